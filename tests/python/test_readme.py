# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs and its C++ compiles, as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bitdecoding

README = Path(__file__).parents[2] / "README.md"


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(found) == 1
    return str(found[0])


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python"), "README.md", "exec"), {})
    assert capsys.readouterr().out.split(maxsplit=1)[1] == "(1, 1, 32, 128) (1, 32, 1)\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp() -> None:
    compiler = ["g++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", "-x", "c++", "-"]
    include = ["-I", str(bitdecoding.get_include())]
    subprocess.run(compiler + include, input=block("cpp"), text=True, check=True)
