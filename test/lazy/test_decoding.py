# Owner(s): ["oncall: jit"]

"""Greedy decoding with a key-value cache, token by token through extracted graphs."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable
from typing import Any

import torch
from model_zoo import set_up_module
from torch import Tensor, nn

from torch_lazy_ext import CompiledGraph, extract_compiled_graph

setUpModule = set_up_module
PROMPT, TOKENS = 5, 32


class TinyLlama(nn.Module):
    """A step of greedy decoding: the next token of each text, and the logits it is chosen from."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=99,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    initializer_range=0.5,  # Large enough that the texts do not repeat one token.
                )
            ).eval()

    def forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits


def static_cache(model: TinyLlama) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.model.config, max_cache_len=PROMPT + TOKENS)


def dynamic_cache(model: TinyLlama) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.model.config)


def layers_of(cache: Any) -> list[dict[str, Any]]:
    """What each layer of a cache holds."""
    return [dict(vars(layer)) for layer in cache.layers]


class DecodingTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(torch.no_grad())
        self.model = TinyLlama()
        self.oracle = copy.deepcopy(self.model)

    def prompt(self, seed: int = 0, rows: int = 2) -> Tensor:
        return torch.randint(3, 99, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))

    def assertSameCache(self, expected: Any, actual: Any) -> None:
        self.assertEqual(len(expected.layers), len(actual.layers))
        for want, got in zip(layers_of(expected), layers_of(actual), strict=True):
            self.assertEqual(list(want), list(got))
            for name in want:
                if isinstance(want[name], Tensor):
                    torch.testing.assert_close(got[name], want[name])
                else:
                    self.assertEqual(got[name], want[name], name)

    def decode(
        self,
        step: Callable[[Tensor], tuple[Tensor, Tensor]],
        eager_step: Callable[[Tensor], tuple[Tensor, Tensor]],
        check: Callable[[], None],
        seed: int = 0,
    ) -> Tensor:
        """Decode the prompt of `seed` with both steps; after each of them `check` runs."""
        ids, eager_ids = self.prompt(seed), self.prompt(seed)
        texts = []
        for i in range(TOKENS):
            eager_ids, eager_logits = eager_step(eager_ids)
            ids, logits = step(ids)
            self.assertEqual(ids.tolist(), eager_ids.tolist(), f"token {i}")
            torch.testing.assert_close(logits, eager_logits)
            check()
            texts.append(ids)
        text = torch.cat(texts, 1)
        # A model that says one thing only would hide a cache that is not read.
        self.assertGreater(len(text.unique()), 8)
        return text

    def report(self, what: str, graph: CompiledGraph, calls: int = TOKENS) -> int:
        """Print and return the number of captures; all calls must have been replays."""
        captures = len(graph.specializations)
        print(f"{what}: {calls} calls, {captures} captures")
        self.assertEqual(sum(s.hits for s in graph.specializations), calls)
        return captures

    def test_static_cache_as_argument(self):
        """The cache's tensors are updated in place with `index_copy_` at a position tensor."""
        cache, eager_cache = static_cache(self.model), static_cache(self.oracle)
        graph = extract_compiled_graph(self.model, (self.prompt(), cache))
        self.assertFalse(cache.layers[0].is_initialized)
        self.decode(
            lambda ids: graph(ids, cache),
            lambda ids: self.oracle(ids, eager_cache),
            lambda: self.assertSameCache(eager_cache, cache),
        )
        self.assertLessEqual(self.report("static cache", graph), 3)

    def test_static_cache_in_closure(self):
        cache, eager_cache = static_cache(self.model), static_cache(self.oracle)
        graph = extract_compiled_graph(lambda ids: self.model(ids, cache), (self.prompt(),))
        self.decode(
            graph,
            lambda ids: self.oracle(ids, eager_cache),
            lambda: self.assertSameCache(eager_cache, cache),
        )
        self.assertLessEqual(self.report("static cache in a closure", graph), 3)

    def test_static_cache_used_again(self):
        """A second text, after `reset()`, needs no further capture."""
        cache, eager_cache = static_cache(self.model), static_cache(self.oracle)
        for c in (cache, eager_cache):
            c.early_initialization(
                batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu"
            )
        graph = extract_compiled_graph(self.model, (self.prompt(), cache))
        texts = []
        for seed in range(3):
            texts.append(
                self.decode(
                    lambda ids: graph(ids, cache),
                    lambda ids: self.oracle(ids, eager_cache),
                    lambda: self.assertSameCache(eager_cache, cache),
                    seed,
                )
            )
            cache.reset()
            eager_cache.reset()
        self.assertNotEqual(texts[0].tolist(), texts[1].tolist())
        self.assertLessEqual(self.report("static cache, three texts", graph, 3 * TOKENS), 2)

    def test_position_tensor(self):
        """A cache of plain tensors in buffers, written with `index_copy_` at a position tensor."""

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.out = nn.Embedding(99, 16), nn.Linear(16, 99)
                nn.init.normal_(self.out.weight)
                self.register_buffer("keys", torch.zeros(2, PROMPT + TOKENS, 16))
                self.register_buffer("values", torch.zeros(2, PROMPT + TOKENS, 16))

            def forward(self, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
                x = self.embedding(ids)
                self.keys.index_copy_(1, position, x.sin())
                self.values.index_copy_(1, position, x)
                mask = torch.arange(self.keys.shape[1]) <= position[:, None]
                y = nn.functional.scaled_dot_product_attention(
                    x, self.keys, self.values, attn_mask=mask
                )
                logits = self.out(y[:, -1] + position[-1].sin())
                if len(position) == 1:
                    position.add_(1)
                return logits.argmax(-1, keepdim=True), logits

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Attention()
        oracle = copy.deepcopy(model)
        graph = extract_compiled_graph(model, (self.prompt(), torch.arange(PROMPT)))
        positions = {}

        def step(name: str, call: Callable) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(ids: Tensor) -> tuple[Tensor, Tensor]:
                if ids.shape[1] > 1:
                    return call(ids, torch.arange(PROMPT))
                position = positions.setdefault(name, torch.tensor([PROMPT]))
                return call(ids, position)

            return run

        def check() -> None:
            torch.testing.assert_close(dict(model.named_buffers()), dict(oracle.named_buffers()))
            if positions:
                self.assertEqual(positions["graph"], positions["eager"])

        self.decode(step("graph", graph), step("eager", oracle), check)
        self.assertEqual(positions["graph"].item(), PROMPT + TOKENS - 1)
        self.assertEqual(self.report("position tensor", graph), 2)

    def test_dynamic_cache(self):
        """The cache grows, so each step has other shapes: as many captures as steps, no more."""
        cache, eager_cache = dynamic_cache(self.model), dynamic_cache(self.oracle)
        graph = extract_compiled_graph(self.model, (self.prompt(), cache))
        self.assertFalse(cache.layers[0].is_initialized if cache.layers else False)
        self.decode(
            lambda ids: graph(ids, cache),
            lambda ids: self.oracle(ids, eager_cache),
            lambda: self.assertSameCache(eager_cache, cache),
        )
        self.assertLessEqual(self.report("dynamic cache", graph), TOKENS)

    def test_dynamic_cache_returned(self):
        """The cache is a new object of each call: made in the first, copied and grown by others."""

        def step(model: TinyLlama, ids: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any]:
            out = model.model(input_ids=ids, past_key_values=copy.copy(cache), use_cache=True)
            logits = out.logits[:, -1]
            return logits.argmax(-1, keepdim=True), logits, out.past_key_values

        graph = extract_compiled_graph(
            lambda ids, cache: step(self.model, ids, cache), (self.prompt(), None)
        )
        caches: dict[str, Any] = {}

        def keep(name: str, call: Callable) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(ids: Tensor) -> tuple[Tensor, Tensor]:
                token, logits, caches[name] = call(ids, caches.get(name))
                return token, logits

            return run

        self.decode(
            keep("graph", graph),
            keep("eager", lambda ids, cache: step(self.oracle, ids, cache)),
            lambda: self.assertSameCache(caches["eager"], caches["graph"]),
        )
        self.assertLessEqual(self.report("dynamic cache, returned", graph), TOKENS)

    def test_whole_loop(self):
        """`generate` as one program: its loop, its cache, and its checks for the end of a text."""

        def generate(model: TinyLlama, ids: Tensor) -> Tensor:
            return model.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )

        graph = extract_compiled_graph(lambda ids: generate(self.model, ids), (self.prompt(),))
        for seed in range(4):
            text = graph(self.prompt(seed))
            self.assertEqual(text.shape, (2, PROMPT + 8))
            self.assertEqual(text.tolist(), generate(self.oracle, self.prompt(seed)).tolist())
        self.assertEqual(self.report("the whole loop", graph, 4), 1)

    def test_dynamic_cache_as_tensors(self):
        """Keys and values as a pytree of tensors: an argument that grows from call to call."""

        def step(model: TinyLlama, ids: Tensor, past: list) -> tuple[Tensor, Tensor, list]:
            cache = dynamic_cache(model)
            for i, (keys, values) in enumerate(past):
                cache.update(keys, values, i)
            token, logits = model(ids, cache)
            return token, logits, [(layer.keys, layer.values) for layer in cache.layers]

        graph = extract_compiled_graph(
            lambda ids, past: step(self.model, ids, past), (self.prompt(), [])
        )
        pasts: dict[str, list] = {}

        def keep(name: str, call: Callable) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(ids: Tensor) -> tuple[Tensor, Tensor]:
                token, logits, pasts[name] = call(ids, pasts.get(name, []))
                return token, logits

            return run

        self.decode(
            keep("graph", graph),
            keep("eager", lambda ids, past: step(self.oracle, ids, past)),
            lambda: torch.testing.assert_close(pasts["graph"], pasts["eager"]),
        )
        captures = self.report("dynamic cache as tensors", graph)
        # A second text meets the same shapes.
        pasts.clear()
        self.decode(
            keep("graph", graph),
            keep("eager", lambda ids, past: step(self.oracle, ids, past)),
            lambda: torch.testing.assert_close(pasts["graph"], pasts["eager"]),
            seed=1,
        )
        self.assertEqual(len(graph.specializations), captures)
        self.assertEqual(captures, TOKENS)


if __name__ == "__main__":
    unittest.main()
