# SPDX-License-Identifier: Apache-2.0
"""What the decode benchmark runs on: the bytes that a case must read, caches in cold memory."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import torch
from shapes import Case

import bitdecoding
from bitdecoding import KvFormat, PagedKvCache
from bitdecoding.plan import decode_kernel

TEMPLATE_RECORDS = 64  # records (of a page and KV head) that are packed; the pool repeats them
LAUNCHES = 20  # of a graph, at least
LARGE_BYTES = 24 << 30  # twice as much may not fit


@dataclass(frozen=True)
class Zones:
    """Tokens of every sequence that stay in fp16; printed and parsed as first/newest."""

    sinks: int
    recent: int

    @classmethod
    def parse(cls, text: str) -> Zones:
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match:
            raise ValueError(f"zones = {text!r}; allowed: first tokens / newest tokens: 16/64")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.sinks}/{self.recent}"


def packed_tokens(length: int, fmt: KvFormat, zones: Zones) -> int:
    """How many of a sequence's tokens are in pages after it was appended (docs/format.md, 6)."""
    return max(0, length - zones.recent) // fmt.page_tokens * fmt.page_tokens


def query_bytes(case: Case) -> int:
    """Queries and outputs of one call, fp16."""
    return 2 * 2 * case.batch * case.heads_kv * case.columns * case.head_dim


def decode_bytes(case: Case, fmt: KvFormat, zones: Zones) -> int:
    """Bytes that one decode call must move once: whole pages, 16-bit zones, queries, outputs.

    The page of the first tokens counts too, unless all its tokens are read from their zone.
    """
    total = 0
    for length in case.lengths():
        packed = packed_tokens(length, fmt, zones)
        first = min(zones.sinks, packed)
        pages = packed // fmt.page_tokens - first // fmt.page_tokens
        zone_tokens = first + length - packed
        total += pages * fmt.page_bytes() + zone_tokens * 2 * 2 * fmt.head_dim
    return case.heads_kv * total + query_bytes(case)


def sixteen_bit_bytes(case: Case) -> int:
    """The same of fp16 K and V."""
    return 2 * 2 * case.heads_kv * sum(case.lengths()) * case.head_dim + query_bytes(case)


def copies_needed(moved: int, l2_bytes: int) -> int:
    """Caches to take turns through: 4x the L2 lies between two reads of the same byte."""
    if moved > LARGE_BYTES:
        return 1  # hundreds of times the L2
    return 1 + max(1, -(-4 * l2_bytes // moved))


def launches_needed(copies: int) -> int:
    """Launches of a graph: every copy equally often, LAUNCHES or more."""
    return -(-LAUNCHES // copies) * copies


def queries(case: Case, device: torch.device) -> torch.Tensor:
    """(B, Sq, Hq, D) fp16."""
    shape = (case.batch, case.query_tokens, case.heads_kv * case.group, case.head_dim)
    return torch.randn(shape, dtype=torch.float16, device=device)


def caches(
    case: Case, fmt: KvFormat, zones: Zones, copies: int, device: torch.device
) -> list[PagedKvCache]:
    """Caches of the same shape in different memory, whole sequences in each.

    Every sequence has pages and a slot of its own, in random order, in one pool and one side buffer
    for all copies. Contents: TEMPLATE_RECORDS records packed from random tokens, over and over.
    """
    lengths = np.asarray(case.lengths(), dtype=np.int32)
    packed = np.asarray([packed_tokens(n, fmt, zones) for n in case.lengths()], dtype=np.int32)
    tables = _block_tables(packed // fmt.page_tokens, copies)
    pool = _pool(fmt, case.heads_kv, int(tables.max(initial=0)) + 1, device)

    tail_tokens = -(-(zones.recent + fmt.page_tokens) // 16) * 16
    rows = zones.sinks + tail_tokens
    side_shape = (copies * case.batch, case.heads_kv, 2, rows, fmt.head_dim)
    side = torch.randn(side_shape, dtype=torch.float16, device=device)
    slots = torch.randperm(copies * case.batch).to(torch.int32).view(copies, case.batch)
    # Calls of the copies follow each other on one stream, so they can share scratch memory.
    shared = {"workspace": bitdecoding.Workspace(device)} if device.type == "cuda" else {}
    return [
        PagedKvCache.wrap(
            fmt,
            pool=pool,
            side=side,
            block_table=torch.from_numpy(tables[i]).to(device),
            slots=slots[i].to(device),
            lengths=torch.from_numpy(lengths.copy()).to(device),
            packed=torch.from_numpy(packed.copy()).to(device),
            keep_first=zones.sinks,
            keep_last=zones.recent,
            **shared,
        )
        for i in range(copies)
    ]


def same_memory(copies: list[PagedKvCache], fmt: KvFormat) -> list[PagedKvCache]:
    """The copies once more, read as another format with the same page bytes."""
    return [
        PagedKvCache.wrap(
            fmt,
            pool=one.pool,
            side=one.side,
            block_table=one.block_table,
            slots=one.slots,
            lengths=one.lengths,
            packed=one.packed,
            keep_first=one.keep_first,
            keep_last=one.keep_last,
            workspace=one.workspace,
        )
        for one in copies
    ]


def _block_tables(pages: np.ndarray, copies: int) -> np.ndarray:
    """int32 (copies, B, most pages): shuffled ids, each once; -1 where a sequence has no page."""
    tables = np.full((copies, len(pages), pages.max()), -1, dtype=np.int32)
    used = np.broadcast_to(np.arange(pages.max()) < pages[:, None], tables.shape)
    tables[used] = np.random.default_rng(0).permutation(copies * int(pages.sum()))
    return tables


def _pool(fmt: KvFormat, heads: int, pages: int, device: torch.device) -> torch.Tensor:
    """(pages, heads, page_bytes): real codes and parameters."""
    records = _template(fmt).to(device).view(torch.int64)  # copied 8 bytes at a time
    count = pages * heads
    repeated = records.repeat(-(-count // TEMPLATE_RECORDS), 1)
    return repeated[:count].view(torch.uint8).view(pages, heads, fmt.page_bytes())


@cache
def _template(fmt: KvFormat) -> torch.Tensor:
    """Records, packed on the CPU: a build with a single decode kernel can be timed."""
    shape = (2, 1, TEMPLATE_RECORDS * fmt.page_tokens, 1, fmt.head_dim)
    k, v = torch.randn(shape, dtype=torch.float16)
    pool = torch.zeros((TEMPLATE_RECORDS, 1, fmt.page_bytes()), dtype=torch.uint8)
    table = torch.arange(TEMPLATE_RECORDS, dtype=torch.int32).view(1, -1)
    bitdecoding.pack_pages(k, v, pool, table, format=fmt)
    return pool.view(TEMPLATE_RECORDS, -1)


def kernel_row(pattern: str, fmt: KvFormat, columns: int) -> str:
    """The one row of the kernel table for the format that ``pattern`` matches; of several, that
    which the library would choose on a GPU of 9.0 or, where the pattern rules it out, of 8.0."""
    page = f"_k{fmt.k_bits}v{fmt.v_bits}_{fmt.k_axis[0]}_d{fmt.head_dim}_n"
    kernels = bitdecoding.build_info()["kernels"]
    rows = [name for name in kernels if page in name and fnmatchcase(name, pattern)]
    if len(rows) == 1:
        return rows[0]
    for capability in (90, 80):
        with suppress(NotImplementedError):
            chosen = decode_kernel(fmt, columns, compute_capability=capability)
            if chosen in rows:
                return chosen
    raise LookupError(f"no kernel '{pattern}' for {fmt} and {columns} columns in this build")


def copy_engine(kernel: str) -> str:
    """How a row brings its bytes to shared memory."""
    return "bulk" if kernel.startswith("decode_sm90_") else "cp.async"
