# Owner(s): ["oncall: jit"]

"""State that a program keeps: replays read what is there now, and leave what eager leaves."""

import collections
import copy
import functools
import types
import unittest
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from oracle import Call, check, expected_failures, extract_untouched, maketest, tensors
from torch import nn

from torch_lazy_ext import extract_compiled_graph


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


class Linear(nn.Module):
    """A weight, a buffer, a plain tensor, and attributes of plain Python types."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3))
        self.frozen = nn.Parameter(randn(3), requires_grad=False)
        self.register_buffer("scale", randn(3))
        self.register_buffer("hidden", randn(3), persistent=False)
        self.register_buffer("nothing", None)
        self.offset = randn(3)
        self.factor = 2.0
        self.flag = True
        self.mode = "plus"
        self.config = {"power": 2, "nested": {"shift": 0.5}}
        self.sizes = [1, 2]
        self.child = nn.Linear(3, 3)

    def forward(self, x):
        y = x * self.weight + self.frozen * self.scale - self.hidden + self.offset
        y = self.child(y) * self.factor + self.config["nested"]["shift"]
        y = y + 1 if self.flag else y - 1
        y = y + sum(self.sizes) if self.mode == "plus" else y.abs() ** self.config["power"]
        return y if self.nothing is None else y + self.nothing


def changed(change: Any, captures: int | None = 1, **options: Any) -> Any:
    """`change(module, i)` happens between the calls."""
    return maketest(
        Linear, tensors((2, 3)), calls=4, captures=captures, between=change, exact=False, **options
    )


def _in_place(m, i):
    with torch.no_grad():
        m.weight.add_(i)
        m.scale.mul_(2)
        m.hidden.zero_()
        m.offset.copy_(randn(3))


def _optimizer_step(m, i):
    for p in m.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p) * i
    torch.optim.SGD(m.parameters(), lr=0.1).step()


def _adam_step(m, i):
    for p in m.parameters():
        p.grad = randn(*p.shape)
    torch.optim.Adam(m.parameters(), lr=0.1, foreach=bool(i % 2)).step()


def _load_state_dict(m, i):
    m.load_state_dict({k: randn(*v.shape) for k, v in m.state_dict().items()})


def _load_state_dict_assign(m, i):
    m.load_state_dict({k: randn(*v.shape) for k, v in m.state_dict().items()}, assign=True)


def _set_data(m, i):
    m.weight.data = randn(3)
    m.scale.data = randn(3)


def _new_parameter(m, i):
    m.weight = nn.Parameter(randn(3))
    m.child.weight = nn.Parameter(randn(3, 3))


def _new_buffer(m, i):
    m.scale = randn(3)
    m.offset = randn(3)


def _new_child(m, i):
    m.child = nn.Linear(3, 3)


def _child_of_other_type(m, i):
    m.child = nn.Identity() if i % 2 else nn.Linear(3, 3)


def _requires_grad(m, i):
    m.requires_grad_(bool(i % 2))


def _shape(m, i):
    m.offset = randn(2 if i % 2 else 1, 3)


def _strides(m, i):
    m.offset = randn(6)[::2] if i % 2 else randn(3)


def _set_(m, i):
    with torch.no_grad():
        m.weight.set_(randn(3))


def _swap_storage(m, i):
    m.weight.data, m.frozen.data = m.frozen.data, m.weight.data


def _tie(m, i):
    m.frozen = m.weight if i % 2 else nn.Parameter(randn(3))


def _optional_buffer(m, i):
    m.nothing = randn(3) if i % 2 else None


def _delete_and_set(m, i):
    del m.scale
    m.register_buffer("scale", randn(3))


def _forward_replaced(m, i):
    m.forward = types.MethodType(lambda self, x: x * self.weight * i, m)


def _hook(m, i):
    if i == 2:
        m.register_forward_hook(lambda mod, args, out: out * 3)


def _pre_hook(m, i):
    if i == 2:
        m.child.register_forward_pre_hook(lambda mod, args: (args[0] + 1,))


class OutsideChangeTest(unittest.TestCase):
    """What is changed between calls, the next replay sees."""

    test_nothing = changed(lambda m, i: None)
    test_in_place = changed(_in_place)
    test_sgd_step = changed(_optimizer_step)
    test_adam_step = changed(_adam_step)
    test_load_state_dict = changed(_load_state_dict)
    test_load_state_dict_assign = changed(_load_state_dict_assign)
    test_data = changed(_set_data)
    test_set_ = changed(_set_)
    test_swapped_data = changed(_swap_storage)
    test_parameter_replaced = changed(_new_parameter)
    test_buffer_replaced = changed(_new_buffer)
    # Once more for the other order of parameters, which the program could see.
    test_deleted_and_registered_again = changed(_delete_and_set, captures=2)
    test_child_replaced = changed(_new_child, captures=None)
    test_child_of_other_type = changed(_child_of_other_type, captures=None)
    test_shape_of_attribute = changed(_shape, captures=3)
    test_strides_of_attribute = changed(_strides, captures=2)
    test_requires_grad = changed(_requires_grad, captures=3)
    test_tied_and_untied = changed(_tie, captures=3)
    test_optional_buffer = changed(_optional_buffer, captures=3)
    test_float_attribute = changed(lambda m, i: setattr(m, "factor", i * 0.5), captures=5)
    test_int_for_float = changed(lambda m, i: setattr(m, "factor", (2, 2.0)[i % 2]), captures=2)
    test_bool_attribute = changed(lambda m, i: setattr(m, "flag", bool(i % 2)), captures=2)
    test_string_attribute = changed(
        lambda m, i: setattr(m, "mode", ("plus", "power")[i % 2]), captures=2
    )
    test_dict_attribute = changed(
        lambda m, i: m.__setattr__("mode", "power") or m.config.update(power=i), captures=5
    )
    test_nested_dict_attribute = changed(
        lambda m, i: m.config["nested"].update(shift=i % 2), captures=3
    )
    test_dict_replaced = changed(
        lambda m, i: setattr(m, "config", {"power": 2, "nested": {"shift": i % 2}}), captures=3
    )
    test_list_attribute = changed(lambda m, i: m.sizes.append(i), captures=5)
    test_list_element = changed(lambda m, i: m.sizes.__setitem__(0, i % 2), captures=2)
    test_unrelated_attribute = changed(
        lambda m, i: setattr(m, "never_read", object()), captures=None
    )
    test_forward_replaced = changed(_forward_replaced, captures=None)
    test_hook_added = changed(_hook, captures=None)
    test_pre_hook_added = changed(_pre_hook, captures=None)

    def test_module_converted(self):
        """`.double()` and back: the arguments follow."""

        def inputs(i):
            return (torch.randn(2, 3, dtype=torch.float64 if i % 2 else torch.float32),)

        def convert(m, i):
            m.to(torch.float64 if i % 2 else torch.float32)
            m.offset = m.offset.to(m.weight.dtype)

        check(Linear, inputs, calls=4, captures=2, between=convert, exact=False)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)
        )

    def forward(self, x):
        return self.layers(x) if self.training else self.layers(x) * 2


def _toggled(m, i):
    m.train(bool(i % 2))


def _one_child_toggled(m, i):
    m.layers[2].train(bool(i % 2))


def _momentum(m, i):
    m.layers[1].momentum = 0.1 * i


def _p(m, i):
    m.layers[2].p = 0.3 if i % 2 else 0.6


class TrainEvalTest(unittest.TestCase):
    test_train = maketest(Switched, tensors((4, 3)), calls=10, exact=False)
    test_eval = maketest(lambda: Switched().eval(), tensors((4, 3)), exact=False)
    test_toggled = maketest(
        Switched, tensors((4, 3)), calls=8, captures=2, between=_toggled, exact=False
    )
    test_one_child_toggled = maketest(
        Switched, tensors((4, 3)), calls=6, captures=2, between=_one_child_toggled, exact=False
    )
    test_momentum = maketest(
        Switched, tensors((4, 3)), calls=4, captures=5, between=_momentum, exact=False
    )
    test_dropout_probability = maketest(
        Switched, tensors((4, 3)), calls=5, captures=3, between=_p, exact=False
    )
    test_batch_norm_many_steps = maketest(
        lambda: nn.BatchNorm2d(3), tensors((4, 3, 2, 2)), calls=40, exact=False
    )
    test_batch_norm_cumulative_average = maketest(
        lambda: nn.BatchNorm1d(3, momentum=None), tensors((4, 3)), calls=6, captures=None,
        exact=False,
    )  # fmt: skip
    test_batch_norm_without_tracking = maketest(
        lambda: nn.BatchNorm1d(3, track_running_stats=False), tensors((4, 3)), exact=False
    )
    test_batch_norm_statistics_reset = maketest(
        lambda: nn.BatchNorm1d(3),
        tensors((4, 3)),
        calls=5,
        between=lambda m, i: m.reset_running_stats() if i == 3 else None,
        exact=False,
    )
    test_batch_norm_too_few_values = maketest(
        lambda: nn.BatchNorm1d(3),
        lambda i: (torch.randn(1 if i % 2 else 4, 3),),
        calls=4,
        captures=None,
        exact=False,
    )
    test_instance_norm = maketest(
        lambda: nn.InstanceNorm1d(3, track_running_stats=True),
        tensors((4, 3, 5)),
        calls=6,
        exact=False,
    )


class Stateful(nn.Module):
    """Runs `step(self, x)`, which may change the state of the module."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3))
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(8, 3))
        self.plain = torch.zeros(3)
        self.items: list[Any] = []
        self.table: dict[str, Any] = {}
        self.last = None
        self.calls = 0
        self.child = nn.Linear(3, 3)
        self.step = step

    def forward(self, x):
        return self.step(self, x)


def stepping(step: Any, captures: int | None = 1, **options: Any) -> Any:
    return maketest(
        lambda: Stateful(step),
        options.pop("inputs", None) or tensors((2, 3)),
        calls=options.pop("calls", 5),
        captures=captures,
        exact=False,
        **options,
    )


def _buffer_in_place(m, x):
    m.steps += x.sum(0)
    return x + m.steps


def _buffer_in_place_after_use(m, x):
    y = x + m.steps
    m.steps.add_(1)
    return y


def _buffer_rebound(m, x):
    m.steps = m.steps * 0.9 + x.mean(0) * 0.1
    return x * m.steps


def _buffer_rebound_to_argument(m, x):
    m.steps = x[0]
    return x.sum()


def _buffer_rebound_twice(m, x):
    m.steps = m.steps + 1
    m.steps = m.steps * 2
    return m.steps


def _buffer_rebound_to_view_of_itself(m, x):
    m.cache = m.cache.roll(1, 0)
    m.cache[0] = x[0]
    return m.cache[:2].sum(0)


def _buffer_swapped(m, x):
    m.steps, m.plain = m.plain, m.steps
    m.steps += x[0]
    return m.steps - m.plain


def _buffer_other_shape(m, x):
    m.cache = torch.cat([m.cache, x])
    return m.cache.sum()


def _counted(m, x):
    m.count += 1
    return x / m.count


def _plain_in_place(m, x):
    m.plain.add_(x[0])
    return m.plain * 2


def _plain_rebound(m, x):
    m.plain = m.plain + x[0]
    return x


def _lazily_created(m, x):
    if m.last is None:
        m.last = torch.zeros_like(x[0])
    m.last = m.last + x[0]
    return m.last


def _lazily_created_by_hasattr(m, x):
    if not hasattr(m, "late"):
        m.late = x.new_zeros(3)
    m.late += x[0]
    return m.late.clone()


def _lazily_registered(m, x):
    if "late" not in m._buffers:
        m.register_buffer("late", torch.ones(3))
    m.late.mul_(2)
    return x * m.late


def _lazily_added_parameter(m, x):
    if not hasattr(m, "extra"):
        m.extra = nn.Parameter(torch.ones(3))
    return x * m.extra


def _python_counter(m, x):
    m.calls += 1
    return x * 2


def _python_counter_in_result(m, x):
    m.calls += 1
    return x * m.calls


def _number_kept(m, x):
    m.last = x.shape[0]
    return x + 1


def _tensor_kept(m, x):
    m.last = x + 1
    return x


def _argument_kept(m, x):
    m.last = x
    return x * 2


def _view_kept(m, x):
    m.last = x[0]
    return x * 2


def _result_kept(m, x):
    m.last = y = x * 2
    return y


def _structure_kept(m, x):
    m.last = {"y": [x + 1, x], "n": 3}
    return x


def _list_appended(m, x):
    m.items.append(x + 1)
    return x * 2


def _list_of_numbers_appended(m, x):
    m.items.append(len(m.items))
    return x * 2


def _dict_filled(m, x):
    m.table["y"] = x * 2
    return x


def _dict_used_as_cache(m, x):
    if "mask" not in m.table:
        m.table["mask"] = torch.ones(3).triu()
    return x * m.table["mask"]


def _attribute_deleted(m, x):
    if hasattr(m, "offset"):
        del m.offset
        return x
    m.offset = x[0]
    return x + 1


def _key_moved(m, x):
    m.table.setdefault("a", 1)
    m.table.setdefault("b", 2)
    first = next(iter(m.table))
    m.table[first] = m.table.pop(first)
    return list(m.table), x * 2


def _ordered_table(m, i):
    if i == 1:
        m.table = collections.OrderedDict(a=1, b=2, c=3)
    m.table.move_to_end(("a", "b", "c")[i % 3])


def _key_of_ordered_dict_moved(m, x):
    before = list(m.table)
    if before:
        m.table.move_to_end("b")
    return before, x * 2


def _weight_in_place(m, x):
    with torch.no_grad():
        m.weight.add_(1)
        m.child.weight.mul_(0.5)
    return m.child(x) * m.weight


def _weight_data(m, x):
    m.weight.data = m.weight.data + 1
    return x * m.weight


def _weight_data_in_place(m, x):
    m.weight.data.add_(1)
    return x * m.weight


def _weight_replaced(m, x):
    m.weight = nn.Parameter(m.weight * 2)
    return x * m.weight


def _set_training(m, x):
    m.train(not m.training)
    return x + m.training


def _child_attribute(m, x):
    m.child.last = x * 2
    return m.child(x)


def _kv_cache(m, x, position):
    m.cache.index_copy_(0, position, x)
    return m.cache.softmax(0), m.cache[:2]


def _slice_assigned(m, x):
    m.cache[2:4] = x
    m.cache[:, 1] += 1
    return m.cache.sum(1)


def _grad_read(m, x):
    return x if m.weight.grad is None else x + m.weight.grad


def _grad_written(m, x):
    m.weight.grad = torch.ones_like(m.weight) * x[0]
    return x


def _grad_beside_another_tensor(m, x):
    return x if m.last is None else x + 2 * m.last + m.weight.grad


def _set_grad_and_last(m, i):
    m.weight.grad = randn(3)
    m.last = m.weight.grad if i % 2 else randn(3)


def _two_grads(m, x):
    return x if m.weight.grad is None else x + 2 * m.weight.grad + m.child.bias.grad


def _set_two_grads(m, i):
    m.weight.grad = randn(3)
    m.child.bias.grad = m.weight.grad if i % 2 else randn(3)


class InsideChangeTest(unittest.TestCase):
    """What the program changes about its module, a replay changes too."""

    test_buffer_in_place = stepping(_buffer_in_place)
    test_buffer_in_place_after_use = stepping(_buffer_in_place_after_use)
    test_buffer_rebound = stepping(_buffer_rebound)
    test_buffer_rebound_to_argument = stepping(_buffer_rebound_to_argument)
    test_buffer_rebound_twice = stepping(_buffer_rebound_twice)
    test_buffer_rebound_to_view_of_itself = stepping(_buffer_rebound_to_view_of_itself)
    test_buffer_swapped = stepping(_buffer_swapped)
    test_buffer_other_shape = stepping(_buffer_other_shape, captures=6)
    test_counted = stepping(_counted)
    test_plain_in_place = stepping(_plain_in_place)
    test_plain_rebound = stepping(_plain_rebound)
    test_lazily_created = stepping(_lazily_created, captures=2)
    test_lazily_created_by_hasattr = stepping(_lazily_created_by_hasattr, captures=2)
    test_lazily_registered = stepping(_lazily_registered, captures=2)
    test_lazily_added_parameter = stepping(_lazily_added_parameter, captures=2)
    test_python_counter = stepping(_python_counter, captures=None)
    test_python_counter_in_result = stepping(_python_counter_in_result, captures=None)
    test_number_kept = stepping(_number_kept, captures=2)
    test_tensor_kept = stepping(_tensor_kept, captures=2)
    test_argument_kept = stepping(_argument_kept, captures=2)
    test_view_kept = stepping(_view_kept, captures=2)
    test_result_kept = stepping(_result_kept, captures=2)
    test_structure_kept = stepping(_structure_kept, captures=None)
    test_list_appended = stepping(_list_appended, captures=None)
    test_list_of_numbers_appended = stepping(_list_of_numbers_appended, captures=None)
    test_dict_filled = stepping(_dict_filled, captures=None)
    test_dict_used_as_cache = stepping(_dict_used_as_cache, captures=2)
    test_key_moved_between_calls = stepping(
        lambda m, x: (list(m.table), x * 2),
        captures=4,
        between=lambda m, i: m.table.update({"ab"[i % 2]: m.table.pop("ab"[i % 2], 0)}),
    )
    test_key_of_ordered_dict_moved = stepping(
        _key_of_ordered_dict_moved, captures=None, between=_ordered_table
    )
    test_key_moved = stepping(_key_moved, captures=None)
    test_attribute_deleted = stepping(_attribute_deleted, captures=3)
    test_weight_in_place = stepping(_weight_in_place)
    test_weight_data = stepping(_weight_data)
    test_weight_data_in_place = stepping(_weight_data_in_place)
    test_weight_replaced = stepping(_weight_replaced)
    test_set_training = stepping(_set_training, captures=2)
    test_child_attribute = stepping(_child_attribute, captures=2)
    test_slice_assigned = stepping(_slice_assigned)
    test_grad_read = stepping(
        _grad_read,
        captures=None,
        between=lambda m, i: setattr(m.weight, "grad", randn(3) if i % 2 else None),
    )
    test_grad_is_sometimes_an_attribute = stepping(
        _grad_beside_another_tensor, captures=3, between=_set_grad_and_last
    )
    test_one_grad_or_two = stepping(_two_grads, captures=3, between=_set_two_grads)
    test_grad_written = stepping(_grad_written, captures=None)
    test_kv_cache = stepping(
        _kv_cache, inputs=lambda i: (torch.randn(1, 3), torch.tensor([i])), calls=7
    )
    test_kv_cache_position_as_a_number = stepping(
        lambda m, x, i: (m.cache[i].copy_(x[0]), m.cache[: i + 1].sum(0)),
        inputs=lambda i: (torch.randn(1, 3), i % 3),
        captures=3,
    )
    test_raises_after_change = stepping(
        lambda m, x: (m.steps.add_(1), m.__setattr__("last", 3), x @ x), captures=None
    )
    test_raises_sometimes_after_change = stepping(
        lambda m, x: (m.steps.add_(1), m.__setattr__("calls", m.calls + 1), x * randn(3)),
        captures=None,
        inputs=lambda i: (torch.randn(2, 4 if i % 2 else 3),),
    )


def _closure():
    weight, counter, numbers = randn(3), torch.zeros(()), [2.0]

    def program(x):
        counter.add_(1)
        return x * weight * numbers[0] + counter

    program.weight, program.numbers = weight, numbers
    return program


def _nonlocal():
    state = torch.zeros(3)

    def program(x):
        nonlocal state
        state = state + x[0]
        return state * 2

    return program


def _nonlocal_number():
    n = 0

    def program(x):
        nonlocal n
        n += 1
        return x * n

    return program


def _closure_rebound():
    weight = randn(3)

    def program(x):
        return x * weight

    def rebind():
        nonlocal weight
        weight = randn(3)

    program.rebind = rebind
    return program


GLOBALS_SOURCE = """
def program(x):
    global total
    total = total + x[0]
    scale.mul_(2)
    return x * scale * factor, total
"""


def _with_globals():
    names: dict[str, Any] = {
        "scale": torch.ones(3),
        "total": torch.zeros(3),
        "factor": 2.0,
        "torch": torch,
    }
    exec(GLOBALS_SOURCE, names)
    return names["program"]


def _default_argument():
    weight = randn(3)

    def program(x, w=weight, options={"k": 2}):  # noqa: B006
        w.add_(1)
        return x * w * options["k"]

    return program


def _keyword_default():
    weight = randn(3)

    def program(x, *, w=weight, options={"k": 2}):  # noqa: B006
        return x * w * options["k"]

    return program


def _partial():
    return functools.partial(lambda numbers, x, by: x * numbers[0] + by[0], [2.0], by=[1.0])


NESTED_SOURCE = """
def program(x):
    def inner(y):
        return y * factor
    return inner(x) + (lambda: shift)()
"""
FRESH_SOURCE = """
def program(x):
    global fresh
    fresh = x.sum(0)
    return x * 2
"""


def _with_source(source, **names):
    exec(source, names)
    return names["program"]


class Slotted:
    """Holds state in slots."""

    __slots__ = ("factor", "weight")

    def __init__(self) -> None:
        self.weight = randn(3)
        self.factor = 2.0

    def __call__(self, x):
        return x * self.weight * self.factor


class ByGlobal:
    """Reads a global in a method that another one calls."""

    def __call__(self, x):
        return self.scaled(x) + 1

    def scaled(self, x):
        return x * GLOBAL_FACTOR[0]


GLOBAL_FACTOR = [2.0]


class Attribute:
    """Holds state as many programs do: in an object that is no module."""

    def __init__(self) -> None:
        self.weight = randn(3)
        self.steps = 0
        self.layer = nn.Linear(3, 3)

    def __call__(self, x):
        return self.layer(x) * self.weight

    def method(self, x):
        self.weight = self.weight + 1
        return x * self.weight

    def counted(self, x):
        self.steps += 1
        return x * self.steps


class FunctionStateTest(unittest.TestCase):
    """Closures, globals, defaults and objects."""

    test_closure = maketest(_closure, tensors((2, 3)), calls=5)
    test_closure_changed_in_place = maketest(
        _closure, tensors((2, 3)), calls=5, between=lambda f, i: f.weight.mul_(2)
    )
    test_closure_list_changed = maketest(
        _closure,
        tensors((2, 3)),
        calls=4,
        captures=5,
        between=lambda f, i: f.numbers.__setitem__(0, float(i)),
    )
    test_closure_rebound = maketest(
        _closure_rebound, tensors((2, 3)), between=lambda f, i: f.rebind()
    )
    test_nonlocal = maketest(_nonlocal, tensors((2, 3)), calls=5)
    test_nonlocal_number = maketest(_nonlocal_number, tensors((2, 3)), calls=5, captures=None)
    test_globals = maketest(_with_globals, tensors((2, 3)), calls=5)
    test_global_replaced = maketest(
        _with_globals,
        tensors((2, 3)),
        between=lambda f, i: f.__globals__.update(scale=randn(3)),
    )
    test_global_number = maketest(
        _with_globals,
        tensors((2, 3)),
        captures=4,
        between=lambda f, i: f.__globals__.update(factor=i),
    )
    test_default_argument = maketest(_default_argument, tensors((2, 3)), calls=5)
    test_keyword_default_replaced = maketest(
        _keyword_default,
        tensors((2, 3)),
        between=lambda f, i: f.__kwdefaults__.update(w=randn(3)),
    )
    test_keyword_default_changed = maketest(
        _keyword_default,
        tensors((2, 3)),
        captures=4,
        between=lambda f, i: f.__kwdefaults__["options"].update(k=i + 2),
    )
    test_partial_changed = maketest(
        _partial,
        tensors((2, 3)),
        captures=4,
        between=lambda f, i: f.args[0].__setitem__(0, float(i)),
    )
    test_partial_keyword_changed = maketest(
        _partial,
        tensors((2, 3)),
        captures=4,
        between=lambda f, i: f.keywords["by"].__setitem__(0, float(i + 2)),
    )
    test_global_of_inner_functions = maketest(
        lambda: _with_source(NESTED_SOURCE, factor=2.0, shift=1.0),
        tensors((2, 3)),
        captures=4,
        between=lambda f, i: f.__globals__.update({("factor", "shift")[i % 2]: float(i)}),
    )
    test_global_made_by_the_program = maketest(
        lambda: _with_source(FRESH_SOURCE), tensors((2, 3)), captures=2
    )
    test_slots_replaced = maketest(
        Slotted, tensors((2, 3)), between=lambda m, i: setattr(m, "weight", randn(3))
    )
    test_slots_changed = maketest(
        Slotted,
        tensors((2, 3)),
        captures=4,
        between=lambda m, i: setattr(m, "factor", float(i)),
    )
    test_global_of_methods = maketest(
        ByGlobal,
        tensors((2, 3)),
        captures=4,
        between=lambda m, i: GLOBAL_FACTOR.__setitem__(0, float(i)),
    )
    test_bound_method_of_module = maketest(lambda: Linear().forward, tensors((2, 3)), exact=False)
    test_callable_object = maketest(
        Attribute, tensors((2, 3)), exact=False, between=lambda a, i: a.weight.add_(1)
    )
    test_callable_object_rebound = maketest(
        Attribute,
        tensors((2, 3)),
        exact=False,
        captures=None,
        between=lambda a, i: setattr(a, "weight", randn(3)),
    )
    test_bound_method_of_object = maketest(
        lambda: Attribute().method, tensors((2, 3)), captures=None
    )
    test_counting_method_of_object = maketest(
        lambda: Attribute().counted, tensors((2, 3)), captures=None
    )
    test_module_in_closure = maketest(
        lambda: (lambda m: lambda x: m(x) * 2)(nn.Linear(3, 3)), tensors((2, 3)), exact=False
    )
    test_modules_in_a_list = maketest(
        lambda: (lambda ms: lambda x: sum(m(x) for m in ms))([nn.Linear(3, 3), nn.BatchNorm1d(3)]),
        tensors((2, 3)),
        exact=False,
    )
    test_module_in_object = maketest(
        lambda: (lambda a: lambda x: a.layer(x))(Attribute()),
        tensors((2, 3)),
        exact=False,
    )

    def test_object_in_closure_rebound(self):
        def make():
            holder = Attribute()

            def program(x):
                return x * holder.weight

            program.holder = holder
            return program

        check(
            make,
            tensors((2, 3)),
            between=lambda f, i: setattr(f.holder, "weight", randn(3)),
            captures=None,
        )

    def test_object_attribute_number_changes(self):
        def make():
            holder = Attribute()

            def program(x):
                return x * holder.steps

            program.holder = holder
            return program

        check(
            make,
            tensors((2, 3)),
            between=lambda f, i: setattr(f.holder, "steps", i),
            captures=None,
        )

    def test_object_argument_changes(self):
        """One object, passed to each call, with another tensor in it each time."""

        class Cache:
            def __init__(self):
                self.k = randn(3)

        def make():
            cache = Cache()

            def program(x, cache=cache):
                cache.k = cache.k + x[0]
                return x * cache.k

            program.cache = cache
            return program

        check(make, tensors((2, 3)), captures=None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.zeros(5, 3))
        self.row = self.table[1]  # A plain attribute that is a view of a buffer.

    def forward(self, i):
        self.table += 1
        return self.head(self.embedding(i) + self.row)


class _Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


def _parametrized():
    m = nn.Linear(3, 3)
    parametrize.register_parametrization(m, "weight", _Symmetric())
    return m


def _assigned(m, i):
    with torch.no_grad():
        m.weight = randn(3, 3)


def _shared_layers():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


class StructureTest(unittest.TestCase):
    """Parametrizations, tied weights, views among the state, lazy modules."""

    test_tied = maketest(Tied, lambda: (torch.tensor([0, 4, 1]),), exact=False)
    test_tied_changed = maketest(
        Tied,
        lambda: (torch.tensor([0, 4, 1]),),
        exact=False,
        between=lambda m, i: m.head.weight.data.add_(1),
    )
    test_shared_layer = maketest(_shared_layers, tensors((2, 3)), exact=False)
    test_parametrization = maketest(_parametrized, tensors((2, 3)), exact=False)
    test_parametrization_changed = maketest(
        _parametrized,
        tensors((2, 3)),
        exact=False,
        between=lambda m, i: m.parametrizations.weight.original.data.add_(1),
    )
    test_weight_norm = maketest(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        tensors((2, 3)),
        exact=False,
    )
    test_weight_norm_assigned = maketest(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        tensors((2, 3)),
        exact=False,
        between=_assigned,
    )
    test_old_weight_norm = maketest(
        lambda: nn.utils.weight_norm(nn.Linear(3, 4)), tensors((2, 3)), exact=False
    )
    test_spectral_norm = maketest(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        tensors((2, 3)),
        calls=5,
        exact=False,
    )
    test_old_spectral_norm = maketest(
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), tensors((2, 3)), calls=5, exact=False
    )
    test_orthogonal = maketest(
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), tensors((2, 3)), exact=False
    )
    test_parametrization_cached = maketest(
        lambda: (lambda m: parametrize.cached()(lambda x: m(x) + m.weight.sum()))(_parametrized()),
        tensors((2, 3)),
        exact=False,
    )
    test_parameter_list_and_dict = maketest(
        lambda: _Lists(), tensors((2, 3)), between=lambda m, i: m.ps[0].data.add_(1)
    )
    test_module_dict = maketest(
        lambda: _Lists(),
        lambda i: Call(torch.randn(2, 3), which=("a", "b")[i % 2]),
        captures=2,
        calls=4,
        exact=False,
    )
    test_lazy_linear = maketest(
        lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()),
        tensors((2, 3)),
        captures=None,
        exact=False,
    )
    test_deep_copy_of_module = maketest(
        lambda: copy.deepcopy(Linear()), tensors((2, 3)), exact=False
    )


class _Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ps = nn.ParameterList([randn(3), randn(3)])
        self.pd = nn.ParameterDict({"a": randn(3)})
        self.md = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Tanh()})

    def forward(self, x, which="b"):
        return self.md[which](x * self.ps[0] + self.ps[1] * self.pd["a"])


class ExtractionKeepsModuleTest(unittest.TestCase):
    """The user's module is the same object with the same parameters, whatever happens."""

    def test_failure_in_the_middle(self):
        class Fails(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.BatchNorm1d(3)
                self.note = "before"

            def forward(self, x):
                y = self.inner(x)
                self.inner.weight = nn.Parameter(torch.zeros(3))
                self.note = y
                self.late = y
                del self.inner.running_var
                raise KeyError("in the middle")

        _, error = extract_untouched(Fails(), Call(torch.randn(4, 3)))
        self.assertIs(type(error), KeyError)

    def test_two_graphs_of_one_module(self):
        """Each sees what the other one's replays leave behind."""
        m = nn.BatchNorm1d(3)
        first = extract_compiled_graph(m, (torch.randn(4, 3),))
        second = extract_compiled_graph(m, (torch.randn(4, 3),))
        eager = copy.deepcopy(m)
        for i in range(6):
            x = torch.randn(4, 3)
            torch.testing.assert_close((first, second)[i % 2](x).detach(), eager(x).detach())
        torch.testing.assert_close(m.state_dict(), eager.state_dict())
        self.assertEqual(m.num_batches_tracked, 6)

    def test_eager_calls_between_replays(self):
        m = Stateful(_buffer_rebound)
        eager = copy.deepcopy(m)
        with torch.no_grad():
            graph = extract_compiled_graph(m, (torch.randn(2, 3),))
            for i in range(6):
                x = torch.randn(2, 3)
                torch.testing.assert_close((graph, m)[i % 2](x), eager(x))


# What is not as eager yet, with the reason; a test of these that passes fails the run.
expected_failures(
    {
        "test_dict_replaced": "captured more often than necessary: containers count by identity",
    }
)(OutsideChangeTest)


if __name__ == "__main__":
    unittest.main()
