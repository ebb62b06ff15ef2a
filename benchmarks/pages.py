# SPDX-License-Identifier: Apache-2.0
"""Pages with sections that scripts fill from results: between <!-- name:begin --> and its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provenance import ROOT, standing


def source(path: Path, facts: Mapping[str, Any]) -> str:
    """Where the numbers of a section of docs/ come from."""
    commit = standing(path, facts["commit"])
    return f"{facts['gpu']}, {commit} ([results](../benchmarks/results/{path.name})).\n"


def updated(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"no {begin.strip()} ... {end.strip()}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def write(pages: Mapping[Path, str], script: str, check: bool) -> None:
    """Writes what a script makes of pages; to check, exits with 1 where that would change one."""
    for path, text in pages.items():
        if check and text != path.read_text():
            sys.exit(f"{path.relative_to(ROOT)} is older than the results: run {script}")
        if not check:
            path.write_text(text)
