# SPDX-License-Identifier: Apache-2.0
"""Bad values in device memory: the sequence's output is NaN or nothing of it is written, the other
sequences are right, and check() says once what was wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS
from cuda_kernels import DECODE_KERNELS, multiplies_bytes, skip_without_code
from decode_inputs import (
    Built,
    Contents,
    Page,
    Queries,
    build,
    formats_of,
    on_device,
    on_host,
)
from half_budget import Expected, assert_close
from samples import FORMATS, family

from bitdecoding import PagedKvCache

pytestmark = pytest.mark.gpu

LENGTHS = (400, 333, 200)
BAD = 1  # the sequence
LARGEST, SMALLEST = 2**31 - 1, -(2**31)


@dataclass
class Fault:
    values: dict[tuple[str, Any], int]  # (table, index) -> what is written there
    message: str


def state_faults(cache: PagedKvCache) -> list[Fault]:
    """Everything that is wrong with sequence BAD of a cache of LENGTHS and can be told."""
    pages, slots = cache.pool.shape[0], cache.side.shape[0]
    page_tokens, columns = cache.format.page_tokens, cache.block_table.shape[1]
    tail = cache.side.shape[3] - cache.keep_first
    packed = (LENGTHS[BAD] - cache.keep_last) // page_tokens * page_tokens
    last = packed // page_tokens - 1
    too_long, too_many = packed + tail + 1, (columns + 1) * page_tokens
    length, tokens = ("lengths", BAD), ("packed", BAD)

    def page(column: int, value: int) -> Fault:
        message = f"block_table of sequence {BAD} = {value}; allowed: 0 to {pages - 1} "
        return Fault({("block_table", (BAD, column)): value}, message)

    def slot(value: int) -> Fault:
        message = f"slots[{BAD}] = {value}; allowed: 0 to {slots - 1} "
        return Fault({("slots", BAD): value}, message)

    def in_pages(value: int, more: dict[tuple[str, Any], int] | None = None) -> Fault:
        return Fault({tokens: value, **(more or {})}, f"packed[{BAD}] = {value}; allowed: mult")

    return [
        *(page(0, value) for value in (pages, -1, LARGEST, SMALLEST)),
        page(last, pages),
        page(last, -1),
        *(slot(value) for value in (slots, -1, LARGEST, SMALLEST)),
        Fault({length: -1}, f"lengths[{BAD}] = -1; allowed: 0 or more"),
        Fault({length: SMALLEST}, f"lengths[{BAD}] = {SMALLEST}; allowed: 0 or more"),
        Fault({length: too_long}, f"lengths[{BAD}] - packed[{BAD}] = {tail + 1}; allowed: at most"),
        Fault({length: LARGEST}, f"lengths[{BAD}] - packed[{BAD}] = {LARGEST - packed}; allowed"),
        in_pages(-page_tokens),
        in_pages(page_tokens // 2),
        in_pages(page_tokens * (LENGTHS[BAD] // page_tokens + 1)),
        in_pages(too_many, {length: too_many + 1}),
    ]


@contextmanager
def broken(cache: PagedKvCache, fault: Fault) -> Iterator[None]:
    """The fault's values are in the cache's tables meanwhile."""
    before = {place: int(getattr(cache, place[0])[place[1]]) for place in fault.values}
    for (table, index), value in fault.values.items():
        getattr(cache, table)[index] = value
    yield
    for (table, index), value in before.items():
        getattr(cache, table)[index] = value


def assert_reported_once(cache: PagedKvCache, fault: Fault) -> None:
    with pytest.raises(ValueError, match=re.escape(fault.message)):
        cache.check()
    cache.check()


def contents_of(page: Page) -> Contents:
    return Contents(formats_of(page)[-1], LENGTHS, 2, 16, 64)


def others(expected: Expected) -> Expected:
    """Without sequence BAD."""
    return expected.mapped(lambda part: np.delete(part, BAD, axis=0))


def check_decode(built: Built, cache: PagedKvCache, fault: Fault, kernel: str | None) -> None:
    import torch

    (case,) = built.cases
    q = case.q.cuda()
    out = torch.zeros_like(q)
    options: dict[str, Any] = {} if kernel is None else {"kernel": kernel}
    with broken(cache, fault):
        _, lse = cache.decode(q, out=out, return_softmax_lse=True, **options)
    found, sums = out.float().cpu().numpy(), lse.cpu().numpy()
    assert np.all(np.isnan(found[BAD])), f"out after {fault}"
    assert np.all(np.isnan(sums[BAD])), f"lse after {fault}"
    assert_close(
        np.delete(found, BAD, axis=0),
        np.delete(sums, BAD, axis=0),
        others(case.expected),
        case.queries.dtype,
        kind="beside a bad sequence",
        what=f"{kernel}: {fault}",
        of_bytes=multiplies_bytes(kernel),
    )
    assert_reported_once(cache, fault)


@pytest.mark.parametrize("kernel", DECODE_KERNELS)
def test_decode(torch: Any, kernel: str) -> None:
    built = build(contents_of(Page.of_kernel(kernel)), (Queries(4),))
    cache = on_device(built.cache, "cuda")
    q = built.cases[0].q.cuda()
    with skip_without_code():
        good = cache.decode(q, kernel=kernel)
    for fault in state_faults(cache):
        check_decode(built, cache, fault, kernel)
    assert torch.equal(cache.decode(q, kernel=kernel), good)
    cache.check()


def test_decode_of_bad_sequences_only(torch: Any) -> None:
    built = build(contents_of(Page(4, 4, "channel", 128)), (Queries(4),))
    cache = on_device(built.cache, "cuda")
    q = built.cases[0].q.cuda()
    good = cache.decode(q)
    slots = cache.slots.clone()
    cache.slots.fill_(-5)
    out, lse = cache.decode(q, return_softmax_lse=True)
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())
    cache.slots.copy_(slots)
    with pytest.raises(ValueError, match=r"slots\[[012]\] = -5; allowed: 0 to"):
        cache.check()
    cache.check()
    assert torch.equal(cache.decode(q), good)


def test_check_looks_at_the_tables_too(torch: Any) -> None:
    built = build(contents_of(Page(4, 4, "channel", 128)), ())
    cache = on_device(built.cache, "cuda")
    cache.check()
    for fault in state_faults(cache):
        with broken(cache, fault), pytest.raises(ValueError, match=rf"\b{fault_table(fault)}\["):
            cache.check()
    cache.check()


def fault_table(fault: Fault) -> str:
    """The table that the host blames: of several the one named by the message."""
    return re.split(r"\W| of", fault.message)[0]


# ---- append ----

ROW = 200  # tokens of a row of k and v


def append_faults(cache: PagedKvCache, max_tokens: int) -> list[Fault]:
    """Of an append of ROW tokens to sequence BAD. `runs` stands for leftpad, num_tokens."""
    runs = f"leftpad, num_tokens of sequence {BAD} = "
    pages = cache.pool.shape[0]
    page_tokens = cache.format.page_tokens
    packed = (LENGTHS[BAD] - cache.keep_last) // page_tokens * page_tokens
    column = packed // page_tokens  # the first page that the append fills
    length = max_tokens - ROW + 1
    old = (length - cache.keep_last) // page_tokens * page_tokens
    return [
        *(fault for fault in state_faults(cache) if "block_table" not in fault.message),
        Fault({("num_tokens", BAD): ROW + 1}, runs),
        Fault({("num_tokens", BAD): -1}, runs),
        Fault({("num_tokens", BAD): LARGEST}, runs),
        Fault({("leftpad", BAD): -1}, runs),
        Fault({("leftpad", BAD): ROW + 1}, runs),
        Fault({("leftpad", BAD): SMALLEST}, runs),
        *(
            Fault(
                {("block_table", (BAD, column)): value},
                f"block_table of sequence {BAD} = {value}; allowed: 0 to {pages - 1} ",
            )
            for value in (pages, -1, LARGEST, SMALLEST)
        ),
        Fault(
            {("lengths", BAD): length, ("packed", BAD): old},
            f"lengths[{BAD}] = {max_tokens + 1} after the append; allowed: at most {max_tokens} ",
        ),
    ]


@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_append(torch: Any, f: Any) -> None:
    rng = np.random.default_rng(5)
    max_tokens = 1000

    def empty(device: str) -> PagedKvCache:
        return PagedKvCache(f, batch=3, num_kv_heads=2, max_tokens=max_tokens, device=device)

    own = empty("cpu")
    shape = (3, max(LENGTHS), 2, f.head_dim)
    k, v = (torch.from_numpy(family("normal", shape, rng)).half() for _ in range(2))
    own.append(k, v, num_tokens=np.array(LENGTHS, np.int32))
    k, v = k[:, :ROW], v[:, :ROW]
    on_gpu = [k.cuda(), v.cuda()]
    # The other sequences grow as they do on a CPU.
    grown = on_host(own)
    grown.append(k, v, num_tokens=np.array([ROW if b != BAD else 0 for b in range(3)], np.int32))

    for fault in append_faults(own, max_tokens):
        cache = empty("cuda")
        for name in ARRAYS:
            getattr(cache, name).copy_(torch.from_numpy(getattr(own, name)))
        runs = {
            "leftpad": torch.zeros(3, dtype=torch.int32, device="cuda"),
            "num_tokens": torch.full((3,), ROW, dtype=torch.int32, device="cuda"),
        }
        tables = Fault({}, "")
        for (table, index), value in fault.values.items():
            if table in runs:
                runs[table][index] = value
            else:
                tables.values[table, index] = value
        with broken(cache, tables):
            cache.append(*on_gpu, **runs)
            for (table, index), value in tables.values.items():
                assert int(getattr(cache, table)[index]) == value, f"{fault} was overwritten"
        found = on_host(cache)
        for name in ("pool", "side", "lengths", "packed"):
            assert np.array_equal(bytes_of(found, name), bytes_of(grown, name)), f"{fault}: {name}"
        assert_reported_once(cache, fault)


def bytes_of(cache: PagedKvCache, name: str) -> Any:
    return np.ascontiguousarray(getattr(cache, name)).view(np.uint8)


def test_append_beyond_the_block_table(torch: Any) -> None:
    """A cache of the caller's arrays is as large as its table: what outgrows it is not written."""
    f = FORMATS[0]
    built = build(Contents(f, (256, 300, 64), 1, 0, 0), ())
    cache = on_device(built.cache, "cuda")
    before = on_host(cache)
    columns = cache.block_table.shape[1]
    room = (columns + 1) * f.page_tokens - 1
    k = torch.zeros(3, room, 1, f.head_dim, dtype=torch.float16, device="cuda")
    counts = [0, room - 300 + 1, 0]
    cache.append(k, k, num_tokens=torch.tensor(counts, dtype=torch.int32, device="cuda"))
    found = on_host(cache)
    for name in ARRAYS:
        assert np.array_equal(bytes_of(found, name), bytes_of(before, name)), name
    with pytest.raises(ValueError, match=r"lengths\[1\].* after the append"):
        cache.check()
    cache.check()
