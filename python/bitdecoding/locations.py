# SPDX-License-Identifier: Apache-2.0
"""Where the C++ side of an installed package lies."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def get_include() -> str:
    """Directory of the C++ headers, for a compiler's -I."""
    in_checkout = _PACKAGE.parents[1] / "include"  # a development build leaves them in place
    return str(_existing(_PACKAGE / "include", in_checkout))


def get_cmake_dir() -> str:
    """Directory of bitdecodingConfig.cmake, for `cmake -Dbitdecoding_DIR=...`."""
    return str(_existing(_PACKAGE / "lib" / "cmake" / "bitdecoding"))


def _existing(*candidates: Path) -> Path:
    for path in candidates:
        if path.is_dir():
            return path
    raise FileNotFoundError(f"{candidates[0]}: a development build has none; install the package")
