# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 4 GiB and strides beyond 2^31 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_contents import assert_holds
from cuda_kernels import DECODE_KERNELS, skip_without_code
from decode_inputs import on_host
from samples import family

from bitdecoding import KvFormat, PagedKvCache, pack_pages

F = KvFormat()
B, H, TOKENS = 2, 2, 400
LARGE_BYTES = 5 * 2**30
STRIDE = 2**31 + 128  # elements
SHAPE = (B, TOKENS, H, F.head_dim)
STRIDES = (STRIDE, H * F.head_dim, F.head_dim, 1)
NUM_PAGES = LARGE_BYTES // (H * F.page_bytes())
# Page ids at both ends of the pool and in its middle.
TABLE = np.array([[NUM_PAGES - 1, 0, NUM_PAGES // 2], [1, NUM_PAGES - 2, 2]], np.int32)


def far_apart(values: Any) -> Any:
    """float16 values of SHAPE in rows that lie STRIDE elements apart."""
    memory = np.empty(STRIDE + values[0].size, np.float16)  # never touched between the rows
    rows = np.lib.stride_tricks.as_strided(memory, SHAPE, [2 * stride for stride in STRIDES])
    rows[...] = values
    return rows


def test_cpu(rng: np.random.Generator) -> None:
    small = PagedKvCache(F, batch=B, num_kv_heads=H, max_tokens=TOKENS, keep_first=3, keep_last=5)
    slot = small.side.shape[1:]
    num_slots = LARGE_BYTES // (2 * int(np.prod(slot)))
    large = PagedKvCache.wrap(
        F,
        pool=np.zeros((NUM_PAGES, H, F.page_bytes()), np.uint8),  # pages of zeros take no memory
        side=np.zeros((num_slots, *slot), np.float16),
        block_table=TABLE,
        slots=np.array([num_slots - 1, 0], np.int32),
        lengths=np.zeros(B, np.int32),
        packed=np.zeros(B, np.int32),
        keep_first=3,
        keep_last=5,
    )
    k, v = (far_apart(family("normal", SHAPE, rng)) for _ in range(2))
    assert min(large.pool.nbytes, large.side.nbytes, k.strides[0]) > 2**32
    for cache in (small, large):
        cache.append(k, v)
    for b in range(B):
        assert_holds(large, b, k[b], v[b])
    q = family("normal", (B, 1, 2 * H, F.head_dim), rng)
    assert np.array_equal(large.decode(q), small.decode(q))


@pytest.mark.gpu
def test_cuda(torch: Any, rng: np.random.Generator) -> None:
    values = torch.from_numpy(family("normal", SHAPE, rng)).half()
    small = np.zeros((TABLE.size, H, F.page_bytes()), np.uint8)
    order = np.arange(TABLE.size, dtype=np.int32).reshape(TABLE.shape)
    pack_pages(values, -values, small, order, format=F, keep_first=3)

    memory = torch.empty(STRIDE + values[0].numel(), dtype=torch.float16, device="cuda")
    k = memory.as_strided(SHAPE, STRIDES).copy_(values)
    pool = torch.zeros((NUM_PAGES, H, F.page_bytes()), dtype=torch.uint8, device="cuda")
    table = torch.from_numpy(TABLE).cuda()
    pack_pages(k, k.neg(), pool, table, format=F, keep_first=3, check=True)
    written = table.flatten().long()
    assert np.array_equal(pool[written].cpu().numpy(), small)
    pool[written] = 0
    assert not pool.any()  # nothing else was written


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [None, *(n for n in DECODE_KERNELS if "k4v4_c_d128" in n)])
def test_cuda_append_and_decode(torch: Any, kernel: str | None, rng: np.random.Generator) -> None:
    """A pool and a side buffer above 4 GiB beside a small cache of the same pages and tokens."""
    small = PagedKvCache(
        F, batch=B, num_kv_heads=H, max_tokens=TOKENS, keep_first=3, keep_last=5, device="cuda"
    )
    slot = small.side.shape[1:]
    num_slots = LARGE_BYTES // (2 * int(np.prod(slot)))
    large = PagedKvCache.wrap(
        F,
        pool=torch.zeros((NUM_PAGES, H, F.page_bytes()), dtype=torch.uint8, device="cuda"),
        side=torch.zeros((num_slots, *slot), dtype=torch.float16, device="cuda"),
        block_table=torch.from_numpy(TABLE).cuda(),
        slots=torch.tensor([num_slots - 1, 0], dtype=torch.int32, device="cuda"),
        lengths=torch.zeros(B, dtype=torch.int32, device="cuda"),
        packed=torch.zeros(B, dtype=torch.int32, device="cuda"),
        keep_first=3,
        keep_last=5,
    )
    assert min(large.pool.nbytes, large.side.nbytes) > 2**32
    k, v = (torch.from_numpy(family("normal", SHAPE, rng)).half().cuda() for _ in range(2))
    q = torch.from_numpy(family("normal", (B, 1, 2 * H, F.head_dim), rng)).half().cuda()
    with skip_without_code():
        small.decode(q, kernel=kernel)
    for begin, end in ((0, 250), (250, 251), (251, TOKENS)):
        for cache in (small, large):
            cache.append(k[:, begin:end], v[:, begin:end])
        ours, theirs = (c.decode(q, return_softmax_lse=True, kernel=kernel) for c in (large, small))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for cache in (small, large):
        cache.check()
    ids = [cache.block_table.flatten().long() for cache in (small, large)]
    assert torch.equal(large.pool[ids[1]], small.pool[ids[0]])
    assert torch.equal(large.side[large.slots.long()], small.side[small.slots.long()])
    expected = torch.from_numpy(on_host(small).decode(q.float().cpu().numpy()))
    assert (large.decode(q).float().cpu() - expected).norm() < 2e-3 * expected.norm()
