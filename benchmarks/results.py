# SPDX-License-Identifier: Apache-2.0
"""Result files: the facts of a run and its rows; what is computed from several rows. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import HEAD_DIM, Case, ceiling_case
from suites import PLAN

Row = dict[str, Any]

FLASH = "torch SDPA FlashAttention-2"
CUDNN = "torch SDPA cuDNN"
SIXTEEN_BIT = (FLASH, CUDNN)  # the faster of them is the best 16-bit time
SUM_READ = "torch sum, read"
BULK_READ = "bulk copy, read"
READS = (SUM_READ, BULK_READ)  # they read memory once and write nothing worth counting
METHOD, OPERATOR = "PagedKvCache.decode", "torch operator decode_into"  # calls of host.py

# Of a run. In files of 2026 and before every row has them.
FACTS = (
    "gpu", "driver", "nvcc", "torch", "flashinfer", "sms", "l2_bytes", "cpu", "threads", "commit",
    "sources",
)  # fmt: skip


@dataclass
class Results:
    facts: Row
    rows: list[Row]


def load(path: Path) -> Results:
    """A result file. Rows of the old layout, a bare list, get the fields that they lack."""
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        return Results(content["facts"], content["rows"])
    facts = {name: content[0][name] for name in FACTS if name in content[0]}
    rows = [_with_case({name: row[name] for name in row if name not in FACTS}) for row in content]
    return Results(facts, completed(rows) if "bytes" in rows[0] else rows)


def _with_case(row: Row) -> Row:
    if "group" not in row:  # not of decode
        return {"head_dim": HEAD_DIM} | row
    case = Case(*(row[name] for name in ("batch", "heads_kv", "group", "length")))
    added = {"selection": None if row["format"] == "float16" else PLAN}
    return case.facts() | added | row


def save(path: Path, results: Results) -> None:
    """One line per row, so that a difference shows rows."""
    facts = json.dumps(results.facts, indent=1)
    lines = ",\n".join(json.dumps(row) for row in results.rows)
    path.write_text(f'{{"facts": {facts},\n"rows": [\n{lines}\n]}}\n')


def is_ours(row: Row) -> bool:
    return "format" in row and row["format"] not in ("float16", "bfloat16", "float32")


def rate(row: Row) -> float | None:
    """TB/s of the bytes that must be moved; None without a time."""
    time = row["time_us"]
    return None if time is None else round(row["bytes"] / time / 1e6, 3)


def ceiling(rows: Iterable[Row]) -> Row | None:
    """The row of C, the best read rate: cuDNN's in the ceiling case or a plain read."""
    case = str(ceiling_case())
    reads = [
        row
        for row in rows
        if row.get("mode") == "graph"
        and row["time_us"] is not None
        and (row["kernel"] in READS or (row["kernel"] == CUDNN and row["case"] == case))
    ]
    return max(reads, key=lambda row: row["tb_per_s"], default=None)


def best_sixteen_bit(rows: Iterable[Row], case: str, mode: str = "graph") -> Row | None:
    """The faster of torch's 16-bit ways in a case."""
    rivals = [
        row
        for row in rows
        if row.get("kernel") in SIXTEEN_BIT
        and (row["case"], row["mode"]) == (case, mode)
        and row["time_us"] is not None
    ]
    return min(rivals, key=lambda row: row["time_us"], default=None)


def completed(rows: list[Row]) -> list[Row]:
    """The rows with their rate and what compares them with others of the run: C, the share of it,
    and of ours the speed-up over the best 16-bit time."""
    rated = [row | {"tb_per_s": rate(row)} for row in rows]
    best = ceiling(rated)
    limit = None if best is None else best["tb_per_s"]
    done = []
    for row in rated:
        share = None if limit is None or row["tb_per_s"] is None else row["tb_per_s"] / limit
        added = {"ceiling_tb_per_s": limit, "fraction_of_ceiling": _rounded(share)}
        if "case" in row and is_ours(row):
            rival = best_sixteen_bit(rated, row["case"], row["mode"])
            compared = rival is not None and row["time_us"] is not None
            speed_up = rival["time_us"] / row["time_us"] if rival and compared else None
            added["speedup_best_16bit"] = _rounded(speed_up)
        done.append(row | added)
    return done


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
