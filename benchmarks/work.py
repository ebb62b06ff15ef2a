# SPDX-License-Identifier: Apache-2.0
"""An implementation at work: its calls, what shows that they did it, its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from decode_cases import launches_needed
from measure import graph_difference_us, graph_time_us, host_us, time_us
from results import Row

from bitdecoding import PagedKvCache

# What a row has that cannot be timed, beside the reason in "error".
UNTIMED = {"time_us": None, "p10_us": None, "p90_us": None, "iterations": 0}
HOST_MICROSECONDS = 10_000  # that the calls of one measurement of host time may keep a GPU busy


@dataclass(frozen=True)
class Effort:
    """How much is measured: at most so many seconds and iterations of each row."""

    modes: tuple[str, ...] = ("graph",)
    seconds: float = 0.5
    replays: int = 100
    launches: int = 200


QUICK = Effort(seconds=0.03, replays=10, launches=20)


@dataclass
class Work:
    """Calls that do the same on different memory and, of our decode, what shows that they did."""

    calls: Sequence[Callable[[], Any]]
    out: torch.Tensor | None = None
    caches: list[PagedKvCache] = field(default_factory=list)
    others: Sequence[Callable[[], Any]] = ()  # what the calls are compared with, in turns

    def poison(self) -> None:
        if self.out is not None:
            self.out.fill_(torch.nan)

    def verify(self) -> None:
        for one in self.caches:
            one.check()
        if self.out is not None and not bool(self.out.isfinite().all()):
            raise RuntimeError("the output is not finite")


def timed(mode: str, work: Work, effort: Effort) -> Row:
    """Times of graph replays, or of plain launches; of replays also added_us, where there are
    others to compare with."""
    calls, seconds = work.calls, effort.seconds
    if mode == "plain":
        return time_us(calls, effort.launches, seconds=seconds)
    launches, replays = launches_needed(len(calls)), effort.replays
    row = graph_time_us(calls, launches, replays, seconds=seconds)
    if work.others:
        row["added_us"] = graph_difference_us(
            calls, work.others, launches, replays, seconds=seconds
        )
    return row


def measure(label: Row, make: Callable[[], Work], effort: Effort) -> list[Row]:
    """The rows of one implementation, a row per mode. One that refuses says why."""
    rows = []
    work, host = None, None
    for mode in effort.modes:
        try:
            if work is None:
                work = make()
            work.poison()
            found = timed(mode, work, effort)
            work.verify()
            if host is None:
                host = host_us(work.calls, host_calls(found["time_us"]))
        except (RuntimeError, ValueError, LookupError) as error:
            found = UNTIMED | {"error": str(error).strip().partition("\n")[0]}
        rows.append(label | {"mode": mode} | found)
    return [row | {"host_us": host} for row in rows]


def host_calls(time_us: float) -> int:
    """Calls of one measurement of host time: 50, fewer of long ones."""
    return int(max(5, min(50, HOST_MICROSECONDS / max(time_us, 1e-3))))
