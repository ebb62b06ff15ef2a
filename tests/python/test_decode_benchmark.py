# SPDX-License-Identifier: Apache-2.0
"""benchmarks/decode.py without a GPU: its caches are legal, its bytes are counted, its rows."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_decode import assert_attends

from bitdecoding import KvFormat, PagedKvCache

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Case; zones
SHAPES = [
    ("2x2x4@700", (16, 64)),
    ("1x3x1@512", (0, 0)),  # no tail
    ("3x1x2@513:q2", (5, 0)),  # page 0 is read besides 5 first tokens
    ("2x2x1@400", (128, 7)),  # no token of page 0 is read from it
    ("2x1x3@100", (16, 64)),  # no page
    ("4x2x1@60-900:q3", (16, 64)),  # ragged: one of them without a page
    ("2x2x2@300:d64", (16, 64)),
]
SMALL = {128: "k2v2_c32_v32_p128_d128_norm", 64: "k4v4_c128_v64_p128_d64"}


@pytest.fixture
def cases(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("decode_cases")


def parsed(*names: str) -> list[KvFormat]:
    return [KvFormat.parse(name) for name in names]


def counted_bytes(cache: PagedKvCache) -> int:
    """Token by token, what attention reads of a cache: whole records, rows of the side buffer."""
    arrays = (cache.pool, cache.side, cache.block_table, cache.slots, cache.lengths, cache.packed)
    pool, side, table, slots, lengths, packed = map(np.asarray, arrays)
    first, tail_tokens = cache.keep_first, side.shape[3] - cache.keep_first
    total = 0
    for b, length in enumerate(lengths):
        records, rows = set(), set()
        for token in range(length):
            if token < min(first, packed[b]):
                rows.add(token)
            elif token < packed[b]:
                records.add(table[b, token // cache.format.page_tokens])
            else:
                rows.add(first + token % tail_tokens)
        total += sum(pool[page].nbytes for page in records)
        total += sum(side[slots[b], :, :, row].nbytes for row in rows)
    return total


@pytest.mark.parametrize(("name", "zones"), SHAPES, ids=str)
def test_caches(torch: Any, cases: Any, name: str, zones: tuple[int, int]) -> None:
    case, zone, device = cases.Case.parse(name), cases.Zones(*zones), torch.device("cpu")
    names = (SMALL[128], "k4v2_c128_v128_p128_d128") if case.head_dim == 128 else (SMALL[64],)
    for f in parsed(*names):
        copies = cases.caches(case, f, zone, 3, device)
        used = [np.asarray(cache.block_table).ravel() for cache in copies]
        pages = np.concatenate(used)[np.concatenate(used) >= 0]
        slots = np.concatenate([np.asarray(cache.slots) for cache in copies])
        packed = sum(int(np.asarray(cache.packed).sum()) for cache in copies)
        assert len(set(pages)) == len(pages) == packed // f.page_tokens
        assert len(set(slots)) == len(slots)
        for cache in copies:
            assert list(cache.lengths) == case.lengths()
            cache.check()
            q = cases.queries(case, device)
            out = torch.full_like(q, torch.nan)
            cache.decode(q, out=out)
            assert_attends(cache, q.numpy(), out.numpy(), dtype="float16")
            moved = counted_bytes(cache) + q.nbytes + out.nbytes
            assert cases.decode_bytes(case, f, zone) == moved


def test_bytes_of_the_first_case(cases: Any) -> None:
    case, zones = importlib.import_module("shapes").ceiling_case(), cases.Zones(0, 0)
    int4, int2 = parsed("k4v4_c128_v128_p128_d128", "k2v2_c128_v128_p128_d128")
    queries = 2 * 8 * 32 * 128 * 2
    assert str(case) == "8x8x4@131072"
    assert cases.decode_bytes(case, int4, zones) == 8 * 8 * 1024 * 17408 + queries
    assert cases.decode_bytes(case, int2, zones) == 8 * 8 * 1024 * 9216 + queries
    assert cases.sixteen_bit_bytes(case) == 2 * 8 * 8 * 131072 * 128 * 2 + queries


def test_zones(cases: Any) -> None:
    assert cases.Zones.parse("16/64") == cases.Zones(16, 64)
    with pytest.raises(ValueError, match=r"zones = '16'; allowed: "):
        cases.Zones.parse("16")


def test_cold_memory(cases: Any) -> None:
    l2 = 60 << 20
    assert cases.copies_needed(1 << 30, l2) == 2
    for moved in (4_000_000, l2, 3 * l2 + 1, 4 * l2, 5 * l2):
        copies = cases.copies_needed(moved, l2)
        assert copies >= 2
        assert (copies - 1) * moved >= 4 * l2
        assert copies == 2 or (copies - 2) * moved < 4 * l2
    assert cases.copies_needed(30 << 30, l2) == 1
    for copies, launches in ((1, 20), (2, 20), (3, 21), (20, 20), (52, 52)):
        assert cases.launches_needed(copies) == launches


def test_kernel_row(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ["pack_k4v4_c_d128"]
    for arch in ("sm80", "sm90"):
        for page in ("k4v4_c_d128", "k2v2_c_d128", "k4v4_t_d128"):
            kernels += [f"decode_{arch}_{page}_n{columns}" for columns in (16, 8, 4)]
    int4, mixed, small = parsed(
        "k4v4_c128_v128_p128_d128", "k4v2_c128_v128_p128_d128", "k2v2_c32_v32_p128_d128"
    )

    def chosen(f: KvFormat, columns: int, *, compute_capability: int) -> str:
        if f == mixed:
            raise NotImplementedError
        tile = next((tile for tile in (4, 8) if columns <= tile), 16)
        return f"decode_sm{compute_capability}_k{f.k_bits}v{f.v_bits}_c_d128_n{tile}"

    monkeypatch.setattr(cases.bitdecoding, "build_info", lambda: {"kernels": kernels})
    monkeypatch.setattr(cases, "decode_kernel", chosen)
    assert cases.kernel_row("decode_sm90_*", int4, 4) == "decode_sm90_k4v4_c_d128_n4"
    found = cases.kernel_row("decode_sm90_*", int4, 8)
    assert found == "decode_sm90_k4v4_c_d128_n8"
    assert cases.copy_engine(found) == "bulk"
    found = cases.kernel_row("decode_sm80_*", small, 9)
    assert found == "decode_sm80_k2v2_c_d128_n16"
    assert cases.copy_engine(found) == "cp.async"
    for named in ("decode_sm80_k2v2_c_d128_n16", "decode_sm80_*_n16"):  # not what a call would get
        assert cases.kernel_row(named, small, 1) == "decode_sm80_k2v2_c_d128_n16"
    with pytest.raises(LookupError, match=f"'decode_sm90_.' for {mixed}"):
        cases.kernel_row("decode_sm90_*", mixed, 1)
    with pytest.raises(LookupError, match=r"'\*_n16' for .* and 1 columns"):
        cases.kernel_row("*_n16", small, 1)  # one of 8.x, one of 9.0: which?


FIELDS = {
    "case", "batch", "heads_kv", "group", "query_tokens", "length", "head_dim", "format", "sinks",
    "recent", "selection", "bytes", "copy", "kernel", "mode", "time_us", "p10_us", "p90_us",
    "iterations", "host_us", "tb_per_s", "ceiling_tb_per_s", "fraction_of_ceiling",
}  # fmt: skip
KERNEL = "decode_sm90_k4v4_c_d128_n8"


@pytest.fixture
def bench(torch: Any, cases: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """decode.py with timers that call everything once: 10 us, 5 us of the host."""
    pytest.importorskip("rich")

    def timed(calls: Any, *_: int, **__: float) -> dict[str, Any]:
        for call in calls:
            call()
        return {"time_us": 10.0, "p10_us": 9.0, "p90_us": 11.0, "iterations": 3}

    work = importlib.import_module("work")
    monkeypatch.setattr(work, "graph_time_us", timed)
    monkeypatch.setattr(work, "time_us", timed)
    monkeypatch.setattr(work, "host_us", lambda calls, count: 5.0)
    decode = PagedKvCache.decode
    pretended = {
        "decode": lambda self, q, *, out, kernel: decode(self, q, out=out),
        "plan_decode": lambda self, **_: {"kernel": KERNEL},
    }
    for function, stand_in in pretended.items():
        monkeypatch.setattr(PagedKvCache, function, stand_in, raising=False)
    return importlib.import_module("decode")


def here(torch: Any) -> Any:
    return importlib.import_module("baselines").Device(torch.device("cpu"), 1 << 16)


def test_rows(torch: Any, cases: Any, bench: Any) -> None:
    """Every field in every row, and a row with its reason for what can't be timed."""
    case, zones, name = cases.Case(2, 2, 1, 300), cases.Zones(16, 64), "k4v4_c128_v128_p128_d128"
    effort, where = bench.Effort(("graph", "plain")), here(torch)
    rows = bench.decode_rows(case, bench.Measurement(name, bench.PLAN), zones, where, effort)
    rows += bench.torch_rows(case, where, effort)
    rows += bench.decode_rows(case, bench.Measurement(name, "decode_sm75_*"), zones, where, effort)

    done = bench.completed(rows)
    ours, fa2, cudnn, refused = (done[i : i + 2] for i in range(0, 8, 2))
    for graph, plain in (ours, fa2, cudnn, refused):
        assert (graph["mode"], plain["mode"]) == ("graph", "plain")
    for row in ours + fa2:
        assert row.keys() - {"speedup_best_16bit"} == FIELDS
        assert row["tb_per_s"] == round(row["bytes"] / 10.0 / 1e6, 3)
    for row in cudnn + refused:  # cuDNN takes no CPU tensors
        assert row.keys() - {"speedup_best_16bit"} == FIELDS | {"error"}
        assert row["time_us"] is row["tb_per_s"] is row["fraction_of_ceiling"] is None
    assert (ours[0]["kernel"], ours[0]["copy"], ours[0]["host_us"]) == (KERNEL, "bulk", 5.0)
    assert (ours[0]["selection"], refused[0]["selection"]) == ("plan", "decode_sm75_*")
    assert ours[0]["speedup_best_16bit"] == 1.0
    assert refused[0]["error"].startswith(f"no kernel 'decode_sm75_*' for {name} and 1 columns in")


def test_a_ragged_batch_and_several_query_tokens(torch: Any, cases: Any, bench: Any) -> None:
    effort, where, zones = bench.Effort(), here(torch), cases.Zones(16, 64)
    one = bench.Measurement("k4v4_c128_v128_p128_d128", bench.PLAN)
    ragged = cases.Case.parse("2x2x1@100-900")
    assert bench.torch_rows(ragged, where, effort) == []
    (row,) = bench.decode_rows(ragged, one, zones, where, effort)
    assert (row["case"], row["time_us"]) == ("2x2x1@100-900", 10.0)
    several = cases.Case.parse("2x2x2@200:q3")
    (row, _) = bench.torch_rows(several, where, effort)
    assert (row["query_tokens"], row["time_us"]) == (3, 10.0)


def test_arguments(cases: Any, bench: Any) -> None:
    suites = importlib.import_module("suites")
    parse = bench.parser().parse_args
    assert bench.plans_of(parse([])) == suites.planned(suites.TARGETS)
    plans = bench.plans_of(parse(["--tags", "cp_async", "--kernel", "decode_sm90_*"]))
    assert {one.kernel for plan in plans.values() for one in plan.ours} == {"decode_sm90_*"}
    chosen = ["--cases", "1x2x3@4", "--formats", SMALL[128], "--quick", "--no-baselines"]
    plans = bench.plans_of(parse(chosen))
    assert plans == {
        cases.Case(1, 2, 3, 4): bench.Plan([bench.Measurement(SMALL[128], "plan")], True)
    }
    for wrong in (["--formats", SMALL[128]], ["--cases", "1x2x3@4:d64", "--formats", SMALL[128]]):
        with pytest.raises(ValueError, match="--formats"):
            bench.plans_of(parse(wrong))


def test_a_run(
    torch: Any, cases: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the command line to the file: C first, then the case beside it."""
    baselines = importlib.import_module("baselines")
    small = cases.Case.parse("2x2x1@300")
    for module in (baselines, bench, importlib.import_module("results")):
        monkeypatch.setattr(module, "ceiling_case", lambda: small)
    facts = {"gpu": "none", "flashinfer": None, "l2_bytes": 1 << 16}
    monkeypatch.setattr(bench, "machine", lambda: facts)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "Device", lambda *_: here(torch))
    read = [sys.executable, "-c", 'print(\'{"bytes": 4000, "time_us": 0.001, ']
    read[2] += '"p10_us": 1, "p90_us": 1, "iterations": 1}\')'
    output = tmp_path / "rows.json"
    names = ["--cases", str(small), "2x2x1@200", "--formats", "k4v4_c128_v128_p128_d128"]
    command = ["decode.py", *names, "--output", str(output), "--read-command", shlex.join(read)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    content = json.loads(output.read_text())
    assert content["facts"] == facts
    kernels = [(row["case"], row["kernel"]) for row in content["rows"]]
    sdpa = ["torch SDPA FlashAttention-2", "torch SDPA cuDNN"]
    first = [*sdpa, "torch sum, read", "torch copy_, read and written", "bulk copy, read", KERNEL]
    assert kernels == [(str(small), name) for name in first] + [
        ("2x2x1@200", name) for name in (*sdpa, KERNEL)
    ]
    assert {row["ceiling_tb_per_s"] for row in content["rows"]} == {4.0}


class PretendedFlashInfer:
    """What we use of FlashInfer's wrapper, by torch's attention over the planned pages."""

    def __init__(self, workspace: Any, layout: str, **options: Any) -> None:
        assert layout == "NHD"
        assert options["use_cuda_graph"]
        self.buffers = {name: value for name, value in options.items() if "buffer" in name}

    def plan(self, indptr: Any, indices: Any, last: Any, *shape: int, **_: Any) -> None:
        assert len(indices) <= len(self.buffers["paged_kv_indices_buffer"])
        self.indptr, self.indices, self.last, self.shape = indptr, indices, last, shape

    def run(self, q: Any, pool: Any, *, out: Any) -> None:
        heads, heads_kv, head_dim, size = self.shape
        assert q.shape[1:] == (heads, head_dim)
        for b in range(len(q)):
            ids = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
            tokens = (len(ids) - 1) * size + int(self.last[b])
            k, v = pool[ids].transpose(0, 1).reshape(2, -1, heads_kv, head_dim)[:, :tokens]
            self.lengths = [*getattr(self, "lengths", []), tokens]
            repeated = [x.repeat_interleave(heads // heads_kv, 1).transpose(0, 1) for x in (k, v)]
            sdpa = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
            out[b] = sdpa(q[b][:, None], *repeated)[:, 0]


def test_flashinfer(torch: Any, cases: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines, where, effort = importlib.import_module("baselines"), here(torch), bench.Effort()
    case = cases.Case.parse("3x2x4@20-100")
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert baselines.flashinfer_rows(case, where, effort) == []

    found = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PretendedFlashInfer)
    work = baselines.flashinfer_work(found, case, where)
    work.poison()
    work.calls[0]()
    work.verify()
    assert work.calls[0].func.__self__.lengths == case.lengths()

    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "flashinfer", found)
    (row,) = baselines.flashinfer_rows(case, where, effort)
    assert (row["time_us"], row["format"]) == (10.0, "float16")
    assert baselines.flashinfer_rows(cases.Case(1, 1, 1, 9, query_tokens=2), where, effort) == []
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    (row,) = baselines.flashinfer_rows(case, where, effort)
    assert row["error"].startswith("FlashInfer: AttributeError")


def test_affordable(cases: Any) -> None:
    measure = importlib.import_module("measure")
    assert measure.affordable(100, 1000.0, 1.0) == 100
    assert measure.affordable(100, 100_000.0, 1.0) == 10
    assert measure.affordable(100, 1e9, 1.0) == measure.LEAST_ITERATIONS
    assert measure.affordable(100, 0.0, float("inf")) == 100
    work = importlib.import_module("work")
    assert [work.host_calls(time) for time in (1.0, 1000.0, 1e6)] == [50, 10, 5]


def test_transforms_are_timed_beside_the_same_memory(
    torch: Any, cases: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotated format, and by turns the same pages and zones read without the rotation."""
    decoded: list[PagedKvCache] = []
    decode = PagedKvCache.decode  # pretended

    def noted(self: PagedKvCache, *arguments: Any, **options: Any) -> Any:
        decoded.append(self)
        return decode(self, *arguments, **options)

    def difference(calls: Any, others: Any, *_: Any, **__: Any) -> float:
        decoded.clear()
        for call in (*calls, *others):
            call()
        return 1.5

    monkeypatch.setattr(PagedKvCache, "decode", noted)
    monkeypatch.setattr(importlib.import_module("work"), "graph_difference_us", difference)
    one = bench.Measurement("k4v4_c128_v128_p128_d128_kr128_vr128", bench.PLAN)
    case, zones = cases.Case(2, 2, 1, 300), cases.Zones(16, 64)
    (row,) = bench.decode_rows(case, one, zones, here(torch), bench.Effort())
    assert (row["time_us"], row["added_us"]) == (10.0, 1.5)
    rotated, plain = decoded[: len(decoded) // 2], decoded[len(decoded) // 2 :]
    for a, b in zip(rotated, plain, strict=True):
        assert (a.format.k_rotation, b.format.k_rotation, b.format.v_rotation) == (128, 0, 0)
        for name in ("pool", "side", "block_table", "slots", "lengths", "packed"):
            first, second = (torch.as_tensor(getattr(cache, name)) for cache in (a, b))
            assert first.data_ptr() == second.data_ptr()
        assert (a.keep_first, a.keep_last) == (b.keep_first, b.keep_last) == (16, 64)
