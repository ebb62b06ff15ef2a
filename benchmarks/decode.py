# SPDX-License-Identifier: Apache-2.0
"""Decode attention over low-bit caches, beside 16-bit attention of torch and FlashInfer.

python benchmarks/decode.py --output benchmarks/results/decode.json
python benchmarks/decode.py --tags grid --output benchmarks/results/grid.json
python benchmarks/decode.py --tags recipes head256 --output benchmarks/results/recipes.json
python benchmarks/decode.py --cases 8x8x4@131072 --formats k2v2_c128_v128_p128_d128 --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import Device, ceiling_rows, flashinfer_rows, torch_rows
from decode_cases import (
    Zones,
    caches,
    copies_needed,
    copy_engine,
    decode_bytes,
    kernel_row,
    queries,
    same_memory,
)
from measure import machine
from results import Results, Row, ceiling, completed, is_ours, save
from rich.console import Console
from rich.table import Table
from shapes import Case, ceiling_case
from suites import FORMATS, PLAN, SUITES, TARGETS, Measurement, Plan, planned, untransformed
from work import QUICK, Effort, Work, measure

from bitdecoding import KvFormat

LOW_CEILING = 4.5  # TB/s; an H200 that reads less is not at its best: repeat the run


def decode_rows(
    case: Case, one: Measurement, zones: Zones, where: Device, effort: Effort
) -> list[Row]:
    """Our decode over one format, by the kernel that its plan chooses or the one asked for."""
    fmt = KvFormat.parse(one.format)
    moved = decode_bytes(case, fmt, zones)
    chosen = one.kernel == PLAN
    label = case.facts() | {
        "format": one.format,
        "sinks": zones.sinks,
        "recent": zones.recent,
        "selection": one.kernel,
        "bytes": moved,
        "copy": None,
        "kernel": None if chosen else one.kernel,
    }

    def make() -> Work:
        named = None
        if not chosen:
            named = kernel_row(one.kernel, fmt, case.columns)
        copies = caches(case, fmt, zones, copies_needed(moved, where.l2_bytes), where.device)
        q = queries(case, where.device)
        out = torch.empty_like(q)
        plan = copies[0].plan_decode(
            query_heads=q.shape[2], query_tokens=case.query_tokens, kernel=named
        )
        label.update(kernel=plan["kernel"], copy=copy_engine(plan["kernel"]))
        plain = untransformed(one.format)
        as_they_come = [] if plain == one.format else same_memory(copies, KvFormat.parse(plain))
        calls, others = (
            [partial(cache.decode, q, out=out, kernel=named) for cache in each]
            for each in (copies, as_they_come)
        )
        return Work(calls, out, copies, others)

    return measure(label, make, effort)


def case_rows(
    case: Case, plan: Plan, zones: list[Zones], where: Device, args: argparse.Namespace
) -> list[Row]:
    """All rows of a case that the run doesn't have yet."""
    rows: list[Row] = []
    if args.baselines and plan.baselines:
        if not (args.ceiling and case == ceiling_case()):
            rows += torch_rows(case, where, args.effort)
            torch.cuda.empty_cache()
        rows += flashinfer_rows(case, where, args.effort)
        torch.cuda.empty_cache()
    for one in plan.ours:
        for zone in zones:
            rows += decode_rows(case, one, zone, where, args.effort)
            torch.cuda.empty_cache()
    return rows


def print_rows(title: str, rows: list[Row]) -> None:
    columns = ("format", "zones", "kernel", "mode", "us", "p10", "p90", "host us", "TB/s", "of C")
    names = ("time_us", "p10_us", "p90_us", "host_us", "tb_per_s", "fraction_of_ceiling")
    table = Table(*columns, "x 16-bit", title=title)
    for row in rows:
        zones = "" if row["sinks"] is None else f"{row['sinks']}/{row['recent']}"
        numbers = [row.get(name) for name in (*names, "speedup_best_16bit")]
        texts = ["" if number is None else str(number) for number in numbers]
        texts[0] = texts[0] or row["error"]
        table.add_row(row["format"], zones, row["kernel"], row["mode"], *texts)
    Console(width=170).print(table)


def converter(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` for argparse, which would hide the text of a ValueError."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = options.add_argument_group("what is measured")
    what.add_argument(
        "--tags", nargs="+", choices=tuple(SUITES), default=TARGETS, metavar="TAG",
        help=f"shapes of shapes.csv, with what suites.py says of them; default: {' '.join(TARGETS)}"
        "; also: head256, recipes, grid, quick",
    )  # fmt: skip
    what.add_argument(
        "--cases", nargs="+", type=converter(Case.parse), metavar="BxHxG@L",
        help="these shapes instead, such as 8x8x4@4096 or 8x8x4@1024-4096:q2:d64",
    )  # fmt: skip
    what.add_argument(
        "--formats", nargs="+", type=converter(KvFormat.parse), metavar="FORMAT",
        help=f"with --cases; default: {' '.join(FORMATS)}",
    )  # fmt: skip
    what.add_argument(
        "--kernel", metavar="ROW",
        help="a row of the kernel table or a pattern: 'decode_sm80_*'; default: what suites say",
    )  # fmt: skip
    what.add_argument(
        "--zones", nargs="+", type=converter(Zones.parse), default=[Zones(16, 64)],
        metavar="FIRST/NEWEST", help="default: 16/64",
    )  # fmt: skip
    how = options.add_argument_group("how")
    how.add_argument("--modes", nargs="+", choices=("graph", "plain"), default=["graph"])
    how.add_argument("--quick", action="store_true", help="few iterations")
    how.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    how.add_argument(
        "--ceiling", action=argparse.BooleanOptionalAction, default=True,
        help="measure C first, which takes 8.6 GB",
    )  # fmt: skip
    how.add_argument(
        "--read-command", metavar="COMMAND",
        help="a program that times a plain read: its last line is JSON (baselines.reported_read)",
    )  # fmt: skip
    options.add_argument("--output", type=Path, help="write the rows as JSON, after every case")
    return options


def plans_of(args: argparse.Namespace) -> dict[Case, Plan]:
    """What the arguments ask for, case by case. ValueError where they don't fit each other."""
    if args.cases is None:
        if args.formats is not None:
            raise ValueError("--formats needs --cases: suites have formats of their own")
        plans = planned(args.tags)
        if args.kernel is not None:
            for plan in plans.values():
                formats = dict.fromkeys(one.format for one in plan.ours)
                plan.ours = [Measurement(name, args.kernel) for name in formats]
        return plans
    chosen = args.formats or [KvFormat.parse(name) for name in FORMATS]
    plans = {}
    for case in args.cases:
        for fmt in chosen:
            if fmt.head_dim != case.head_dim:
                raise ValueError(f"--formats: {fmt} for {case}; allowed: head_dim {case.head_dim}")
        ours = [Measurement(str(fmt), args.kernel or PLAN) for fmt in chosen]
        plans[case] = Plan(ours, baselines=True)
    return plans


def main() -> None:
    options = parser()
    args = options.parse_args()
    try:
        plans = plans_of(args)
    except ValueError as error:
        options.error(str(error))
    args.effort = replace(QUICK if args.quick else Effort(), modes=tuple(args.modes))
    begin = time.monotonic()
    facts = machine()
    where = Device(torch.device("cuda", torch.cuda.current_device()), facts["l2_bytes"])
    rows: list[Row] = []
    if args.ceiling:
        rows = completed(
            ceiling_rows(where, args.effort, args.read_command, torch.cuda.empty_cache)
        )
        print_rows(f"{ceiling_case()}: the ceiling", rows)
    for case, plan in plans.items():
        known = len(rows)
        rows = completed(rows + case_rows(case, plan, args.zones, where, args))
        print_rows(str(case), rows[known:])
        if args.output is not None:
            save(args.output, Results(facts, rows))
    report(rows, time.monotonic() - begin, facts)


def report(rows: list[Row], seconds: float, facts: Row) -> None:
    """The last lines; exits with 1 where a row of ours has no time."""
    best = ceiling(rows)
    if best is not None:
        print(f"C = {best['tb_per_s']} TB/s ({best['kernel']})")
        if best["tb_per_s"] < LOW_CEILING:
            print(f"C is below {LOW_CEILING} TB/s: repeat the run")
    if facts["flashinfer"] is None:
        print("FlashInfer isn't installed: no rows of it")
    print(f"{len(rows)} rows in {seconds:.0f} s")
    refused = [row for row in rows if "error" in row and is_ours(row)]
    if refused:
        sys.exit(f"{len(refused)} rows of ours could not be timed: {refused[0]['error']}")


if __name__ == "__main__":
    main()
