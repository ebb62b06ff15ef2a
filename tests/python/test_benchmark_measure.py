# SPDX-License-Identifier: Apache-2.0
"""benchmarks/measure.py on a pretended device: what is timed, how often, what lies outside."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Device:
    """A stream's clock, in microseconds, and a log of what ran on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.captured: list[Any] | None = None

    def run(self, name: str, duration: float) -> None:
        if self.captured is not None:
            self.captured.append((name, duration))
            return
        self.log.append(name)
        self.now += duration

    def event(self, **_: Any) -> Any:
        event = SimpleNamespace(time=0.0)
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: (end.time - event.time) / 1e3
        return event

    def graph(self) -> Any:
        nodes: list[Any] = []

        def replay() -> None:
            for name, duration in nodes:
                self.run(name, duration)

        return SimpleNamespace(nodes=nodes, replay=replay)

    def capture(self, graph: Any) -> Any:
        device = self

        class Capture(nullcontext[None]):
            def __enter__(self) -> None:
                device.captured = graph.nodes

            def __exit__(self, *_: Any) -> None:
                device.captured = None

        return Capture()


@pytest.fixture
def measure(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("measure")


@pytest.fixture
def device(measure: Any, monkeypatch: pytest.MonkeyPatch) -> Device:
    pretended = Device()
    cuda = SimpleNamespace(
        Event=pretended.event,
        CUDAGraph=pretended.graph,
        graph=pretended.capture,
        synchronize=lambda: None,
    )
    monkeypatch.setattr(measure, "torch", SimpleNamespace(cuda=cuda))
    return pretended


def test_single_calls(measure: Any, device: Device) -> None:
    calls = [lambda: device.run("a", 10.0), lambda: device.run("b", 30.0)]
    row = measure.time_us(calls, 20, 2, before=lambda: device.run("before", 1000.0))
    assert (row["time_us"], row["iterations"]) == (20.0, 20)
    assert (row["p10_us"], row["p90_us"]) == (10.0, 30.0)
    assert device.log[::2] == ["before"] * 23  # 2 to warm up, 1 to see how long one takes
    assert device.log[1::2] == ["a", "b", "b", *["a", "b"] * 10]


def test_long_calls_are_made_less_often(measure: Any, device: Device) -> None:
    row = measure.time_us([lambda: device.run("a", 1e5)], 100, seconds=1.0)
    assert row["iterations"] == 10
    row = measure.time_us([lambda: device.run("a", 1e7)], 100, seconds=1.0)
    assert row["iterations"] == measure.LEAST_ITERATIONS


def test_graphs(measure: Any, device: Device) -> None:
    calls = [lambda: device.run("a", 10.0), lambda: device.run("b", 30.0)]
    row = measure.graph_time_us(calls, 4, 7, 3, before=lambda: device.run("before", 1000.0))
    assert (row["time_us"], row["iterations"]) == (20.0, 7)
    replay = ["before", "a", "b", "a", "b"]
    assert device.log == ["before", "a", "b"] + replay * (3 + 1 + 7)  # first calls load kernels


def test_graphs_that_take_turns(measure: Any, device: Device) -> None:
    slow = [lambda: device.run("a", 10.0), lambda: device.run("b", 32.0)]
    fast = [lambda: device.run("c", 20.0)]
    assert measure.graph_difference_us(slow, fast, 4, 7) == 1.0
    # first calls load kernels; then turns: 3 to warm up, 1 to see how long they take, 7
    assert device.log == ["a", "b", "c"] + (["a", "b"] * 2 + ["c"] * 4) * (3 + 1 + 7)
    assert measure.graph_difference_us(fast, slow, 4, 7) == -1.0


def test_host_times(measure: Any, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1e-4, 1.0, 1.0 + 2e-4, 2.0, 2.0 + 6e-4])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    times = measure.host_times([lambda: device.run("a", 1.0)], 10, 3)
    assert times == pytest.approx([10.0, 20.0, 60.0])
    assert device.log == ["a"] * 30
    row = measure.spread(times)
    assert (row["time_us"], row["iterations"]) == (20.0, 3)
