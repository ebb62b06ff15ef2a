# SPDX-License-Identifier: Apache-2.0
"""Caches in shuffled, poisoned memory, and what they must hold after appends."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import oracle_layout

from bitdecoding import KvFormat, PagedKvCache

ARRAYS = ("pool", "side", "block_table", "slots", "lengths", "packed")


def scattered_cache(
    f: KvFormat,
    *,
    batch: int,
    heads: int,
    max_tokens: int,
    keep_first: int,
    keep_last: int,
    rng: np.random.Generator,
) -> PagedKvCache:
    """An empty cache whose pages and slots lie in random order among unused ones; every byte is
    0xFF (as fp16: NaN), and so are the ids of pages that no sequence can reach. Where the format
    rotates K, K has a mean, too."""
    pages = max(0, max_tokens - keep_last) // f.page_tokens
    tail_tokens = oracle_layout.round_up(keep_last + f.page_tokens, 16)
    table = np.full((batch, pages + 2), -1, np.int32)
    ids = rng.permutation(batch * pages + 3)[: batch * pages]
    table[:, :pages] = ids.reshape(batch, pages)
    rows = keep_first + tail_tokens
    side = np.full((batch + 2, heads, 2, rows, f.head_dim), 0xFFFF, np.uint16)
    mean = None
    if f.k_rotation:  # the same wherever pages lie: such caches are compared
        shape = (heads, f.head_dim)
        mean = (2 * np.random.default_rng(f.head_dim).standard_normal(shape)).astype(np.float16)
    return PagedKvCache.wrap(
        f,
        pool=np.full((batch * pages + 3, heads, f.page_bytes()), 0xFF, np.uint8),
        side=side.view(np.float16),
        block_table=table,
        slots=rng.permutation(batch + 2)[:batch].astype(np.int32),
        lengths=np.zeros(batch, np.int32),
        packed=np.zeros(batch, np.int32),
        keep_first=keep_first,
        keep_last=keep_last,
        k_mean=mean,
    )


def contents(cache: PagedKvCache) -> bytes:
    """Every byte of every array."""
    return b"".join(np.asarray(getattr(cache, name)).tobytes() for name in ARRAYS)


def bits(x: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(x).view(np.uint16)


def assert_holds(cache: PagedKvCache, b: int, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> None:
    """Sequence b holds exactly the tokens k, v (L, H, D): tables, pages, first rows and ring."""
    f, length, keep_first = cache.format, len(k), cache.keep_first
    old_tokens = max(0, length - cache.keep_last)
    packed = old_tokens // f.page_tokens * f.page_tokens
    assert (cache.lengths[b], cache.packed[b]) == (length, packed)

    halves = [oracle.arrived(k, f.k_rotation, cache.k_mean), oracle.arrived(v, f.v_rotation)]
    pages = oracle.pack(f, halves[0][:packed], halves[1][:packed], keep_first)
    found = cache.pool[cache.block_table[b, : len(pages)]]
    assert np.array_equal(found, pages), f"{f}: pages of sequence {b}, {length} tokens"

    rows = cache.side[cache.slots[b]]  # (H, 2, F + T, D)
    tail_tokens = rows.shape[2] - keep_first
    tokens = np.arange(packed, length)
    first = min(keep_first, length)
    for i, x in enumerate(halves):
        ring = rows[:, i, keep_first + tokens % tail_tokens].transpose(1, 0, 2)
        assert np.array_equal(bits(ring), bits(x[packed:])), f"{f}: tail of {length} tokens"
        kept = rows[:, i, :first].transpose(1, 0, 2)
        assert np.array_equal(bits(kept), bits(x[:first])), f"{f}: first rows of {length} tokens"


def poison_unattended(cache: PagedKvCache) -> None:
    """NaN in every fp16 value and parameter that decode has no business to read."""
    f = cache.format
    for b, (length, packed) in enumerate(zip(cache.lengths, cache.packed, strict=True)):
        first = min(cache.keep_first, int(packed))
        rows = cache.side[cache.slots[b]]
        tail_tokens = rows.shape[2] - cache.keep_first
        attended = np.zeros(rows.shape[2], bool)
        attended[:first] = True
        attended[cache.keep_first + np.arange(packed, length) % tail_tokens] = True
        rows[:, :, ~attended] = np.nan
        if packed > 0 and first > 0:
            _poison_first_tokens(f, cache.pool[cache.block_table[b, 0]], first)


def _poison_first_tokens(f: KvFormat, record: oracle_layout.Bytes, first: int) -> None:
    """Per-token parameters of page 0 that belong to tokens of the first rows."""
    for index, chunk in enumerate(oracle_layout.chunks(f)):
        here = max(0, min(first - index * oracle_layout.CHUNK, oracle_layout.CHUNK))
        if f.k_axis == "block":
            for offset in (chunk.v_parameters, chunk.k_parameters):
                for block in range(f.head_dim // 32):
                    plane = offset + block * chunk.plane
                    record[:, plane + oracle_layout.token_order()[:here]] = 31
            continue
        planes = [(chunk.v_parameters, 2 * f.head_dim // f.v_group)]
        if f.k_axis == "token":
            planes.append((chunk.k_parameters, 2 * f.head_dim // f.k_group))
        if f.token_norm:
            planes.append((chunk.norms, 1))
        for offset, count in planes:
            for plane in range(count):
                begin = offset + plane * 2 * oracle_layout.CHUNK
                places = begin + 2 * oracle_layout.token_order()[:here]
                record[:, places] = 0xFF
                record[:, places + 1] = 0xFF
