# SPDX-License-Identifier: Apache-2.0
"""Where tests run, the decode kernels of this build, and why a test of one may be skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bitdecoding import build_info

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DECODE_KERNELS = [name for name in build_info()["kernels"] if name.startswith("decode_")]


def multiplies_bytes(kernel: str | None, columns: int = 0) -> bool:
    """Rows for 4 query columns multiply codes as bytes; they serve calls of up to 4."""
    return kernel.endswith("_n4") if kernel else columns <= 4


@contextmanager
def skip_without_code() -> Iterator[None]:
    """Skips where the build has no machine code or PTX of a kernel for the device at hand."""
    try:
        yield
    except NotImplementedError as error:
        if "built for: " in str(error):
            pytest.skip(str(error))
        raise
