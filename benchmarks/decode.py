# SPDX-License-Identifier: Apache-2.0
"""Decode attention over low-bit caches, beside torch's FlashAttention-2 and cuDNN over fp16 ones.

python benchmarks/decode.py --output benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_cases import (
    CASES,
    FORMATS,
    HEAD_DIM,
    Case,
    Zones,
    caches,
    copies_needed,
    copy_engine,
    decode_bytes,
    kernel_row,
    launches_needed,
    queries,
    sixteen_bit_bytes,
)
from measure import graph_time_us, host_us, machine, time_us
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bitdecoding import KvFormat, PagedKvCache

Row = dict[str, Any]

# What a row has that cannot be timed, beside the reason in "error".
UNTIMED = {"time_us": None, "p10_us": None, "p90_us": None, "iterations": 0}
SDPA = {
    "torch SDPA FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass
class Work:
    """Calls that do the same on different memory and, of our decode, what shows that they did."""

    calls: Sequence[Callable[[], Any]]
    out: torch.Tensor | None = None
    caches: list[PagedKvCache] = field(default_factory=list)

    def poison(self) -> None:
        if self.out is not None:
            self.out.fill_(torch.nan)

    def verify(self) -> None:
        for one in self.caches:
            one.check()
        if self.out is not None and not bool(self.out.isfinite().all()):
            raise RuntimeError("the output is not finite")


def measure(label: Row, make: Callable[[], Work], args: argparse.Namespace) -> list[Row]:
    """The rows of one implementation: graph replays, plain launches. One that refuses says why."""
    modes: dict[str, Callable[[Sequence[Callable[[], Any]]], Row]] = {
        "graph": lambda calls: graph_time_us(calls, launches_needed(len(calls)), args.replays),
        "plain": lambda calls: time_us(calls, args.launches),
    }
    rows = []
    work, host = None, None
    for mode, timed in modes.items():
        try:
            if work is None:
                work = make()
                host = host_us(work.calls)
            work.poison()
            found = timed(work.calls)
            work.verify()
        except (RuntimeError, ValueError, LookupError) as error:
            found = UNTIMED | {"error": str(error).strip().partition("\n")[0]}
        rows.append(label | {"mode": mode, "host_us": host} | found)
    return rows


def case_facts(case: Case) -> Row:
    return {
        "batch": case.batch,
        "heads_kv": case.heads_kv,
        "group": case.group,
        "length": case.length,
    }


def decode_rows(
    case: Case, fmt: KvFormat, zones: Zones, args: argparse.Namespace, l2_bytes: int
) -> list[Row]:
    """Our decode over one format, by the kernel that its plan chooses or the one asked for."""
    moved = decode_bytes(case, fmt, zones)
    label = case_facts(case) | {
        "format": str(fmt),
        "sinks": zones.sinks,
        "recent": zones.recent,
        "bytes": moved,
        "copy": None,
        "kernel": args.kernel,
    }

    def make() -> Work:
        named = args.kernel
        if named is not None:
            named = kernel_row(named, fmt, case.group)
        copies = caches(case, fmt, zones, copies_needed(moved, l2_bytes), args.device)
        q = queries(case, fmt.head_dim, args.device)
        out = torch.empty_like(q)
        plan = copies[0].plan_decode(query_heads=q.shape[2], kernel=named)
        label.update(kernel=plan["kernel"], copy=copy_engine(plan["kernel"]))
        calls = [partial(copy.decode, q, out=out, kernel=named) for copy in copies]
        return Work(calls, out, copies)

    return measure(label, make, args)


def baseline_rows(case: Case, args: argparse.Namespace, l2_bytes: int) -> list[Row]:
    """torch over contiguous fp16 K and V; in the first case also plain reads and copies of them."""
    moved = sixteen_bit_bytes(case, HEAD_DIM)
    shape = (case.batch, case.heads_kv, case.length, HEAD_DIM)
    pairs = [
        [torch.randn(shape, dtype=torch.float16, device=args.device) for _ in range(2)]
        for _ in range(copies_needed(moved, l2_bytes))
    ]
    q = queries(case, HEAD_DIM, args.device).view(case.batch, -1, 1, HEAD_DIM)  # (B, Hq, 1, D)
    label = case_facts(case) | {"format": "float16", "sinks": None, "recent": None, "copy": None}
    attend = [
        partial(scaled_dot_product_attention, q, k, v, enable_gqa=case.group > 1) for k, v in pairs
    ]
    rows = []
    for name, backend in SDPA.items():
        with sdpa_kernel(backend):
            rows += measure(label | {"bytes": moved, "kernel": name}, lambda: Work(attend), args)
    if case == CASES[0]:
        one = pairs[0][0].nbytes
        reads = [partial(torch.sum, x.view(torch.float32)) for pair in pairs for x in pair]
        copy = [partial(y.copy_, x) for x, y in zip(pairs[0], pairs[1], strict=True)]
        rows += measure(
            label | {"bytes": one, "kernel": "torch sum, read"}, lambda: Work(reads), args
        )
        rows += measure(
            label | {"bytes": 2 * one, "kernel": "torch copy_, read and written"},
            lambda: Work(copy),
            args,
        )
    return rows


COLUMNS = (
    "batch", "heads_kv", "group", "length", "format", "mode", "sinks", "recent", "time_us",
    "p10_us", "p90_us", "host_us", "bytes", "tb_per_s", "copy", "kernel", "gpu", "driver", "nvcc",
    "torch", "commit", "iterations", "error",
)  # fmt: skip


def finished(row: Row, facts: Row) -> Row:
    """The row with its rate and the facts of the machine, in the order of COLUMNS."""
    time = row["time_us"]
    rate = None if time is None else round(row["bytes"] / time / 1e6, 3)
    complete = row | {"tb_per_s": rate} | facts
    return {name: complete[name] for name in COLUMNS if name in complete}


def print_rows(case: Case, rows: list[Row]) -> None:
    table = Table("format", "zones", "kernel", "mode", "us", "p10", "p90", "host us", "TB/s")
    for row in rows:
        zones = "" if row["sinks"] is None else f"{row['sinks']}/{row['recent']}"
        numbers = [row[name] for name in ("time_us", "p10_us", "p90_us", "host_us", "tb_per_s")]
        texts = ["" if number is None else str(number) for number in numbers]
        texts[0] = texts[0] or row["error"]
        table.add_row(row["format"], zones, row["kernel"], row["mode"], *texts)
    table.title = str(case)
    Console(width=160).print(table)


def save(rows: list[Row], path: Path) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def converter(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` for argparse, which would hide the text of a ValueError."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = parser.add_argument_group("what is measured")
    for name, parse, default, metavar in (
        ("--cases", Case.parse, CASES, "BxHxG@L"),
        ("--formats", KvFormat.parse, [KvFormat.parse(name) for name in FORMATS], "FORMAT"),
        ("--zones", Zones.parse, (Zones(16, 64), Zones(0, 0)), "FIRST/NEWEST"),
    ):
        several.add_argument(
            name, nargs="+", type=converter(parse), default=default, metavar=metavar,
            help=f"default: {' '.join(str(one) for one in default)}",
        )  # fmt: skip
    several.add_argument(
        "--kernel",
        metavar="ROW",
        help="a row of the kernel table or a pattern: 'decode_sm80_*'; default: the plan's choice",
    )
    several.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="few iterations")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, after every case")
    args = parser.parse_args()
    if args.baselines and any(fmt.head_dim != HEAD_DIM for fmt in args.formats):
        parser.error(f"--formats: head_dim other than {HEAD_DIM} needs --no-baselines")
    args.replays, args.launches = (10, 20) if args.quick else (100, 200)
    return args


def main() -> None:
    args = arguments()
    args.device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(args.device)
    facts = machine()
    rows: list[Row] = []
    for case in args.cases:
        found = []
        if args.baselines:
            found += baseline_rows(case, args, properties.L2_cache_size)
            torch.cuda.empty_cache()
        for fmt in args.formats:
            for zones in args.zones:
                found += decode_rows(case, fmt, zones, args, properties.L2_cache_size)
                torch.cuda.empty_cache()
        found = [finished(row, facts) for row in found]
        print_rows(case, found)
        rows += found
        if args.output is not None:
            save(rows, args.output)
    refused = [row for row in rows if "error" in row and row["format"] != "float16"]
    if refused:
        sys.exit(f"{len(refused)} rows of ours could not be timed: {refused[0]['error']}")


if __name__ == "__main__":
    main()
