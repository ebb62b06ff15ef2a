# SPDX-License-Identifier: Apache-2.0
"""What the decode benchmark runs on: shapes, what they must read, caches in cold memory."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch

import bitdecoding
from bitdecoding import KvFormat, PagedKvCache
from bitdecoding.plan import decode_kernel

HEAD_DIM = 128
TEMPLATE_PAGES = 16  # pages that are packed; the pool repeats them
LAUNCHES = 20  # of a graph, at least


@dataclass(frozen=True)
class Case:
    """Decode of one query token per sequence; printed and parsed as BxHxG@L."""

    batch: int
    heads_kv: int
    group: int  # query heads per KV head
    length: int  # tokens of every sequence

    @classmethod
    def parse(cls, text: str) -> Case:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)@(\d+)", text)
        numbers = [int(number) for number in match.groups()] if match else []
        if not match or min(numbers) < 1:
            raise ValueError(
                f"case = {text!r}; allowed: batch x KV heads x group @ tokens: 8x8x4@4096"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads_kv}x{self.group}@{self.length}"


CASES = tuple(
    Case.parse(text)
    for text in (
        "8x8x4@131072", "1x32x1@131072", "8x32x1@32768", "64x8x4@8192", "128x8x8@4096",
        "1x8x4@131072", "1x8x4@32768", "1x8x4@8192",
    )
)  # fmt: skip
FORMATS = (
    "k4v4_c128_v128_p128_d128",
    "k4v2_c128_v128_p128_d128",
    "k2v2_c128_v128_p128_d128",
    "k2v2_c32_v32_p128_d128",
)


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


def packed_tokens(case: Case, fmt: KvFormat, zones: Zones) -> int:
    """How many tokens of a sequence are in pages after it was appended (docs/format.md, 6)."""
    return max(0, case.length - zones.recent) // fmt.page_tokens * fmt.page_tokens


def query_bytes(case: Case, head_dim: int) -> int:
    """Queries and outputs of one call, fp16."""
    return 2 * 2 * case.batch * case.heads_kv * case.group * head_dim


def decode_bytes(case: Case, fmt: KvFormat, zones: Zones) -> int:
    """Bytes that one decode call must move once: whole pages, 16-bit zones, queries, outputs.

    The page of the first tokens counts too, unless all its tokens are read from their zone.
    """
    packed = packed_tokens(case, fmt, zones)
    first = min(zones.sinks, packed)
    pages = packed // fmt.page_tokens - first // fmt.page_tokens
    zone_tokens = first + case.length - packed
    head = pages * fmt.page_bytes() + zone_tokens * 2 * 2 * fmt.head_dim
    return case.batch * case.heads_kv * head + query_bytes(case, fmt.head_dim)


def sixteen_bit_bytes(case: Case, head_dim: int) -> int:
    """The same of fp16 K and V."""
    cache = 2 * 2 * case.batch * case.heads_kv * case.length * head_dim
    return cache + query_bytes(case, head_dim)


def copies_needed(moved: int, l2_bytes: int) -> int:
    """Caches to take turns through: 4x the L2 lies between two reads of the same byte."""
    return 1 + max(1, -(-4 * l2_bytes // moved))


def launches_needed(copies: int) -> int:
    """Launches of a graph: every copy equally often, LAUNCHES or more."""
    return -(-LAUNCHES // copies) * copies


def queries(case: Case, head_dim: int, device: torch.device) -> torch.Tensor:
    """(B, 1, Hq, D) fp16."""
    shape = (case.batch, 1, case.heads_kv * case.group, head_dim)
    return torch.randn(shape, dtype=torch.float16, device=device)


def caches(
    case: Case, fmt: KvFormat, zones: Zones, copies: int, device: torch.device
) -> list[PagedKvCache]:
    """Caches of the same shape in different memory, whole sequences in each.

    Every sequence has pages and a slot of its own, in random order, in one pool and one side buffer
    for all copies. Contents: TEMPLATE_PAGES pages packed from random tokens, over and over.
    """
    packed = packed_tokens(case, fmt, zones)
    columns = packed // fmt.page_tokens
    sequences = copies * case.batch
    pool, ids = _pool(case, fmt, sequences * columns, device)

    tail_tokens = -(-(zones.recent + fmt.page_tokens) // 16) * 16
    rows = zones.sinks + tail_tokens
    side_shape = (sequences, case.heads_kv, 2, rows, fmt.head_dim)
    side = torch.randn(side_shape, dtype=torch.float16, device=device)
    slots = torch.randperm(sequences, device=device).to(torch.int32).view(copies, case.batch)
    # Calls of the copies follow each other on one stream, so they can share scratch memory.
    shared = {"workspace": bitdecoding.Workspace(device)} if device.type == "cuda" else {}

    def counts(tokens: int) -> torch.Tensor:
        return torch.full((case.batch,), tokens, dtype=torch.int32, device=device)

    return [
        PagedKvCache.wrap(
            fmt,
            pool=pool,
            side=side,
            block_table=ids.view(copies, case.batch, columns)[i],
            slots=slots[i],
            lengths=counts(case.length),
            packed=counts(packed),
            keep_first=zones.sinks,
            keep_last=zones.recent,
            **shared,
        )
        for i in range(copies)
    ]


def _pool(
    case: Case, fmt: KvFormat, pages: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of real codes and parameters, ``pages`` or more, and as many ids, shuffled."""
    template = _template(fmt, case.heads_kv).to(device)
    pool = template.repeat(max(1, -(-pages // TEMPLATE_PAGES)), 1, 1)
    ids = torch.randperm(len(pool), device=device)[:pages].to(torch.int32)
    return pool, ids


@cache
def _template(fmt: KvFormat, heads: int) -> torch.Tensor:
    """TEMPLATE_PAGES pages, packed on the CPU: a build with a single decode kernel can be timed."""
    shape = (2, 1, TEMPLATE_PAGES * fmt.page_tokens, heads, fmt.head_dim)
    k, v = torch.randn(shape, dtype=torch.float16)
    pool = torch.zeros((TEMPLATE_PAGES, heads, fmt.page_bytes()), dtype=torch.uint8)
    table = torch.arange(TEMPLATE_PAGES, dtype=torch.int32).view(1, -1)
    bitdecoding.pack_pages(k, v, pool, table, format=fmt)
    return pool


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
