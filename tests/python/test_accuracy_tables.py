# SPDX-License-Identifier: Apache-2.0
"""benchmarks/accuracy_tables.py: what docs/accuracy.md says of rows, which targets are met."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("accuracy_tables")


def text_row(recipe: str, format: str, bits: float, text: str, **numbers: float) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "text", "model": "tiny", "recipe": recipe, "formats": [format]}
    row |= {"text": text, "context": 4096, "keep_first": 16, "keep_last": 64}
    row |= {"bits_per_element": bits, "bytes_per_token": 99.6, "perplexity_16bit": 20.0}
    return row | {"perplexity": 20.0, "kl": 0.001, "kl_p99": 0.02, "top1": 0.97} | numbers


def make_rows() -> list[dict[str, Any]]:
    four = ("kivi-4 g128", "k4v4_c128_v64_p128_d64", 4.375)
    plain = ("kivi-2 g32", "k2v2_c32_v32_p128_d64", 3.0)
    best = ("kivi-2 g32, rotated", "k2v2_c32_v32_p128_d64_kr64_vr64", 3.0)
    fixed = {"model": "tiny", "context": 8}
    return [
        text_row(*four, "novel", perplexity=20.04),
        text_row(*four, "code", kl=0.004),
        text_row(*plain, "novel", perplexity=22.0),
        text_row(*plain, "code", perplexity=22.0),
        text_row(*best, "novel", perplexity=20.8),
        text_row(*best, "code", perplexity=21.0),
        {"kind": "needle", "recipe": "16-bit", "text": "1 keys", "right": 0.9} | fixed,
        {"kind": "generation", "recipe": "16-bit", "text": "novel", "same_tokens": 8,
         "repetition": 0.25} | fixed,
        {"kind": "layers", "recipe": "kivi-4 g128", "text": "all", "errors": [None, 0.2, 0.1]}
        | fixed,
    ]  # fmt: skip


CHECKED = {"kind": "cross-check", "recipe": "kivi-4 g128", "text": "novel",
           "difference": 0.01, "model": "tiny", "context": 640}  # fmt: skip
FACTS = {"cpu": "x", "threads": 2, "torch": "2", "transformers": "5", "commit": "abc"}


def test_sections(tables: Any) -> None:
    found = tables.sections(tables.Results(FACTS, make_rows()))
    lines = found["texts"].splitlines()
    four = next(line for line in lines if "kivi-4" in line)
    assert four == (
        "| kivi-4 g128 | 4.375 | 100 | +0.10% (+0.20%) | 0.0025 (0.0040) | 0.020 | 97.0% |"
    )
    assert "| 16-bit | 90% |" in found["needles"]
    assert "| 16-bit | 8 of 8 | 25.0% |" in found["generation"]
    assert "| kivi-4 g128 | 0.100 | 0.200 | 0.200 |" in found["layers"]
    assert "x, 2 threads" in found["source"]


def test_targets(tables: Any) -> None:
    lines = tables.target_lines(tables.Results(FACTS, make_rows()), "tiny")
    assert [(line[1], line[-1]) for line in lines] == [
        ("kivi-4 g128", "**no**"),  # KL of one text
        ("kivi-2 g32, rotated", "yes"),  # 4.5% where 5% are allowed
    ]
    rows = [row | {"keep_last": 128} for row in make_rows() if row["kind"] == "text"]
    assert tables.target_lines(tables.Results(FACTS, rows), "tiny") == []


def test_the_page_has_every_section(tables: Any, tmp_path: Path, monkeypatch: Any) -> None:
    results = tables.Results(FACTS, make_rows())
    text = tables.PAGE.read_text()
    layered = text_row("searched, 2.9 bits", "", 2.9, "novel", kl=0.01)
    searched = tables.Results(FACTS | {"gpu": "?"}, [layered])
    checked = tables.Results(FACTS, [CHECKED])
    new = tables.document(results, searched, checked, text)
    assert "Not measured" not in new
    assert "| tiny | searched, 2.9 bits | 2.900 | +0.00% (+0.00%) | 0.0100 (0.0100) |" in new
    assert "1 recipes and models on a CPU, 640 tokens, all within" in new
    assert "is 1.00% of what the recipe loses in that layer (" in new
    assert "commit abc, [results](../benchmarks/results/cross_check_cpu.json)" in new
    assert tables.document(results, searched, checked, new) == new
    failed = tables.Results(FACTS, [CHECKED, CHECKED | {"recipe": "oscar", "error": "why"}])
    assert "1 of them beyond the limit: oscar" in tables.document(results, None, failed, text)
    page, *files = (tmp_path / name for name in ("page.md", "1.json", "2.json", "3.json"))
    page.write_text(text)
    for file, one in zip(files, (results, searched, checked), strict=True):
        importlib.import_module("results").save(file, one)
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(importlib.import_module("pages"), "ROOT", tmp_path)
    options = ("--results", "--searched", "--checked")
    named = [word for pair in zip(options, map(str, files), strict=True) for word in pair]
    monkeypatch.setattr("sys.argv", ["accuracy_tables.py", *named])
    tables.main()
    assert page.read_text() == new


def test_the_committed_page_is_of_the_committed_results(
    tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tables.RESULT.exists():
        pytest.skip("no results yet")
    monkeypatch.setattr("sys.argv", ["accuracy_tables.py", "--check"])
    tables.main()
