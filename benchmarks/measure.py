# SPDX-License-Identifier: Apache-2.0
"""Timing on a CUDA device and the facts a result must carry. The method is in README.md."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import bitdecoding


def time_us(calls: list[Callable[[], None]], iterations: int, warm_up: int = 10) -> dict[str, Any]:
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
    times = np.array([begin.elapsed_time(end) * 1e3 for begin, end in pairs])
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {
        "time_us": round(float(median), 2),
        "p10_us": round(float(p10), 2),
        "p90_us": round(float(p90), 2),
        "iterations": iterations,
    }


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
