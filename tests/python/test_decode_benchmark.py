# SPDX-License-Identifier: Apache-2.0
"""benchmarks/decode.py without a GPU: its caches are legal, its bytes are counted, its table."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decode import assert_attends

from bitdecoding import KvFormat, PagedKvCache

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# batch, KV heads, group, length; zones
SHAPES = [
    ((2, 2, 4, 700), (16, 64)),
    ((1, 3, 1, 512), (0, 0)),  # no tail
    ((3, 1, 2, 513), (5, 0)),  # page 0 is read besides 5 first tokens
    ((2, 2, 1, 400), (128, 7)),  # no token of page 0 is read from it
    ((2, 1, 3, 100), (16, 64)),  # no page
]


@pytest.fixture
def cases(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("decode_cases")


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("summary")


def formats(cases: Any) -> list[KvFormat]:
    return [KvFormat.parse(name) for name in cases.FORMATS]


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


@pytest.mark.parametrize(("shape", "zones"), SHAPES, ids=str)
def test_caches(torch: Any, cases: Any, shape: tuple[int, ...], zones: tuple[int, int]) -> None:
    case, zone, device = cases.Case(*shape), cases.Zones(*zones), torch.device("cpu")
    for f in formats(cases):
        copies = cases.caches(case, f, zone, 3, device)
        pages = np.concatenate([np.asarray(cache.block_table).ravel() for cache in copies])
        slots = np.concatenate([np.asarray(cache.slots) for cache in copies])
        assert len(set(pages)) == len(pages)
        assert len(set(slots)) == len(slots)
        for cache in copies:
            cache.check()
            q = cases.queries(case, f.head_dim, device)
            out = torch.full_like(q, torch.nan)
            cache.decode(q, out=out)
            assert_attends(cache, q.numpy(), out.numpy(), dtype="float16")
            moved = counted_bytes(cache) + q.nbytes + out.nbytes
            assert cases.decode_bytes(case, f, zone) == moved


def test_bytes_of_the_first_case(cases: Any) -> None:
    case, zones = cases.CASES[0], cases.Zones(0, 0)
    int4, _, int2, _ = formats(cases)
    queries = 2 * 8 * 32 * 128 * 2
    assert cases.decode_bytes(case, int4, zones) == 8 * 8 * 1024 * 17408 + queries
    assert cases.decode_bytes(case, int2, zones) == 8 * 8 * 1024 * 9216 + queries
    assert cases.sixteen_bit_bytes(case, 128) == 2 * 8 * 8 * 131072 * 128 * 2 + queries


def test_names(cases: Any) -> None:
    assert cases.Case.parse("128x8x4@4096") == cases.Case(128, 8, 4, 4096)
    assert str(cases.Case(1, 2, 3, 4)) == "1x2x3@4"
    assert cases.Zones.parse("16/64") == cases.Zones(16, 64)
    for text in ("8x8@4096", "0x8x4@4096", "8x8x4"):
        with pytest.raises(ValueError, match=f"case = '{text}'; allowed: "):
            cases.Case.parse(text)
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
    for copies, launches in ((2, 20), (3, 21), (20, 20), (52, 52)):
        assert cases.launches_needed(copies) == launches


def test_kernel_row(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ["pack_k4v4_c_d128"]
    for arch in ("sm80", "sm90"):
        for page in ("k4v4_c_d128", "k2v2_c_d128", "k4v4_t_d128"):
            kernels += [f"decode_{arch}_{page}_n{columns}" for columns in (16, 8)]
    int4, mixed, int2, int2_small = formats(cases)

    def chosen(f: KvFormat, columns: int, *, compute_capability: int) -> str:
        if f == mixed:
            raise NotImplementedError
        tile = 8 if columns <= 8 else 16
        return f"decode_sm{compute_capability}_k{f.k_bits}v{f.v_bits}_c_d128_n{tile}"

    monkeypatch.setattr(cases.bitdecoding, "build_info", lambda: {"kernels": kernels})
    monkeypatch.setattr(cases, "decode_kernel", chosen)
    found = cases.kernel_row("decode_sm90_*", int4, 8)
    assert found == "decode_sm90_k4v4_c_d128_n8"
    assert cases.copy_engine(found) == "bulk"
    found = cases.kernel_row("decode_sm80_*", int2_small, 9)
    assert found == "decode_sm80_k2v2_c_d128_n16"
    assert cases.copy_engine(found) == "cp.async"
    for named in ("decode_sm80_k2v2_c_d128_n16", "decode_sm80_*_n16"):  # not what a call would get
        assert cases.kernel_row(named, int2, 1) == "decode_sm80_k2v2_c_d128_n16"
    with pytest.raises(LookupError, match=f"'decode_sm90_.' for {mixed}"):
        cases.kernel_row("decode_sm90_*", mixed, 1)
    with pytest.raises(LookupError, match=r"'\*_n16' for .* and 1 columns"):
        cases.kernel_row("*_n16", int2, 1)  # one of 8.x, one of 9.0: which?


FACTS = ("gpu", "driver", "nvcc", "torch", "commit")
FIELDS = {
    "batch", "heads_kv", "group", "length", "format", "mode", "sinks", "recent", "time_us",
    "p10_us", "p90_us", "host_us", "bytes", "tb_per_s", "copy", "kernel", "iterations", *FACTS,
}  # fmt: skip


def test_rows(torch: Any, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field in every row, and a row with its reason for what can't be timed."""
    pytest.importorskip("rich")
    bench = importlib.import_module("decode")
    row, name = "decode_sm90_k4v4_c_d128_n8", cases.FORMATS[0]

    def timed(calls: Any, *_: int) -> dict[str, Any]:
        for call in calls:
            call()
        return {"time_us": 10.0, "p10_us": 9.0, "p90_us": 11.0, "iterations": 3}

    monkeypatch.setattr(bench, "graph_time_us", timed)
    monkeypatch.setattr(bench, "time_us", timed)
    monkeypatch.setattr(bench, "host_us", lambda calls: 5.0)
    decode = PagedKvCache.decode
    pretended = {
        "decode": lambda self, q, *, out, kernel: decode(self, q, out=out),
        "plan_decode": lambda self, **_: {"kernel": row},
    }
    for function, stand_in in pretended.items():
        monkeypatch.setattr(PagedKvCache, function, stand_in, raising=False)
    case, zones, f = cases.Case(2, 2, 1, 300), cases.Zones(16, 64), KvFormat.parse(name)
    args = Namespace(kernel=None, device=torch.device("cpu"), replays=1, launches=1)
    facts = dict.fromkeys(FACTS, "?")
    rows = bench.decode_rows(case, f, zones, args, 1 << 16)
    rows += bench.baseline_rows(case, args, 1 << 16)
    args.kernel = "decode_sm75_*"
    rows += bench.decode_rows(case, f, zones, args, 1 << 16)

    ours, fa2, cudnn, refused = (rows[i : i + 2] for i in range(0, 8, 2))
    for graph, plain in (ours, fa2, cudnn, refused):
        assert (graph["mode"], plain["mode"]) == ("graph", "plain")
    for one in ours + fa2:
        found = bench.finished(one, facts)
        assert found.keys() == FIELDS
        assert found["tb_per_s"] == round(found["bytes"] / 10.0 / 1e6, 3)
    for one in cudnn + refused:  # cuDNN takes no CPU tensors
        found = bench.finished(one, facts)
        assert found.keys() == FIELDS | {"error"}
        assert found["time_us"] is found["tb_per_s"] is None
    assert (ours[0]["kernel"], ours[0]["copy"], ours[0]["host_us"]) == (row, "bulk", 5.0)
    assert refused[0]["error"].startswith(f"no kernel 'decode_sm75_*' for {name} and 1 columns in")


def result_row(kernel: str, time_us: float | None, **other: Any) -> dict[str, Any]:
    facts = dict.fromkeys(FACTS, "?")
    case = {"batch": 8, "heads_kv": 8, "group": 4, "length": 1024, "mode": "graph"}
    zones = {"sinks": None, "recent": None}
    rate = None if time_us is None else 1000 / time_us
    row = {"format": "float16", "kernel": kernel, "time_us": time_us, "tb_per_s": rate}
    return case | zones | row | facts | other


def test_summary(summary: Any) -> None:
    ours = {"format": "k4v4_c128_v128_p128_d128", "sinks": 16, "recent": 64, "tb_per_s": 3.2}
    small = ours | {"format": "k2v2_c32_v32_p128_d128"}
    rows = [
        result_row("torch SDPA FlashAttention-2", 300.0),
        result_row("torch SDPA cuDNN", 250.0),
        result_row("torch SDPA cuDNN", 1.0, mode="plain"),
        result_row("torch sum, read", 400.0),
        result_row("torch copy_, read and written", 100.0),
        result_row("decode", 100.0, **ours),
        result_row("decode", 1.0, **(ours | {"sinks": 0})),
        result_row("decode", 200.0, **small),
        result_row("torch SDPA FlashAttention-2", 30.0, length=64),
        result_row("torch SDPA cuDNN", None, length=64),
        result_row("decode", 20.0, **(ours | {"length": 64, "tb_per_s": 1.0})),
    ]
    assert summary.table(rows).splitlines() == [
        "| B x Hkv x G, L | best 16-bit | K4V4 | K2V2, groups of 32 |",
        "| --- | --- | --- | --- |",
        "| 8 x 8 x 4, 1024 | 250 us, cuDNN | 100 us, 2.50x, 0.80 | 200 us, 1.25x, 0.80 |",
        "| 8 x 8 x 4, 64 | 30.0 us, FlashAttention-2 | 20.0 us, 1.50x, 0.25 | not timed |",
    ]
    text = f"a\n{summary.BEGIN}old\n{summary.END}b\n"
    content = summary.section(rows, "x.json")
    assert "C = 4.00 TB/s" in content
    new = summary.updated(text, content)
    assert new.startswith(f"a\n{summary.BEGIN}\nDecode attention")
    assert new.endswith(f"not timed |\n\n{summary.END}b\n")
    assert summary.updated(new, content) == new
    with pytest.raises(ValueError, match="decode:begin"):
        summary.updated("a\n", content)


def test_readme_shows_the_result(summary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for document in summary.DOCUMENTS:
        summary.updated(document.read_text(), "")  # has both markers
    if not summary.RESULT.exists():
        pytest.skip(f"no {summary.RESULT.name}")
    monkeypatch.setattr("sys.argv", ["summary.py", "--check"])
    summary.main()
