# SPDX-License-Identifier: Apache-2.0
"""What is made of benchmark results: shares, comparisons, tables; which code they come from."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INT4, SMALL = "k4v4_c128_v128_p128_d128", "k2v2_c32_v32_p128_d128_norm"
FLASH, CUDNN = "torch SDPA FlashAttention-2", "torch SDPA cuDNN"
FACTS = {"gpu": "?", "driver": "?", "nvcc": "?", "torch": "?", "commit": "123"}


def module(name: str) -> Any:
    pytest.importorskip("rich")
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def result_row(kernel: str, time_us: float | None, name: str, **other: Any) -> dict[str, Any]:
    """A rival's row; with ``format`` one of ours. Bytes so that 1 us is 1 TB/s."""
    case = module("shapes").Case.parse(name).facts()
    times = {"time_us": time_us, "p10_us": time_us, "p90_us": time_us, "iterations": 3}
    rest = {"format": "float16", "sinks": None, "recent": None, "selection": None, "copy": None}
    row: dict[str, Any] = case | rest | {"kernel": kernel, "mode": "graph", "bytes": 10**6}
    return row | times | other


def our_row(time_us: float | None, name: str, **other: Any) -> dict[str, Any]:
    ours: dict[str, Any] = {"format": INT4, "sinks": 16, "recent": 64, "selection": "plan"} | other
    return result_row(ours.pop("kernel", "decode_sm90_k4v4_c_d128_n8"), time_us, name, **ours)


def test_shares() -> None:
    first = "8x8x4@131072"
    done = module("results").completed(
        [
            result_row(FLASH, 0.5, first),
            result_row(CUDNN, 0.25, first),  # C: 4 TB/s
            result_row(CUDNN, 0.1, first, mode="plain"),
            result_row(CUDNN, 0.2, "1x8x4@8192"),  # another case's rate is no ceiling
            result_row("torch sum, read", 0.4, first),
            result_row("torch copy_, read and written", 0.1, first),
            our_row(0.5, first),
            our_row(0.1, "1x8x4@8192"),
            our_row(0.1, "1x8x4@32768"),
            our_row(None, first, format=SMALL, error="why"),
        ]
    )
    assert {row["ceiling_tb_per_s"] for row in done} == {4.0}
    shares = [row["fraction_of_ceiling"] for row in done]
    assert shares == [0.5, 1.0, 2.5, 1.25, 0.625, 2.5, 0.5, 2.5, 2.5, None]
    assert [row["speedup_best_16bit"] for row in done[6:]] == [0.5, 2.0, None, None]
    assert "speedup_best_16bit" not in done[0]
    bulk = module("results").completed([result_row("bulk copy, read", 0.2, first), *done])
    assert {row["ceiling_tb_per_s"] for row in bulk} == {5.0}


def test_files(tmp_path: Path) -> None:
    results = module("results")
    rows = results.completed([result_row(CUDNN, 0.25, "8x8x4@131072"), our_row(0.5, "2x2x2@9:q2")])
    path = tmp_path / "new.json"
    results.save(path, results.Results(FACTS, rows))
    assert results.load(path) == results.Results(FACTS, rows)
    assert json.loads(path.read_text()) == {"facts": FACTS, "rows": rows}

    added = {"case", "query_tokens", "head_dim", "selection", "ceiling_tb_per_s"}
    added |= {"fraction_of_ceiling", "speedup_best_16bit"}
    old_rows = [our_row(0.5, "8x8x4@64"), result_row(CUDNN, 0.25, "8x8x4@131072")]
    old = [{n: row[n] for n in row if n not in added} | FACTS for row in old_rows]
    path.write_text(json.dumps(old))
    loaded = results.load(path)
    assert loaded == results.Results(FACTS, results.completed(old_rows))


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda p: p.name
)
def test_committed_files_are_readable(path: Path) -> None:
    if path.name.startswith("demo_"):
        pytest.skip("no rows of times")
    loaded = module("results").load(path)
    assert loaded.facts["commit"]
    compare = module("compare")
    pairs, alone = compare.paired(loaded, loaded)
    assert len(pairs) == sum(row.get("time_us") is not None for row in loaded.rows)
    assert alone == 0
    assert not compare.slower(pairs, 0.0)
    assert not compare.warnings(loaded, loaded)


def test_compare(capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    results, compare = module("results"), module("compare")
    first = "8x8x4@131072"
    before = [
        result_row(CUDNN, 0.25, first),
        our_row(1.0, first),
        our_row(1.0, first, selection="decode_sm80_*"),
        our_row(1.0, "1x8x4@64"),
        our_row(None, "1x8x4@32"),
    ]
    after = [
        result_row(CUDNN, 0.4, first),  # a rival may be slower
        our_row(1.02, first, kernel="decode_sm90_wider"),  # what the plan chooses may change
        our_row(1.1, first, selection="decode_sm80_*"),
        our_row(0.5, "1x8x4@128"),
        our_row(1.0, "1x8x4@32"),
    ]
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    facts = [FACTS, FACTS | {"driver": "other"}]
    for path, rows, fact in zip(paths, (before, after), facts, strict=True):
        results.save(path, results.Results(fact, results.completed(rows)))
    old, new = map(results.load, paths)
    pairs, alone = compare.paired(old, new)
    assert [pair.ratio for pair in pairs] == [1.6, 1.02, 1.1]
    assert alone == 3
    assert [pair.after["selection"] for pair in compare.slower(pairs, 0.03)] == ["decode_sm80_*"]
    assert len(compare.slower(pairs, 0.01)) == 2
    assert compare.warnings(old, new) == [
        "not the same driver: ?, other",
        "the ceilings differ: 4.0 and 2.5 TB/s",
    ]

    arguments = ["compare.py", *map(str, paths), "--threshold"]
    monkeypatch.setattr("sys.argv", [*arguments, "0.03"])
    with pytest.raises(SystemExit, match="1 rows are slower"):
        compare.main()
    monkeypatch.setattr("sys.argv", [*arguments, "0.2"])
    compare.main()
    assert "WARNING: not the same driver" in capsys.readouterr().out


def test_decode_table() -> None:
    summary, results = module("summary"), module("results")
    first, second = "8x8x4@131072", "1x32x1@131072"
    rows = results.completed(
        [
            result_row(FLASH, 300.0, first, bytes=4 * 10**8),
            result_row(CUDNN, 250.0, first, bytes=10**9),  # C: 4 TB/s
            our_row(100.0, first, bytes=32 * 10**7),
            our_row(1.0, first, sinks=0),
            our_row(1.0, first, mode="plain"),
            our_row(1.0, first, selection="decode_sm80_*"),
            our_row(1.0, "8x8x8@32768:q2"),
            our_row(200.0, first, format=SMALL, bytes=64 * 10**7),
            result_row(FLASH, 30.0, second),
            result_row(CUDNN, None, second),
            our_row(20.0, second, bytes=2 * 10**7),
        ]
    )
    cases = [module("shapes").Case.parse(name) for name in (first, second)]
    assert summary.table(rows, cases).splitlines() == [
        "| B x Hkv x G, L | best 16-bit | K4V4 | K2V2, groups of 32, norms |",
        "| --- | --- | --- | --- |",
        "| 8 x 8 x 4, 131072 | 250 us, cuDNN | 100 us, 2.50x, 0.80 | 200 us, 1.25x, 0.80 |",
        "| 1 x 32 x 1, 131072 | 30.0 us, FlashAttention-2 | 20.0 us, 1.50x, 0.25 | not timed |",
    ]
    content = summary.decode_section(results.Results(FACTS, rows), "x.json")
    assert "C = 4.00 TB/s" in content
    pages = module("pages")
    text = "a\n<!-- decode:begin -->\nold\n<!-- decode:end -->\nb\n"
    new = pages.updated(text, "decode", content)
    assert new.startswith("a\n<!-- decode:begin -->\n\nDecode attention")
    assert new.endswith("| not timed |\n\n<!-- decode:end -->\nb\n")
    assert pages.updated(new, "decode", content) == new
    with pytest.raises(ValueError, match="decode:begin"):
        pages.updated("a\n", "decode", content)


def test_readmes_show_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["summary.py", "--check"])
    module("summary").main()


def test_listed_results_are_of_this_code() -> None:
    """benchmarks/results/current.txt names them; all others are shown as earlier ones."""
    assert module("provenance").complaints() == []


def test_hashes(tmp_path: Path) -> None:
    provenance = module("provenance")
    root = provenance.ROOT
    for part in ("include", "cmake", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(root / part, tmp_path / part, ignore=ignored)
    (tmp_path / "src").mkdir()
    for name in ("CMakeLists.txt", "src/kernels.cmake"):
        shutil.copy(root / name, tmp_path / name)
    before = provenance.source_hashes(tmp_path)
    assert before == provenance.source_hashes(tmp_path)
    assert all(before[part] == provenance.source_hashes()[part] for part in ("include", "cmake"))

    def changed(path: str) -> set[str]:
        file = tmp_path / path
        old = file.read_bytes() if file.exists() else None
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((old or b"") + b"#")
        after = provenance.source_hashes(tmp_path)
        if old is None:
            file.unlink()
        else:
            file.write_bytes(old)
        return {part for part in after if after[part] != before[part]}

    assert changed("include/bitdecoding/decode/kernel.cuh") == {"include"}
    assert changed("include/bitdecoding/new.hpp") == {"include"}
    assert changed("src/kernels.cmake") == {"src"}
    assert changed("CMakeLists.txt") == {"cmake"}
    assert changed("benchmarks/shapes.csv") == changed("benchmarks/measure.py") == {"benchmarks"}
    for other in ("include/bitdecoding/README.md", "benchmarks/summary.py"):
        assert changed(other) == set()
    assert changed("benchmarks/results/current.txt") == set()
    accuracy = provenance.source_hashes(tmp_path, provenance.ACCURACY)["accuracy"]
    assert changed("benchmarks/accuracy/fake.py") == changed("benchmarks/accuracy.py") == set()
    (tmp_path / "benchmarks/accuracy/fake.py").write_text("")
    assert provenance.source_hashes(tmp_path, provenance.ACCURACY)["accuracy"] != accuracy
    for name in provenance.READERS - {"plots.py"}:
        assert (BENCHMARKS / name).exists()


def test_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance = module("provenance")
    hashes = provenance.source_hashes()
    facts = {"commit": "abc", "sources": hashes}
    assert provenance.why_not_current(facts, hashes) is None
    other = facts | {"sources": hashes | {"src": "0"}}
    assert provenance.why_not_current(other, hashes) == "src changed since abc"
    dirty = facts | {"commit": "abc-dirty"}
    assert "abc-dirty" in str(provenance.why_not_current(dirty, hashes))
    assert "doesn't say" in str(provenance.why_not_current({"commit": "abc"}, hashes))

    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "CURRENT", tmp_path / "current.txt")
    assert provenance.complaints() == []
    (tmp_path / "current.txt").write_text("# names\nnow.json\nold.json\nnone.json\n")
    for name, content in (("now.json", facts), ("old.json", other)):
        (tmp_path / name).write_text(json.dumps({"facts": content, "rows": []}))
    (tmp_path / "list.json").write_text("[]")
    assert provenance.complaints() == [
        "old.json: src changed since abc",
        "none.json: no such file",
    ]
    assert provenance.standing(tmp_path / "now.json", "abc") == "commit abc"
    assert provenance.standing(tmp_path / "list.json", "abc") == "earlier commit abc"
    assert provenance.standings() == [
        "list.json: older code: it doesn't say which code it was measured with",
        "now.json: this code",
        "old.json: older code: src changed since abc",
    ]
    monkeypatch.setattr("sys.argv", ["provenance.py", "--check"])
    with pytest.raises(SystemExit, match=r"old.json: src changed(.|\n)*take it off current.txt"):
        provenance.main()
