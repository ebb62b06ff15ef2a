# SPDX-License-Identifier: Apache-2.0
"""benchmarks/end_to_end.py without a GPU: its steps agree, its memory is counted, its rows."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_kernels import skip_without_code

from bitdecoding import KvFormat, PagedKvCache, plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INT4 = "k4v4_c128_v128_p128_d128"


@pytest.fixture
def step(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """On one thread: several that wait for each other on few cores take ten times as long."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("llama_step")
    torch.set_num_threads(threads)


@pytest.fixture
def bench(step: Any) -> Any:
    pytest.importorskip("rich")
    return importlib.import_module("end_to_end")


def test_steps_agree(torch: Any, step: Any) -> None:
    """Against torch's attention over the same tokens: with all tokens in 16 bits but for rounding,
    in int4 within the stated limit, which int2 exceeds."""
    module = importlib.import_module("step_agreement")
    zones = importlib.import_module("decode_cases").Zones(16, 64)
    int2 = "k2v2_c128_v128_p128_d128"
    in_zone, int4, lossy = module.agreement_rows(torch.device("cpu"), [INT4, int2], zones)
    assert in_zone["difference"] < 1e-3
    assert 0 < int4["difference"] < module.INT4_LIMIT < lossy["difference"]
    assert "error" not in in_zone | int4 | lossy
    assert (in_zone["recent"], int4["recent"], lossy["limit"]) == (324, 64, None)


@pytest.mark.gpu
def test_replays_agree(torch: Any, step: Any) -> None:
    module = importlib.import_module("step_agreement")
    zones = importlib.import_module("decode_cases").Zones(16, 64)
    with skip_without_code():
        rows = module.agreement_rows(torch.device("cuda"), [INT4], zones)
    assert [row["captured"] for row in rows] == [False, True, True]
    assert not any("error" in row for row in rows), rows


def test_a_fault_is_told(torch: Any, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("step_agreement")
    zones = importlib.import_module("decode_cases").Zones(16, 64)
    decode = PagedKvCache.decode

    def other_heads(self: PagedKvCache, q: Any) -> Any:
        return decode(self, q.flip(2)).flip(2)

    monkeypatch.setattr(PagedKvCache, "decode", other_heads)
    for row in module.agreement_rows(torch.device("cpu"), [INT4], zones):
        assert row["error"].startswith("difference = ")
        assert row["error"].endswith(f"allowed: at most {row['limit']}")


def test_rotary(torch: Any, step: Any) -> None:
    """Scores depend on distances alone, and position 0 is left as it is."""
    model = step.Llama(step.TINY, 64, torch.device("cpu"), torch.float32)
    q, k = torch.randn(2, 1, 1, 1, 128)

    def score(of_q: int, of_k: int) -> float:
        turned = [
            step._rotate(x, model.cos[[p]], model.sin[[p]]) for x, p in ((q, of_q), (k, of_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(20, 3) == pytest.approx(score(50, 33), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-4)
    assert abs(score(20, 3) - score(20, 4)) > 1e-3


@pytest.mark.parametrize("zones", [(16, 64), (0, 0)])
@pytest.mark.parametrize("name", [INT4, "k2v2_c32_v32_p128_d128"])
def test_memory(torch: Any, step: Any, name: str, zones: tuple[int, int]) -> None:
    """A sequence's bytes are those of its pages and its slot, and appends have the room."""
    cases = importlib.import_module("decode_cases")
    fmt, zone, most = KvFormat.parse(name), cases.Zones(*zones), 400
    attend = step.LowBitAttention.random(
        step.TINY, fmt, zone, batch=3, start=300, most=most, device=torch.device("cpu")
    )
    first = attend.layers[0]
    tables = [
        table
        for layer in attend.layers
        for table in (layer.block_table, layer.slots, layer.lengths, layer.packed)
    ]
    pages = sum(layer.block_table.numel() for layer in attend.layers)
    total = pages * first.pool[0].nbytes + first.side.nbytes  # of all layers: they share both
    total += sum(table.nbytes for table in tables)
    first_last = {"keep_first": zone.sinks, "keep_last": zone.recent}
    assert total == 3 * plan.sequence_bytes(step.TINY.cached, fmt, most, **first_last)
    assert len(first.side) == 3 * step.TINY.layers
    k = torch.randn(3, 1, 2, 128)
    for _ in range(most - 300):
        first.append(k, k)
    attend.check()
    assert first.lengths.tolist() == [most] * 3
    assert attend.layers[1].lengths.tolist() == [300] * 3
    kv = step.SixteenBitAttention.random(
        step.TINY, batch=3, length=40, backend=None, device=torch.device("cpu"),
        dtype=torch.bfloat16,
    ).kv  # fmt: skip
    assert kv.nbytes == 3 * plan.sixteen_bit_bytes(step.TINY.cached, 40)


def test_llama_shape(step: Any) -> None:
    """8.0 billion weights, 128 KiB of 16-bit K and V a token, and what fits beside them."""
    s = step.LLAMA_8B
    kv = 2 * s.heads_kv * s.head_dim
    layer = s.hidden * (2 * s.heads * s.head_dim + kv + 3 * s.ffn)
    assert 8.0e9 < s.layers * layer + 2 * s.vocab * s.hidden < 8.1e9
    assert plan.sixteen_bit_bytes(s.cached, 1) == 128 << 10
    assert step.largest_batch(10 << 30, 4 << 30, 1 << 30) == 6
    assert step.largest_batch(4 << 30, 4 << 30, 1) == 0
    assert step.largest_batch(1 << 30, 4 << 30, 1) == 0


FIELDS = {
    "case", "batch", "heads_kv", "group", "query_tokens", "length", "head_dim", "format", "sinks",
    "recent", "kernel", "mode", "cache_bytes", "time_us", "p10_us", "p90_us", "iterations",
}  # fmt: skip
TIMED = FIELDS | {
    "without_attention_us", "attention_share", "ms_per_token", "tokens_per_s",
    "speedup_best_16bit",
}  # fmt: skip


@pytest.fixture
def pretended(torch: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU in the place of the GPU; steps with attention take twice as long as those without."""
    attended = []
    real = bench.timed_step

    def timed(model: Any, attend: Any, *rest: Any) -> Any:
        attended.append(attend is not bench.without_attention)
        return real(model, attend, *rest)

    def graph_time_us(calls: Any, launches: int, iterations: int, warm_up: int) -> dict[str, Any]:
        for _ in range(1 + warm_up + iterations):
            for call in calls:
                call()
        time = 4000.0 if attended[-1] else 2000.0
        return {"time_us": time, "p10_us": time, "p90_us": time, "iterations": iterations}

    monkeypatch.setattr(bench, "timed_step", timed)
    monkeypatch.setattr(bench, "graph_time_us", graph_time_us)
    monkeypatch.setattr(bench, "release", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 << 20, 0))
    chosen = {"kernel": "decode_sm90_k4v4_c_d128_n8"}
    monkeypatch.setattr(PagedKvCache, "plan_decode", lambda self, **_: chosen)
    return bench


def test_rows(torch: Any, step: Any, pretended: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench, device = pretended, torch.device("cpu")
    zones = importlib.import_module("decode_cases").Zones(16, 64)
    args = Namespace(
        zones=zones, replays=4, device=device, lengths=(140, 200), throughput_length=130,
        margin_gib=0,
    )  # fmt: skip
    model = step.Llama(step.TINY, 300, device, torch.bfloat16)
    contenders = [bench.sixteen_bit(step.TINY, name, args) for name in bench.BACKENDS]
    contenders.append(bench.low_bit(step.TINY, INT4, args))
    rows = bench.latency(model, contenders, args)
    assert [row["length"] for row in rows] == [140] * 3 + [200] * 3
    for flash, cudnn, ours in (rows[:3], rows[3:]):
        assert flash.keys() == ours.keys() == TIMED
        assert cudnn.keys() == FIELDS | {"error"}  # it takes no CPU tensors
        assert ours["kernel"] == "decode_sm90_k4v4_c_d128_n8"
        assert (ours["attention_share"], ours["speedup_best_16bit"]) == (0.5, 1.0)
        assert (ours["ms_per_token"], ours["tokens_per_s"]) == (4.0, 250.0)

    flash, _, ours = bench.throughput(model, contenders, args)
    each = plan.sequence_bytes(step.TINY.cached, KvFormat.parse(INT4), 134)
    assert (ours["batch"], flash["batch"]) == ((4 << 20) // each, (4 << 20) // (130 * 2048))
    assert ours["cache_bytes"] == ours["batch"] * each
    assert ours["tokens_per_s"] == ours["batch"] * 250.0
    assert ours["speedup_best_16bit"] == pytest.approx(ours["batch"] / flash["batch"], abs=1e-3)
    assert f"{ours['batch']} sequences" in capsys.readouterr().out
    bench.print_rows("throughput", [flash, ours])
    args.margin_gib = 1
    with pytest.raises(SystemExit, match="margin-gib 1: not one sequence"):
        bench.throughput(model, contenders, args)
