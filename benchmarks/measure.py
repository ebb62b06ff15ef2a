# SPDX-License-Identifier: Apache-2.0
"""Timing on a CUDA device and the facts a result must carry. The method is in README.md."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from provenance import source_hashes

import bitdecoding

LEAST_ITERATIONS = 5


def nothing() -> None:
    """What is done before a call where nothing must be."""


def time_us(
    calls: Sequence[Callable[[], Any]],
    iterations: int,
    warm_up: int = 10,
    *,
    seconds: float = math.inf,
    before: Callable[[], Any] = nothing,
) -> dict[str, Any]:
    """Times single calls with CUDA events, taking turns through ``calls``.

    ``calls`` do the same work on different memory, so that together they touch several times the
    L2 cache; ``before`` is enqueued ahead of each and not timed. Fewer than ``iterations`` are
    made where they would take longer than ``seconds``. Returns median, 10th and 90th percentile in
    microseconds.
    """
    for i in range(warm_up):
        before()
        calls[i % len(calls)]()
    estimate = _times(calls[-1:], 1, before)[0]
    times = _times(calls, affordable(iterations, estimate, seconds), before)
    return spread(times)


def affordable(iterations: int, estimate_us: float, seconds: float) -> int:
    """``iterations``, or as many as fit ``seconds``; never below LEAST_ITERATIONS."""
    fitting = seconds * 1e6 / max(estimate_us, 1e-3)
    return int(min(iterations, max(LEAST_ITERATIONS, fitting)))


def _times(
    calls: Sequence[Callable[[], Any]], count: int, before: Callable[[], Any]
) -> list[float]:
    """Microseconds of each of ``count`` calls. Waits for the device."""
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for i, (begin, end) in enumerate(pairs):
        before()
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]


def spread(times: list[float]) -> dict[str, Any]:
    """The fields of a row that times become."""
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {
        "time_us": round(float(median), 2),
        "p10_us": round(float(p10), 2),
        "p90_us": round(float(p90), 2),
        "iterations": len(times),
    }


def graph_time_us(
    calls: Sequence[Callable[[], Any]],
    launches: int,
    iterations: int,
    warm_up: int = 3,
    *,
    seconds: float = math.inf,
    before: Callable[[], Any] = nothing,
) -> dict[str, Any]:
    """Times replays of one CUDA graph of ``launches`` calls, taking turns through ``calls``.

    ``before`` is enqueued ahead of each replay and not timed. Returns a call's share of a replay:
    median, 10th and 90th percentile in microseconds.
    """
    before()
    graph = captured(calls, launches)
    row = time_us([graph.replay], iterations, warm_up, seconds=seconds, before=before)
    shares = {name: round(row[name] / launches, 2) for name in ("time_us", "p10_us", "p90_us")}
    return row | shares


def graph_difference_us(
    calls: Sequence[Callable[[], Any]],
    others: Sequence[Callable[[], Any]],
    launches: int,
    iterations: int,
    warm_up: int = 3,
    *,
    seconds: float = math.inf,
) -> float:
    """By how many microseconds one of ``calls`` takes longer than one of ``others``: the medians of
    their graphs' replays, as of `graph_time_us`, which take turns, so that what the device does
    meanwhile happens to both."""
    replays = [captured(each, launches).replay for each in (calls, others)]
    for i in range(2 * warm_up):
        replays[i % 2]()
    estimate = sum(_times(replays, 2, nothing))
    times = _times(replays, 2 * affordable(iterations, estimate, seconds), nothing)
    return round(float(np.median(times[::2]) - np.median(times[1::2])) / launches, 3)


def captured(calls: Sequence[Callable[[], Any]], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, by turns."""
    for call in calls:  # the first call of a kernel loads it, which no capture may do
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    return graph


def host_times(calls: Sequence[Callable[[], Any]], count: int, repeats: int) -> list[float]:
    """Microseconds of host time of one call, ``repeats`` of them: each the mean of ``count`` calls
    into an empty queue, none of which waits."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        times.append(1e6 * (time.perf_counter() - begin) / count)
    torch.cuda.synchronize()
    return times


def host_us(calls: Sequence[Callable[[], Any]], count: int = 50, repeats: int = 9) -> float:
    """The median of `host_times`."""
    return round(float(np.median(host_times(calls, count, repeats))), 2)


def machine() -> dict[str, Any]:
    """GPU, driver, compiler, torch, commit and code: what a number means nothing without."""
    info = bitdecoding.build_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        check=True, capture_output=True, text=True,
    ).stdout.split()[0]  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "nvcc": info["cuda"],
        "torch": torch.__version__,
        "flashinfer": installed("flashinfer-python"),
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "commit": info["git"],
        "sources": source_hashes(),
    }


def installed(package: str) -> str | None:
    """The version of a package, None where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
