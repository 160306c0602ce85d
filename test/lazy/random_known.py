# Owner(s): ["oncall: jit"]

"""Kinds of programs that are known to go wrong, and are drawn no more until they are mended.

Each row of `KNOWN` has the text that such a program has in it, the reason, and a minimal program,
which `test_random_programs.KnownTest` expects to fail: where it passes, the row has to go.
"""

import re
from typing import NamedTuple

from random_statements import WORLD


class Known(NamedTuple):
    """A kind that goes wrong.

    Attributes:
        pattern: what its programs have in their text; nothing where the generator, or the
            comparison, asks for the row by its name.
        reason: what goes wrong.
        body: the smallest one, for an argument `a` that requires grad, lines parted by "; ".
        inputs: makes arguments `a` and `b` of that.
        change: of the world, before the last two calls.
        derive: as in `random_programs.compare`.
        ambient: what is around the calls.
    """

    pattern: str
    reason: str
    body: str
    change: str = "pass"
    derive: int = 1
    ambient: str = "contextlib.nullcontext()"
    inputs: str = "b = a.detach().clone()"

    def source(self) -> str:
        lines = "".join(f"        {line}\n" for line in self.body.split("; "))
        return (
            f"{WORLD}\n\ndef inputs(i):\n"
            "    a = random_tensor((2, 3), torch.float32).requires_grad_()\n"
            f"    {self.inputs}\n    return (a, b, 1)\n\n\nclass Program(State):\n"
            f"    def __call__(self, a, b, n):\n        k = 0\n{lines}\n\ndef ambient(i):\n"
            f"    return {self.ambient}\n\n\ndef change(p, i):\n    if i > 1:\n        "
            f"{self.change}\n\n\nderive = {self.derive}\n"
        )


KNOWN = {
    "hook_inside": Known(
        r"(self\.\w+|\b[abc]|\bv\d+)\.(register_hook|register_post|retain_grad)",
        "hooks that the program registers on tensors of the caller are not there after a call",
        "a.register_hook(lambda g: g * 2); return (a * 3).sum()",
    ),
    "gradient_inside": Known(
        r"autograd\.grad\(",
        "torch.autograd.grad with respect to what the program was given finds no path to it",
        "return torch.autograd.grad((self.w * a).sum(), self.w)[0]",
    ),
    "backward_inside": Known(
        r"\.backward\(",
        "backward() inside of the program: inputs=, and what is left of the graph of the results",
        "(a * self.w).sum().backward(inputs=[self.w]); return a * 1",
    ),
    "leaf_made_inside": Known(
        r"requires_grad_\(\)|requires_grad=True|nn\.Parameter\(",
        "a leaf that the program makes is none in the result",
        "return torch.tensor([1.0, 2.0], requires_grad=True) * 2",
    ),
    "requires_grad_inside": Known(
        r"requires_grad_\(False\)|\.detach_\(\)",
        "requires_grad of an argument that the program changes is not what eager leaves",
        "a.detach_(); return a * self.w",
    ),
    "vector_to_parameters": Known(
        r"vector_to_parameters",
        "parameters whose data are views of one vector",
        "nn.utils.vector_to_parameters(torch.arange(9.0), [self.w, self.b]); return a * self.w",
    ),
    "deepcopy_of_a_leaf": Known(
        r"copy\.(deep)?copy\(",
        "a copy of an argument that requires grad is a leaf without a history in ours",
        "return copy.deepcopy(a) * 2",
    ),
    "base_of_a_result": Known(
        "",
        "a result that requires grad and is a view in eager is none in ours",
        "return (a * 1).view(-1)",
    ),
    "only_a_backward_would_fail": Known(
        "",
        "an error that only a backward would raise is raised by the extraction",
        "v = a + 1; v.floor_divide_(2); return v",
        derive=0,
    ),
    "aliased_arguments": Known(
        "",
        "of two arguments that are views of one tensor with a history, one is written to",
        "b[0] = 0",
        inputs="a = a * 1; b = a[:1]",
    ),
    "no_second_derivative": Known(
        "",
        "create_graph=True of a result whose backward cannot be differentiated",
        "return a + 2",
        derive=5,
    ),
    "versions_in_inference_mode": Known(
        r"inference_mode",
        "version counters of normal tensors that are written to in inference mode",
        "self.s.data.add_(1)",
        ambient="torch.inference_mode()",
    ),
    "grad_mode_switched_on": Known(
        r"(?s)(no_grad|inference_mode)\(\).*(enable_grad|set_grad_enabled)",
        "a program that switches grad mode on, called where it is off",
        "torch.set_grad_enabled(True); return a * self.w",
        ambient="torch.no_grad()",
    ),
    "gradients_share_memory": Known(
        r"parameters_to_vector",
        "gradients that are parts of one tensor share its memory in ours",
        "return nn.utils.parameters_to_vector([self.w, self.b]).squeeze().unsqueeze(0)",
    ),
    "functorch": Known(
        r"torch\.func\.|functional\.jvp",
        "gradients through torch.func inside of the program",
        "return torch.func.jacrev(lambda t: t * t)(a)",
    ),
    "custom_function": Known(
        r"(Same|View|Dirty|Saves)\.apply",
        "custom autograd.Functions that return views or their arguments",
        "v = View.apply(a); return v[:1], v",
    ),
    "reentrant_checkpoint": Known(
        r"use_reentrant=True",
        "checkpoint(use_reentrant=True) is incompatible with how the backward is captured",
        "return checkpoint(lambda t: t.sin() * 2, a, use_reentrant=True)",
    ),
    "class_attribute_written": Known(
        r"type\(self\)\.scale = ",
        "a class attribute that the program writes stays after the extraction",
        "type(self).scale = 3; return a * self.scale",
    ),
    "class_attribute_changed": Known(
        r"type\(p\)\.scale",
        "a class attribute is read once",
        "return a * self.scale",
        "type(p).scale = 5",
    ),
    "list_of_class": Known(
        r"State\.shared\.append|State\.shared\[0\] =",
        "a list that hangs on a class is not taken back",
        "State.shared.append(1); return a * 1",
    ),
    "function_attribute_written": Known(
        r"helper\.\w+ = ",
        "a function's attribute that the program writes stays after the extraction",
        "helper.note = 3; return a * 1",
    ),
    "function_changed": Known(
        r"helper\.__defaults__ = |globals\(\)\[.helper.\]",
        "defaults of a function are read once",
        "return helper(a)",
        "helper.__defaults__ = (6,)",
    ),
    "method_replaced": Known(
        r"type\(p\)\.method|p\.method",
        "a method replaced on a class is called no more",
        "return self.method(a)",
        "type(p).method = type(p).other_method",
    ),
    "attribute_of_imported_module": Known(
        r"config\.ratio = ",
        "an attribute of a module is read once, and what is written to it stays",
        "config.ratio = 3; return a * config.ratio",
    ),
    "context_variable": Known(
        r"VAR\.set",
        "a ContextVar is read once, and what is written to it stays",
        "VAR.set(3); return a * VAR.get()",
    ),
    "set_written": Known(
        r"\.seen\.(add|discard)|self\.seen \|=",
        "a set that the program changes stays changed after the extraction",
        "self.seen.add(7); return a * 1",
    ),
    "array_written": Known(
        r"\.arr\.append|\.arr\[0\] =",
        "an array that the program changes stays changed after the extraction",
        "self.arr.append(7.0); return a * 1",
    ),
    "attribute_of_a_tensor": Known(
        r"\.tag = ",
        "an attribute of a tensor that the program sets stays after the extraction",
        "self.s.tag = 3; return a * 1",
    ),
    "metadata_of_state": Known(
        r"self\.(s\.dtype|t\.shape|w\.requires_grad|s\.is_contiguous)",
        "of a tensor that reaches no operator, nothing is guarded",
        "return a * self.t.shape[0]",
        "p.t = torch.ones(7)",
    ),
    "lazy_result": Known(
        r"return (iter|zip|\(t \*|lambda|functools\.partial)",
        "a result that is called or iterated later holds tensors of the capture",
        "return iter([a, a])",
    ),
}
PATTERNS = {name: re.compile(known.pattern) for name, known in KNOWN.items() if known.pattern}
