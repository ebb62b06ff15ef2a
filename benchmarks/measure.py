# SPDX-License-Identifier: Apache-2.0
"""Timing on a CUDA device and the facts a result must carry. The method is in README.md."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import bitdecoding


def time_us(
    calls: Sequence[Callable[[], Any]], iterations: int, warm_up: int = 10
) -> dict[str, Any]:
    """Times single calls with CUDA events, taking turns through ``calls``.

    ``calls`` do the same work on different memory, so that together they touch several times the
    L2 cache. Returns median, 10th and 90th percentile in microseconds.
    """
    for i in range(warm_up):
        calls[i % len(calls)]()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(iterations)
    ]
    for i, (begin, end) in enumerate(pairs):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return _spread([begin.elapsed_time(end) * 1e3 for begin, end in pairs])


def _spread(times: list[float]) -> dict[str, Any]:
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {
        "time_us": round(float(median), 2),
        "p10_us": round(float(p10), 2),
        "p90_us": round(float(p90), 2),
        "iterations": len(times),
    }


def graph_time_us(
    calls: Sequence[Callable[[], Any]], launches: int, iterations: int, warm_up: int = 3
) -> dict[str, Any]:
    """Times replays of one CUDA graph of ``launches`` calls, taking turns through ``calls``.

    Returns a call's share of a replay: median, 10th and 90th percentile in microseconds.
    """
    for call in calls:  # the first call of a kernel loads it, which no capture may do
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    row = time_us([graph.replay], iterations, warm_up)
    shares = {name: round(row[name] / launches, 2) for name in ("time_us", "p10_us", "p90_us")}
    return row | shares


def host_us(calls: Sequence[Callable[[], Any]], count: int = 50, repeats: int = 9) -> float:
    """Host time of one call: ``count`` of them into an empty queue, none of which waits. Median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        times.append(1e6 * (time.perf_counter() - begin) / count)
    torch.cuda.synchronize()
    return round(float(np.median(times)), 2)


def machine() -> dict[str, Any]:
    """GPU, driver, compiler, torch and commit: what a number means nothing without."""
    info = bitdecoding.build_info()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        check=True, capture_output=True, text=True,
    ).stdout.split()[0]  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "nvcc": info["cuda"],
        "torch": torch.__version__,
        "commit": info["git"],
    }
