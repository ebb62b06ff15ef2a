# SPDX-License-Identifier: Apache-2.0
"""The speed that we want, as data, and what results show of it. target_table.py writes it down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from results import METHOD, OPERATOR, Results, Row, best_sixteen_bit, ceiling, load
from shapes import Case, tagged
from suites import (
    INT2,
    INT2_D64,
    INT2_PER_TOKEN,
    INT4,
    INT4_D64,
    INT4_PER_TOKEN,
    K4V2,
    PLAN,
    SMALL_GROUPS,
    SUITES,
)

RESULTS = Path(__file__).with_name("results")
FILES = {
    "decode": "decode_h200.json",
    "pack": "pack_h200.json",
    "append": "append_h200.json",
    "host": "host_h200.json",
}
LAUNCH_US = 5.0  # what a decode call may take besides its bytes
ZONES = (16, 64)
LABELS = {
    INT4: "int4", K4V2: "K4V2", INT2: "int2", SMALL_GROUPS: "int2, groups of 32, norms",
    INT4_PER_TOKEN: "int4, K per token", INT2_PER_TOKEN: "int2, K per token",
    INT4_D64: "int4, head_dim 64", INT2_D64: "int2, head_dim 64",
}  # fmt: skip

# Elements of the A operand per ns and SM by query columns: the faster of mma.sync (8) and wgmma,
# fp16, counted on an H200. One element is one code.
TENSOR_RATE = {8: 280.0, 16: 141.0, 32: 115.0, 64: 58.0}


@dataclass(frozen=True)
class Run:
    """The results of one benchmark, by what says which row is meant."""

    results: Results

    def decode_row(self, case: Case, fmt: str, kernel: str) -> Row | None:
        """The timed row of a case in graph replays, zones on."""
        for row in self.results.rows:
            zones = (row.get("sinks"), row.get("recent"))
            asked = (row.get("case"), row.get("format"), row.get("selection"), row.get("mode"))
            if asked == (str(case), fmt, kernel, "graph") and zones == ZONES:
                return row if row["time_us"] is not None else None
        return None

    def row(self, **fields: object) -> Row | None:
        """The first timed row with these fields."""
        for row in self.results.rows:
            if all(row.get(name) == value for name, value in fields.items()):
                return row if row["time_us"] is not None else None
        return None

    def ceiling(self) -> float | None:
        """C, TB/s."""
        best = ceiling(self.results.rows)
        return None if best is None else float(best["tb_per_s"])

    def bytes_us(self, moved: float) -> float | None:
        """Microseconds of so many bytes at C."""
        rate = self.ceiling()
        return None if rate is None else moved / rate / 1e6


@dataclass(frozen=True)
class Line:
    """A line of the table: a number and the most that it may be, in the same unit."""

    what: str
    case: str
    target: str
    measured: float | None = None
    limit: float | None = None
    unit: str = "us"

    @property
    def ratio(self) -> float | None:
        if self.measured is None or self.limit is None:
            return None
        return self.measured / self.limit

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.ratio is None:
            return "no limit"  # the run lacks C, or the best 16-bit time
        return "met" if self.ratio <= 1 else "missed"


# What the time of a row may be at most, in microseconds; None where the run can't say.
Limit = Callable[[Run, Row], float | None]


@dataclass(frozen=True)
class DecodeTarget:
    """A limit for a format on all shapes of a suite."""

    suite: str
    format: str
    text: str
    limit: Limit
    cases: Iterable[Case] = field(default=())  # default: all of the suite

    def lines(self, run: Run) -> list[Line]:
        kernel = SUITES[self.suite].kernel
        what = LABELS[self.format] + ("" if kernel == PLAN else ", cp.async kernels")
        found = []
        for case in tuple(self.cases) or tagged(self.suite):
            row = run.decode_row(case, self.format, kernel)
            if row is None:
                found.append(Line(what, str(case), self.text))
            else:
                limit = self.limit(run, row)
                found.append(Line(what, str(case), self.text, row["time_us"], limit))
        return found


def share_of_ceiling(share: float, launch_us: float = 0.0) -> tuple[str, Limit]:
    """bytes / (share * C), and what a launch may take."""

    def limit(run: Run, row: Row) -> float | None:
        time = run.bytes_us(row["bytes"])
        return None if time is None else time / share + launch_us

    launch = f" + {launch_us:.0f} us" if launch_us else ""
    return f"bytes / {share:.2f} C{launch}", limit


def share_of_sixteen_bit(share: float) -> tuple[str, Limit]:
    """A share of the best 16-bit time in the same case."""

    def limit(run: Run, row: Row) -> float | None:
        best = best_sixteen_bit(run.results.rows, row["case"])
        return None if best is None else share * float(best["time_us"])

    return f"{share:.2f} of the best 16-bit time", limit


def tensor_us(case: Case, sms: int) -> float:
    """Microseconds that the tensor cores need for the codes of K and V, in one tile of columns."""
    codes = 2 * case.heads_kv * sum(case.lengths()) * case.head_dim
    return codes / (TENSOR_RATE[case.columns] * sms) / 1e3


def larger_floor(run: Run, row: Row) -> float | None:
    """The larger of the two floors / 0.85 where they are far apart, / 0.70 where both bind."""
    by_bytes = run.bytes_us(row["bytes"])
    sms = run.results.facts.get("sms")
    if by_bytes is None or sms is None:
        return None
    floors = sorted((by_bytes, tensor_us(Case.parse(row["case"]), sms)))
    return floors[1] / (0.85 if floors[1] >= 1.5 * floors[0] else 0.70)


COLUMNS: tuple[str, Limit] = ("larger floor / 0.85 or 0.70", larger_floor)
SINGLE = {INT4: (0.30, 0.32, 0.45), INT2: (0.23, 0.27, 0.42)}  # by case, long to short

DECODE_TARGETS = (
    DecodeTarget("large", INT4, *share_of_ceiling(0.95, LAUNCH_US)),
    DecodeTarget("large", INT2, *share_of_ceiling(0.86, LAUNCH_US)),
    DecodeTarget("large", K4V2, *share_of_ceiling(0.92, LAUNCH_US)),
    DecodeTarget("large", SMALL_GROUPS, *share_of_ceiling(0.78, LAUNCH_US)),
    *(
        DecodeTarget("single", fmt, *share_of_sixteen_bit(share), cases=(case,))
        for fmt, shares in SINGLE.items()
        for case, share in zip(tagged("single"), shares, strict=True)
    ),
    DecodeTarget("head64", INT4_D64, *share_of_ceiling(0.85)),
    DecodeTarget("head64", INT2_D64, *share_of_ceiling(0.70)),
    DecodeTarget("token", INT4_PER_TOKEN, *share_of_ceiling(0.85)),
    DecodeTarget("token", INT2_PER_TOKEN, *share_of_ceiling(0.70)),
    DecodeTarget("columns", INT4, *COLUMNS),
    DecodeTarget("columns", INT2, *COLUMNS),
    DecodeTarget("cp_async", INT4, *share_of_ceiling(0.80)),
    DecodeTarget("cp_async", INT2, *share_of_ceiling(0.65)),
)


def length_lines(run: Run) -> list[Line]:
    """Time per token over the lengths: the largest over the smallest."""
    cases = tagged("length")
    lines = []
    for fmt in SUITES["length"].formats:
        rows = [run.decode_row(case, fmt, PLAN) for case in cases]
        times = [
            row["time_us"] / case.length
            for case, row in zip(cases, rows, strict=True)
            if row is not None
        ]
        spread = max(times) / min(times) if len(times) == len(cases) else None
        what, names = f"{LABELS[fmt]}, time per token", f"{cases[0]} to {cases[-1].length}"
        lines.append(Line(what, names, "largest / smallest 1.10", spread, 1.10, "x"))
    return lines


def ragged_lines(run: Run) -> list[Line]:
    """Time per byte of the ragged batch over that of equal lengths."""
    ragged, equal = sorted(tagged("ragged"), key=lambda case: not case.ragged)
    lines = []
    for fmt in SUITES["ragged"].formats:
        rows = [run.decode_row(case, fmt, PLAN) for case in (ragged, equal)]
        costs = [row["time_us"] / row["bytes"] for row in rows if row is not None]
        ratio = costs[0] / costs[1] if len(costs) == 2 else None
        text = "1.10 x the time of the bytes in equal lengths"
        lines.append(Line(f"{LABELS[fmt]}, ragged", str(ragged), text, ratio, 1.10, "x"))
    return lines


def host_lines(run: Run) -> list[Line]:
    """Host time of a call from Python, its plan known."""
    (case,) = tagged("host")
    lines = []
    for call, limit in ((METHOD, 10.0), (OPERATOR, 20.0)):
        row = run.row(call=call, case=str(case), format=INT4)
        measured = None if row is None else row["time_us"]
        lines.append(Line(f"host time, {call}", str(case), f"{limit:.0f} us", measured, limit))
    return lines


def pack_lines(run: Run) -> list[Line]:
    """Prefill pack of 8 sequences of 131072 tokens and 8 heads."""
    text, limit = share_of_ceiling(0.75)
    lines = []
    for fmt in (INT4, INT2):
        row = run.row(kernel="pack_pages", format=fmt, batch=8, length=131072, heads_kv=8)
        found = (None, None) if row is None else (row["time_us"], limit(run, row))
        lines.append(Line(f"{LABELS[fmt]}, prefill pack", "8 x 131072 x 8 heads", text, *found))
    return lines


def append_lines(run: Run) -> list[Line]:
    """Append of one token to 64 sequences of 8 heads."""
    lines = []
    for fmt in (INT4, INT2):
        for step, text in (("plain", "4 us"), ("page", "4 us + bytes / 0.75 C")):
            row = run.row(kernel="append", format=fmt, step=step, batch=64, heads_kv=8)
            what = f"{LABELS[fmt]}, append, {step} step"
            measured, limit = None, None
            if row is not None:
                bytes_us = run.bytes_us(row["bytes"] / 0.75) if step == "page" else 0.0
                measured = row["time_us"]
                limit = None if bytes_us is None else 4.0 + bytes_us
            lines.append(Line(what, "64 x 8 heads", text, measured, limit))
    return lines


def all_lines(decode: Run, pack: Run, append: Run, host: Run) -> list[Line]:
    """The table, in the order in which targets were set."""
    lines = [line for target in DECODE_TARGETS for line in target.lines(decode)]
    lines += pack_lines(pack) + append_lines(append) + host_lines(host)
    return lines + length_lines(decode) + ragged_lines(decode)


def load_runs(folder: Path = RESULTS) -> dict[str, Run]:
    """The runs of FILES; an empty one where there is no file."""
    paths = {name: folder / file for name, file in FILES.items()}
    return {
        name: Run(load(path) if path.exists() else Results({}, [])) for name, path in paths.items()
    }
