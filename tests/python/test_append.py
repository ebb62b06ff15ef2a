# SPDX-License-Identifier: Apache-2.0
"""append: whatever the chunks, padding and lengths, a cache holds what its tokens say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_contents import assert_holds, scattered_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import FAMILIES, FORMATS, Floats32, family, mixed

from bitdecoding import KvFormat, PagedKvCache


def boundaries(f: KvFormat, keep_first: int, keep_last: int) -> list[int]:
    """0, 1 and the lengths around every edge of zones, groups, chunks and pages."""
    edges = {1, 32, 64, f.k_group, f.page_tokens, keep_first, keep_last, keep_last + f.page_tokens}
    edges |= {keep_last + 2 * f.page_tokens, 2 * (keep_last + f.page_tokens)}
    return sorted({max(0, edge + step) for edge in edges for step in (-1, 0, 1)} | {0})


@pytest.mark.parametrize("f", FORMATS, ids=str)
@pytest.mark.parametrize("zones", [(0, 0), (16, 64), (5, 7), (64, 1), (1, 200)], ids=str)
def test_every_boundary_length(
    f: KvFormat, zones: tuple[int, int], rng: np.random.Generator
) -> None:
    keep_first, keep_last = zones
    lengths = boundaries(f, keep_first, keep_last)
    shape = (len(lengths), max(lengths) + 3, 2, f.head_dim)
    k, v = (mixed(*shape, rng) for _ in range(2))
    cache = scattered_cache(
        f,
        batch=len(lengths),
        heads=2,
        max_tokens=max(lengths),
        keep_first=keep_first,
        keep_last=keep_last,
        rng=rng,
    )
    pads = rng.integers(0, 4, len(lengths)).astype(np.int32)
    cache.append(k, v, leftpad=pads, num_tokens=np.array(lengths, np.int32))
    cache.check()
    for b, (pad, length) in enumerate(zip(pads, lengths, strict=True)):
        assert_holds(cache, b, k[b, pad : pad + length], v[b, pad : pad + length])


def one_by_one(cache: PagedKvCache, k: Floats32, v: Floats32) -> None:
    for token in range(k.shape[1]):
        cache.append(k[:, token : token + 1], v[:, token : token + 1])


@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_tokens_one_by_one(f: KvFormat, rng: np.random.Generator) -> None:
    tokens = 2 * f.page_tokens + 40 + 3
    k, v = (mixed(len(FAMILIES), tokens, 1, f.head_dim, rng) for _ in range(2))
    settings: dict[str, Any] = {"batch": len(FAMILIES), "num_kv_heads": 1, "max_tokens": tokens}
    cache = PagedKvCache(f, **settings, keep_first=3, keep_last=40)
    one_by_one(cache, k, v)
    for b in range(len(k)):
        assert_holds(cache, b, k[b], v[b])


@st.composite
def appends(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """counts[call][row], pads[call][row]: ragged appends of up to 500 tokens to three sequences."""
    size = st.one_of(st.integers(0, 5), st.integers(0, 200))
    rows = st.lists(size, min_size=3, max_size=3)
    counts = draw(st.lists(rows, min_size=1, max_size=7))
    pads = [draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)) for _ in counts]
    return counts, pads


@given(
    calls=appends(),
    f=st.sampled_from(FORMATS),
    keep_first=st.sampled_from([0, 1, 16, 64]),
    keep_last=st.sampled_from([0, 1, 30, 64, 150]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_any_chunks_give_the_same_bytes(
    calls: tuple[list[list[int]], list[list[int]]],
    f: KvFormat,
    keep_first: int,
    keep_last: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    counts, pads = calls
    totals = np.sum(counts, axis=0)
    k, v = (mixed(3, int(max(totals)), 2, f.head_dim, rng) for _ in range(2))
    cache = scattered_cache(
        f,
        batch=3,
        heads=2,
        max_tokens=max(totals),
        keep_first=keep_first,
        keep_last=keep_last,
        rng=rng,
    )
    done = [0, 0, 0]
    for count, pad in zip(counts, pads, strict=True):
        width = max(p + n for p, n in zip(pad, count, strict=True)) + 1
        rows = [np.full((3, width, 2, f.head_dim), np.nan, np.float32) for _ in range(2)]
        for b in range(3):
            for row, x in zip(rows, (k, v), strict=True):
                row[b, pad[b] : pad[b] + count[b]] = x[b, done[b] : done[b] + count[b]]
            done[b] += count[b]
        cache.append(
            *rows, leftpad=np.array(pad, np.int32), num_tokens=np.array(count, np.int32), threads=2
        )
    for b in range(3):
        assert_holds(cache, b, k[b, : totals[b]], v[b, : totals[b]])


def test_leftpad_alone_means_the_rest_of_the_row(rng: np.random.Generator) -> None:
    f = FORMATS[1]
    k, v = (family("normal", (3, 150, 2, f.head_dim), rng) for _ in range(2))
    cache = PagedKvCache(f, batch=3, num_kv_heads=2, max_tokens=150, keep_last=10)
    pads = np.array([0, 20, 150], np.int32)
    cache.append(k, v, leftpad=pads)
    for b, pad in enumerate(pads):
        assert_holds(cache, b, k[b, pad:], v[b, pad:])


def test_strided_views_and_dtypes(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    x = torch.from_numpy(family("beyond_fp16", (2, 2, 2, 200, f.head_dim), rng))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = x.to(dtype).requires_grad_()
        k, v = given[0].transpose(1, 2), given[1].transpose(1, 2)  # (B, H, S, D) -> (B, S, H, D)
        cache = PagedKvCache(f, batch=2, num_kv_heads=2, max_tokens=200, keep_last=20)
        cache.append(k, v)
        for b in range(2):
            assert_holds(cache, b, k[b].detach().float().numpy(), v[b].detach().float().numpy())


def test_a_cache_of_torch_tensors(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[4]
    k, v = (family("normal", (1, 300, 2, f.head_dim), rng) for _ in range(2))
    own = PagedKvCache(f, batch=1, num_kv_heads=2, max_tokens=300)
    own.append(k, v)
    names = ("pool", "side", "block_table", "slots", "lengths", "packed")
    arrays = {name: torch.from_numpy(np.copy(getattr(own, name))) for name in names}
    arrays["pool"].zero_()
    arrays["side"].zero_()
    cache = PagedKvCache.wrap(f, **arrays, keep_first=16, keep_last=64)
    cache.reset()
    assert int(cache.lengths.sum()) == 0
    cache.append(torch.from_numpy(k), torch.from_numpy(v))
    for name in names:
        assert np.array_equal(np.asarray(getattr(cache, name)), getattr(own, name)), name
