# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: captured once, replayed as sequences grow over page boundaries, equal to eager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import seeds
from cache_contents import ARRAYS, scattered_cache
from decode_inputs import on_device, on_host, rng_of
from samples import FORMATS

from bitdecoding import KvFormat, PagedKvCache

pytestmark = pytest.mark.gpu

B, H, GROUP = 4, 2, 4
START = (100, 0, 63, 300)  # tokens before the graph
STEPS = 280


@dataclass
class Inputs:
    """Memory that a graph reads: tokens (B, n, H, D), their numbers, queries (B, Sq, Hq, D)."""

    k: Any
    v: Any
    counts: Any
    q: Any

    @classmethod
    def empty(cls, torch: Any, f: KvFormat, dtype: str, new: int, queries: int) -> Inputs:
        options = {"dtype": getattr(torch, dtype), "device": "cuda"}
        k, v = torch.zeros(2, B, new, H, f.head_dim, **options)
        counts = torch.zeros(B, dtype=torch.int32, device="cuda")
        return cls(k, v, counts, torch.zeros(B, queries, H * GROUP, f.head_dim, **options))

    def fill(self, torch: Any) -> None:
        for x in (self.k, self.v, self.q):
            x.normal_()
        most = self.k.shape[1]
        self.counts.copy_(torch.randint(0 if most > 1 else 1, most + 1, (B,)))


def step(cache: PagedKvCache, inputs: Inputs) -> tuple[Any, Any]:
    cache.append(inputs.k, inputs.v, num_tokens=inputs.counts)
    return cache.decode(inputs.q, return_softmax_lse=True)


def started(torch: Any, f: KvFormat, zones: tuple[int, int], *key: object) -> PagedKvCache:
    """A cache with START tokens in shuffled, poisoned memory. Places differ from key to key."""
    rng = rng_of("graph", f, zones, *key)
    most = max(START) + 3 * STEPS
    host = scattered_cache(
        f, batch=B, heads=H, max_tokens=most, keep_first=zones[0], keep_last=zones[1], rng=rng
    )
    x = rng_of("start", f).standard_normal((2, B, max(START), H, f.head_dim))
    k, v = torch.from_numpy(x).half()
    host.append(k, v, num_tokens=np.asarray(START, np.int32))
    return on_device(host, "cuda")


def warm_up(cache: PagedKvCache, inputs: Inputs) -> None:
    """The same calls as in the graph, of no tokens: kernels are loaded, the workspace is there."""
    inputs.counts.zero_()
    step(cache, inputs)


@pytest.mark.parametrize(
    ("f", "zones", "dtype", "new", "queries"),
    [
        (FORMATS[0], (16, 64), "float16", 1, 1),
        (FORMATS[1], (5, 30), "bfloat16", 3, 2),
        (FORMATS[2], (0, 0), "float16", 2, 1),
        (FORMATS[3], (64, 200), "bfloat16", 1, 4),
        (FORMATS[5], (16, 0), "float16", 3, 1),
        (FORMATS[7], (16, 64), "float16", 1, 1),  # blocks
        (FORMATS[9], (5, 30), "bfloat16", 2, 3),  # head_dim 256
        (FORMATS[10], (16, 64), "float16", 1, 1),  # rotations, and with K's a mean
        (FORMATS[11], (0, 20), "bfloat16", 3, 1),
    ],
    ids=str,
)
def test_replay_equals_eager(
    torch: Any, f: KvFormat, zones: tuple[int, int], dtype: str, new: int, queries: int
) -> None:
    torch.manual_seed(seeds.SEED)
    inputs = Inputs.empty(torch, f, dtype, new, queries)
    captured, eager = (started(torch, f, zones, name) for name in ("captured", "eager"))
    warm_up(captured, inputs)
    warm_up(eager, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step(captured, inputs)
    assert captured.lengths.tolist() == list(START)  # capturing runs nothing
    packed = captured.packed.clone()
    for number in range(STEPS):
        inputs.fill(torch)
        graph.replay()
        expected, expected_lse = step(eager, inputs)
        assert torch.equal(out, expected), f"seed {seeds.SEED}: out of step {number}"
        assert torch.equal(lse, expected_lse), f"seed {seeds.SEED}: lse of step {number}"
    assert bool((captured.packed - packed >= f.page_tokens).all()), "no page boundary was crossed"
    captured.check()
    eager.check()
    assert_same_tokens(captured, eager)


def assert_same_tokens(a: PagedKvCache, b: PagedKvCache) -> None:
    """Equal lengths, pages and slots, wherever these lie."""
    ours, theirs = on_host(a), on_host(b)
    assert np.array_equal(ours.lengths, theirs.lengths)
    assert np.array_equal(ours.packed, theirs.packed)
    for sequence, packed in enumerate(ours.packed):
        pages = int(packed) // a.format.page_tokens
        tables = (cache.block_table[sequence, :pages] for cache in (ours, theirs))
        pools = [cache.pool[ids] for cache, ids in zip((ours, theirs), tables, strict=True)]
        assert np.array_equal(*pools), f"pages of sequence {sequence}"
        rows = [cache.side[cache.slots[sequence]].view(np.uint16) for cache in (ours, theirs)]
        assert np.array_equal(*rows), f"slot of sequence {sequence}"


def test_one_graph_serves_other_lengths_and_places(torch: Any) -> None:
    """Decode alone: lengths, pages and slots are what the arrays hold at the replay."""
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    cache = started(torch, f, (16, 64), "first")
    cache.decode(inputs.q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.decode(inputs.q)
    for name in ("first", "second", "third"):
        other = started(torch, f, (16, 64), name)
        k = torch.randn(B, 700, H, f.head_dim, device="cuda").half()
        other.append(k, -k, num_tokens=torch.tensor([700, 3, 0, 128], device="cuda").int())
        for array in ARRAYS:
            getattr(cache, array).copy_(getattr(other, array))
        inputs.fill(torch)
        graph.replay()
        assert torch.equal(out, other.decode(inputs.q)), name


def test_two_graphs_of_one_cache(torch: Any) -> None:
    """A later call with more columns grows the workspace; the first graph's memory stays."""
    f = FORMATS[0]
    inputs = [Inputs.empty(torch, f, "float16", 1, queries) for queries in (1, 40)]
    cache = started(torch, f, (16, 64), "two graphs")
    graphs, outs = [], []
    for given in inputs:
        cache.decode(given.q)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append(cache.decode(given.q))
    for _ in range(3):
        for graph, given, out in zip(graphs, inputs, outs, strict=True):
            given.fill(torch)
            graph.replay()
            assert torch.equal(out, cache.decode(given.q))


def test_a_bad_value_during_replay_is_reported(torch: Any) -> None:
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    cache = started(torch, f, (16, 64), "bad")
    warm_up(cache, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step(cache, inputs)
    inputs.fill(torch)
    slot = int(cache.slots[2])
    cache.slots[2] = 1000
    graph.replay()
    assert out.isnan().flatten(1).all(1).tolist() == [False, False, True, False]
    cache.slots[2] = slot
    with pytest.raises(ValueError, match=r"slots\[2\] = 1000; allowed: 0 to"):
        cache.check()
    graph.replay()
    assert not bool(out.isnan().any())
    cache.check()


def test_a_capture_before_the_first_call_says_so(torch: Any) -> None:
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    expected = started(torch, f, (16, 64), "cold").decode(inputs.q)  # loads the kernel
    cache = started(torch, f, (16, 64), "cold")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="while a CUDA graph is captured")
    with refused, torch.cuda.graph(graph):
        cache.decode(inputs.q)
    torch.cuda.synchronize()
    assert torch.equal(cache.decode(inputs.q), expected)
