# SPDX-License-Identifier: Apache-2.0
"""What profile.py asks Nsight Compute (ncu) and what it makes of the answer; needs no GPU.

Metric names are those of ncu 2023 to 2026 for compute capability 9.0.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from typing import Any

RANGE = "decode"  # the NVTX range around the profiled launch

# field of a row: (metric, factor from the metric's base unit). Base units: bytes, nanoseconds, 1.
SCALARS = {
    "profiled_us": ("gpu__time_duration.sum", 1e-3),
    "sm_ghz": ("sm__cycles_elapsed.avg.per_second", 1e-9),
    "dram_bytes_read": ("dram__bytes_read.sum", 1),
    "dram_bytes_written": ("dram__bytes_write.sum", 1),
    "dram_read_tb_per_s": ("dram__bytes_read.sum.per_second", 1e-12),
    "dram_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "warp_instructions": ("smsp__inst_executed.sum", 1),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "shared_bytes_dynamic": ("launch__shared_mem_per_block_dynamic", 1),
    "shared_bytes_static": ("launch__shared_mem_per_block_static", 1),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "occupancy_percent_possible": ("sm__maximum_warps_per_active_cycle_pct", 1),
}
# Percent of the rate that a pipe could sustain while its SM was active.
PIPES = {
    "alu": "sm__inst_executed_pipe_alu",
    "fma": "sm__inst_executed_pipe_fma",
    "fma_heavy": "sm__inst_executed_pipe_fmaheavy",
    "xu": "sm__inst_executed_pipe_xu",
    "lsu": "sm__inst_executed_pipe_lsu",
    "tensor": "sm__pipe_tensor_cycles_active",
    "tensor_fp16": "sm__pipe_tensor_op_hmma_cycles_active",
    "tensor_int8": "sm__pipe_tensor_op_imma_cycles_active",
}
# Warps that waited, for each reason, per instruction issued; "selected" is the one that issued.
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle",
    "long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction",
    "not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait",
)  # fmt: skip


def pipe_metric(name: str) -> str:
    return f"{PIPES[name]}.avg.pct_of_peak_sustained_active"


def stall_metric(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


METRICS = (
    *(metric for metric, _ in SCALARS.values()),
    *map(pipe_metric, PIPES),
    *map(stall_metric, STALLS),
)


def command(ncu: str, log: str, cache_control: str, child: Sequence[str]) -> list[str]:
    """ncu on ``child``, the launches in RANGE alone; what ncu says, with the CSV, goes to ``log``.

    Clocks are left alone. ``cache_control``: 'none' leaves caches as they are between the passes
    that ncu repeats the launch in, 'all' empties them.
    """
    return [
        ncu, "--nvtx", "--nvtx-include", f"{RANGE}/", "--clock-control", "none",
        "--cache-control", cache_control, "--metrics", ",".join(METRICS), "--csv", "--page", "raw",
        "--print-units", "base", "--log-file", log, *child,
    ]  # fmt: skip


def version(text: str) -> str:
    """2025.3.1.0, of what ncu --version prints."""
    found = re.search(r"Version (\S+)", text)
    return found[1] if found else "unknown"


def parse(log: str) -> dict[str, str]:
    """The cells of the one profiled launch, by column: metrics, "Kernel Name" and others.

    ``log`` is what ncu wrote with `command`: its own lines begin with "=="; the CSV has a line of
    names, a line of units and a line per launch. Raises RuntimeError where that isn't one launch,
    or with the errors that ncu wrote.
    """
    lines = log.splitlines()
    table = list(csv.reader(line for line in lines if line.startswith('"')))
    errors = [line.removeprefix("==ERROR==").strip() for line in lines if "==ERROR==" in line]
    if unknown := unknown_metrics(log):
        raise RuntimeError(f"ncu knows no metric {', '.join(unknown)}")
    if errors or not table:
        raise RuntimeError(f"ncu: {'; '.join(errors) or 'no CSV in what it wrote'}")
    names, _, *launches = table
    cells = [dict(zip(names, launch, strict=False)) for launch in launches]
    if len(cells) != 1:
        found = ", ".join(cell.get("Kernel Name", "?") for cell in cells) or "none"
        raise RuntimeError(f"launches in the NVTX range '{RANGE}': {found}; allowed: exactly one")
    return cells[0]


def unknown_metrics(log: str) -> list[str]:
    """Names that ncu couldn't find; it writes them plain or as a regular expression."""
    found = re.findall(r"[Ff]ailed to find metric\W+(?:regex:\^)?(\w+(?:\\?\.\w+)*)", log)
    return [name.replace("\\", "") for name in dict.fromkeys(found)]


def record(cells: dict[str, str]) -> dict[str, Any]:
    """The fields of a row. Raises RuntimeError that lists every metric without a number."""
    values = {metric: number(cells.get(metric, "")) for metric in METRICS}
    missing = [metric for metric, value in values.items() if value is None]
    if missing:
        raise RuntimeError(f"ncu gave no number for {', '.join(missing)}")
    row: dict[str, Any] = {
        field: rounded(values[metric], factor) for field, (metric, factor) in SCALARS.items()
    }
    row["ctas"], row["threads"] = extent(cells, "Grid Size"), extent(cells, "Block Size")
    row["pipes_percent"] = {name: rounded(values[pipe_metric(name)]) for name in PIPES}
    row["stalls_per_issue"] = {name: rounded(values[stall_metric(name)]) for name in STALLS}
    return row


def extent(cells: dict[str, str], column: str) -> int:
    """(132, 1, 1) as 132"""
    return math.prod(int(size) for size in re.findall(r"\d+", cells[column]))


def number(cell: str) -> float | None:
    """A cell as a number; None for n/a, nan and words. ncu may group digits by commas."""
    try:
        value = float(cell.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def rounded(value: float | None, factor: float = 1) -> float | int:
    """To three decimals, counts as ints."""
    assert value is not None
    scaled = round(value * factor, 3)
    return int(scaled) if factor == 1 and scaled == int(scaled) else scaled
