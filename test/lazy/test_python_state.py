# Owner(s): ["oncall: jit"]

"""What a program reads and writes of Python: one row for each kind of state.

Each kind of `READS` is a program and a change that it can see. The program is captured once while
nothing changes, gives what eager gives after the change, and `explain()` names what it relies on.
"""

import abc
import array
import collections
import contextlib
import contextvars
import copy
import functools
import operator
import os
import sys
import threading
import types
import unittest
import weakref

import numpy
import torch
from torch import nn

import torch_lazy_ext

ROWS = {}  # name -> what makes the program: it gives program, change, and a text of explain()


def row(make):
    ROWS[make.__name__] = make
    return make


def module_of(**content):
    """A new module, and a function that imports it by its name."""
    made = types.ModuleType("settings_of_a_test")
    vars(made).update(content)
    return made


def function(source, **names):
    """A function of a namespace of its own."""
    space = {"__name__": "a_users_module", "torch": torch, "nn": nn, **names}
    exec(compile(source, "program.py", "exec"), space)
    return space["f"], space


@row
def class_attribute():
    class Net(nn.Module):
        scale = 2.0

        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Net, "scale", 5.0), "Net.scale = 2.0 (class attribute, read at "


@row
def class_attribute_of_a_base():
    class Base(nn.Module):
        scale = 2.0

    class Net(Base):
        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Base, "scale", 5.0), "Base.scale = 2.0"


@row
def class_attribute_hidden_by_a_nearer_class():
    class Base(nn.Module):
        scale = 2.0

    class Net(Base):
        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Net, "scale", 5.0), "Base.scale = 2.0"


@row
def class_attribute_hidden_by_the_object():
    class Net(nn.Module):
        scale = 2.0

        def forward(self, x):
            return x * self.scale

    net = Net()
    return net, lambda: setattr(net, "scale", 5.0), "Net.scale = 2.0"


@row
def object_attribute_deleted():
    class Net(nn.Module):
        scale = 2.0

        def forward(self, x):
            return x * self.scale

    net = Net()
    net.scale = 3.0
    return net, lambda: delattr(net, "scale"), "scale = 3.0 (attribute"


@row
def attribute_that_appears():
    class Net(nn.Module):
        def forward(self, x):
            return x * getattr(self, "scale", 2.0)

    net = Net()
    return net, lambda: setattr(net, "scale", 5.0), "on"


@row
def attribute_that_is_missing():
    class Config:
        pass

    config = Config()

    def f(x):
        try:
            return x * config.scale
        except AttributeError:
            return x

    return f, lambda: setattr(config, "scale", 5.0), "on"


@row
def method_replaced_on_the_class():
    class Net(nn.Module):
        def scaled(self, x):
            return x * 2

        def forward(self, x):
            return self.scaled(x)

    return Net(), lambda: setattr(Net, "scaled", lambda self, x: x * 5), "objects"


@row
def forward_replaced_on_the_class():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2

    return Net(), lambda: setattr(Net, "forward", lambda self, x: x * 5), "objects"


@row
def forward_replaced_on_the_object():
    net = nn.Sequential(nn.Tanh())
    return net, lambda: setattr(net, "forward", lambda x: x * 5), "objects"


@row
def property_replaced():
    class Net(nn.Module):
        @property
        def scale(self):
            return 2.0

        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Net, "scale", property(lambda self: 5.0)), "objects"


@row
def what_a_property_reads():
    class Net(nn.Module):
        factor = 2.0

        @property
        def scale(self):
            return self.factor

        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Net, "factor", 5.0), "Net.factor = 2.0"


@row
def class_method_and_its_attribute():
    class Net(nn.Module):
        factor = 2.0

        @classmethod
        def scale(cls):
            return cls.factor

        def forward(self, x):
            return x * self.scale()

    return Net(), lambda: setattr(Net, "factor", 5.0), "Net.factor = 2.0"


@row
def special_method_that_appears():
    class Scale:
        value = 2.0

        def __rmul__(self, other):
            return other * self.value

    scale = Scale()

    def f(x):
        return 3.0 * scale * x

    return f, lambda: setattr(Scale, "__rmul__", lambda self, other: other * 7.0), "Scale.value"


@row
def class_of_an_object():
    class Two(nn.Module):
        def forward(self, x):
            return x * 2

    class Five(nn.Module):
        def forward(self, x):
            return x * 5

    net = Two()
    return net, lambda: setattr(net, "__class__", Five), "objects"


@row
def class_of_a_held_object():
    class Two:
        def scale(self):
            return 2

    class Five:
        def scale(self):
            return 5

    held = Two()
    return lambda x: x * held.scale(), lambda: setattr(held, "__class__", Five), "objects"


@row
def bases_of_a_class():
    class Two:
        def scale(self):
            return 2

    class Five:
        def scale(self):
            return 5

    class Held(Two):
        pass

    held = Held()
    return lambda x: x * held.scale(), lambda: setattr(Held, "__bases__", (Five,)), "objects"


@row
def class_registered_as_a_subclass():
    class Kind(abc.ABC):  # noqa: B024
        pass

    class Thing:
        pass

    thing = Thing()
    program = lambda x: x * 2 if isinstance(thing, Kind) else x  # noqa: E731
    return program, lambda: Kind.register(Thing), "abc.get_cache_token() = "


@row
def class_registered_as_a_mapping():
    class Thing:
        pass

    thing = Thing()
    program = lambda x: x * 2 if isinstance(thing, collections.abc.Mapping) else x  # noqa: E731
    change = functools.partial(collections.abc.Mapping.register, Thing)
    return program, change, "abc.get_cache_token() = "


@row
def class_that_is_used_as_a_namespace():
    class Config:
        scale = 2.0

    return lambda x: x * Config.scale, lambda: setattr(Config, "scale", 5.0), "Config.scale = 2.0"


@row
def container_of_a_class():
    class Net(nn.Module):
        scales = [2.0]  # noqa: RUF012

        def forward(self, x):
            return x * self.scales[0]

    return Net(), lambda: Net.scales.append(Net.scales.pop() + 1), "Net.scales.0 = 2.0"


@row
def class_made_by_the_program():
    class Helper:
        scale = 2.0

        def apply(self, x):
            return x * self.scale

    return lambda x: Helper().apply(x), lambda: setattr(Helper, "scale", 5.0), "Helper.scale = 2.0"


@row
def method_of_a_module_of_torch():
    original = nn.Tanh.forward

    def change():
        nn.Tanh.forward = lambda self, x: x * 5
        return lambda: setattr(nn.Tanh, "forward", original)

    return nn.Sequential(nn.Tanh()), change, "libraries"


@row
def function_of_torch():
    original = nn.functional.gelu

    def change():
        nn.functional.gelu = lambda x, approximate="none": x * 5
        return lambda: setattr(nn.functional, "gelu", original)

    return nn.Sequential(nn.GELU()), change, "libraries"


@row
def global_value():
    f, space = function("def f(x):\n    return x * SCALE", SCALE=2.0)
    return f, lambda: space.update(SCALE=5.0), "SCALE = 2.0 (global, read at program.py:2)"


@row
def global_function():
    f, space = function("def g(x):\n    return x * 2\ndef f(x):\n    return g(x)")
    return f, lambda: space.update(g=lambda x: x * 5), "objects"


@row
def builtin_hidden_by_a_global():
    f, space = function("def f(x):\n    return x * len((1, 2))")
    return f, lambda: space.update(len=lambda items: 5), "on"


@row
def attribute_of_a_module():
    config = module_of(SCALE=2.0)
    f, _space = function("def f(x):\n    return x * config.SCALE", config=config)
    return f, lambda: setattr(config, "SCALE", 5.0), "config.SCALE = 2.0 (attribute of a module"


@row
def attribute_of_a_module_of_a_module():
    config = module_of(inner=module_of(SCALE=2.0))
    f, _space = function("def f(x):\n    return x * config.inner.SCALE", config=config)
    return f, lambda: setattr(config.inner, "SCALE", 5.0), "config.inner.SCALE = 2.0"


@row
def function_of_a_module_and_its_global():
    helper, space = function("def f(x):\n    return x * SCALE", SCALE=2.0)
    utils = module_of(helper=helper)
    f, _space = function("def f(x):\n    return utils.helper(x)", utils=utils)
    return f, lambda: space.update(SCALE=5.0), "SCALE = 2.0"


@row
def container_of_a_module():
    config = module_of(table={"scale": 2.0})
    f, _space = function("def f(x):\n    return x * config.table['scale']", config=config)
    return f, lambda: config.table.update(scale=5.0), "table.scale = 2.0"


@row
def module_imported_inside():
    config = sys.modules["settings_of_a_test"] = module_of(SCALE=2.0)
    source = "def f(x):\n    import settings_of_a_test as c\n    return x * c.SCALE"
    return function(source)[0], lambda: setattr(config, "SCALE", 5.0), "on"


@row
def name_imported_inside():
    config = sys.modules["settings_of_a_test"] = module_of(SCALE=2.0)
    source = "def f(x):\n    from settings_of_a_test import SCALE\n    return x * SCALE"
    return function(source)[0], lambda: setattr(config, "SCALE", 5.0), "on"


@row
def imported_module_replaced():
    sys.modules["settings_of_a_test"] = module_of(SCALE=2.0)
    source = "def f(x):\n    from settings_of_a_test import SCALE\n    return x * SCALE"

    def change():
        sys.modules["settings_of_a_test"] = module_of(SCALE=5.0)

    return function(source)[0], change, "on"


@row
def default_argument():
    def f(x, scale=2.0):
        return x * scale

    return f, lambda: setattr(f, "__defaults__", (5.0,)), "f(scale) = 2.0 (default argument"


@row
def keyword_default():
    def f(x, *, scale=2.0):
        return x * scale

    return f, lambda: f.__kwdefaults__.update(scale=5.0), "f(scale) = 2.0 (default argument"


@row
def default_of_a_helper():
    def helper(x, scale=2.0):
        return x * scale

    return lambda x: helper(x), lambda: setattr(helper, "__defaults__", (5.0,)), "helper(scale)"


@row
def default_of_one_of_many():
    """Made by one line: they differ in what they close over."""

    def make(factor):
        def helper(x, scale=2.0):
            return x * scale + factor

        return helper

    helpers = [make(float(i)) for i in range(4)]

    def program(x):
        return helpers[2](x)

    return program, lambda: setattr(helpers[2], "__defaults__", (5.0,)), "helper(scale)"


@row
def default_of_a_copy():
    def helper(x, scale=2.0):
        return x * scale

    another = types.FunctionType(helper.__code__, helper.__globals__, "another", (3.0,))
    hidden = weakref.WeakValueDictionary(another=another)

    def change():
        another.__defaults__ = (5.0,)

    return lambda x: hidden["another"](x), change, "another(scale)"


@row
def code_of_a_function():
    def helper(x):
        return x * 2

    def other(x):
        return x * 5

    return lambda x: helper(x), lambda: setattr(helper, "__code__", other.__code__), "objects"


@row
def attribute_of_a_function():
    def f(x):
        return x * f.scale

    f.scale = 2.0
    return f, lambda: setattr(f, "scale", 5.0), "f.scale = 2.0"


@row
def closure():
    scale = 2.0

    def f(x):
        return x * scale

    def change():
        nonlocal scale
        scale = 5.0

    return f, change, "scale = 2.0 (closure, read at "


@row
def context_variable():
    variable = contextvars.ContextVar("scale", default=2.0)
    return lambda x: x * variable.get(), lambda: variable.set(5.0), "on"


@row
def context_variable_of_a_module():
    config = module_of(scale=contextvars.ContextVar("scale", default=2.0))
    f, _space = function("def f(x):\n    return x * config.scale.get()", config=config)
    return f, lambda: config.scale.set(5.0), "on"


@row
def thread_local():
    local = threading.local()
    local.scale = 2.0
    return lambda x: x * local.scale, lambda: setattr(local, "scale", 5.0), "scale = 2.0"


@row
def thread_local_that_appears():
    local = threading.local()

    def f(x):
        return x * getattr(local, "scale", 2.0)

    return f, lambda: setattr(local, "scale", 5.0), "on"


@row
def environment():
    os.environ["SCALE_OF_A_TEST"] = "2"

    def f(x):
        return x * float(os.environ["SCALE_OF_A_TEST"])

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ"


@row
def environment_by_getenv():
    os.environ.pop("SCALE_OF_A_TEST", None)

    def f(x):
        return x * float(os.getenv("SCALE_OF_A_TEST", "2"))

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ"


@row
def set_of_values():
    held = {2.0}
    return lambda x: x * sum(held), lambda: held.add(3.0), "objects"


@row
def set_in_an_attribute():
    net = nn.Tanh()
    net.skipped = {"a"}
    net.forward = lambda x: x if "b" in net.skipped else x * 2
    return net, lambda: net.skipped.add("b"), "objects"


@row
def deque_of_values():
    held = collections.deque([2.0])
    return lambda x: x * sum(held), lambda: held.append(3.0), "on"


@row
def array_of_values():
    held = array.array("d", [2.0])
    return lambda x: x * held[0], lambda: held.__setitem__(0, 5.0), "objects"


@row
def bytes_that_change():
    held = bytearray(b"\x02")
    return lambda x: x * held[0], lambda: held.__setitem__(0, 5), "objects"


@row
def counter():
    held = collections.Counter("aab")
    return lambda x: x * held["a"], lambda: held.update("aaa"), "a = 2"


@row
def default_dictionary():
    held = collections.defaultdict(lambda: 2.0)
    held["a"] = 3.0
    return lambda x: x * held["a"], lambda: held.update(a=5.0), "a = 3.0"


@row
def chain_of_dictionaries():
    inner = {"a": 2.0}
    held = collections.ChainMap({}, inner)
    return lambda x: x * held["a"], lambda: inner.update(a=5.0), "a = 2.0"


@row
def chain_of_dictionaries_by_a_nearer_one():
    nearer = {}
    held = collections.ChainMap(nearer, {"a": 2.0})
    return lambda x: x * held["a"], lambda: nearer.update(a=5.0), "on"


@row
def dictionary_of_a_user():
    held = collections.UserDict(a=2.0)
    return lambda x: x * held["a"], lambda: held.update(a=5.0), "a = 2.0"


@row
def view_of_a_dictionary():
    inner = {"a": 2.0}
    held = types.MappingProxyType(inner)
    return lambda x: x * held["a"], lambda: inner.update(a=5.0), "a = 2.0"


@row
def namespace_object():
    held = types.SimpleNamespace(a=2.0)
    return lambda x: x * held.a, lambda: setattr(held, "a", 5.0), "a = 2.0 (attribute"


@row
def slots_of_an_object():
    class Held:
        __slots__ = ("a",)

    held = Held()
    held.a = 2.0
    return lambda x: x * held.a, lambda: setattr(held, "a", 5.0), "a = 2.0"


@row
def attribute_found_by_its_name():
    held = types.SimpleNamespace(a=2.0)
    get = operator.attrgetter("a")
    return lambda x: x * get(held), lambda: setattr(held, "a", 5.0), "on"


@row
def weak_reference():
    class Held:
        scale = 5.0

    held = [Held()]
    reference = weakref.ref(held[0])
    return lambda x: x * (2 if reference() is None else 3), held.clear, "on"


@row
def what_a_weak_reference_reaches():
    class Held:
        pass

    held = Held()
    held.scale = 2.0
    reference = weakref.ref(held)

    def change():
        held.scale = 5.0

    return lambda x: x * reference().scale, change, "scale = 2.0"


@row
def shape_of_a_buffer():
    net = nn.Tanh()
    net.register_buffer("table", torch.ones(3))
    net.forward = lambda x: x * net.table.shape[0]
    return net, lambda: setattr(net, "table", torch.ones(7)), "table: torch.float32[3] (tensor"


@row
def dtype_of_a_buffer():
    net = nn.Tanh()
    net.register_buffer("table", torch.ones(3))
    net.forward = lambda x: x * (2 if net.table.dtype == torch.float32 else 5)
    return net, lambda: setattr(net, "table", torch.ones(3).double()), "table: torch.float32[3]"


@row
def tensor_that_may_be_none():
    net = nn.Tanh()
    net.mask = torch.ones(1)
    net.forward = lambda x: x * (2 if net.mask is not None else 5)
    return net, lambda: setattr(net, "mask", None), "mask: torch.float32[1]"


@row
def requires_grad_of_a_parameter():
    net = nn.Linear(1, 1)
    net.forward = lambda x: x * (2 if net.weight.requires_grad else 5)
    return net, lambda: net.requires_grad_(False) and None, "on"


@row
def strides_of_a_tensor():
    net = nn.Tanh()
    net.table = torch.ones(2, 3)
    net.forward = lambda x: x * (2 if net.table.is_contiguous() else 5)
    return net, lambda: setattr(net, "table", torch.ones(3, 2).t()), "table: torch.float32[2, 3]"


@row
def attribute_of_a_tensor():
    net = nn.Tanh()
    net.table = torch.ones(2)
    net.table.scale = 2.0
    net.forward = lambda x: x * net.table.scale
    return net, lambda: setattr(net.table, "scale", 5.0), "scale = 2.0"


@row
def array_of_numpy():
    held = numpy.array([2.0])
    return lambda x: x * float(held[0]), lambda: held.__setitem__(0, 5.0), "on"


@row
def training_of_a_module():
    net = nn.Sequential(nn.Tanh())
    net.forward = lambda x: x * (2 if net.training else 5)
    return net, lambda: net.eval() and None, "training = True"


def _hook_row(name, register, hook):
    def make():
        def change():
            return register(hook).remove

        return nn.Sequential(nn.Tanh()), change, "on"

    ROWS[name] = make


_hook_row(
    "global_forward_hook",
    nn.modules.module.register_module_forward_hook,
    lambda m, args, out: out * 10,
)
_hook_row(
    "global_forward_hook_always_called",
    functools.partial(nn.modules.module.register_module_forward_hook, always_call=True),
    lambda m, args, out: out * 10,
)
_hook_row(
    "global_forward_pre_hook",
    nn.modules.module.register_module_forward_pre_hook,
    lambda m, args: (args[0] * 10,),
)


@row
def threads_of_torch():
    def f(x):
        return x * torch.get_num_threads()

    def change():
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        return lambda: torch.set_num_threads(before)

    return f, change, "get_num_threads() = "


@row
def setting_of_a_backend():
    def f(x):
        return x * (2 if torch.backends.mkldnn.enabled else 5)

    def change():
        flags = torch.backends.mkldnn.flags(enabled=not torch.backends.mkldnn.enabled)
        flags.__enter__()
        return lambda: flags.__exit__(None, None, None)

    return f, change, "torch.backends.mkldnn.enabled = "


@row
def environment_in_bytes():
    os.environb[b"SCALE_OF_A_TEST"] = b"2"

    def f(x):
        return x * int(os.environb[b"SCALE_OF_A_TEST"])

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ['SCALE_OF_A_TEST'] = '2'"


@row
def environment_that_has_a_variable():
    os.environ.pop("SCALE_OF_A_TEST", None)

    def f(x):
        return x * (2 if "SCALE_OF_A_TEST" in os.environ else 5)

    return f, lambda: os.environ.update(SCALE_OF_A_TEST=""), "os.environ['SCALE_OF_A_TEST'] = unset"


@row
def environment_in_a_library():
    os.environ["SCALE_OF_A_TEST"] = "2"

    def f(x):
        return x * float(os.path.expandvars("${SCALE_OF_A_TEST}.0"))

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ['SCALE_OF_A_TEST'] = '2'"


@row
def whole_environment():
    os.environ.pop("SCALE_OF_A_TEST", None)

    def f(x):
        return x * sum(name.startswith("SCALE_OF") for name in os.environ)

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ = "


@row
def size_of_the_environment():
    os.environ.pop("SCALE_OF_A_TEST", None)
    size = len(os.environ)

    def f(x):
        return x * (len(os.environ) - size)

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ = "


@row
def copy_of_the_environment():
    os.environ.pop("SCALE_OF_A_TEST", None)

    def f(x):
        return x * float({**os.environ}.get("SCALE_OF_A_TEST", "2"))

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5"), "os.environ = "


@row
def precision_of_products():
    def f(x):
        return x * (2 if torch.get_float32_matmul_precision() == "highest" else 5)

    def change():
        torch.set_float32_matmul_precision("high")
        return lambda: torch.set_float32_matmul_precision("highest")

    return f, change, "_get_float32_matmul_precision() = 'highest'"


class ReadsTest(unittest.TestCase):
    def run_row(self, make) -> None:
        program, change, text = make()
        x = torch.arange(1.0, 3.0)

        def agree():
            torch.testing.assert_close(graph(x), program(x), rtol=0, atol=0)

        with torch.no_grad(), contextlib.ExitStack() as undo:
            undo.callback(sys.modules.pop, "settings_of_a_test", None)
            undo.callback(os.environ.pop, "SCALE_OF_A_TEST", None)
            before = program(x)
            graph = torch_lazy_ext.extract_compiled_graph(program, (x,))
            for _ in range(3):
                agree()
            self.assertEqual(len(graph.specializations), 1, "captured again, and nothing changed")
            relied = [s for s in graph.explain().splitlines() if s.startswith("  relies on ")]
            self.assertTrue(any(text in line for line in relied), graph.explain(verbose=True))
            restore = change()
            if callable(restore):
                undo.callback(restore)
            self.assertFalse(torch.equal(program(x), before), "the change changes nothing")
            agree()
            agree()
            self.assertEqual(len(graph.specializations), 2)


for _name, _make in ROWS.items():
    setattr(ReadsTest, f"test_{_name}", functools.partialmethod(ReadsTest.run_row, _make))


UNRELATED = {}


def unrelated(make):
    UNRELATED[make.__name__] = make
    return make


@unrelated
def attribute_that_no_code_names():
    net = nn.Sequential(nn.Tanh())
    return net, lambda: setattr(net, "remark", "new")


@unrelated
def attribute_of_another_class():
    class Other:
        scale = 2.0

    class Net(nn.Module):
        scale = 2.0

        def forward(self, x):
            return x * self.scale

    return Net(), lambda: setattr(Other, "scale", 5.0)


@unrelated
def class_attribute_that_no_code_names():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2

    return Net(), lambda: setattr(Net, "remark", "new")


@unrelated
def copy_of_an_object_of_a_class():
    class Held:
        scale = 2.0

    held = Held()
    return lambda x: x * held.scale, lambda: copy.copy(held) and None


@unrelated
def module_that_grows():
    config = module_of(SCALE=2.0)
    f, _space = function("def f(x):\n    return x * config.SCALE", config=config)

    def change():
        for i in range(100):
            setattr(config, f"value{i}", i)

    return f, change


@unrelated
def globals_that_grow():
    f, space = function("def f(x):\n    return x * SCALE", SCALE=2.0)
    return f, lambda: space.update({f"value{i}": i for i in range(100)})


@unrelated
def import_of_a_module():
    def change():
        sys.modules["settings_of_a_test"] = module_of()

    return nn.Linear(2, 2), change


@unrelated
def attribute_of_torch():
    def change():
        torch.remark_of_a_test = 1
        return lambda: delattr(torch, "remark_of_a_test")

    return nn.Linear(2, 2), change


@unrelated
def environment_that_nobody_reads():
    return nn.Linear(2, 2), lambda: os.environ.update(SCALE_OF_A_TEST="5")


@unrelated
def environment_variable_that_another_is_beside():
    def f(x):
        return x * float(os.getenv("OFFSET_OF_A_TEST", "2"))

    return f, lambda: os.environ.update(SCALE_OF_A_TEST="5")


@unrelated
def weights():
    net = nn.Linear(2, 2)
    return net, lambda: net.load_state_dict(nn.Linear(2, 2).state_dict())


class UnrelatedTest(unittest.TestCase):
    def run_row(self, make) -> None:
        program, change = make()
        x = torch.arange(1.0, 3.0)
        with torch.no_grad(), contextlib.ExitStack() as undo:
            undo.callback(sys.modules.pop, "settings_of_a_test", None)
            undo.callback(os.environ.pop, "SCALE_OF_A_TEST", None)
            graph = torch_lazy_ext.extract_compiled_graph(program, (x,))
            graph(x)
            restore = change()
            if callable(restore):
                undo.callback(restore)
            torch.testing.assert_close(graph(x), program(x), rtol=0, atol=0)
            self.assertEqual(len(graph.specializations), 1)

    def test_a_capture_is_no_change(self) -> None:
        """What a capture puts in place for its time is no change for other graphs."""
        net, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(2)
        with torch.no_grad():
            graph = torch_lazy_ext.extract_compiled_graph(net, (x,))
            torch_lazy_ext.extract_compiled_graph(lambda x: x.tolist(), (x,))
            graph(x)
        self.assertEqual(len(graph.specializations), 1)


for _name, _make in UNRELATED.items():
    setattr(UnrelatedTest, f"test_{_name}", functools.partialmethod(UnrelatedTest.run_row, _make))


WRITES = {}


def writes(make):
    """`make()` gives a program, and what it writes to as a value to compare."""
    WRITES[make.__name__] = make
    return make


@writes
def to_a_class():
    class Net(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls = self.calls + 1
            return x * self.calls

    return Net(), lambda: Net.calls


@writes
def a_new_attribute_of_a_class():
    class Net(nn.Module):
        def forward(self, x):
            Net.last = x * 2
            return x

    return Net(), lambda: Net.last.tolist() if hasattr(Net, "last") else None


@writes
def to_a_module():
    config = module_of(calls=0)
    f, _space = function(
        "def f(x):\n    config.calls += 1\n    return x * config.calls", config=config
    )
    return f, lambda: config.calls


@writes
def to_a_global_of_another_module():
    helper, space = function(
        "def f(x):\n    global calls\n    calls += 1\n    return x * calls", calls=0
    )
    utils = module_of(helper=helper)
    f, _space = function("def f(x):\n    return utils.helper(x)", utils=utils)
    return f, lambda: space["calls"]


@writes
def to_a_function():
    def f(x):
        f.calls = getattr(f, "calls", 0) + 1
        return x * f.calls

    return f, lambda: dict(vars(f))


@writes
def to_a_tensor():
    net = nn.Tanh()
    net.table = torch.ones(2)
    net.table.calls = 0

    def forward(x):
        net.table.calls += 1
        return x * net.table.calls

    net.forward = forward
    return net, lambda: net.table.calls


@writes
def to_a_set():
    held = {0}

    def f(x):
        held.add(len(held))
        return x * len(held)

    return f, lambda: set(held)


@writes
def to_a_deque():
    held = collections.deque([0.0], maxlen=3)

    def f(x):
        held.append(held[-1] + 1.0)
        return x * sum(held)

    return f, lambda: list(held)


@writes
def to_an_array():
    held = array.array("d", [1.0])

    def f(x):
        held[0] += 1.0
        return x * held[0]

    return f, lambda: held.tolist()


@writes
def to_bytes():
    held = bytearray(b"\x01")

    def f(x):
        held[0] += 1
        return x * held[0]

    return f, lambda: bytes(held)


@writes
def to_a_context_variable():
    variable = contextvars.ContextVar("calls", default=0)

    def f(x):
        variable.set(variable.get() + 1)
        return x * variable.get()

    return f, variable.get


@writes
def to_a_thread_local():
    local = threading.local()
    local.calls = 0

    def f(x):
        local.calls += 1
        return x * local.calls

    return f, lambda: local.calls


@writes
def to_the_environment():
    os.environ["SCALE_OF_A_TEST"] = "1"

    def f(x):
        os.environ["SCALE_OF_A_TEST"] += "1"
        return x * len(os.environ["SCALE_OF_A_TEST"])

    return f, lambda: os.environ.get("SCALE_OF_A_TEST")


@writes
def to_a_dictionary_of_a_user():
    held = collections.UserDict(calls=0)

    def f(x):
        held["calls"] += 1
        return x * held["calls"]

    return f, lambda: dict(held)


class WritesTest(unittest.TestCase):
    def run_row(self, make) -> None:
        x = torch.arange(1.0, 3.0)
        with torch.no_grad():
            program, state = make()
            expected = []
            for _ in range(3):
                result = program(x)
                expected.append((result, state()))
            program, state = make()
            before = state()
            graph = torch_lazy_ext.extract_compiled_graph(program, (x,))
            self.assertEqual(state(), before, "the extraction left something behind")
            for result, after in expected:
                torch.testing.assert_close(graph(x), result, rtol=0, atol=0)
                self.assertEqual(state(), after)

    def run_failing(self, make) -> None:
        """Also an extraction that fails leaves nothing behind."""
        x = torch.arange(1.0, 3.0)
        program, state = make()

        def fails(x):
            program(x)
            return x.untyped_storage()

        before = state()
        with self.assertRaises(torch_lazy_ext.UnsupportedError):
            torch_lazy_ext.extract_compiled_graph(fails, (x,))
        self.assertEqual(state(), before)

    def tearDown(self) -> None:
        os.environ.pop("SCALE_OF_A_TEST", None)


for _name, _make in WRITES.items():
    setattr(WritesTest, f"test_{_name}", functools.partialmethod(WritesTest.run_row, _make))
    _failing = functools.partialmethod(WritesTest.run_failing, _make)
    setattr(WritesTest, f"test_{_name}_and_fails", _failing)


class IdentityTest(unittest.TestCase):
    """Objects that are an argument and part of the program's state."""

    def test_default_object(self) -> None:
        class Config:
            pass

        default = Config()
        default.scale = 2.0
        other = Config()
        other.scale = 2.0

        def f(x, config):
            return x * config.scale if config is default else x * 7

        x = torch.ones(2)
        graph = torch_lazy_ext.extract_compiled_graph(f, (x, default))
        for config in (default, other, default, other):
            torch.testing.assert_close(graph(x, config), f(x, config))
        self.assertEqual(len(graph.specializations), 2)

    def test_key_of_a_dictionary(self) -> None:
        class Key:
            pass

        a, b = Key(), Key()
        table = {a: 2.0, b: 5.0}

        def f(x, key):
            return x * table[key]

        x = torch.ones(2)
        graph = torch_lazy_ext.extract_compiled_graph(f, (x, a))
        for key in (a, b, a):
            torch.testing.assert_close(graph(x, key), f(x, key))
        self.assertEqual(len(graph.specializations), 2)

    def test_list_in_two_places(self) -> None:
        held = []

        def f(x, items):
            items.append(1)
            return x * len(held)

        x = torch.ones(2)
        graph = torch_lazy_ext.extract_compiled_graph(f, (x, held))
        self.assertEqual(held, [])
        torch.testing.assert_close(graph(x, held), x)
        self.assertEqual(held, [1])
        torch.testing.assert_close(graph(x, []), x)
        self.assertEqual(held, [1])

    def test_attributes_of_an_argument(self) -> None:
        def f(x):
            return x * x.scale

        x = torch.ones(2)
        x.scale = 2.0
        graph = torch_lazy_ext.extract_compiled_graph(f, (x,))
        torch.testing.assert_close(graph(x), f(x))


class ArgumentsTest(unittest.TestCase):
    """Containers that a program is given and changes."""

    def check(self, change, *make) -> None:
        def f(x, held):
            change(held)
            return x * len(held)

        x = torch.ones(2)
        example = make[0]()
        graph = torch_lazy_ext.extract_compiled_graph(f, (x, example))
        self.assertEqual(example, make[0]())
        for made in make:
            expected, given = made(), made()
            torch.testing.assert_close(graph(x, given), f(x, expected))
            self.assertEqual(given, expected)

    def test_set(self) -> None:
        self.check(lambda s: s.add(len(s)), lambda: {10}, lambda: {10, 11}, lambda: {10})

    def test_bytes(self) -> None:
        self.check(lambda b: b.append(7), lambda: bytearray(b"a"), lambda: bytearray(b"bc"))

    def test_array(self) -> None:
        self.check(
            lambda a: a.append(7),
            lambda: array.array("i", [1]),
            lambda: array.array("i", [1, 2]),
            lambda: array.array("l", [1]),
        )

    def test_tuple_with_its_own_length(self) -> None:
        class Odd(tuple):
            def __len__(self):
                raise NotImplementedError

        net, x = nn.Linear(2, 2), torch.ones(2)
        net.odd = Odd((1, 2))
        graph = torch_lazy_ext.extract_compiled_graph(net, (x,))
        torch.testing.assert_close(graph(x), net(x))
        graph = torch_lazy_ext.extract_compiled_graph(lambda x, odd: x * odd[0], (x, Odd((3,))))
        torch.testing.assert_close(graph(x, Odd((3,))), x * 3)
        torch.testing.assert_close(graph(x, Odd((4,))), x * 4)


if __name__ == "__main__":
    unittest.main()
