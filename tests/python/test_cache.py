# SPDX-License-Identifier: Apache-2.0
"""PagedKvCache as an object: what it allocates, wraps, refuses and survives."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS, assert_holds, contents, scattered_cache
from samples import FORMATS, family

from bitdecoding import KvFormat, PagedKvCache


@pytest.mark.parametrize("f", FORMATS, ids=str)
@pytest.mark.parametrize("keep_last", [0, 1, 64, 100])
@pytest.mark.parametrize("max_tokens", [0, 1, 64, 127, 128, 129, 192, 228, 300])
def test_allocates_exactly_the_pages_that_can_fill(
    f: KvFormat, keep_last: int, max_tokens: int
) -> None:
    cache = PagedKvCache(
        f, batch=3, num_kv_heads=2, max_tokens=max_tokens, keep_first=8, keep_last=keep_last
    )
    pages = max(0, max_tokens - keep_last) // f.page_tokens
    tail = -(-(keep_last + f.page_tokens) // 16) * 16
    assert cache.pool.shape == (3 * pages, 2, f.page_bytes())
    assert cache.side.shape == (3, 2, 2, 8 + tail, f.head_dim)
    assert cache.block_table.tolist() == [list(range(b * pages, (b + 1) * pages)) for b in range(3)]
    expected = 3 * pages * 2 * f.page_bytes() + 3 * 2 * 2 * (8 + tail) * f.head_dim * 2
    assert cache.nbytes == expected + 4 * (3 * pages + 3 + 3 + 3)

    k = np.zeros((3, max_tokens + 1, 2, f.head_dim), np.float16)
    before = contents(cache)
    with pytest.raises(ValueError, match=f"{max_tokens + 1} .* {max_tokens} \\(max_tokens"):
        cache.append(k, k)
    assert contents(cache) == before
    cache.append(k[:, 1:], k[:, 1:])  # but max_tokens fit
    assert cache.lengths.tolist() == [max_tokens] * 3
    if max_tokens > 0:
        with pytest.raises(ValueError, match="max_tokens"):
            cache.append(k[:, :1], k[:, :1])


def test_attributes() -> None:
    cache = PagedKvCache("k4v2_c64_v64_p128_d64", batch=2, num_kv_heads=3, max_tokens=500)
    assert cache.format == KvFormat.parse("k4v2_c64_v64_p128_d64")
    assert (cache.keep_first, cache.keep_last, cache.max_tokens) == (16, 64, 500)
    assert cache.lengths.tolist() == cache.packed.tolist() == [0, 0]
    assert cache.slots.tolist() == [0, 1]
    assert "k4v2_c64_v64_p128_d64" in repr(cache)
    assert "batch=2, num_kv_heads=3, max_tokens=500" in repr(cache)
    with pytest.raises(AttributeError):
        cache.pool = cache.pool  # type: ignore[misc]


def test_wrap_shares_memory(rng: np.random.Generator) -> None:
    f = FORMATS[0]
    cache = scattered_cache(f, batch=2, heads=2, max_tokens=300, keep_first=3, keep_last=5, rng=rng)
    pointers = {name: getattr(cache, name).ctypes.data for name in ARRAYS}
    arrays = {name: getattr(cache, name) for name in ARRAYS}
    again = PagedKvCache.wrap(str(f), **arrays, keep_first=3, keep_last=5)
    k, v = (family("normal", (2, 300, 2, f.head_dim), rng) for _ in range(2))
    again.append(k, v)
    for name in ARRAYS:
        assert getattr(again, name) is arrays[name]
        assert getattr(again, name).ctypes.data == pointers[name]
    for b in range(2):
        assert_holds(cache, b, k[b], v[b])  # the first cache sees what the second wrote


def test_wrap_keeps_its_arrays_alive(torch: Any) -> None:
    f = FORMATS[0]
    own = PagedKvCache(f, batch=1, num_kv_heads=1, max_tokens=10)
    arrays = {name: torch.from_numpy(getattr(own, name).copy()) for name in ARRAYS}
    cache = PagedKvCache.wrap(f, **arrays, keep_first=16, keep_last=64)
    pointer = arrays["side"].data_ptr()
    del arrays, own
    k = np.ones((1, 1, 1, f.head_dim), np.float16)
    cache.append(k, k)
    assert cache.side.data_ptr() == pointer
    assert float(cache.side[0, 0, 0, 16, 0]) == 1


def test_arguments_are_kept_no_longer_than_a_call(torch: Any) -> None:
    cache = PagedKvCache(FORMATS[0], batch=1, num_kv_heads=1, max_tokens=10)
    for heads in (1, 7):
        memory = np.zeros((1, 1, heads, FORMATS[0].head_dim), np.float16)
        alive = weakref.ref(memory)
        x = torch.from_numpy(memory)
        if heads == 1:
            cache.append(x, x)
            cache.decode(torch.nn.Parameter(x))  # history or not: read as it is
        else:
            with pytest.raises(ValueError, match="k: shape"):
                cache.append(x, x)
        del memory, x
        gc.collect()
        assert alive() is None


def test_capacity_of_a_wrapped_cache(rng: np.random.Generator) -> None:
    f = FORMATS[2]
    cache = scattered_cache(f, batch=1, heads=1, max_tokens=200, keep_first=0, keep_last=8, rng=rng)
    columns = cache.block_table.shape[1]
    assert cache.max_tokens == columns * 64 + 63 + 8


def test_sequences_share_what_is_packed_and_nothing_else(rng: np.random.Generator) -> None:
    f = FORMATS[2]
    cache = scattered_cache(f, batch=2, heads=1, max_tokens=200, keep_first=0, keep_last=8, rng=rng)
    k, v = (family("normal", (2, 200, 1, f.head_dim), rng) for _ in range(2))
    k[1], v[1] = k[0], v[0]
    cache.append(k[:, :72], v[:, :72])  # one page each, of the same tokens
    cache.block_table[1, 0] = cache.block_table[0, 0]
    cache.append(k[:, 72:130], v[:, 72:130])
    q = np.ones((2, 1, 1, f.head_dim), np.float32)
    before = cache.decode(q)
    assert np.array_equal(before[0], before[1])

    second_only = np.array([0, 10], np.int32)
    own = cache.block_table[1, 1]
    cache.block_table[1, 1] = cache.block_table[0, 0]
    with pytest.raises(ValueError, match=r"block_table\[1, 1\] = .*block_table\[0, 0\]"):
        cache.append(k[:, :10], v[:, :10], num_tokens=second_only)
    cache.block_table[1, 1] = own
    cache.slots[1] = cache.slots[0]
    with pytest.raises(ValueError, match=r"slots\[1\] = .*slots\[0\]"):
        cache.append(k[:, :10], v[:, :10], num_tokens=second_only)
    assert np.array_equal(cache.decode(q)[0], before[0])


def test_reset(rng: np.random.Generator) -> None:
    f = FORMATS[1]
    cache = PagedKvCache(f, batch=2, num_kv_heads=1, max_tokens=400)
    for _ in range(2):
        k, v = (family("outliers", (2, 400, 1, f.head_dim), rng) for _ in range(2))
        cache.append(k, v)
        for b in range(2):
            assert_holds(cache, b, k[b], v[b])
        cache.reset()
        assert cache.lengths.tolist() == cache.packed.tolist() == [0, 0]
        q = np.ones((2, 1, 2, f.head_dim), np.float16)
        assert np.all(cache.decode(q) == 0)


def pickled(cache: PagedKvCache) -> Any:
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_independent(duplicate: Any, rng: np.random.Generator) -> None:
    f = FORMATS[3]
    k, v = (family("normal", (1, 200, 2, f.head_dim), rng) for _ in range(2))
    cache = PagedKvCache(f, batch=1, num_kv_heads=2, max_tokens=300, keep_first=2, keep_last=3)
    cache.append(k, v)
    before = contents(cache)
    other = duplicate(cache)
    assert contents(other) == before
    assert repr(other) == repr(cache)
    other.append(k[:, :100], v[:, :100])
    assert contents(cache) == before
    assert_holds(
        other, 0, np.concatenate([k, k[:, :100]], 1)[0], np.concatenate([v, v[:, :100]], 1)[0]
    )


@pytest.mark.parametrize(
    ("array", "place", "value", "wrong"),
    [
        ("block_table", (1, 0), 99, "block_table[1, 0] = 99"),
        ("block_table", (0, 1), -1, "block_table[0, 1] = -1"),
        ("slots", 1, 2, "slots[1] = 2"),
        ("lengths", 0, -1, "lengths[0] = -1"),
        ("lengths", 0, 10000, "lengths[0] = 10000"),
        ("packed", 1, 100, "packed[1] = 100"),
        ("packed", 1, 512, "packed[1] = 512"),
    ],
)
def test_check_names_what_is_wrong(array: str, place: Any, value: int, wrong: str) -> None:
    f = FORMATS[0]
    cache = PagedKvCache(f, batch=2, num_kv_heads=1, max_tokens=400)
    k = np.ones((2, 400, 1, f.head_dim), np.float16)
    cache.append(k, k)
    cache.check()
    getattr(cache, array)[place] = value
    before = contents(cache)
    message = re.escape(wrong) + ".*allowed"
    with pytest.raises(ValueError, match=message):
        cache.check()
    with pytest.raises(ValueError, match=message):
        cache.decode(np.ones((2, 1, 1, f.head_dim), np.float16))
    assert contents(cache) == before


def test_device_names(torch: Any) -> None:
    arguments: dict[str, Any] = {"batch": 1, "num_kv_heads": 1, "max_tokens": 1}
    with pytest.raises(ValueError, match="device = 'tpu'; allowed: 'cpu', 'cuda'"):
        PagedKvCache("k4v4_c128_v128_p128_d128", **arguments, device="tpu")
    cache = PagedKvCache("k4v4_c128_v128_p128_d128", **arguments, device=torch.device("cpu"))
    assert type(cache.pool) is np.ndarray
