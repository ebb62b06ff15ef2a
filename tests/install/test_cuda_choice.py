# SPDX-License-Identifier: Apache-2.0
"""The choice of a CUDA compiler: what can't build kernels is an error that says why, never a build
without kernels. The compilers here are scripts that claim to be nvcc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]


def configure(build: Path, *options: str) -> str:
    """Configures the project, which must fail; its output in one line."""
    command = ["cmake", "-S", str(SOURCE), "-B", str(build), "-G", "Ninja", *options]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0, result.stdout
    return " ".join((result.stdout + result.stderr).split())


def pretend_nvcc(folder: Path, script: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return f"-DCMAKE_CUDA_COMPILER={nvcc}"


VERSION = 'echo "Cuda compilation tools, release {}, V{}.1"'


@pytest.mark.parametrize("choice", ["auto", "system"])
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (VERSION.format("12.4", "12.4"), "is CUDA 12.4; needed is 13.0 or newer"),
        ("echo no licence >&2; exit 1", "--version' failed (1): no licence"),
        (
            f'if [ "$1" = --version ]; then {VERSION.format("13.0", "13.0")}; '
            "else echo cannot find cicc >&2; exit 1; fi",
            "cannot build a program of one kernel; the toolkit is incomplete",
        ),
    ],
)
def test_unusable_compiler(tmp_path: Path, choice: str, script: str, words: str) -> None:
    nvcc = pretend_nvcc(tmp_path, script)
    output = configure(tmp_path / "build", f"-DBITDECODING_CUDA={choice}", nvcc)
    assert words in output
    assert "Ways out: " in output


def test_unknown_choice(tmp_path: Path) -> None:
    output = configure(tmp_path, "-DBITDECODING_CUDA=bogus")
    assert "BITDECODING_CUDA = 'bogus'; allowed: auto, system, pypi, off" in output


def test_another_choice_in_one_build_tree(tmp_path: Path) -> None:
    cache = tmp_path / "CMakeCache.txt"
    cache.write_text("BITDECODING_CONFIGURED_CUDA:INTERNAL=off\n")
    output = configure(tmp_path, "-DBITDECODING_CUDA=pypi")
    assert "BITDECODING_CUDA = 'pypi', but" in output
    assert "was configured with 'off'" in output
