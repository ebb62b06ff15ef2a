# SPDX-License-Identifier: Apache-2.0
"""benchmarks/profile.py without a GPU: what ncu is asked, what is made of its CSV, its errors."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bitdecoding import KvFormat

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INT4 = "k4v4_c128_v128_p128_d128"
KERNEL = "void decode_attention<decode_sm90_k4v4_c_d128_n8>(DecodeProblem)"


@pytest.fixture
def ncu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ncu_report")


@pytest.fixture
def profile(torch: Any, ncu: Any) -> Any:
    pytest.importorskip("rich")
    return importlib.import_module("profile_decode")


def values(ncu: Any) -> dict[str, str]:
    """A number for every metric, as ncu prints them in base units."""
    found = {metric: f"{1 + i / 4:.6f}" for i, metric in enumerate(ncu.METRICS)}
    found |= {
        "gpu__time_duration.sum": "277,984",
        "dram__bytes_read.sum": "1,142,293,504",
        "dram__bytes_read.sum.per_second": "4,109,206,659,376.08",
        "launch__registers_per_thread": "168",
        ncu.pipe_metric("alu"): "61.25",
        ncu.stall_metric("wait"): "1.5",
    }
    return found


def log(ncu: Any, launches: int = 1, changed: dict[str, str] | None = None) -> str:
    """What ncu writes: its own lines, names, units, a line per launch."""
    facts = {"ID": "0", "Kernel Name": KERNEL, "Block Size": "(256, 1, 1)"}
    cells = facts | {"Grid Size": "(132, 1, 1)", "CC": "9.0"} | values(ncu) | (changed or {})
    lines = [cells.keys(), ["" for _ in cells], *[cells.values()] * launches]
    rows = [",".join(f'"{cell}"' for cell in line) for line in lines]
    return "\n".join(["==PROF== Connected to process 7", *rows, "==PROF== Disconnected"]) + "\n"


def test_command(ncu: Any) -> None:
    line = ncu.command("ncu", "out.csv", "none", ["python", "profile.py", "1x8x4@8192"])
    options = dict(zip(line[2:-3:2], line[3:-3:2], strict=False))
    assert line[-3:] == ["python", "profile.py", "1x8x4@8192"]
    assert options["--nvtx-include"] == "decode/"
    assert options["--clock-control"] == options["--cache-control"] == "none"
    metrics = options["--metrics"].split(",")
    assert len(set(metrics)) == len(metrics) == 2 + 11 + 8 + 19
    assert "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio" in metrics


def test_record(ncu: Any) -> None:
    row = ncu.record(ncu.parse(log(ncu)))
    assert row["profiled_us"] == 277.984
    assert row["dram_bytes_read"] == 1142293504
    assert row["dram_read_tb_per_s"] == 4.109
    assert (row["registers"], row["ctas"], row["threads"]) == (168, 132, 256)
    assert row["pipes_percent"]["alu"] == 61.25
    assert row["stalls_per_issue"]["wait"] == 1.5
    assert row["pipes_percent"].keys() == ncu.PIPES.keys()
    assert tuple(row["stalls_per_issue"]) == ncu.STALLS


def test_version(ncu: Any) -> None:
    told = (
        "NVIDIA (R) Nsight Compute Command Line Profiler\nVersion 2025.3.1.0 (build 1) (public)\n"
    )
    assert ncu.version(told) == "2025.3.1.0"
    assert ncu.version("") == "unknown"


def test_refusals(ncu: Any) -> None:
    """The error names all metrics that ncu doesn't know or gave no number for."""
    unknown = (
        "==ERROR== Failed to find metric regex:^sm__no_such(\\.(sum|min))?$\n"
        "==ERROR== Failed to find metric dram__neither.sum.per_second\n"
    )
    with pytest.raises(RuntimeError, match=r"sm__no_such, dram__neither\.sum\.per_second$"):
        ncu.parse(unknown)
    absent = {ncu.pipe_metric("xu"): "n/a", ncu.stall_metric("gmma"): "nan"}
    with pytest.raises(RuntimeError, match=r"no number for sm__inst_executed_pipe_xu.*_gmma_"):
        ncu.record(ncu.parse(log(ncu, changed=absent)))
    for launches, found in ((0, "none"), (2, f"{KERNEL}, {KERNEL}")):
        with pytest.raises(RuntimeError) as error:
            ncu.parse(log(ncu, launches))
        assert f"'decode': {found}; allowed: exactly one" in str(error.value)
    with pytest.raises(RuntimeError, match=r"ncu: ERR_NVGPUCTRPERM - no permission$"):
        ncu.parse("==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    with pytest.raises(RuntimeError, match="no CSV"):
        ncu.parse("==WARNING== No kernels were profiled.\n")


def fake_ncu(folder: Path, written: str, code: int) -> str:
    """A program in the place of ncu that plays the child too."""
    facts = {"bytes": 5, "kernel": "decode_sm90_k4v4_c_d128_n8", "copy": "bulk"}
    program = folder / "ncu"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "def after(name): return sys.argv[sys.argv.index(name) + 1]\n"
        f"open(after('--log-file'), 'w').write({written!r})\n"
        f"open(after('--launch-to'), 'w').write({json.dumps(facts)!r})\n"
        f"sys.exit({code})\n"
    )
    program.chmod(0o755)
    return str(program)


def test_rows(ncu: Any, profile: Any, tmp_path: Path) -> None:
    cases = importlib.import_module("decode_cases")
    case, zones, fmt = cases.Case(1, 8, 4, 8192), cases.Zones(16, 64), KvFormat.parse(INT4)
    args = Namespace(kernel=None, cache_control="all", ncu=fake_ncu(tmp_path, log(ncu), 0))
    row = profile.profiled(case, fmt, zones, args)
    assert row["kernel"] == "decode_sm90_k4v4_c_d128_n8"
    assert row["case"] == "1x8x4@8192"
    assert (row["batch"], row["heads_kv"], row["group"], row["length"]) == (1, 8, 4, 8192)
    assert (row["format"], row["sinks"], row["recent"]) == (INT4, 16, 64)
    assert (row["registers"], row["cache_control"], row["copy"]) == (168, "all", "bulk")
    profile.print_row(row)
    args.ncu = fake_ncu(tmp_path, log(ncu), 3)
    with pytest.raises(RuntimeError, match="exit code 3"):
        profile.profiled(case, fmt, zones, args)


def test_add(profile: Any, tmp_path: Path) -> None:
    """Rows of other cases stay; a file of other code is refused."""
    output = tmp_path / "rows.json"
    facts = {"gpu": "H200", "driver": "1", "ncu": "2", "commit": "abc", "sources": {"src": "1"}}
    rows = [{"case": case, "format": INT4} for case in ("1x8x4@8192", "8x8x4@8192")]
    profile.save(output, profile.Results(facts, rows))
    args = Namespace(add=True, output=output, cases=["8x8x4@8192"], formats=[INT4])
    assert profile.kept(facts, args) == rows[:1]
    with pytest.raises(ValueError, match=r"--add: commit of .* = abc; allowed: def"):
        profile.kept(facts | {"commit": "def"}, args)
    args.add = False
    assert profile.kept(facts, args) == []


def test_script(torch: Any) -> None:
    """It is a program, and whoever imports the standard library's module of its name gets that."""
    pytest.importorskip("rich")
    script = BENCHMARKS / "profile.py"
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert "CASE" in run.stdout, run.stderr
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import cProfile, profile; "
    code += "cProfile.run('1 + 1'); print(profile.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function calls" in run.stdout
    assert str(BENCHMARKS) not in run.stdout
