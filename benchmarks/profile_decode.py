# SPDX-License-Identifier: Apache-2.0
"""What profile.py does: the child that launches, ncu around it, the rows."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ncu_report
import torch
from decode import converter
from decode_cases import (
    Zones,
    caches,
    copies_needed,
    copy_engine,
    decode_bytes,
    kernel_row,
    queries,
)
from measure import machine
from results import Results, Row, load, save
from rich.console import Console
from rich.table import Table
from shapes import Case
from suites import INT2, INT4

from bitdecoding import KvFormat

SCRIPT = Path(__file__).with_name("profile.py")
FORMATS = (INT4, INT2)
WARM_UP = 10  # launches before the profiled one


def launch(case: Case, fmt: KvFormat, zones: Zones, pattern: str | None) -> Row:
    """In the child: one decode call on cold memory inside the range. Returns what the row says of
    the call, with decode.py's names."""
    device = torch.device("cuda", torch.cuda.current_device())
    moved = decode_bytes(case, fmt, zones)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    kernel = pattern
    if pattern is not None:
        kernel = kernel_row(pattern, fmt, case.columns)
    copies = caches(case, fmt, zones, copies_needed(moved, l2_bytes), device)
    q = queries(case, device)
    out = torch.empty_like(q)
    plan = copies[0].plan_decode(
        query_heads=q.shape[2], query_tokens=case.query_tokens, kernel=kernel
    )
    for i in range(max(WARM_UP, len(copies))):
        copies[-1 - i % len(copies)].decode(q, out=out, kernel=kernel)  # ends on another than 0
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range(ncu_report.RANGE):
        copies[0].decode(q, out=out, kernel=kernel)
    torch.cuda.synchronize()
    copies[0].check()
    return {"bytes": moved, "kernel": plan["kernel"], "copy": copy_engine(plan["kernel"])}


def profiled(case: Case, fmt: KvFormat, zones: Zones, args: argparse.Namespace) -> Row:
    """The row of one launch: the child's facts, ncu's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        log, facts = Path(folder, "ncu.csv"), Path(folder, "facts.json")
        child = [
            sys.executable, str(SCRIPT), str(case), "--formats", str(fmt), "--zones", str(zones),
            "--launch-to", str(facts),
        ]  # fmt: skip
        child += [] if args.kernel is None else ["--kernel", args.kernel]
        run = subprocess.run(ncu_report.command(args.ncu, str(log), args.cache_control, child))
        told = log.read_text() if log.exists() else ""
        row = ncu_report.record(ncu_report.parse(told))
        if run.returncode != 0 or not facts.exists():
            raise RuntimeError(f"the launch failed under ncu (exit code {run.returncode})")
        zone_facts = {"sinks": zones.sinks, "recent": zones.recent}
        label = case.facts() | {"format": str(fmt)} | zone_facts
        told_by_child: Row = json.loads(facts.read_text())
        return label | told_by_child | row | {"cache_control": args.cache_control}


def print_row(row: Row) -> None:
    stalls = sorted(row["stalls_per_issue"].items(), key=lambda item: -item[1])
    table = Table("what", "seen", title=f"{row['kernel']}, {row['length']} tokens", min_width=60)
    table.add_row("time under ncu", f"{row['profiled_us']} us")
    table.add_row("DRAM", f"{row['dram_read_tb_per_s']} TB/s read, {row['dram_percent']}%")
    table.add_row("issue slots", f"{row['issue_percent']}%")
    table.add_row("pipes, %", ", ".join(f"{k} {v}" for k, v in row["pipes_percent"].items()))
    table.add_row("stalls per issue", ", ".join(f"{k} {v}" for k, v in stalls[:6]))
    table.add_row("registers", str(row["registers"]))
    table.add_row("occupancy", f"{row['occupancy_percent']}%")
    Console(width=140).print(table)


def kept(facts: Row, args: argparse.Namespace) -> list[Row]:
    """With --add, the output's rows but for those that are profiled anew.

    Raises ValueError where they come from other code or another machine."""
    if not args.add or not args.output.exists():
        return []
    before = load(args.output)
    for name in ("gpu", "driver", "ncu", "commit", "sources"):
        if before.facts[name] != facts[name]:
            raise ValueError(
                f"--add: {name} of {args.output} = {before.facts[name]}; allowed: {facts[name]}"
            )
    anew = {(str(case), str(fmt)) for case in args.cases for fmt in args.formats}
    return [row for row in before.rows if (row["case"], row["format"]) not in anew]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="profile.py", description=__doc__)
    for name, count, parse, default, metavar in (
        ("cases", "+", Case.parse, None, "CASE"),
        ("--formats", "+", KvFormat.parse, [KvFormat.parse(name) for name in FORMATS], "FORMAT"),
        ("--zones", None, Zones.parse, Zones(16, 64), "FIRST/NEWEST"),
    ):
        parser.add_argument(
            name, nargs=count, type=converter(parse), default=default, metavar=metavar
        )
    parser.add_argument("--kernel", metavar="ROW", help="as in decode.py")
    parser.add_argument(
        "--cache-control", choices=("none", "all"), default="none",
        help="'all' empties the caches before every pass: for calls of less than a few times the "
        "L2, which would find their bytes there; default: none",
    )  # fmt: skip
    parser.add_argument("--ncu", help="Nsight Compute's command line; default: ncu of PATH")
    parser.add_argument("--output", type=Path, help="write the rows as JSON, after every launch")
    parser.add_argument(
        "--add", action="store_true",
        help="to what the output holds: its rows of other cases and formats stay",
    )  # fmt: skip
    parser.add_argument("--launch-to", type=Path, help=argparse.SUPPRESS)  # this is the child
    args = parser.parse_args()
    if {case.head_dim for case in args.cases} != {fmt.head_dim for fmt in args.formats}:
        parser.error("--formats: allowed: those of the cases' head_dim")
    if args.add and args.output is None:
        parser.error("--add: allowed: with --output")
    if args.launch_to is None:
        args.ncu = args.ncu or shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
        if args.ncu is None:
            parser.error("--ncu: ncu (Nsight Compute) is not in PATH; allowed: its path")
    return args


def main() -> None:
    args = arguments()
    if args.launch_to is not None:
        found = launch(args.cases[0], args.formats[0], args.zones, args.kernel)
        args.launch_to.write_text(json.dumps(found))
        return
    told = subprocess.run([args.ncu, "--version"], capture_output=True, text=True).stdout
    facts = machine() | {"ncu": ncu_report.version(told)}
    try:
        rows = kept(facts, args)
    except ValueError as error:
        sys.exit(str(error))
    for case in args.cases:
        for fmt in args.formats:
            try:
                rows.append(profiled(case, fmt, args.zones, args))
            except RuntimeError as error:
                sys.exit(f"{case}, {fmt}: {error}")
            print_row(rows[-1])
            if args.output is not None:
                save(args.output, Results(facts, rows))
