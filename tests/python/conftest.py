# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all Python tests. Those marked gpu are skipped, visibly, without a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import half_budget
import numpy as np
import pytest
import seeds
from hypothesis import settings

settings.register_profile("bitdecoding", deadline=None, print_blob=True)
settings.load_profile("bitdecoding")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="of the decode tests' random numbers")


def pytest_configure(config: pytest.Config) -> None:
    share_cores(config)
    given = config.getoption("--seed")
    seeds.SEED = seeds.SEED if given is None else given


def share_cores(config: pytest.Config) -> None:
    """Workers of pytest-xdist with a thread per core each fight for the cores: with 16 of them the
    GPU tests took over 1000 s, with one thread each 74 s. Said before they start: numpy and torch
    look when they are loaded."""
    if getattr(config.option, "numprocesses", None):
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(variable, "1")


def pytest_report_header() -> str:
    return f"seed of the decode tests: {seeds.SEED} (pytest --seed repeats it)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in half_budget.SUMMARY.lines():
        terminalreporter.write_line(line)


def why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    import bitdecoding

    return None if bitdecoding.build_info()["kernels"] else "this build has no CUDA kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items) and (reason := why_no_gpu()):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250318)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads, far slower where the cores are busy."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
