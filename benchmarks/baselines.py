# SPDX-License-Identifier: Apache-2.0
"""What decode is compared with: 16-bit attention of torch and FlashInfer, plain reads of memory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from decode_cases import copies_needed, queries, sixteen_bit_bytes
from results import BULK_READ, CUDNN, FLASH, SUM_READ, Row
from shapes import Case, ceiling_case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from work import Effort, Work, measure

BACKENDS = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
COPY = "torch copy_, read and written"
FLASHINFER = "FlashInfer batch decode, pages of 16"
FLASHINFER_PAGE_TOKENS = 16
FLASHINFER_WORKSPACE = 128 << 20  # bytes, what its documentation recommends


@dataclass(frozen=True)
class Device:
    """Where rivals run."""

    device: torch.device
    l2_bytes: int


def sixteen_bit_label(case: Case) -> Row:
    return case.facts() | {
        "format": "float16",
        "sinks": None,
        "recent": None,
        "selection": None,
        "copy": None,
    }


def key_value_pairs(case: Case, where: Device) -> list[list[torch.Tensor]]:
    """fp16 K and V (B, Hkv, L, D), as often as cold memory needs them."""
    shape = (case.batch, case.heads_kv, case.length, case.head_dim)
    return [
        [torch.randn(shape, dtype=torch.float16, device=where.device) for _ in range(2)]
        for _ in range(copies_needed(sixteen_bit_bytes(case), where.l2_bytes))
    ]


def torch_rows(case: Case, where: Device, effort: Effort) -> list[Row]:
    """torch over contiguous K and V, by FlashAttention-2 and cuDNN; none of a ragged batch."""
    if case.ragged:
        return []
    pairs: list[list[torch.Tensor]] = []
    q = queries(case, where.device).transpose(1, 2)  # (B, Hq, Sq, D)
    gqa = case.group > 1

    def make() -> Work:
        if not pairs:  # the second backend takes those of the first
            pairs.extend(key_value_pairs(case, where))
        attend = partial(scaled_dot_product_attention, q, enable_gqa=gqa)
        return Work([partial(attend, k, v) for k, v in pairs])

    label = sixteen_bit_label(case) | {"bytes": sixteen_bit_bytes(case)}
    rows = []
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            rows += measure(label | {"kernel": name}, make, effort)
    return rows


def flashinfer_rows(case: Case, where: Device, effort: Effort) -> list[Row]:
    """FlashInfer over pages of 16 tokens; none where it isn't installed. Its decode of several
    query tokens is causal, so it has no row of them."""
    if importlib.util.find_spec("flashinfer") is None or case.query_tokens > 1:
        return []

    def make() -> Work:
        try:
            return flashinfer_work(importlib.import_module("flashinfer"), case, where)
        except Exception as error:  # it compiles as it runs: anything may be missing
            raise RuntimeError(f"FlashInfer: {type(error).__name__}: {error}") from error

    label = sixteen_bit_label(case) | {"bytes": sixteen_bit_bytes(case), "kernel": FLASHINFER}
    return measure(label, make, effort)


def flashinfer_work(flashinfer: Any, case: Case, where: Device) -> Work:
    """One wrapper, planned once; its calls take turns through pools (pages, 2, 16, Hkv, D)."""
    size = FLASHINFER_PAGE_TOKENS
    lengths = torch.tensor(case.lengths(), dtype=torch.int32)
    pages = (lengths + size - 1) // size
    indptr = torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
    indices = torch.randperm(int(pages.sum())).to(torch.int32)
    last = lengths - (pages - 1) * size
    options = {"device": where.device}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, **options),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=case.group > 1,
        paged_kv_indptr_buffer=torch.empty_like(indptr, **options),
        paged_kv_indices_buffer=torch.empty_like(indices, **options),
        paged_kv_last_page_len_buffer=torch.empty_like(last, **options),
    )
    heads = case.heads_kv * case.group
    wrapper.plan(
        indptr, indices.to(where.device), last, heads, case.heads_kv, case.head_dim, size,
        q_data_type=torch.float16, kv_data_type=torch.float16,
    )  # fmt: skip
    q = queries(case, where.device)[:, 0]  # (B, Hq, D)
    out = torch.empty_like(q)
    shape = (len(indices), 2, size, case.heads_kv, case.head_dim)
    calls = []
    for _ in range(copies_needed(sixteen_bit_bytes(case), where.l2_bytes)):
        pool = torch.randn(shape, dtype=torch.float16, **options)
        calls.append(partial(wrapper.run, q, pool, out=out))
    return Work(calls, out)


def read_rows(where: Device, effort: Effort) -> list[Row]:
    """Plain reads of the ceiling case's K and V, and copies of them."""
    case = ceiling_case()
    pairs = key_value_pairs(case, where)
    one = pairs[0][0].nbytes
    reads = [partial(torch.sum, x.view(torch.float32)) for pair in pairs for x in pair]
    copies = [partial(y.copy_, x) for x, y in zip(pairs[0], pairs[1], strict=True)]
    label = sixteen_bit_label(case)
    rows = measure(label | {"bytes": one, "kernel": SUM_READ}, lambda: Work(reads), effort)
    return rows + measure(label | {"bytes": 2 * one, "kernel": COPY}, lambda: Work(copies), effort)


def reported_read(command: str) -> list[Row]:
    """A read that another program times, as a row: the last line that it prints is a JSON object
    with bytes, time_us, p10_us, p90_us and iterations."""
    text = subprocess.run(
        shlex.split(command), check=True, capture_output=True, text=True
    ).stdout.strip()
    report = json.loads(text.splitlines()[-1])
    names = ("bytes", "time_us", "p10_us", "p90_us", "iterations")
    found = {name: report[name] for name in names}
    label = sixteen_bit_label(ceiling_case()) | {"kernel": BULK_READ, "mode": "graph"}
    return [label | found | {"host_us": None}]


def ceiling_rows(
    where: Device, effort: Effort, read_command: str | None, empty: Callable[[], None]
) -> list[Row]:
    """All that C may be the largest of: 16-bit attention in the ceiling case, plain reads."""
    rows = torch_rows(ceiling_case(), where, effort)
    empty()
    rows += read_rows(where, effort)
    empty()
    return rows + ([] if read_command is None else reported_read(read_command))
