# SPDX-License-Identifier: Apache-2.0
"""Which code a result comes from: a hash per part of the tree that decides what is measured.

python benchmarks/provenance.py            lists every result file and what has changed since
python benchmarks/provenance.py --check    1 where a file of results/current.txt is older code's
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
CURRENT = RESULTS / "current.txt"  # names of the files that must come from the code in this tree

# Contents count, wherever they are committed or not; READMEs don't.
PARTS = {
    "include": ("include",),
    "src": ("src",),
    "cmake": ("cmake", "CMakeLists.txt"),
    "benchmarks": ("benchmarks",),
    "accuracy": ("benchmarks/accuracy", "benchmarks/accuracy.py"),
}
# What a result's time depends on, and what its accuracy does. Neither bench runs the other's code.
SPEED = ("include", "src", "cmake", "benchmarks")
ACCURACY = ("include", "src", "accuracy")
SUFFIXES = {".hpp", ".cuh", ".cpp", ".cu", ".in", ".cmake", ".txt", ".py", ".csv"}
# They only read results: a new column of a table is no reason to measure again.
READERS = {
    "accuracy_plot.py", "accuracy_tables.py", "compare.py", "pages.py", "plots.py",
    "provenance.py", "recipe_speed.py", "summary.py", "target_table.py", "targets.py",
}  # fmt: skip


def files_of(part: str, root: Path = ROOT) -> list[Path]:
    """The files of a part, in the order of their names."""
    found: list[Path] = []
    for name in PARTS[part]:
        path = root / name
        found += [path] if path.is_file() else path.rglob("*")
    results = root / "benchmarks/results"
    others = set(files_of("accuracy", root)) if part == "benchmarks" else set()
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.suffix in SUFFIXES
        and results not in path.parents
        and not (part == "benchmarks" and path.name in READERS)
        and path not in others
    )


def source_hashes(root: Path = ROOT, parts: tuple[str, ...] = SPEED) -> dict[str, str]:
    """By part: 16 hexadecimal digits of its files' names and contents, independent of commits."""
    hashes = {}
    for part in parts:
        digest = hashlib.sha256()
        for path in files_of(part, root):
            name, content = path.relative_to(root).as_posix(), path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
        hashes[part] = digest.hexdigest()[:16]
    return hashes


def why_not_current(facts: dict[str, Any], hashes: dict[str, str]) -> str | None:
    """What of the code is not what a result with these facts was measured with; None: nothing."""
    if "sources" not in facts:
        return "it doesn't say which code it was measured with"
    if str(facts["commit"]).endswith("-dirty") or facts["commit"] == "unknown":
        return f"commit {facts['commit']}: the code that was built is not committed"
    changed = [part for part, of in facts["sources"].items() if of != hashes.get(part)]
    return f"{', '.join(changed)} changed since {facts['commit']}" if changed else None


def facts_of(path: Path) -> dict[str, Any] | None:
    """The facts of a result file that holds them apart from its rows."""
    content = json.loads(path.read_text())
    facts = content.get("facts") if isinstance(content, dict) else None
    return facts if isinstance(facts, dict) else None


def listed() -> list[Path]:
    """The result files of current.txt."""
    lines = CURRENT.read_text().splitlines() if CURRENT.exists() else []
    return [RESULTS / line for line in lines if line and not line.startswith("#")]


def standing(path: Path, commit: str) -> str:
    """How tables name the commit of a result: current.txt says whether it is this code's."""
    return f"commit {commit}" if path in listed() else f"earlier commit {commit}"


def complaints() -> list[str]:
    """What is wrong with the files of current.txt."""
    hashes = source_hashes(parts=tuple(PARTS))
    found = []
    for path in listed():
        if not path.exists():
            found.append(f"{path.name}: no such file")
            continue
        reason = why_not_current(facts_of(path) or {}, hashes)
        if reason is not None:
            found.append(f"{path.name}: {reason}")
    return found


def standings() -> list[str]:
    """Every result file, and whether it is this code's."""
    hashes = source_hashes(parts=tuple(PARTS))
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        reason = why_not_current(facts_of(path) or {}, hashes)
        lines.append(f"{path.name}: {'this code' if reason is None else f'older code: {reason}'}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        found = complaints()
        advice = f"Measure again, or take it off {CURRENT.name}."
        sys.exit("\n".join([*found, advice]) if found else 0)
    print("\n".join(standings()))


if __name__ == "__main__":
    main()
