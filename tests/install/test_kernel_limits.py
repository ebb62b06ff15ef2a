# SPDX-License-Identifier: Apache-2.0
"""Kernels over their limits in the kernel table fail the build, by name, value and limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
ROWS = {"pack_k4v4_c_d64": (48, 0, 0), "pack_k4v4_c_d128": (48, 16, 1024)}
# What ptxas 13.4 prints of a kernel, between lines that are not about kernels.
REPORT = """\
ptxas info    : Compiling entry function '_ZN4pack{size}{row}EEvNS_7ProblemE' for 'sm_90a'
ptxas info    : Function properties for _ZN4pack{size}{row}EEvNS_7ProblemE
    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{more}
ptxas info    : Compile time = 12.345 ms
"""


def report(row: str, registers: int, stack: int = 0, shared: int = 0) -> str:
    more = f", {stack} bytes cumulative stack size" if stack else ""
    more += f", {shared} bytes smem" if shared else ""
    return REPORT.format(
        row=row, size=len(row), registers=registers, stack=stack, spills=stack // 2, more=more
    )


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ([("pack_k4v4_c_d64", 48), ("pack_k4v4_c_d128", 48, 16, 1024)], []),
        (
            [("pack_k4v4_c_d64", 49), ("pack_k4v4_c_d128", 8)],
            ["pack_k4v4_c_d64 for sm_90a: registers = 49; allowed: at most 48"],
        ),
        (
            [("pack_k4v4_c_d64", 48, 8), ("pack_k4v4_c_d128", 48, 24, 1040)],
            [
                "pack_k4v4_c_d64 for sm_90a: stack bytes (4 bytes spill stores, 4 bytes spill "
                "loads) = 8; allowed: at most 0",
                "pack_k4v4_c_d128 for sm_90a: stack bytes (12 bytes",
                "pack_k4v4_c_d128 for sm_90a: static shared bytes = 1040; allowed: at most 1024",
            ],
        ),
        ([("pack_k4v4_c_d64", 8)], ["pack_k4v4_c_d128: ptxas reported no such kernel"]),
        (
            [("pack_k4v4_c_d64", 8), ("pack_k4v4_c_d128", 8), ("pack_k4v4_c_d6", 8)],
            ["14pack_k4v4_c_d6EEvNS_7ProblemE for sm_90a: no row of the kernel table"],
        ),
    ],
)
def test_reports(tmp_path: Path, reports: list[tuple[str, int]], words: list[str]) -> None:
    limits = "".join(f"{name} {' '.join(map(str, most))}\n" for name, most in ROWS.items())
    (tmp_path / "unit.limits").write_text(limits)
    text = "a warning\n" + "".join(report(*one) for one in reports) + "another\n"
    text += report("pack_k4v4_c_d64", 99).replace("sm_90a", "sm_86")  # has no limits
    (tmp_path / "text").write_text(text)
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\n[ "$5" = -Xptxas=-v ] || exit 2\ntouch "$4"\ncat text >&2\n')
    compiler.chmod(0o755)
    launcher = [sys.executable, str(SOURCE / "cmake/check_kernels.py"), str(compiler)]
    command = [*launcher, "-c", "unit.cu", "-o", "unit.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = result.stderr.splitlines()
    assert lines[:2] == ["a warning", "another"]
    advice = ["BITDECODING_LIMITS=off builds kernels over their limits"] if words else []
    assert lines[2 + len(words) :] == advice
    for line, word in zip(lines[2:], words, strict=False):
        assert line.startswith("error: kernel table (src/kernels.cmake): ")
        assert word in line
    assert result.returncode == bool(words)
    assert (tmp_path / "unit.o").exists() == (not words)


def test_serialized_products(tmp_path: Path) -> None:
    (tmp_path / "unit.limits").write_text("decode_sm90 168 0 0\n")
    text = report("decode_sm90", 168) + (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to this in the function '_ZN4pack11decode_sm90EEvNS_7ProblemE'\n"
    )
    (tmp_path / "text").write_text(text)
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\ntouch "$4"\ncat text >&2\n')
    compiler.chmod(0o755)
    launcher = [sys.executable, str(SOURCE / "cmake/check_kernels.py"), str(compiler)]
    command = [*launcher, "-c", "unit.cu", "-o", "unit.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "decode_sm90EEvNS_7ProblemE: wgmma.mma_async instructions are seri" in result.stderr


def test_build(tmp_path: Path) -> None:
    """One kernel by the build's compiler, within its limits but for one, and then within all."""
    nvcc = os.environ.get("BITDECODING_NVCC")
    if not nvcc:
        pytest.skip("this build has no CUDA compiler")
    row = "append_k4v4_t_d64"
    configure = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), "-G", "Ninja"]
    options = {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": "80-real",
        "BITDECODING_KERNELS": row,
        "BITDECODING_LIMITS": "on",
        "Python_EXECUTABLE": sys.executable,
    }
    configure += [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(configure, check=True, capture_output=True)
    (limits,) = tmp_path.glob("src/*.limits")
    table = limits.read_text()
    assert table == f"{row} 64 0 0\n"
    limits.write_text(f"{row} 16 0 0\n")
    build = ["cmake", "--build", str(tmp_path), "--target", "bitdecoding_append"]
    failed = subprocess.run(build, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert f"{row} for sm_80: registers = " in failed.stdout
    assert "; allowed: at most 16" in failed.stdout
    assert not list(tmp_path.rglob("append_unit_0.cu.o"))
    limits.write_text(table)
    subprocess.run(build, check=True, capture_output=True)
