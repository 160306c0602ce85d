# Owner(s): ["oncall: jit"]

"""Random programs, captured once and replayed with fresh values, compared with eager.

Hypothesis draws the numbers that `random_programs.Generated` makes programs of. A failure shrinks to
a small program, and is printed as a script that can be pasted into a file beside this one. The
default set draws the same programs on each run. The slow set has 100,000 of them and 300,000 wide
ones, 5,000 a test, and prints the seeds:

    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py LongRunTest
    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py WideLongRunTest.test_part_07
"""

import collections
import os
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_known import KNOWN, Known
from random_programs import DERIVATIONS, STATE_CLASS, Generated, Outcome, Wide, compare
from random_statements import (
    ALIASED,
    AMBIENT,
    CHANGES_OF_WORLD,
    DRAWN,
    DTYPES,
    FRESH,
    GROUPS,
    RETURNS,
    SHAPES,
    WIDE_GROUPS,
    WIDE_RETURNS,
)

SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"

number = st.integers(0, 15)
input_numbers = st.tuples(
    st.integers(0, len(FRESH) + len(ALIASED) - 1),
    st.integers(0, len(SHAPES) - 1),
    st.integers(0, len(DTYPES) - 1),
    st.integers(0, 2),
)
input_lists = st.lists(input_numbers, min_size=1, max_size=3)
statement_numbers = st.tuples(
    st.integers(0, len(DRAWN) - 1),
    st.integers(0, max(map(len, [*GROUPS, *WIDE_GROUPS])) - 1),
    number,
    number,
    st.integers(0, 127),
)
programs = st.builds(
    Generated,
    input_lists,
    st.one_of(st.none(), input_lists),
    st.lists(statement_numbers, min_size=1, max_size=14),
    st.tuples(st.integers(0, len(RETURNS) - 1), number, number, number),
)
wide_programs = st.builds(
    Generated,
    input_lists,
    st.one_of(st.none(), st.none(), input_lists),
    st.lists(statement_numbers, min_size=1, max_size=8),
    st.tuples(st.integers(0, len(WIDE_RETURNS) - 1), number, number, number),
    st.builds(
        Wide,
        st.integers(0, len(AMBIENT) - 1),
        st.lists(st.tuples(number, st.integers(0, len(CHANGES_OF_WORLD) - 1)), max_size=2),
        st.integers(0, DERIVATIONS - 1),
        st.integers(0, 15).map(lambda i: i == 15),
    ),
)

# The program that runs, for the case that it takes the process down.
LAST_PROGRAM = Path(tempfile.gettempdir(), f"random_program_{os.getpid()}.py")


def run(
    count: int, first_seed: int | None, kind: st.SearchStrategy[Generated] = programs
) -> collections.Counter[Outcome]:
    """Compare `count` random programs; of no seed, the same ones on each run."""
    outcomes: collections.Counter[Outcome] = collections.Counter()

    @settings(
        max_examples=count,
        derandomize=first_seed is None,
        database=None,
        deadline=None,
        # Shrinking runs many more programs: in the long run only.
        phases=[Phase.generate] if first_seed is None else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind)
    def test(program: Generated) -> None:
        LAST_PROGRAM.write_text(program.script)
        try:
            outcomes[compare(program.source, KNOWN)] += 1
        except Exception as e:
            raise AssertionError(f"{type(e).__name__}: {e}\n\n{program.script}") from e

    if first_seed is not None:
        test = seed(first_seed)(test)
    test()
    LAST_PROGRAM.unlink()
    return outcomes


def statistic(outcomes: collections.Counter[Outcome]) -> str:
    """How many programs were equal, raised or were refused, and why those were."""
    of: collections.Counter[str] = collections.Counter()
    for outcome, count in outcomes.items():
        of[outcome.what] += count
    refusals = [(n, o.why) for o, n in outcomes.items() if o.what == "refused"]
    lines = [f"{outcomes.total()} programs, 0 wrong: {dict(of)}"]
    lines += [f"    {n:6} refused: {why}" for n, why in sorted(refusals, reverse=True)[:30]]
    return "\n".join(lines)


class RandomProgramTest(unittest.TestCase):
    def test_programs(self) -> None:
        """The same programs on each run."""
        run(400, None)

    def test_wide_programs(self) -> None:
        run(400, None, wide_programs)


# Found by long runs, and shrunk: the type of `a`, of shape (2, 3), and what the program does.
FOUND = {
    "data_before_its_view": ("float32", "v = a[0]; d = v.data; return {'x': d, 'l': [d, v]}"),
    "view_of_former_data": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; return v[0]"),
    "former_data_in_state": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; self.s = v[0]"),
    "data_of_a_written_tensor": (
        "float32",
        "v = a + 1; w = a * 2; w *= 2; v.data = w; return v[:1], v, w",
    ),
    "data_then_write": ("float32", "v = a + 1; v.data = a * 2; v.add_(1); return v[:1], v"),
    "set_after_write": ("float32", "b = a.view(-1)[1:]; a.clamp_(min=3); a.set_(b)"),
    "sum_into_itself": ("bool", "v = a[0, 0].clone(); torch.sum(v, 0, out=v); return v"),
    "write_of_no_bools": ("bool", "v = a.any().expand(0, 3); v.zero_(); return v"),
    "write_of_no_windows": ("int64", "v = a[:0].unfold(-1, 2, 1); v.data.add_(1); return v"),
    "out_broadcasts": ("float32", "torch.add(a, torch.ones(2, 2, 3), out=a)"),
    "view_dtype_after_conj_write": (
        "complex64",
        "v = a.conj(); v *= 2; return a.view(torch.uint8), v",
    ),
    "view_dtype_of_conj": ("complex64", "return a.conj().view(torch.uint8)"),
    "numpy_of_conj": ("complex64", "return a.conj().numpy()"),
    "numpy_of_neg": ("complex64", "return a.conj().imag.numpy()"),
    "number_and_complex": (
        "float32",
        "k = a[0, 0].item(); return k + 1j, 2j - k, 2j**k, k == 1 + 0j, 1j != k",
    ),
    "number_below_complex": ("float32", "return a[0, 0].item() < 1j"),
    "number_and_numpy": (
        "float32",
        "k = a[0, 0].item(); f = numpy.float32(0.1); return k + f, f + k, numpy.sqrt(k * k), k < f",
    ),
    "layout_of_a_transposed_state": (
        "float32",
        "self.s.transpose_(0, 1); return self.s.shape, self.s.stride(), self.s * 2",
    ),
    "layout_of_a_larger_state": (
        "float32",
        "self.t.unsqueeze_(0); self.t.add_(1); return self.t.shape, self.t.size(0), self.t + 1",
    ),
    "layout_of_a_state_that_is_set": (
        "float32",
        "self.s.set_(a.t()); return self.s.stride(), self.s.is_contiguous(), self.s + 1",
    ),
    "data_of_a_view_is_a_constant": (
        "float32",
        "v = a[0]; v.data = torch.tensor([1.0]); return v",
    ),
    "number_and_large_int": ("float32", "k = a[0, 0].item(); return k < 10**400, k == 2**60 + 1"),
}


def wide(body: str, inputs: str = "b = a.detach().clone()", **further: Any) -> Known:
    """A minimal program of arguments `a` of shape (2, 3), which requires grad, and `b`."""
    return Known("", "", body, inputs=inputs, **further)


NO_GRAD = {"ambient": "torch.no_grad()"}
INFERENCE = {"ambient": "torch.inference_mode()"}
HISTORY = "a = a * 1; b = a[0]"
SHARED = "a = a.detach(); b = a.detach().requires_grad_()"
IN_INFERENCE = "c = torch.inference_mode(); c.__enter__()"
OUT_OF_IT = "c.__exit__(None, None, None)"
THIRDS = "b = (a.detach() / 3 + 0.1).requires_grad_()"
LEAF_VIEW = "a = random_tensor((2, 3), torch.float32).flip(0)[..., :2].requires_grad_(); b = a"
WIDE_FOUND = {
    # Attributes of functions that the program names and does not call.
    "attribute_of_a_function_that_is_not_called": wide(
        "k = getattr(helper, 'note', 0); helper.note = 1; return a * 2, k"
    ),
    "attribute_of_a_function_that_the_caller_sets": wide(
        "k = getattr(helper, 'note', 0); return a * 2, k",
        change="p.__call__.__func__.__globals__['helper'].note = i",
    ),
    "changed_attribute_of_a_function_that_is_not_called": wide(
        "return a * helper.bonus", change="p.__call__.__func__.__globals__['helper'].bonus = i"
    ),
    "attribute_of_a_method_that_is_not_called": wide(
        "k = getattr(State.method, 'note', 0); State.method.note = 1; return a * 2, k"
    ),
    # Attributes of tensors: of the caller's they are effects, of results they come with them.
    "attribute_of_a_state_tensor": wide("self.s.tag = 3; return a * 1"),
    "attribute_of_an_argument": wide("a.tag = 3; return a * 1"),
    "attribute_of_a_result": wide("v = a * 2; v.tag = 3; return v"),
    "attribute_that_is_a_result": wide("v = a * 2; self.t.tag = v; return v"),
    "attribute_of_a_copy": wide("v = copy.copy(a); v.tag = 1; return v"),
    "attribute_deleted": wide("del a.tag; return a * 1", "b = a; a.tag = 1"),
    "attribute_of_an_argument_read": wide(
        "k = getattr(a, 'tag', 0); return a * k", "b = a; a.tag = i"
    ),
    "attribute_of_an_argument_looked_for": wide(
        "k = a.tag if hasattr(a, 'tag') else 0; return k", "b = a; exec('if i > 1: a.tag = i')"
    ),
    "attribute_of_another_state_tensor": wide(
        "self.s.tag = self.n; return a * 1", change="p.s = torch.ones(2, 3)"
    ),
    # Views that results are of one another, or of what the caller has.
    "view_of_a_custom_view": wide("v = View.apply(a); return v[:1], v"),
    "views_of_a_custom_view": wide("v = View.apply(a); return v[:1], v[1:]"),
    "custom_view_of_a_result": wide("v = a * 2; w = View.apply(v); return w, v, w[1:]"),
    "custom_view_of_what_nobody_has": wide("v = a * 2; w = View.apply(v); return w[1:], w[:1]"),
    "custom_same_of_a_result": wide("v = a * 2; w = Same.apply(v); return w, v"),
    "custom_view_of_a_custom_same": wide(
        "v = Same.apply(a); u = View.apply(v); return u[1:], u, v"
    ),
    "view_of_assigned_data": wide("a.data = a * 2; return a[:1], a"),
    "gradient_from_before_data_was_assigned": wide(
        "v = a * 3; a.data = a.detach() * 2; return v, a * 5", "b = a"
    ),
    "view_from_before_data_was_assigned": wide(
        "v = a[1:]; u = v[:1]; a.data = a * 2; return u, v, v * 2, a[:1]", "b = a"
    ),
    "gradient_of_state_from_before_data_was_assigned": wide(
        "v = self.w * 3; u = self.w[1:]; self.w.data = self.w * 2; return v, u, self.w * 5"
    ),
    "data_of_what_has_a_history": wide("v = a * 1; v.data = a * 2; return v[:1], v, v * v"),
    "view_of_a_leaf_over_an_argument": wide(
        "v = b.detach().requires_grad_(); return v.view(-1), v.detach()"
    ),
    "view_of_a_view_without_grad": wide(
        "v = a.t(); torch.set_grad_enabled(True); return v[:1], v", "a = a * 1; b = a", **NO_GRAD
    ),
    "memory_of_what_requires_grad": wide("b.set_(a); return b * 1, (b, b)"),
    "hook_beside_a_write": wide(
        "k = a * 1; b.t_(); b.register_hook(lambda g, log=self.log: log.append(1)); return k * b",
        HISTORY,
    ),
    "gradients_of_parts": wide(
        "v = nn.utils.parameters_to_vector([self.w, self.b]); return v, a", derive=2
    ),
    "second_derivative_without_a_leaf": wide(
        "v = F.batch_norm(a, self.norm.running_mean.clone(), self.norm.running_var.clone(), "
        "self.b, training=True); return torch.where(a > 1, a, v).sum()",
        "a = random_tensor((3, 3), torch.float32).requires_grad_() * 1; b = a",
        derive=5,
    ),
    "custom_same_of_a_written_argument": wide("a[0] = 3; return Same.apply(a)", "a = a * 1; b = 1"),
    "view_of_a_written_argument": wide("a[0] = 3; return a.view(-1), a[1:]", "a = a * 1; b = 1"),
    "custom_function_whose_backward_ran": wide(
        "v = Saves.apply(a, a)[0]; (v * self.w).sum().backward(); return v.view(-1), v.detach()"
    ),
    "custom_same_twice": wide("v = Same.apply(a); v = Same.apply(v); return v"),
    "custom_same_of_a_leaf": wide("v = nn.Parameter(a.detach().clone()); return Same.apply(v), v"),
    "view_without_grad": wide(
        "v = a * self.w; torch.set_grad_enabled(False); u = v.expand(2, 2, 3); "
        "torch.set_grad_enabled(True); return u"
    ),
    "view_without_grad_of_a_result": wide(
        "torch.set_grad_enabled(True); v = a * 2; torch.set_grad_enabled(False); return v.t(), v",
        **NO_GRAD,
    ),
    "view_in_inference_mode": wide("return a[0], a.view(-1)", **INFERENCE),
    "view_that_nobody_may_use": wide(
        "v = self.w[0]; v[0] = 0; self.w.register_hook(lambda g: g * 2); return v", **INFERENCE
    ),
    "deep_copy_of_a_history": wide("return copy.deepcopy(a * 1)"),
    "deep_copy_of_a_history_that_comes": wide(
        "return copy.deepcopy(a)", "a = a * 1 if i == 3 else a; b = a"
    ),
    "view_of_a_deep_copy": wide("v = copy.deepcopy(self.w); return v[:1], v"),
    "copy_of_a_view": wide("v = copy.copy(a[0]); return v"),
    "copy_of_a_custom_same": wide("v = copy.copy(Same.apply(a)); return v", HISTORY),
    "leaf_over_a_view": wide("v = a.detach()[0].requires_grad_(); return v"),
    "leaf_over_a_view_of_a_result": wide(
        "v = b * 1; u = v[0].requires_grad_(); w = v.view(-1).requires_grad_(); return u, w"
    ),
    "leaf_over_a_view_of_what_is_returned": wide(
        "v = b * 1; u = v.expand(2, 3).requires_grad_(); return u, v", **NO_GRAD
    ),
    "leaf_over_a_view_of_a_written_result": wide(
        "v = b * 1; u = v[0].requires_grad_(); v.detach().mul_(2); return u, u * 3"
    ),
    "leaf_over_a_view_of_data": wide(
        "return torch.tensor([[1.0, 2.0]])[0].requires_grad_(), torch.zeros(2)[:1].requires_grad_()"
    ),
    "view_of_a_leaf_over_a_view_of_a_result": wide(
        "v = (b * 1)[0].requires_grad_(); return v[:1], v.view(-1)[1:], v * 2"
    ),
    "view_of_a_leaf_over_a_view_of_data": wide(
        "v = torch.tensor([[1.0, 2.0]])[0].requires_grad_(); return v[:1]"
    ),
    "hook_of_a_leaf_that_requires_no_grad_any_more": wide(
        "v = nn.Parameter(b * 1); v.register_hook(lambda g: g * 2); v.requires_grad_(False); "
        "return v, v * 2"
    ),
    "leaf_over_a_view_in_inference_mode": wide("return (b * 1)[0].requires_grad_()", **INFERENCE),
    "leaf_over_data": wide("v = a.data.view(-1).requires_grad_(); return v"),
    "retained_view_of_a_parameter": wide("v = self.w[0]; v.retain_grad(); return v"),
    "retained_view_of_a_result": wide("v = a * 2; u = v[0]; u.retain_grad(); return u, v"),
    # Gradients and hooks of results.
    "gradient_of_a_retained_result": wide(
        "v = a * 2; v.retain_grad(); v.sum().backward(retain_graph=True); return v"
    ),
    "argument_that_is_frozen_before_a_backward": wide(
        "v = a * 2; a.requires_grad_(False); self.w.sum().backward(); return v",
        "b = a = random_tensor((2, 3), torch.float32).requires_grad_()",
    ),
    "products_that_share_a_cast": wide(
        "c = torch.autocast('cpu', dtype=torch.bfloat16); c.__enter__(); v = b @ self.m.weight; "
        "TABLE['t'] = a @ self.m.weight; self.s.copy_(v); c.__exit__(None, None, None); "
        "return self.w.view(-1)",
        derive=3,
    ),
    "gradient_of_a_leaf_made_inside": wide(
        "v = torch.ones(2, 3, requires_grad=True); (v * a).sum().backward(); return v"
    ),
    "gradient_of_a_view": wide(
        "v = self.w[0]; v.retain_grad(); v.sum().backward(retain_graph=True); return v"
    ),
    "hook_of_a_leaf_made_inside": wide(
        "v = torch.ones(2, 3, requires_grad=True); v.register_hook(lambda g: g * 2); "
        "return v, v * a"
    ),
    "hook_after_a_leaf_made_inside": wide(
        "v = nn.Parameter(b * 1); v.register_post_accumulate_grad_hook("
        "lambda p: torch._foreach_mul_([p.grad], 2)); "
        "return v, v * a"
    ),
    "hook_of_a_view": wide("v = self.w.view(-1); v.register_hook(lambda g: g * 2); return v"),
    "hook_on_the_way_of_a_view": wide(
        "v = self.w.view(-1); v.register_hook(lambda g: g * 2); return v[:1]"
    ),
    "hook_of_a_view_and_its_view": wide(
        "v = self.w.view(-1); v.register_hook(lambda g: g * 2); return v[:1], v"
    ),
    "backward_that_raises": wide("return a // 2", derive=3),
    "backward_that_raises_beside_others": wide("return a // 2, a * 2", derive=3),
    "hook_that_reads_what_was_written": wide(
        "v = a * 2; v.register_hook(lambda g: g * self.n); self.n = 7; return v * 2"
    ),
    "second_derivative_in_a_reduced_type": wide(
        "return F.gelu(self.m(b)), self.m(b).std(), (b.bfloat16() + 0.3).abs() ** 1.7",
        derive=5,
        ambient="torch.autocast('cpu', dtype=torch.bfloat16)",
    ),
    # Several tensors over one memory, of which one is written to.
    "error_of_shared_memory": wide(
        "a.index_copy_(0, torch.tensor([0]), b[:1]); return k", "a = a.detach(); b = a.view(-1)[1:]"
    ),
    "error_of_shared_memory_that_is_caught": wide(
        "exec('try: a.index_copy_(0, torch.tensor([0]), b[:1])\\nexcept RuntimeError: pass', "
        "globals(), locals()); return a * 2",
        "a = a.detach(); b = a.view(-1)[1:]",
    ),
    "detached_of_shared_memory": wide("a[..., 1:].mul_(2); b.detach_(); return k", SHARED),
    "view_of_shared_memory": wide("a[..., 1:].mul_(2); return b.view(-1), b * 2", SHARED),
    "custom_same_of_shared_memory": wide("a.mul_(2); return Same.apply(b)", SHARED),
    "dirty_view_of_an_argument": wide("v = Dirty.apply(b); return a", HISTORY),
    "retained_view_of_an_argument": wide(
        "b.retain_grad(); a.index_put_((torch.tensor([0, 0]),), self.t + 1); return b",
        HISTORY,
        **INFERENCE,
    ),
    "copy_to_itself": wide(
        "a.copy_(a); return k",
        "a = torch.ones(3).expand(2, 3).requires_grad_(); b = a",
        **INFERENCE,
    ),
    "running_mean_of_other_channels": wide(
        "return F.batch_norm(a[:, :2], self.norm.running_mean, self.norm.running_var, training=True)"
    ),
    "running_mean_of_other_channels_that_come": wide(
        "return F.batch_norm(a, self.norm.running_mean, self.norm.running_var, training=True)",
        "a = a[:, :1] if i == 3 else a; b = a",
    ),
    "error_of_what_stands_for_it": wide(
        "return F.batch_norm(a[0], self.norm.running_mean, self.norm.running_var, training=True)"
    ),
    "written_list": wide("v = a * 1; torch._foreach_add_([v, v], 1); return v"),
    "write_beside_an_array": wide(
        "v = self.norm(b); return v",
        "b = torch.from_numpy(torch.ones(3).expand(2, 3).numpy()).requires_grad_()",
    ),
    "cast_in_inference_mode": wide(
        "return a.bool(), a.to(torch.float64), a.reshape(-1)", **INFERENCE
    ),
    # Inference tensors, whatever the mode of the call is.
    "inference_leaf_of_data": wide(
        f"{IN_INFERENCE}; v = torch.tensor([1.0, 2.0], requires_grad=True); {OUT_OF_IT}; return v"
    ),
    "inference_leaf": wide(
        f"{IN_INFERENCE}; v = torch.ones(2, requires_grad=True); {OUT_OF_IT}; return v, v[0]"
    ),
    "inference_leaf_of_a_value": wide(
        f"{IN_INFERENCE}; v = (a * 1).requires_grad_(); {OUT_OF_IT}; return v"
    ),
    "inference_parameter": wide(f"{IN_INFERENCE}; v = nn.Parameter(a * 1); {OUT_OF_IT}; return v"),
    "view_of_an_inference_tensor": wide(
        f"{IN_INFERENCE}; v = a * 1; {OUT_OF_IT}; return v[0], v.view(-1), v * 2"
    ),
    "shared_memory_in_inference_mode": wide(
        "k = b.is_inference(), a.is_inference(); b.mul_(2); return k, b[0], a * 1",
        "a = a.detach(); b = a[0]",
        **INFERENCE,
    ),
    "dirty_view_in_inference_mode": wide("Dirty.apply(b); return k", "b = a[0]", **INFERENCE),
    "dirty_result_in_inference_mode": wide("return Dirty.apply(b)", "b = a[0]", **INFERENCE),
    "detached_of_shared_memory_without_grad": wide(
        "a.mul_(2); return b.detach(), a.detach()", "b = a[0]", **NO_GRAD
    ),
    "leaf_in_inference_mode": wide(
        "v = a * 1; v.requires_grad_(); return v, v, torch.ones(2, requires_grad=True)", **INFERENCE
    ),
    "data_of_shared_memory_in_inference_mode": wide(
        "a.data.masked_fill_(a > 2, 2); return b * 1, a.data", "b = a[0]", **INFERENCE
    ),
    "text_of_a_history": wide("return str(a), str(b), str(a * 1), f'{b[0]}'", HISTORY, **NO_GRAD),
    "data_of_a_view_with_a_history": wide(
        "v = a * 1; self.s = v.view(-1); self.s.data = a * 2; return a"
    ),
    # Parameters over memory that others have, too.
    "copy_of_a_parameter": wide("v = copy.copy(self.w); v.tag = 1; return v, v * 2, v[0]"),
    "copy_of_a_parameter_without_grad": wide("return copy.copy(self.w)", **NO_GRAD),
    "parameter_over_an_argument": wide("v = nn.Parameter(a.detach()); return v, v * 2, v.view(-1)"),
    "parameter_over_a_view": wide("return nn.Parameter(a[0])"),
    "parameter_over_a_written_view": wide("b.mul_(2); return nn.Parameter(b[0], False)"),
    # A history that a tensor forgets, and a view that was made before.
    "view_before_a_flag_is_cleared": wide("v = a[0]; a.requires_grad_(False); return v, v * 2"),
    "view_before_a_parameter_is_frozen": wide(
        "v = self.w[0]; self.w.requires_grad_(False); return v"
    ),
    "view_before_its_base_is_detached": wide("v = b[0]; b.detach_(); return v", "b = a * 2"),
    "result_before_a_flag_is_cleared": wide("v = a * 2; a.requires_grad_(False); return v, a * 3"),
    # Equal values that are computed twice, in memory that no schema tells of.
    "matrix_product_twice": wide(
        "return a @ self.m.weight, a @ self.m.weight",
        "a = a.detach().expand(2, 2, 3).requires_grad_(); b = a",
    ),
    "reshaped_twice": wide("return a.t().reshape(-1), a.t().reshape(-1)"),
    # What a leaf gets from the program, and from elsewhere: a sum in eager's order.
    "gradient_from_elsewhere": wide("return b, b / (b + 3.7)", THIRDS),
    "gradient_from_elsewhere_many_times": wide(
        "return b, b / (b + 3.7) + b.sin() * b.exp() + b / 3", THIRDS
    ),
    "gradient_from_elsewhere_of_a_history": wide("return b, b / (b + 3.7)", f"{THIRDS} * 1"),
    "gradient_from_elsewhere_of_a_result": wide("v = b * 1; return v, v / (v + 3.7)", THIRDS),
    "gradient_from_elsewhere_in_part": wide(
        "return b, b / (b + 3.7), b.sin() * b.exp()", THIRDS, derive=2
    ),
    "second_gradient_from_elsewhere": wide("return b, b / (b + 3.7)", THIRDS, derive=5),
    # Backwards for which eager looks at the data of the forward.
    "product": wide(
        "return b.prod(), b.prod(1), b.prod(0, keepdim=True)",
        "b = (a.detach() / 3 - 5).requires_grad_()",
    ),
    "second_derivative_of_a_product": wide(
        "return b.prod()",
        "b = (a.detach() / 3 - 5).requires_grad_()",
        derive=5,
    ),
    "second_derivative_of_a_cumulative_product": wide(
        "return b.cumprod(-1)",
        "b = (a.detach() / 3 - 5).requires_grad_()",
        derive=5,
    ),
    "product_with_a_zero": wide(
        "return b.prod(), b.prod(1), b.prod(0, keepdim=True)",
        "b = a.detach() / 3 - 5; b[0, 0] = 0; b.requires_grad_()",
    ),
    "second_derivative_of_a_product_with_a_zero": wide(
        "return b.prod()",
        "b = a.detach() / 3 - 5; b[0, 0] = 0; b.requires_grad_()",
        derive=5,
    ),
    "second_derivative_of_a_cumulative_product_with_a_zero": wide(
        "return b.cumprod(-1)",
        "b = a.detach() / 3 - 5; b[0, 0] = 0; b.requires_grad_()",
        derive=5,
    ),
    "product_with_zeros": wide(
        "return b.prod(), b.prod(1), b.prod(0, keepdim=True)",
        "b = a.detach() / 3 - 5; b[0, :] = 0; b.requires_grad_()",
    ),
    "second_derivative_of_a_product_with_zeros": wide(
        "return b.prod()",
        "b = a.detach() / 3 - 5; b[0, :] = 0; b.requires_grad_()",
        derive=5,
    ),
    "second_derivative_of_a_cumulative_product_with_zeros": wide(
        "return b.cumprod(-1)",
        "b = a.detach() / 3 - 5; b[0, :] = 0; b.requires_grad_()",
        derive=5,
    ),
    "product_with_more_zeros_each_time": wide(
        "return b.prod(), b.prod(1), b.prod(0, keepdim=True)",
        "b = a.detach() / 3 - 5; b[0, :i] = 0; b.requires_grad_()",
    ),
    "second_derivative_of_a_product_with_more_zeros_each_time": wide(
        "return b.prod()",
        "b = a.detach() / 3 - 5; b[0, :i] = 0; b.requires_grad_()",
        derive=5,
    ),
    "second_derivative_of_a_cumulative_product_with_more_zeros_each_time": wide(
        "return b.cumprod(-1)",
        "b = a.detach() / 3 - 5; b[0, :i] = 0; b.requires_grad_()",
        derive=5,
    ),
    "product_in_another_type": wide(
        "return b.prod(dtype=torch.float64), b.prod(1, dtype=torch.float64)",
        "b = a.detach() / 3 - 5; b[0, 0] = 0; b.requires_grad_()",
        derive=5,
    ),
    "product_of_nothing": wide(
        "return b[:0].prod(), b[:0].prod(0), b[:1].prod(0), b.sum().prod()",
        "b = (a.detach() / 3 - 5).requires_grad_()",
    ),
    "text_of_a_product": wide(
        "return str(b.prod()), str(b.prod(0))",
        "b = (a.detach() / 3 - 5).requires_grad_()",
    ),
    "product_in_the_program": wide(
        "v = b.prod(); u = torch.autograd.grad(v, b, create_graph=True)[0]; return u, v",
        "b = a.detach() / 3 - 5; b[0, :i] = 0; b.requires_grad_()",
        derive=3,
    ),
    "product_differentiated_twice": wide(
        "v = b.prod(); v.backward(); return v",
        "b = a.detach() / 3 - 5; b[0, :] = 0; b.requires_grad_()",
        derive=3,
    ),
    # A tensor of the caller's that is turned, and what is made of it.
    "detached_of_what_is_turned": wide(
        "a.t_(); a.mul_(2); return a[0], a.detach(), a.data[:1]", "a = a * 1; b = 1"
    ),
    "view_without_grad_of_what_is_turned": wide(
        "a.t_(); torch.set_grad_enabled(False); v = a[0]; torch.set_grad_enabled(True); return v, a",
        "a = a * 1; b = 1",
    ),
    # Custom functions over a leaf that is a view of what requires no grad.
    "custom_same_twice_of_such_a_leaf": wide(
        "v = Same.apply(a); u = Same.apply(v); return u, v, v[1:], u[1:]", LEAF_VIEW
    ),
    "custom_view_of_such_a_leaf": wide(
        "v = View.apply(a); u = View.apply(v); return u, v[1:]", LEAF_VIEW
    ),
    # A leaf that is a view of what does not require grad, whose views are views of that.
    "view_of_a_leaf_that_is_a_view": wide("return a[0], a.view(-1)", LEAF_VIEW, **NO_GRAD),
    "flag_of_a_view_of_such_a_leaf": wide("v = a[0]; return v.requires_grad", LEAF_VIEW, **NO_GRAD),
    "copy_of_a_view_of_such_a_leaf": wide("return copy.copy(a[0])", LEAF_VIEW, **NO_GRAD),
    "chunk_of_such_a_leaf": wide("return a.split(1)[0].requires_grad", LEAF_VIEW, **NO_GRAD),
    "view_without_grad_of_a_leaf_over_an_argument": wide(
        "v = a.detach().requires_grad_(); return v[:1], v", **NO_GRAD
    ),
    "view_without_grad_of_a_leaf_of_data": wide(
        "v = torch.tensor([1.0, 2.0], requires_grad=True); return v[None], v[:1]", **NO_GRAD
    ),
    "view_in_inference_mode_of_a_leaf_of_data": wide(
        "v = torch.tensor([1.0, 2.0], requires_grad=True); return v[None], v", **INFERENCE
    ),
    "view_of_a_leaf_over_an_argument_in_inference_mode": wide(
        "v = b.detach().requires_grad_(); return v.view(-1), v.detach()", HISTORY, **INFERENCE
    ),
    "view_of_a_leaf_made_over_such_a_leaf": wide(
        "v = a.detach().requires_grad_(); u = v[:1]; a.neg_(); return u, v", LEAF_VIEW, **NO_GRAD
    ),
    "write_beside_a_view_of_a_leaf_made_over_such_a_leaf": wide(
        "v = a.detach().requires_grad_(); u = v[:1]; a.detach().neg_(); return v * 2", LEAF_VIEW
    ),
    "view_of_such_a_leaf_that_is_turned": wide(
        "torch.set_grad_enabled(False); b.t_(); torch.set_grad_enabled(True); return b * 2",
        f"{LEAF_VIEW}.t()",
        derive=3,
    ),
    "write_to_such_a_leaf": wide(
        "torch.set_grad_enabled(False); a.mul_(2); torch.set_grad_enabled(True); return a[0]",
        LEAF_VIEW,
    ),
    "write_beside_a_view_of_such_a_leaf": wide(
        "v = a[0]; a.detach().mul_(2); return v", LEAF_VIEW, derive=3
    ),
    "write_beside_a_view_of_such_a_leaf_made_inside": wide(
        "u = a.detach().t().requires_grad_(); v = u[0]; u.detach().mul_(2); return v", derive=3
    ),
}


class FoundTest(unittest.TestCase):
    """What was wrong once."""


def _found(dtype: str, body: str) -> Callable[[unittest.TestCase], None]:
    lines = "".join(f"        {line}\n" for line in body.split("; "))
    inputs = f"def inputs(i):\n    return (random_tensor((2, 3), torch.{dtype}),)\n"
    program = f"class Program(State):\n    def __call__(self, a):\n{lines}"

    def test(self: unittest.TestCase) -> None:
        compare(f"{STATE_CLASS}\n{inputs}\n{program}")

    return test


for _name, (_dtype, _body) in FOUND.items():
    setattr(FoundTest, f"test_{_name}", _found(_dtype, _body))


def _found_wide(row: Known) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        compare(row.source())

    return test


for _name, _row in WIDE_FOUND.items():
    setattr(FoundTest, f"test_{_name}", _found_wide(_row))


# A second derivative of cumprod() beside a zero goes PyTorch's way for tensors that are no plain ones.
# From torch 2.14 on that adds what an element contributes itself in another place than its way for
# plain tensors, which eager goes in both releases: the last bit, or the sign of a zero, differs.
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
    for _name in ("with_a_zero", "with_more_zeros_each_time"):
        _name = f"test_second_derivative_of_a_cumulative_product_{_name}"
        setattr(FoundTest, _name, unittest.expectedFailure(getattr(FoundTest, _name)))


class KnownTest(unittest.TestCase):
    """What is excluded: fails as long as it has to be."""


def _known(known: Known) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        compare(known.source())

    return unittest.expectedFailure(test)


for _name, _row in KNOWN.items():
    setattr(KnownTest, f"test_{_name}", _known(_row))


# Seeds of its own for each run that has a number, and the same ones for runs that have none.
RUN = int(os.environ.get("RANDOM_PROGRAMS_RUN", "0"))


PLAIN_PARTS, WIDE_PARTS = 20, 60


def longtest(
    part: int, parts: int, kind: st.SearchStrategy[Generated]
) -> Callable[[unittest.TestCase], None]:
    """A test of 5,000 programs from 10 seeds of their own."""

    def test(self: unittest.TestCase) -> None:
        outcomes: collections.Counter[Outcome] = collections.Counter()
        begin = 10 * (parts * RUN + part)
        for first in range(begin, begin + 10):
            outcomes += run(500, first, kind)
        print(f"seeds {begin} to {begin + 9}: {statistic(outcomes)}")

    return test


@unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
class LongRunTest(unittest.TestCase):
    """100,000 programs in parts of 5,000; a part can be run alone, and again."""


@unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
class WideLongRunTest(unittest.TestCase):
    """The same with 300,000 wide programs."""


for _part in range(PLAIN_PARTS):
    setattr(LongRunTest, f"test_part_{_part:02}", longtest(_part, PLAIN_PARTS, programs))
for _part in range(WIDE_PARTS):
    _test = longtest(_part, WIDE_PARTS, wide_programs)
    setattr(WideLongRunTest, f"test_part_{_part:02}", _test)


if __name__ == "__main__":
    unittest.main()
