# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs and its C++ compiles, as printed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import bitdecoding

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.split(maxsplit=1)[1] == "(1, 1, 32, 128) (1, 32, 1)\n"


def test_torch_operators(torch: Any) -> None:
    if torch.cuda.is_available() and not bitdecoding.build_info()["kernels"]:
        pytest.skip("a CUDA device, but a build without kernels")
    _, code = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    k, q = (torch.ones(4, 1, heads, 128, device=names["device"]).half() for heads in (8, 32))
    for _ in range(2):
        out, lse = names["step"](k, k, q)
    assert bool((out - 1).abs().max() < 1e-3)
    assert bool((lse - math.log(2) - math.sqrt(128)).abs().max() < 1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp() -> None:
    compiler = ["g++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", "-x", "c++", "-"]
    include = ["-I", str(bitdecoding.get_include())]
    (code,) = blocks("cpp")
    subprocess.run(compiler + include, input=code, text=True, check=True)
