# SPDX-License-Identifier: Apache-2.0
"""The console script: what info and plan print, exit codes, and work without rich or torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from bitdecoding import __version__, build_info
from bitdecoding.cli import main
from bitdecoding.plan import ModelShape, has_kernels, sequence_bytes
from bitdecoding.recipes import COMMON, RECIPES, resolve_format

PLAN = ["plan", "--layers", "32", "--heads-kv", "8", "--head-dim", "128"]


@pytest.fixture(params=["with rich", "without rich"])
def rich(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without rich":
        hide(monkeypatch, "rich", "torch")
    else:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> Any:
        return None if name in names else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)


@pytest.mark.usefixtures("rich")
def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    assert build_info()["compiler"] in out
    for name, recipe in RECIPES.items():
        assert f"{name} " in out
        assert str(recipe.format(128)) in out
    assert f"format_version {build_info()['format_version']}\n" in out
    for kernel in build_info()["kernels"] or ["none (CPU only)"]:
        assert kernel in out


@pytest.mark.usefixtures("rich")
def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--context", "8192", "--memory", "40"]) == 0
    out = capsys.readouterr().out
    size = sequence_bytes(ModelShape(32, 8, 128), resolve_format("int4", 128), 8192)
    assert all(f"{name} " in out for name in COMMON)
    format = resolve_format("int4", 128)
    (row,) = [line.split() for line in out.splitlines() if str(format) in line]
    bits, megabytes, tokens_per_gb, ratio, sequences = row[-5:]
    assert bits == f"{format.bits_per_element:.2f}"
    assert megabytes == f"{size / 1e6:.1f}"
    assert tokens_per_gb == f"{8192 * 10**9 // size:,}"
    assert ratio == f"{131072 * 8192 / size:.2f}x"
    assert sequences == str(40 * 10**9 // size)
    assert row[-6] == ("yes" if has_kernels(format) else "no")


def test_formats_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    format = resolve_format("k4v2", 64)
    kernels = ["append_k4v2_c_d64", "decode_sm90_k4v2_c_d64_n8", "append_k4v4_c_d64"]
    for built, expected in ((kernels, True), (kernels[1:], False), (kernels[::2], False)):
        monkeypatch.setattr("bitdecoding.plan.build_info", lambda names=built: {"kernels": names})
        assert has_kernels(format) is expected
    assert not has_kernels(resolve_format("k4v2", 128))


def test_plan_of_chosen_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--format", "int2", "--format", "k4v4_t64_v64_p64_d128"]) == 0
    out = capsys.readouterr().out
    assert str(resolve_format("int2", 128)) in out
    assert "k4v4_t64_v64_p64_d128" in out
    assert "k4v4_c" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN[:-1], "96"], "head_dim = 96"),
        ([*PLAN, "--format", "int5"], "int5"),
        ([*PLAN, "--format", "kivi-2-edges"], "kivi-2-edges"),
        ([*PLAN, "--keep-first", "129"], "keep_first = 129; allowed: 0 to page_tokens (128)"),
    ],
)
def test_bad_values_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bitdecoding plan: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["plan"],
        ["demo", "--steps", "0"],
        ["sing"],
        [*PLAN, "--keep-last=-1"],
        [*PLAN, "--keep-last", "99999999999"],
        [*PLAN, "--context", "99999999999"],
        [*PLAN, "--context", "1e3"],
        [*PLAN, "--memory=-3"],
        [*PLAN, "--memory", "nan"],
        [*PLAN, "--memory", "inf"],
        [*PLAN, "--memory", "much"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    if arguments[:-2] == PLAN:
        option, value = arguments[-2:]
        assert f"argument {option}: {value}; allowed: " in capsys.readouterr().err


def test_demo_names_the_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "torch", "gguf")
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("torch", "gguf"))  # and others that are not installed
    assert "bitdecoding[demo]" in error


def test_nothing_heavy_is_imported() -> None:
    code = "import bitdecoding.cli, sys; print([m for m in ('torch', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
