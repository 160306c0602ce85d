# Owner(s): ["oncall: jit"]

"""Random numbers: after torch.manual_seed a replay draws what eager draws, and no more."""

import concurrent.futures
import itertools
import os
import random
import threading
import unittest
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from oracle import (
    Call,
    check,
    check_refused,
    expected_failures,
    makefunctiontest,
    maketest,
    tensors,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

X = tensors((4, 3))

FACTORIES = {
    "rand": lambda x: torch.rand(2, 3),
    "rand_like": lambda x: torch.rand_like(x),
    "randn": lambda x: torch.randn(2, 3),
    "randn_like": lambda x: torch.randn_like(x),
    "randn_double": lambda x: torch.randn(2, 3, dtype=torch.float64),
    "randn_complex": lambda x: torch.randn(2, 3, dtype=torch.complex64),
    "randn_of_sixteen": lambda x: torch.randn(16),  # A vectorized path of its own.
    "randn_of_many": lambda x: torch.randn(1000),
    "randn_device": lambda x: torch.randn(3, device="cpu"),
    "randint": lambda x: torch.randint(10, (2, 3)),
    "randint_low": lambda x: torch.randint(-5, 5, (2, 3), dtype=torch.int32),
    "randint_like": lambda x: torch.randint_like(x, 10),
    "randint_large": lambda x: torch.randint(0, 2**40, (3,)),
    "randperm": lambda x: torch.randperm(7),
    "randperm_int32": lambda x: torch.randperm(7, dtype=torch.int32),
    "normal_tensors": lambda x: torch.normal(x, x.abs()),
    "normal_mean": lambda x: torch.normal(x),
    "normal_std": lambda x: torch.normal(0.5, x.abs()),
    "normal_size": lambda x: torch.normal(0.0, 2.0, (2, 3)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_p": lambda x: torch.bernoulli(x, 0.3),
    "multinomial": lambda x: torch.multinomial(x.softmax(1), 2),
    "multinomial_replacement": lambda x: torch.multinomial(x.softmax(1), 5, replacement=True),
    "poisson": lambda x: torch.poisson(x.abs() * 4),
    "binomial": lambda x: torch.binomial(x.abs().round() + 3, x.sigmoid()),
    "standard_gamma": lambda x: torch._standard_gamma(x.abs() + 1),
    "dirichlet": lambda x: torch._sample_dirichlet(x.abs() + 1),
    "normal_": lambda x: x.clone().normal_(1, 2),
    "uniform_": lambda x: x.clone().uniform_(-1, 1),
    "exponential_": lambda x: x.clone().exponential_(0.5),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "geometric_": lambda x: x.clone().geometric_(0.3),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "random_": lambda x: x.clone().random_(),
    "random_to": lambda x: x.clone().random_(7),
    "random_from_to": lambda x: x.clone().random_(-3, 7),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.2),
    "bernoulli_tensor_": lambda x: x.clone().bernoulli_(x.sigmoid()),
    "new_normal": lambda x: x.new_empty(5).normal_(),
    "empty_uniform": lambda x: torch.empty(3, 2).uniform_(),
    "strided_target": lambda x: torch.zeros(6, 3)[::2].normal_(),
    "init_kaiming": lambda x: nn.init.kaiming_uniform_(torch.empty(3, 3)),
    "init_trunc_normal": lambda x: nn.init.trunc_normal_(torch.empty(3, 3)),
    "init_orthogonal": lambda x: nn.init.orthogonal_(torch.empty(3, 3)),
    "distribution_normal": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "distribution_categorical": lambda x: torch.distributions.Categorical(
        logits=x, validate_args=False
    ).sample(),
}

REGULARIZERS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout_transposed": lambda x: F.dropout(x.t(), 0.5),
    "dropout_one": lambda x: F.dropout(x, 1.0),
    "dropout_zero": lambda x: F.dropout(x, 0.0),
    "dropout_in_place": lambda x: F.dropout(x * 1, 0.5, inplace=True),
    "dropout_twice": lambda x: F.dropout(F.dropout(x, 0.2), 0.2),
    "dropout1d": lambda x: F.dropout1d(x[None], 0.5),
    "dropout2d": lambda x: F.dropout2d(x[None, :, :, None], 0.5),
    "dropout3d": lambda x: F.dropout3d(x[None, :, :, None, None], 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[None], 0.5, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu_of_transposed": lambda x: F.rrelu(x.reshape(2, -1).t(), training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "gumbel_softmax_hard": lambda x: F.gumbel_softmax(x, hard=True),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
        x.view(1, 3, 2, 2).repeat(1, 1, 3, 3), 2, output_size=3
    ),
    "attention_dropout": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], dropout_p=0.5
    ),
    "feature_dropout": lambda x: torch.feature_dropout(x[None], 0.5, True),
}


class FactoryTest(unittest.TestCase):
    """Each way to draw numbers, alone, then between two others that show the order."""


class RegularizerTest(unittest.TestCase):
    """Dropout and its relatives, in training and not."""


def _between(draw: Any) -> Any:
    return lambda x: (torch.rand(2), draw(x), torch.randn(2), draw(x))


for _cls, _table in ((FactoryTest, FACTORIES), (RegularizerTest, REGULARIZERS)):
    for _name, _draw in _table.items():
        setattr(_cls, f"test_{_name}", makefunctiontest(_draw, X))
        setattr(_cls, f"test_{_name}_between_others", makefunctiontest(_between(_draw), X))


# Of a tensor of shape (4, 16), or a part of it, that does not lie in memory as a new one would.
LAYOUTS = {
    "transposed": lambda x: x.t(),
    "every_second_column": lambda x: x[:, ::2],
    "rows_and_columns": lambda x: x[::2, 1:],
    "one_column": lambda x: x[:, 3],
    "permuted": lambda x: x.view(4, 4, 4).permute(2, 0, 1),
}
FILLS = {
    "uniform_": lambda x: x.uniform_(),
    "normal_": lambda x: x.normal_(),
    "bernoulli_": lambda x: x.bernoulli_(0.4),
    "random_": lambda x: x.random_(9),
    "exponential_": lambda x: x.exponential_(),
    "log_normal_": lambda x: x.log_normal_(),
    "dropout_": lambda x: F.dropout(x.add_(1), inplace=True),
    "rand_out": lambda x: torch.rand(x.shape, out=x),
    "randn_out": lambda x: torch.randn(x.shape, out=x),
    "randint_out": lambda x: torch.randint(2, 9, x.shape, out=x),
    "bernoulli_out": lambda x: torch.bernoulli(torch.full(x.shape, 0.5), out=x),
    "normal_out": lambda x: torch.normal(torch.zeros(x.shape), torch.ones(x.shape), out=x),
    "normal_size_out": lambda x: torch.normal(0.0, 2.0, x.shape, out=x),
}


class LayoutTest(unittest.TestCase):
    """Numbers drawn into a tensor that is there go to the places that eager puts them in."""

    test_rrelu_of_transposed = makefunctiontest(
        lambda x: F.rrelu(x.t(), training=True), tensors((3, 4))
    )


def _fill(layout: Any, fill: Any) -> Any:
    return lambda x: (fill(layout(x)), x.sum(), torch.rand(2))


for (_layout, _view), (_name, _draw) in itertools.product(LAYOUTS.items(), FILLS.items()):
    setattr(
        LayoutTest,
        f"test_{_name}_{_layout}",
        makefunctiontest(_fill(_view, _draw), tensors((4, 16))),
    )


def _unused(x):
    torch.randn(3)
    return x + torch.rand(3)


def _only_unused(x):
    torch.rand(3)
    F.dropout(x)
    return x + 1


def _equal_calls(x):
    return torch.rand(3), torch.rand(3), torch.rand(3) - torch.rand(3)


def _reversed_use(x):
    a = torch.rand(3)
    b = torch.randn(3)
    return b, a, x + b, x + a


def _through_state(x):
    a = torch.zeros(3)
    a.uniform_()
    b = a.clone()
    a.normal_()
    return a, b


def _drawn_in_loop(x):
    for _ in range(5):
        x = x + torch.randn_like(x) * 0.1
    return x


def _drawn_into_argument(x):
    x.normal_()
    x[0].uniform_()


def _drawn_under_condition(x, k):
    return x + torch.rand(3) if k else x


def _seeded_inside(x):
    torch.manual_seed(7)
    return x + torch.rand(3)


def _seeded_inside_late(x):
    a = torch.rand(3)
    torch.manual_seed(7)
    return a, torch.rand(3)


def _forked_inside(x):
    with torch.random.fork_rng(devices=[]):
        a = torch.rand(3)
    return a, torch.rand(3)


def _forked_and_seeded_inside(x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        a = torch.rand(3)
    return a, torch.rand(3)


def _state_restored_inside(x):
    state = torch.get_rng_state()
    a = torch.rand(3)
    torch.set_rng_state(state)
    return a, torch.rand(3)


def _random_value_read(x):
    # Which way it goes depends on the generator alone.
    return x + 1 if torch.rand(()).item() < 0.5 else x - 1


def _random_values_read(x):
    for _ in range(3):
        x = _random_value_read(x)
    return x


def _random_size(x):
    return torch.zeros(int(torch.randint(1, 4, ()).item()))


def _random_index(x):
    return x[torch.randperm(4)], x[torch.randint(4, (2,))]


def _data_branch_after_drawing(x):
    y = torch.rand(3)
    return y + 1 if x.sum() > 0 else y - torch.rand(3)


def _masked_noise(x):
    return torch.where(torch.rand_like(x) < 0.5, x, torch.zeros_like(x))


class OrderTest(unittest.TestCase):
    """Program order is kept, no draw is dropped or merged, and the state afterwards is eager's."""

    test_unused = makefunctiontest(_unused, X)
    test_only_unused = makefunctiontest(_only_unused, X)
    test_equal_calls = makefunctiontest(_equal_calls, X)
    test_reversed_use = makefunctiontest(_reversed_use, X)
    test_through_state = makefunctiontest(_through_state, X)
    test_drawn_in_loop = makefunctiontest(_drawn_in_loop, X)
    test_drawn_into_argument = makefunctiontest(_drawn_into_argument, X)
    test_drawn_under_condition = makefunctiontest(
        _drawn_under_condition, lambda i: (torch.randn(3), bool(i % 2)), captures=2, calls=5
    )
    test_masked_noise = makefunctiontest(_masked_noise, X)
    test_random_index = makefunctiontest(_random_index, X)
    test_random_value_read = makefunctiontest(_random_value_read, X, calls=10, captures=2)
    test_random_values_read = makefunctiontest(_random_values_read, X, calls=12, captures=8)
    test_random_size = makefunctiontest(_random_size, X, calls=10, captures=3)
    test_data_branch_after_drawing = makefunctiontest(
        _data_branch_after_drawing,
        lambda i: (torch.randn(3).abs() * (-1) ** i,),
        calls=6,
        captures=2,
    )
    test_no_draw_moves_nothing = makefunctiontest(lambda x: x * 2, X)
    test_error_after_drawing = makefunctiontest(
        lambda x: (torch.rand(3), torch.rand(3) + x),
        lambda i: (torch.randn(4 if i % 2 else 3),),
        calls=4,
        captures=None,
    )
    test_no_arguments = makefunctiontest(lambda: torch.randn(3) + torch.rand(3), lambda: ())


class SeedingTest(unittest.TestCase):
    """The program itself sets, saves or restores the generator."""

    test_seeded_inside = makefunctiontest(_seeded_inside, X)
    test_seeded_inside_late = makefunctiontest(_seeded_inside_late, X)
    test_forked_inside = makefunctiontest(_forked_inside, X)
    test_forked_and_seeded_inside = makefunctiontest(_forked_and_seeded_inside, X)
    test_state_restored_inside = makefunctiontest(_state_restored_inside, X)
    test_initial_seed_read = makefunctiontest(lambda x: (torch.initial_seed(), x + 1), X,
                                              captures=None)  # fmt: skip


def _state_returned(x):
    before = torch.get_rng_state()
    y = torch.rand(2)
    return before, y, torch.get_rng_state().sum()


def _state_written_by_hand(x):
    state = torch.get_rng_state()
    torch.rand(3)
    torch.set_rng_state(state.clone())
    return torch.rand(3)


def _seeded_twice(x):
    torch.manual_seed(3)
    a = torch.rand(2)
    torch.manual_seed(3)
    b = torch.rand(2)
    torch.manual_seed(-3)
    return a, b, a - b, torch.initial_seed(), torch.manual_seed(4).initial_seed()


def _default_generator(x):
    torch.default_generator.manual_seed(5)
    a = torch.rand(2)
    seed = torch.default_generator.initial_seed()
    torch.default_generator.manual_seed(6)
    return a, seed, torch.rand(2, generator=torch.default_generator)


for _program in (_default_generator, _state_returned, _state_written_by_hand, _seeded_twice):
    setattr(SeedingTest, f"test{_program.__name__}", makefunctiontest(_program, X))


class SeedingRefusedTest(unittest.TestCase):
    def test_refused(self):
        in_a_tuple = (torch.Generator(),)
        for program, pattern in (
            (lambda x: torch.rand(torch.seed() % 2 + 1), "torch.seed"),
            (lambda x: torch.Generator().manual_seed(3), "returns or keeps a torch.Generator"),
            (lambda x, g=in_a_tuple: torch.rand(2, generator=g[0].manual_seed(1)), "by a way"),
        ):  # fmt: skip
            with self.subTest(pattern):
                check_refused(lambda p=program: p, X, UnsupportedError, pattern)

    def test_a_wrong_seed_is_eagers_error(self):
        check(lambda: lambda x, s: torch.manual_seed(s), lambda: (torch.ones(2), 2**70))


class OwnGenerator(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        self.draw = draw

    def forward(self, x):
        return self.draw(x, self.generator)


GENERATOR = {
    "rand": lambda x, g: torch.rand(2, 3, generator=g),
    "randn": lambda x, g: torch.randn(2, 3, generator=g),
    "randint": lambda x, g: torch.randint(0, 9, (4,), generator=g),
    "randperm": lambda x, g: torch.randperm(6, generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x.sigmoid(), generator=g),
    "multinomial": lambda x, g: torch.multinomial(x.softmax(1), 2, generator=g),
    "normal": lambda x, g: torch.normal(0.0, 1.0, (3,), generator=g),
    "normal_": lambda x, g: torch.empty(3).normal_(generator=g),
    "uniform_": lambda x, g: x.uniform_(generator=g),
    "poisson": lambda x, g: torch.poisson(x.abs(), generator=g),
    "two_generators": lambda x, g: (
        torch.rand(2, generator=g), torch.rand(2), torch.rand(2, generator=g),
    ),
    "unused": lambda x, g: (torch.rand(2, generator=g), x)[1],
    "seeded_inside": lambda x, g: torch.rand(3, generator=g.manual_seed(9)),
    "two_made_inside": lambda x, g: (lambda a, b: (
        torch.rand(2, generator=a), torch.rand(2, generator=b), torch.rand(2, generator=a)
    ))(torch.Generator(), torch.Generator().manual_seed(7)),
    "state_moved": lambda x, g: (
        torch.rand(2, generator=g.set_state(torch.Generator().manual_seed(3).get_state())),
        g.initial_seed(),
    ),
    "made_inside": lambda x, g: torch.rand(3, generator=torch.Generator().manual_seed(4)),
    "default_generator": lambda x, g: torch.rand(3, generator=torch.default_generator),
}  # fmt: skip


class SeedOfThreadsTest(unittest.TestCase):
    def test_threads_that_seed_extract_and_train(self) -> None:
        """The default generator is everybody's: a seed of another thread stays, and is no error."""
        errors: list[str] = []

        def train(seed: int) -> None:
            torch.manual_seed(seed)
            model = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

            def step(x: torch.Tensor) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.dropout(model(x), 0.5).pow(2).sum()
                loss.backward()
                optimizer.step()
                return loss.detach()

            graph = extract_compiled_graph(step, (torch.ones(2, 3),))
            for _ in range(3):
                graph(torch.ones(2, 3))

        def work(k: int) -> None:
            try:
                for i in range(6):
                    train(100 * k + i)
            except Exception as e:
                errors.append(f"{type(e).__name__}: {e}")

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])

    def test_seed_of_another_thread_stays(self) -> None:
        """It comes in the middle of a capture."""

        def seed(value: int) -> None:
            thread = threading.Thread(target=torch.default_generator.manual_seed, args=(value,))
            thread.start()
            thread.join()

        asked, answered = os.pipe(), os.pipe()
        generator = torch.default_generator

        def other() -> None:
            while os.read(asked[0], 1) == b"s":
                generator.manual_seed(77)
                os.write(answered[1], b"d")

        def program(x: torch.Tensor) -> torch.Tensor:
            os.write(asked[1], b"s")
            os.read(answered[0], 1)
            return x + torch.rand(2)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            graph = extract_compiled_graph(program, (torch.ones(2),))
            self.assertEqual(torch.initial_seed(), 77)
        finally:
            os.write(asked[1], b"e")
            thread.join()
            for end in (*asked, *answered):
                os.close(end)
        seed(78)
        want = torch.ones(2) + torch.rand(2)
        seed(78)
        self.assertTrue(torch.equal(graph(torch.ones(2)), want))

    def test_seed_of_another_thread_stays_when_numbers_are_put_back(self) -> None:
        """It comes while a kernel runs: of a capture that looks at data, and of a call in vain."""
        threads_seed = [False]
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        pool.submit(int).result()

        @torch.library.custom_op("torch_lazy_ext_test_randomness::meanwhile", mutates_args=())
        def meanwhile(x: torch.Tensor) -> torch.Tensor:
            if threads_seed.pop():
                pool.submit(torch.default_generator.manual_seed, 77).result()
            threads_seed.append(False)
            return x.clone()

        @meanwhile.register_fake
        def _(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x)

        def program(x: torch.Tensor) -> torch.Tensor:
            y = meanwhile(x + torch.rand(2))
            return y * 2 if y.sum() > 100 else y

        for seeded in (False, True):
            with self.subTest(seeded=seeded):
                want = 77 if seeded else 5
                torch.manual_seed(5)
                threads_seed[:] = [seeded]
                graph = extract_compiled_graph(program, (torch.ones(2),))
                self.assertEqual(torch.initial_seed(), want)
                graph(torch.ones(2))
                torch.manual_seed(5)
                threads_seed[:] = [seeded]
                result = graph(torch.full((2,), 100.0))
                self.assertEqual(torch.initial_seed(), want)
                if not seeded:
                    torch.manual_seed(5)
                    self.assertTrue(torch.equal(result, program(torch.full((2,), 100.0))))

    def test_own_seed_is_put_back(self) -> None:
        """A graph that seeds by itself, and a call of it in vain."""

        def program(x: torch.Tensor) -> torch.Tensor:
            y = x + torch.rand(2)
            torch.manual_seed(9)
            y = y + torch.rand(2)
            return y * 2 if y.sum() > 100 else y

        torch.manual_seed(5)
        graph = extract_compiled_graph(program, (torch.ones(2),))
        self.assertEqual(torch.initial_seed(), 5)
        graph(torch.ones(2))
        for x in (torch.full((2,), 100.0), torch.ones(2)):
            torch.manual_seed(6)
            want = program(x)
            torch.manual_seed(6)
            self.assertTrue(torch.equal(graph(x), want))


class GeneratorTest(unittest.TestCase):
    """A Generator argument is honoured: its state is drawn from, and moves as in eager."""

    test_other_generator_on_each_call = makefunctiontest(
        lambda x, g: x + torch.rand(3, generator=g),
        lambda i: (torch.randn(3), torch.Generator().manual_seed(i)),
        captures=None,
    )
    test_generator_by_keyword = makefunctiontest(
        lambda x, generator=None: torch.randn(3, generator=generator) + x,
        lambda i: Call(
            torch.randn(3), generator=torch.Generator().manual_seed(i) if i % 2 else None
        ),
        captures=None,
        calls=4,
    )
    test_seeded_between_calls = maketest(
        lambda: OwnGenerator(GENERATOR["rand"]),
        X,
        between=lambda m, i: m.generator.manual_seed(i),
    )
    test_generator_replaced = maketest(
        lambda: OwnGenerator(GENERATOR["randn"]),
        X,
        captures=None,
        between=lambda m, i: setattr(m, "generator", torch.Generator().manual_seed(i)),
    )

    def test_made_inside_in_threads(self):
        """A generator that the program makes is each call's own."""

        def program(n):
            generator = torch.Generator().manual_seed(1)
            # Long enough for threads to be switched between two of them.
            return torch.cat([torch.rand(100_000, generator=generator) for _ in range(n)])

        graph = extract_compiled_graph(program, (20,))
        graph(20)
        expected = program(20)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for result in pool.map(lambda _: graph(20), range(16)):
                self.assertTrue(torch.equal(result, expected))


for _name, _draw in GENERATOR.items():
    setattr(GeneratorTest, f"test_{_name}", maketest(lambda d=_draw: OwnGenerator(d), X))


class ModuleRandomnessTest(unittest.TestCase):
    test_dropout = maketest(lambda: nn.Dropout(0.3), X, calls=6)
    test_dropout_eval = maketest(lambda: nn.Dropout(0.3).eval(), X)
    test_deep_dropout = maketest(lambda: nn.Sequential(*[nn.Dropout(0.1) for _ in range(6)]), X)
    test_lstm_dropout = maketest(
        lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.4), tensors((5, 2, 3)), exact=False
    )
    test_transformer_layer = maketest(
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2), tensors((3, 2, 4)), exact=False
    )
    test_attention_dropout = maketest(
        lambda: (lambda m: lambda x: m(x, x, x))(nn.MultiheadAttention(4, 2, dropout=0.3)),
        tensors((3, 2, 4)),
        exact=False,
    )
    test_drop_path_style = makefunctiontest(
        lambda x: x * (torch.rand(x.shape[0], 1) > 0.5).float() / 0.5, X
    )
    test_variational = maketest(lambda: _Variational(), X, exact=False)

    def test_extraction_leaves_the_generator_alone(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        graph = extract_compiled_graph(nn.Dropout(), (torch.ones(5, 5),))
        self.assertTrue(torch.equal(before, torch.get_rng_state()))
        graph(torch.ones(5, 5))
        self.assertFalse(torch.equal(before, torch.get_rng_state()))

    def test_replays_differ_without_a_seed(self):
        graph = extract_compiled_graph(lambda: torch.randn(100), ())
        self.assertFalse(torch.equal(graph(), graph()))


class _Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        mean, spread = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + torch.randn_like(mean) * spread.exp()), mean


# Every entry that draws from the default generator on one of its samples: a test below finds them.
RANDOM_OPERATORS = (
    "bernoulli",
    "cauchy",
    "exponential",
    "geometric",
    "log_normal",
    "multinomial",
    "nn.functional.alpha_dropout",
    "nn.functional.dropout",
    "nn.functional.dropout2d",
    "nn.functional.dropout3d",
    "nn.functional.feature_alpha_dropout.with_train",
    "nn.functional.fractional_max_pool2d",
    "nn.functional.fractional_max_pool3d",
    "nn.functional.multi_head_attention_forward",
    "nn.functional.rrelu",
    "nn.functional.scaled_dot_product_attention",
    "normal",
    "normal.in_place",
    "normal.number_mean",
    "pca_lowrank",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "svd_lowrank",
    "uniform",
)


def _full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


INEXACT = ("nn.functional.multi_head_attention_forward", "pca_lowrank", "svd_lowrank")
OPERATORS = {_full_name(op): op for op in op_db if not op.name.startswith("jiterator")}


def _samples(op: Any) -> list[Any]:
    if not op.dtypes:  # None on CPU.
        return []
    dtype = torch.float32 if torch.float32 in op.dtypes else min(op.dtypes, key=str)
    return list(op.sample_inputs("cpu", dtype, requires_grad=False))


def unseeded() -> Any:
    """OpInfo sets a seed before each of its random operators, and here the test does."""
    return mock.patch.object(
        common_methods_invocations,
        "wrapper_set_seed",
        lambda op, *args, **kwargs: op(*args, **kwargs),
    )


def draws(op: Any) -> bool:
    """Whether one of the operator's samples moves the default generator."""
    for sample in _samples(op)[:6]:
        before = torch.get_rng_state()
        with torch.no_grad():
            op.op(sample.input, *sample.args, **sample.kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            return True
    return False


class OpInfoTest(unittest.TestCase):
    """Every random operator of OpInfo, on each of its samples."""

    def _check(self, op: Any) -> None:
        count = len(_samples(op))
        for k in range(min(count, 12)):
            with self.subTest(sample=k), unseeded():

                def inputs(i: int, k: int = k) -> Call:
                    sample = _samples(op)[k]
                    return Call(sample.input, *sample.args, **sample.kwargs)

                check(
                    lambda: op.op,
                    inputs,
                    exact=_full_name(op) not in INEXACT,
                    # Some samples put random numbers into Python arguments.
                    captures=None,
                )

    def test_the_list_is_complete(self):
        with unseeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Deprecations of the operators.
            found = {name for name, op in OPERATORS.items() if draws(op)}
        self.assertEqual(found, set(RANDOM_OPERATORS))


for _name in RANDOM_OPERATORS:
    setattr(
        OpInfoTest,
        f"test_{_name.replace('.', '_')}",
        lambda self, name=_name: self._check(OPERATORS[name]),
    )


def _distribution(make: Any) -> Any:
    def program(x: Tensor) -> Tensor:
        distribution = make(x)
        return distribution.sample((2,))

    return makefunctiontest(program, X)


class DistributionTest(unittest.TestCase):
    """torch.distributions, without its checks of values (those read data)."""

    test_uniform = _distribution(
        lambda x: torch.distributions.Uniform(x, x + 1, validate_args=False)
    )
    test_laplace = _distribution(lambda x: torch.distributions.Laplace(x, 1.0, validate_args=False))
    test_gamma = _distribution(
        lambda x: torch.distributions.Gamma(x.abs() + 1, 1.0, validate_args=False)
    )
    test_beta = _distribution(
        lambda x: torch.distributions.Beta(x.abs() + 1, 2.0, validate_args=False)
    )
    test_bernoulli = _distribution(
        lambda x: torch.distributions.Bernoulli(logits=x, validate_args=False)
    )
    test_validated_normal = _distribution(lambda x: torch.distributions.Normal(x, x.abs() + 1))


class ForeignGeneratorTest(unittest.TestCase):
    """Numbers from generators that are not torch's would be the same on each replay: refused."""

    def check(self, draw: Callable[[], float]) -> None:
        check_refused(
            lambda: lambda x: x * draw(), tensors((2, 3)), UnsupportedError, "draws numbers from"
        )

    def test_python(self):
        self.check(random.random)

    def test_numpy(self):
        self.check(np.random.rand)


# What is not as eager yet, with the reason; a test of these that passes fails the run.
expected_failures(
    {
        "test_init_trunc_normal": "captured once more although nothing changed: the first run is with other values",
        "test_init_trunc_normal_between_others": "captured once more although nothing changed: the first run is with other values",
    }
)(FactoryTest)


if __name__ == "__main__":
    unittest.main()
