# SPDX-License-Identifier: Apache-2.0
"""Compiler launcher that fails a unit in which a kernel is over its limits in the kernel table, or
has wgmmas that wait for each other.

check_kernels.py COMPILER ... -c UNIT.cu -o OBJECT, where UNIT.limits beside the unit has a line per
row: name, registers and bytes of stack of a thread, bytes of static shared memory. They are limits
of code for ARCHITECTURES. What ptxas says of its kernels is read and not shown; all else is.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90a")
KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers")  # the line that ends a kernel's report
STACK = re.compile(r"(\d+) bytes cumulative stack")
SHARED = re.compile(r"(\d+) bytes smem")
SPILLS = re.compile(r"bytes stack frame, (\d+ bytes spill stores, \d+ bytes spill loads)")
SERIALIZED = re.compile(r"Potential Performance Loss: (.*) in the function '(\S+)'")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel; also the most it may say."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Report:
    symbol: str  # mangled
    arch: str
    usage: Usage
    spills: str


def read_reports(output: str) -> tuple[list[Report], str]:
    """ptxas's reports in a compiler's output, and the rest of it."""
    reports = []
    rest = []
    symbol = arch = spills = ""
    for line in output.splitlines(keepends=True):
        spilled = SPILLS.search(line)
        if not (line.startswith("ptxas info ") or spilled):
            rest.append(line)
        if kernel := KERNEL.search(line):
            symbol, arch = kernel.groups()
            spills = ""
        if spilled:
            spills = spilled[1]
        if used := USED.search(line):
            stack, shared = (
                int(found[1]) if (found := pattern.search(line)) else 0
                for pattern in (STACK, SHARED)
            )
            reports.append(Report(symbol, arch, Usage(int(used[1]), stack, shared), spills))
    return reports, "".join(rest)


def read_limits(path: Path) -> dict[str, Usage]:
    rows = [line.split() for line in path.read_text().splitlines()]
    return {name: Usage(*map(int, limits)) for name, *limits in rows}


def faults(reports: list[Report], limits: dict[str, Usage]) -> list[str]:
    """What is over its limit, and rows that ptxas said nothing of."""
    found = []
    unseen = set(limits)
    for report in reports:
        if report.arch not in ARCHITECTURES:
            continue
        row = next((name for name in limits if f"{len(name)}{name}E" in report.symbol), None)
        if row is None:
            found.append(f"{report.symbol} for {report.arch}: no row of the kernel table")
            continue
        unseen.discard(row)
        used, most = report.usage, limits[row]
        for what, value, limit in (
            ("registers", used.registers, most.registers),
            (f"stack bytes ({report.spills})", used.stack, most.stack),
            ("static shared bytes", used.shared, most.shared),
        ):
            if value > limit:
                found.append(f"{row} for {report.arch}: {what} = {value}; allowed: at most {limit}")
    return found + [f"{row}: ptxas reported no such kernel" for row in sorted(unseen)]


def serialized(output: str) -> list[str]:
    """Kernels whose wgmmas ptxas has made to wait for each other, and why."""
    return sorted({f"{symbol}: {why}" for why, symbol in SERIALIZED.findall(output)})


def main() -> int:
    command = sys.argv[1:]
    compiled = subprocess.run(
        [*command, "-Xptxas=-v"], stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    reports, rest = read_reports(compiled.stderr)
    sys.stderr.write(rest)
    if compiled.returncode != 0:
        return compiled.returncode
    unit, output = (Path(command[command.index(option) + 1]) for option in ("-c", "-o"))
    wrong = faults(reports, read_limits(unit.with_suffix(".limits")))
    wrong += serialized(compiled.stderr)
    for text in wrong:
        print(f"error: kernel table (src/kernels.cmake): {text}", file=sys.stderr)
    if wrong:
        print("BITDECODING_LIMITS=off builds kernels over their limits", file=sys.stderr)
        output.unlink()  # else the next build would take it for done
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
