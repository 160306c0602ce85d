# Owner(s): ["oncall: jit"]

"""Results of a replay: their structure, the memory they share, strides and memory format."""

import collections
import dataclasses
import enum
import unittest
from typing import Any, NamedTuple

import numpy
import torch
from oracle import Call, makefunctiontest, maketest, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    y: Tensor
    name: str
    count: int = 0


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    y: Tensor
    nested: Record


class Registered:
    """A container that pytree has been told about."""

    def __init__(self, y: Any, tag: str) -> None:
        self.y = y
        self.tag = tag


pytree.register_pytree_node(
    Registered, lambda r: ([r.y], r.tag), lambda children, tag: Registered(*children, tag)
)


class Plain:
    """A class of the user's own that nobody registered anywhere."""

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.seen = [y, 3]


class Colour(enum.Enum):
    RED = 1


class TorchOutput(collections.OrderedDict):
    """Behaves as ModelOutput of transformers: keys are attributes, and the first is [0]."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


def of_structure(make: Any) -> Any:
    """`make` puts two tensors, the results of operators on the argument, into a structure."""
    return makefunctiontest(lambda x: make(x + 1, x * 2), tensors((2, 3)))


def _moved(a, b):
    result = collections.OrderedDict(a=a, b=b)
    result.move_to_end("a")
    return result


class StructureTest(unittest.TestCase):
    test_structure_tensor = of_structure(lambda a, b: a)
    test_structure_tuple = of_structure(lambda a, b: (a, b))
    test_structure_tuple_of_one = of_structure(lambda a, b: (a,))
    test_structure_list = of_structure(lambda a, b: [a, b])
    test_structure_empty_tuple = of_structure(lambda a, b: ())
    test_structure_empty_list_and_dict = of_structure(lambda a, b: ([], {}, a))
    test_structure_dict = of_structure(lambda a, b: {"b": b, "a": a})
    test_structure_dict_int_keys = of_structure(lambda a, b: {3: a, 1: b, "x": None})
    test_structure_ordered_dict = of_structure(
        lambda a, b: collections.OrderedDict([("z", a), ("a", b)])
    )
    test_structure_ordered_dict_moved = of_structure(_moved)
    test_structure_default_dict = of_structure(
        lambda a, b: collections.defaultdict(list, {"k": [a, b]})
    )
    test_structure_deque = of_structure(lambda a, b: collections.deque([a, b], maxlen=3))
    test_structure_list_in_two_places = of_structure(lambda a, b: [[a, b]] * 2)
    test_structure_deque_in_two_places = of_structure(lambda a, b: [collections.deque([a])] * 2)
    test_structure_namedtuple = of_structure(lambda a, b: Pair(a, [b, None]))
    test_structure_nested = of_structure(lambda a, b: {"x": [(a, {"y": b}), None], "n": 1})
    test_structure_dataclass = of_structure(lambda a, b: Record(a, "n", 3))
    test_structure_frozen_dataclass = of_structure(lambda a, b: FrozenRecord(a, Record(b, "n")))
    test_structure_registered = of_structure(lambda a, b: Registered([a, b], "tag"))
    test_structure_plain_object = of_structure(lambda a, b: Plain(a))
    test_structure_model_output = of_structure(lambda a, b: TorchOutput(logits=a, loss=b))
    test_structure_set_of_numbers = of_structure(lambda a, b: ({1, 2}, frozenset({"x"}), a))
    test_structure_torch_size = of_structure(lambda a, b: (a.shape, a.size(), a))
    test_structure_no_tensor = of_structure(lambda a, b: (1, "two", 3.0, None, True, 1 + 2j))
    test_structure_none = of_structure(lambda a, b: None)
    test_structure_numbers = of_structure(lambda a, b: (a, 1, 2.5, float("nan"), -0.0, False))
    test_structure_strings_and_bytes = of_structure(lambda a, b: {"s": "text", "b": b"raw", "y": a})
    test_structure_dtype_and_device = of_structure(
        lambda a, b: (a.dtype, a.device, a.layout, torch.strided, torch.contiguous_format)
    )
    test_structure_enum = of_structure(lambda a, b: (Colour.RED, a))
    test_structure_ellipsis_and_slice = of_structure(lambda a, b: (..., slice(1, None), a))
    test_structure_metadata = of_structure(
        lambda a, b: (a.ndim, a.stride(), a.numel(), a.is_contiguous(), a.element_size(), len(a))
    )
    test_structure_type_of_tensor = of_structure(
        lambda a, b: (type(a), a.type(), a.is_cpu, a.is_cuda, isinstance(a, nn.Parameter))
    )
    test_structure_tensor_flags = of_structure(
        lambda a, b: (
            a.is_leaf,
            a.requires_grad,
            a.is_sparse,
            a.is_quantized,
            a.is_floating_point(),
        )
    )
    test_return_type_max = makefunctiontest(lambda x: torch.max(x, dim=1), tensors((2, 3)))
    test_return_type_topk = makefunctiontest(lambda x: x.topk(2), tensors((2, 3)))
    test_return_type_svd = makefunctiontest(
        lambda x: torch.linalg.svd(x), tensors((3, 3)), exact=False
    )
    test_return_type_fields = makefunctiontest(
        lambda x: {"m": x.sort().values, "both": x.median(0), "i": x.median(0).indices},
        tensors((5, 3)),
    )
    test_split_is_a_tuple = makefunctiontest(lambda x: x.exp().split(2), tensors((5, 3)))
    test_unbind_is_a_tuple = makefunctiontest(lambda x: x.exp().unbind(1), tensors((2, 3)))

    test_numpy_scalar_in_two_places = makefunctiontest(
        lambda x: (lambda k: [k, {"k": k}])(numpy.float32(2)), tensors((2,))
    )
    test_numpy_array_in_two_places = makefunctiontest(
        lambda x: (lambda k: [k, {"k": k}])(numpy.ones(2)), tensors((2,))
    )

    def test_numpy_scalars_are_fresh(self):
        import torch_lazy_ext

        x = torch.ones(2)
        graph = torch_lazy_ext.extract_compiled_graph(lambda x: numpy.float64(2), (x,))
        self.assertIsNot(graph(x), graph(x))

    def test_set_in_two_places(self):
        import torch_lazy_ext

        x = torch.ones(2)
        graph = torch_lazy_ext.extract_compiled_graph(lambda x: [{1, 2}] * 2, (x,))
        first, second = graph(x)
        self.assertIs(first, second)

    # A container must be a new one on each call, or the caller's changes come back.
    def test_containers_are_fresh(self):
        import torch_lazy_ext

        def program(x):
            return {"list": [x + 1, 1], "inner": {"k": [2]}, "y": x}

        graph = torch_lazy_ext.extract_compiled_graph(program, (torch.randn(2),))
        first = graph(torch.randn(2))
        first["list"].append(7)
        first["inner"]["k"].append(8)
        second = graph(torch.randn(2))
        self.assertEqual(len(second["list"]), 2)
        self.assertEqual(second["inner"], {"k": [2]})

    def test_mutable_leaf_is_fresh(self):
        """A set is a leaf for pytree, and still the program makes a new one on each call."""
        import torch_lazy_ext

        graph = torch_lazy_ext.extract_compiled_graph(
            lambda x: ({1, 2}, bytearray(b"ab"), x + 1), (torch.randn(2),)
        )
        first = graph(torch.randn(2))
        first[0].add(9)
        first[1].append(3)
        second = graph(torch.randn(2))
        self.assertEqual(second[0], {1, 2})
        self.assertEqual(second[1], bytearray(b"ab"))


def mutated_then(view: Any) -> Any:
    """`view` of an argument that the program has written to."""

    def program(x):
        x.mul_(2)
        return view(x)

    return makefunctiontest(program, tensors((2, 3)))


def view_then_mutated(view: Any) -> Any:
    """`view` of an argument that the program writes to afterwards."""

    def program(x):
        y = view(x)
        x.add_(1)
        return y

    return makefunctiontest(program, tensors((2, 3)))


def mutated_through(view: Any) -> Any:
    """The argument is written through a view, and both are returned."""

    def program(x):
        y = view(x)
        y.mul_(3)
        return x, y

    return makefunctiontest(program, tensors((2, 3)))


def of_intermediate(make: Any) -> Any:
    """Results over the memory of a value that the program made."""
    return makefunctiontest(lambda x: make(x + 1), tensors((2, 3)))


def _detached_and_mutated(y):
    z = y.detach()
    z.add_(1)
    return y, z


def _mutated_base_of_view(y):
    z = y[0]
    y.mul_(2)
    return y, z


def _mutated_view_alone(y):
    z = y[0]
    z.mul_(2)
    return z


def _two_views_mutated(y):
    a, b = y[0], y[:, 1]
    a.mul_(2)
    b.add_(10)
    return a, b


def _chain_of_views_mutated(y):
    a = y.t()
    b = a[1:]
    c = b.reshape(-1)
    b.add_(1)
    return a, b, c


def _regenerated_strides(y):
    y.t_()
    return y


def _overlapping_complex():
    memory = torch.randn(4, dtype=torch.complex64)
    return memory[:2], memory[1:3]


VIEWS = {
    "view": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(3, 2),
    "flatten": lambda x: x.flatten(),
    "transpose": lambda x: x.t(),
    "permute": lambda x: x.permute(1, 0),
    "select": lambda x: x[1],
    "slice": lambda x: x[:, 1:],
    "step": lambda x: x[:, ::2],
    "expand": lambda x: x[:, :1].expand(2, 4),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(0),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "diagonal": lambda x: x.diagonal(),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2), 1),
    "detach": lambda x: x.detach(),
    "alias": lambda x: x.view_as(x),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "movedim": lambda x: x.movedim(0, 1),
    "view_dtype": lambda x: x.view(torch.int32),
    "view_dtype_smaller": lambda x: x.view(torch.int16),
    "unbind": lambda x: x.unbind(0),
    "split": lambda x: x.split(2, dim=1),
    "chunk": lambda x: x.chunk(2),
    "real": lambda x: x.real,
    "data": lambda x: x.data,
    "ellipsis": lambda x: x[..., None, 1],
    "iterated": lambda x: list(x),
    "mT": lambda x: x.mT,
    "unflatten": lambda x: x.unflatten(1, (3, 1)),
    "hsplit": lambda x: x.hsplit(3),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "contiguous": lambda x: x.contiguous(),
    "to_same": lambda x: x.to(torch.float32),
    "cpu": lambda x: x.cpu(),
    "float": lambda x: x.float(),
    "positive": lambda x: +x,
    "expand_as": lambda x: x.expand_as(x),
    "broadcast_to": lambda x: x.broadcast_to(2, 2, 3),
    "atleast_3d": lambda x: torch.atleast_3d(x),
    "type_as": lambda x: x.type_as(x),
    "ravel": lambda x: x.ravel(),
}
# Not in-place targets: expanded memory, tuples, and views with another dtype in between.
WRITABLE = (
    "view", "transpose", "select", "slice", "step", "diagonal", "as_strided", "detach", "unsqueeze",
    "narrow", "data", "movedim", "reshape", "contiguous", "to_same", "unflatten",
)  # fmt: skip


class AliasTest(unittest.TestCase):
    """Which memory is shared: the same as in eager, so that writing through one shows there."""

    test_argument = makefunctiontest(lambda x: x, tensors((2, 3)))
    test_argument_twice = makefunctiontest(lambda x: (x, x), tensors((2, 3)))
    test_arguments_swapped = makefunctiontest(lambda x, y: (y, x), tensors((2, 3), (2, 3)))
    test_argument_and_result = makefunctiontest(lambda x: (x, x + 1), tensors((2, 3)))
    test_argument_in_container = makefunctiontest(
        lambda d: {"same": d["a"], "list": d["b"]},
        lambda: ({"a": torch.randn(2), "b": [torch.randn(3), torch.randn(2)]},),
    )
    test_argument_container_itself = makefunctiontest(
        lambda d: d, lambda: ({"a": torch.randn(2), "b": [torch.randn(3)]},)
    )
    test_mutated_argument = makefunctiontest(lambda x: x.add_(1), tensors((2, 3)))
    test_mutated_argument_twice = makefunctiontest(
        lambda x: (x.add_(1), x, x.mul_(2)), tensors((2, 3))
    )
    test_result_twice = makefunctiontest(lambda x: (lambda y: (y, y))(x + 1), tensors((2, 3)))
    test_result_twice_nested = makefunctiontest(
        lambda x: (lambda y: {"a": y, "b": [y, y * 2]})(x + 1), tensors((2, 3))
    )
    test_view_of_argument_twice = makefunctiontest(
        lambda x: (lambda v: (v, [v], x[0]))(x[0]), tensors((2, 3))
    )
    test_view_of_mutated_result_twice = makefunctiontest(
        lambda x: (lambda y: (lambda v: (v.add_(1), v, y, v))(y[0]))(x + 1), tensors((2, 3))
    )
    test_equal_results_are_two_tensors = makefunctiontest(lambda x: (x + 1, x + 1), tensors((2, 3)))
    test_equal_constants_are_two_tensors = makefunctiontest(
        lambda x: (torch.zeros(2), torch.zeros(2), torch.tensor([1, 2]), torch.tensor([1, 2])),
        tensors((2, 3)),
    )
    test_clone_is_a_tensor_of_its_own = makefunctiontest(
        lambda x: (x.clone(), x.clone().detach()), tensors((2, 3))
    )
    test_copy_of_argument = makefunctiontest(
        lambda x: (x.to(torch.float32, copy=True), x.new_tensor([1.0]), x.reshape(-1).clone()),
        tensors((2, 3)),
    )

    test_of_intermediate_view_and_base = of_intermediate(lambda y: (y, y[0]))
    test_of_intermediate_two_views = of_intermediate(lambda y: (y[0], y[1]))
    test_of_intermediate_overlapping_views = of_intermediate(lambda y: (y[:, :2], y[:, 1:]))
    test_of_intermediate_transposed = of_intermediate(lambda y: (y.t(), y))
    test_of_intermediate_view_of_view = of_intermediate(lambda y: (y[1:].view(-1)[1:], y))
    test_of_intermediate_expand = of_intermediate(lambda y: (y[:, :1].expand(2, 5), y))
    test_of_intermediate_detach = of_intermediate(lambda y: (y.detach(), y))
    test_of_intermediate_data = of_intermediate(lambda y: (y.data, y))
    test_of_intermediate_data_after_write = of_intermediate(
        lambda y: (lambda z: (y.add_(1), y, z, y[1:], z[1:])[1:])(y.data)
    )
    test_of_intermediate_detached_and_mutated = of_intermediate(_detached_and_mutated)
    test_of_intermediate_split = of_intermediate(lambda y: y.split(1))
    test_of_intermediate_unbind_and_base = of_intermediate(lambda y: (*y.unbind(), y))
    test_of_intermediate_chunk_of_transposed = of_intermediate(lambda y: y.t().chunk(2))
    test_of_intermediate_reshape_copies = of_intermediate(lambda y: (y.t().reshape(-1), y))
    test_of_intermediate_contiguous_is_itself = of_intermediate(lambda y: (y.contiguous(), y))
    test_of_intermediate_to_is_itself = of_intermediate(lambda y: (y.to(torch.float32), y.float()))
    test_of_intermediate_mutated_base = of_intermediate(_mutated_base_of_view)
    test_of_intermediate_mutated_view_alone = of_intermediate(_mutated_view_alone)
    test_of_intermediate_two_views_mutated = of_intermediate(_two_views_mutated)
    test_of_intermediate_chain_of_views = of_intermediate(_chain_of_views_mutated)
    test_of_intermediate_t_ = of_intermediate(_regenerated_strides)
    test_of_intermediate_view_as_real = of_intermediate(
        lambda y: (lambda c: (torch.view_as_real(c), c))(torch.complex(y, y * 2))
    )
    test_of_intermediate_real_and_imag = of_intermediate(
        lambda y: (lambda c: (c.real, c.imag, c))(torch.complex(y, y * 2))
    )
    test_of_intermediate_conj = of_intermediate(
        lambda y: (lambda c: (c.conj(), c))(torch.complex(y, y * 2))
    )
    test_of_intermediate_conj_alone = of_intermediate(lambda y: torch.complex(y, y * 2).conj())
    test_of_intermediate_neg_view = of_intermediate(lambda y: torch.complex(y, y * 2).conj().imag)
    test_result_made_to_require_grad = makefunctiontest(
        lambda x: ((x + 1).requires_grad_(), x * 2), tensors((2, 3))
    )
    test_detached_result_made_to_require_grad = makefunctiontest(
        lambda x: (x + 1).detach().requires_grad_(), tensors((2, 3)), grad=True
    )
    test_conj_of_shared_memory = makefunctiontest(
        lambda x, y: (x.mul_(2), y.conj(), y.conj().imag)[1:], lambda: _overlapping_complex()
    )
    test_conj_of_transposed = makefunctiontest(
        lambda x: (lambda y: (x.t_(), y)[1])(x.conj()), tensors((2, 3), dtype=torch.complex64)
    )
    test_conj_of_argument = makefunctiontest(
        lambda x: (x.conj(), x), tensors((2, 3), dtype=torch.complex64)
    )
    test_real_of_argument = makefunctiontest(
        lambda x: (x.real, x.imag), tensors((2, 3), dtype=torch.complex64)
    )
    test_view_as_complex_of_argument = makefunctiontest(
        lambda x: torch.view_as_complex(x), tensors((3, 2))
    )
    test_view_as_real_of_argument = makefunctiontest(
        lambda x: torch.view_as_real(x), tensors((3, 2), dtype=torch.complex64)
    )
    test_views_of_two_arguments = makefunctiontest(
        lambda x, y: (x[0], y.t(), x.view(-1)), tensors((2, 3), (3, 4))
    )
    test_view_of_view_argument = makefunctiontest(
        lambda x: (x[:, 0], x), lambda: (torch.randn(4, 6)[1:3, ::2],)
    )
    test_dropout_in_eval_returns_argument = maketest(lambda: nn.Dropout().eval(), tensors((2, 3)))
    test_identity_returns_argument = maketest(lambda: nn.Identity(), tensors((2, 3)))
    test_flatten_module = maketest(lambda: nn.Flatten(), tensors((2, 3, 4)))


for _name, _view in VIEWS.items():
    setattr(AliasTest, f"test_view_of_argument_{_name}", makefunctiontest(_view, tensors((2, 3))))
    if _name not in ("view_dtype", "view_dtype_smaller"):
        setattr(AliasTest, f"test_view_of_mutated_argument_{_name}", mutated_then(_view))
        setattr(AliasTest, f"test_view_then_mutated_{_name}", view_then_mutated(_view))
    if _name in WRITABLE:
        setattr(AliasTest, f"test_mutated_through_{_name}", mutated_through(_view))


class Returns(nn.Module):
    """Returns what `take` makes of the module and the argument."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("table", torch.randn(4, 3))
        self.plain = torch.randn(2, 3)
        self.take = take

    def forward(self, x):
        return self.take(self, x)


def of_state(take: Any, **options: Any) -> Any:
    return maketest(lambda: Returns(take), tensors((2, 3)), **options)


def _buffer_counted(m, x):
    m.steps += 1
    return m.steps, m.steps[1:], x + m.steps


def _buffer_rebound(m, x):
    m.steps = m.steps + 1
    return m.steps, x


class StateResultTest(unittest.TestCase):
    """Results that are, or share memory with, parameters, buffers and attributes."""

    test_parameter_itself = of_state(lambda m, x: (m.weight, x * m.weight))
    test_parameter_alone = of_state(lambda m, x: m.weight)
    test_parameter_view = of_state(lambda m, x: m.weight[0])
    test_parameter_detached = of_state(lambda m, x: m.weight.detach())
    test_parameter_data = of_state(lambda m, x: m.weight.data)
    test_parameter_transposed = of_state(lambda m, x: (m.weight.t(), x @ m.weight.t()), exact=False)
    test_parameter_expanded = of_state(lambda m, x: m.weight[:, :1].expand(2, 5))
    test_buffer_itself = of_state(lambda m, x: (m.table, x))
    test_buffer_row = of_state(lambda m, x: m.table[1])
    test_buffer_counted = of_state(_buffer_counted)
    test_buffer_rebound = of_state(_buffer_rebound)
    test_plain_attribute = of_state(lambda m, x: (m.plain, m.plain.view(-1)))
    test_state_dict = of_state(lambda m, x: dict(m.named_parameters()))
    test_parameters_list = of_state(lambda m, x: [*m.parameters(), *m.buffers()])
    test_module_in_result = of_state(lambda m, x: (x + 1, m.training))
    test_mixed = of_state(lambda m, x: {"x": x, "w": m.weight, "v": x.view(-1), "t": m.table[:2]})


def channels_last(*shape: int) -> Any:
    return lambda: (torch.randn(shape).to(memory_format=torch.channels_last),)


def _permuted(*dims: int) -> Any:
    return lambda: (torch.randn(2, 3, 4, 5).permute(dims),)


class MemoryFormatTest(unittest.TestCase):
    """Strides of results, for arguments of every layout."""

    test_elementwise = makefunctiontest(lambda x: x.relu() + 1, channels_last(2, 3, 4, 5))
    test_conv = maketest(lambda: nn.Conv2d(3, 4, 3), channels_last(2, 3, 8, 8), exact=False)
    test_conv_with_weights_in_channels_last = maketest(
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        tensors((2, 3, 8, 8)),
        exact=False,
    )
    test_batch_norm = maketest(
        lambda: nn.BatchNorm2d(3).eval(), channels_last(2, 3, 4, 5), exact=False
    )
    test_batch_norm_in_training = maketest(
        lambda: nn.BatchNorm2d(3), channels_last(2, 3, 4, 5), exact=False
    )
    test_group_norm = maketest(lambda: nn.GroupNorm(2, 4), channels_last(2, 4, 3, 3), exact=False)
    test_max_pool = maketest(lambda: nn.MaxPool2d(2), channels_last(2, 3, 4, 6))
    test_max_pool_of_many_channels = maketest(lambda: nn.MaxPool2d(2), tensors((2, 16, 16, 16)))
    test_average_pool = maketest(lambda: nn.AvgPool2d(2), channels_last(2, 3, 4, 6), exact=False)
    test_adaptive_pool = maketest(
        lambda: nn.AdaptiveAvgPool2d(2), channels_last(2, 3, 4, 6), exact=False
    )
    test_interpolate = makefunctiontest(
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
        channels_last(2, 3, 4, 5),
        exact=False,
    )
    test_pad = makefunctiontest(lambda x: nn.functional.pad(x, (1, 1)), channels_last(2, 3, 4, 5))
    test_cat = makefunctiontest(lambda x: torch.cat([x, x + 1], 1), channels_last(2, 3, 4, 5))
    test_mixed_formats = makefunctiontest(
        lambda x, y: (x + y, y + x, x * 2 + y),
        lambda: (
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(2, 3, 4, 5),
        ),
    )
    test_to_channels_last = makefunctiontest(
        lambda x: x.to(memory_format=torch.channels_last), tensors((2, 3, 4, 5))
    )
    test_contiguous_of_channels_last = makefunctiontest(
        lambda x: (x.contiguous(), x.contiguous(memory_format=torch.channels_last)),
        channels_last(2, 3, 4, 5),
    )
    test_clone_formats = makefunctiontest(
        lambda x: (
            x.clone(),
            x.clone(memory_format=torch.contiguous_format),
            x.clone(memory_format=torch.preserve_format),
        ),
        channels_last(2, 3, 4, 5),
    )
    test_like_factories = makefunctiontest(
        lambda x: (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 3)),
        channels_last(2, 3, 4, 5),
    )
    test_one_channel_is_ambiguous = makefunctiontest(
        lambda x: (x + 1, x.is_contiguous(memory_format=torch.channels_last)),
        channels_last(2, 1, 4, 5),
    )
    test_sum_of_what_has_one_channel_last = makefunctiontest(
        lambda x: x.clone(memory_format=torch.channels_last) + x, tensors((2, 1, 3, 4))
    )
    test_channels_last_3d = makefunctiontest(
        lambda x: x * 2 + 1,
        lambda: (torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),),
    )
    test_permuted_argument = makefunctiontest(lambda x: x.exp() + x, _permuted(3, 1, 0, 2))
    test_permuted_reduction = makefunctiontest(
        lambda x: (x.sum(1), x.amax(0, keepdim=True)), _permuted(3, 1, 0, 2), exact=False
    )
    test_transposed_matmul = makefunctiontest(
        lambda x, y: (x.t() @ y, (x.t() @ y).t()), tensors((3, 4), (3, 5)), exact=False
    )
    test_transposed_result = makefunctiontest(lambda x: (x + 1).t() * 2, tensors((2, 3)))
    test_expanded_argument = makefunctiontest(
        lambda x: (x + 1, x.clone(), x.contiguous()), lambda: (torch.randn(2, 1).expand(2, 5),)
    )
    test_where_on_permuted = makefunctiontest(
        lambda x: torch.where(x > 0, x, -x), _permuted(0, 2, 3, 1)
    )
    test_empty_strided = makefunctiontest(
        lambda x: torch.empty_strided((2, 3), (1, 2)).copy_(x), tensors((2, 3))
    )
    test_einsum_strides = makefunctiontest(
        lambda x: torch.einsum("bij->bji", x), tensors((2, 3, 4))
    )
    test_sizes_of_one = makefunctiontest(
        lambda x: (x.expand(1, 3) + 1, x[:, :1] * 2, x.t()[:1]), tensors((1, 3))
    )
    test_zero_sized = makefunctiontest(
        lambda x: (x + 1, x.t(), x.sum(0), x.view(0), x[1:1]), tensors((0, 3))
    )
    test_scalar_results = makefunctiontest(
        lambda x: (x.sum(), x[0, 0], x.max(), x.norm()), tensors((2, 3)), exact=False
    )
    test_kwargs_result = makefunctiontest(
        lambda *, x, y=2: {"r": x * y}, lambda: Call(x=torch.randn(2, 3))
    )


if __name__ == "__main__":
    unittest.main()
