# SPDX-License-Identifier: Apache-2.0
"""benchmarks/append.py, pack.py, host.py without a GPU: steps are what they say, bytes add up."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdecoding import KvFormat

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FORMAT = "k4v2_c32_v64_p128_d128"


@pytest.fixture
def append(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("append")


def graph(calls: Any, launches: int, *_: int, before: Any, **__: float) -> dict[str, Any]:
    """Two replays."""
    for _replay in range(2):
        before()
        for i in range(launches):
            calls[i % len(calls)]()
    return {"time_us": 4.0, "p10_us": 3.0, "p90_us": 5.0, "iterations": 2}


@pytest.mark.parametrize("step", ["plain", "page"])
def test_steps(torch: Any, append: Any, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(append, "graph_time_us", graph)
    where = append.Device(torch.device("cpu"), 1 << 10)
    row = append.append_row(
        step, KvFormat.parse(FORMAT), append.Sizes(3, 2), where, append.Effort()
    )
    assert "error" not in row
    assert (row["step"], row["batch"], row["heads_kv"], row["time_us"]) == (step, 3, 2, 4.0)
    monkeypatch.setattr(append, "verify", lambda *_: (_ for _ in ()).throw(RuntimeError("why")))
    row = append.append_row(
        step, KvFormat.parse(FORMAT), append.Sizes(1, 1), where, append.Effort()
    )
    assert (row["time_us"], row["error"]) == (None, "why")


def test_what_a_step_writes(torch: Any, append: Any) -> None:
    fmt, sizes = KvFormat.parse(FORMAT), append.Sizes(2, 3)
    k, v = torch.randn(2, 2, 1, 3, 128)
    for step, new_pages in (("plain", 0), ("page", 1)):
        made = append.make_step(step, fmt, sizes, 1, torch.device("cpu"))
        (cache,) = made.caches
        pool = np.asarray(cache.pool).copy()
        cache.append(k, v)
        append.verify(step, made, 1)
        written = (np.asarray(cache.pool) != pool).any(axis=(1, 2)).sum()
        assert written == 2 * new_pages
        record = fmt.page_bytes() + 128 * 512  # of a page, and its tokens in 16 bits
        assert append.append_bytes(step, fmt, sizes) == 2 * 3 * (2 * 512 + new_pages * record)
        with pytest.raises(RuntimeError, match="lengths are not"):
            append.verify(step, made, 2)


def test_pack_bytes(torch: Any, append: Any) -> None:
    pack, fmt = importlib.import_module("pack"), KvFormat.parse(FORMAT)
    read, written = 2 * 3 * 256 * 128 * 2 * 2, 2 * 3 * 2 * fmt.page_bytes()
    assert pack.pack_bytes(fmt, 2, 3, 300) == read + written
    for name in (*pack.PACK_FORMATS, *append.APPEND_FORMATS):
        assert str(KvFormat.parse(name)) == name


def test_host_rows(torch: Any, append: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host, case = (
        importlib.import_module("host"),
        importlib.import_module("shapes").Case(1, 2, 1, 300),
    )
    monkeypatch.setattr(host, "WARM_UP", 1)

    def times(calls: Any, count: int, repeats: int) -> list[float]:
        calls[0]()
        return [7.0] * repeats

    monkeypatch.setattr(host, "host_times", times)
    fmt, device = KvFormat.parse(FORMAT), torch.device("cpu")
    rows = host.host_rows(case, fmt, device)
    assert len({row["call"] for row in rows}) == len(rows) == 6
    assert {host.METHOD, host.OPERATOR} < {row["call"] for row in rows}
    assert {(row["time_us"], row["iterations"]) for row in rows} == {(7.0, host.REPEATS)}
