# SPDX-License-Identifier: Apache-2.0
"""Importing: NumPy only, quick, no CUDA context; facts of the build; C++ files of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import bitdecoding


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_numpy_only_and_is_quick() -> None:
    code = """
import sys, time
import numpy
begin = time.perf_counter()
before = set(sys.modules)
import bitdecoding
print(time.perf_counter() - begin)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    seconds, loaded = python(code).splitlines()
    assert loaded in ("['bitdecoding']", "['bitdecoding', 'numpy']")
    assert float(seconds) < 1


def test_cpu_work_never_imports_torch() -> None:
    code = """
import sys
import numpy as np, bitdecoding
cache = bitdecoding.PagedKvCache(bitdecoding.KvFormat(), batch=1, num_kv_heads=1, max_tokens=300)
k = np.ones((1, 300, 1, 128), np.float16)
cache.append(k, k)
cache.decode(k[:, :1])
page = k[:, :128]
bitdecoding.pack_pages(page, page, cache.pool, cache.block_table, format=cache.format)
assert "torch" not in sys.modules
"""
    python(code)


def test_build_info() -> None:
    info = bitdecoding.build_info()
    assert info["version"] == bitdecoding.__version__
    assert {"git", "compiler", "cuda", "architectures", "kernels", "cuda_driver"} <= set(info)
    assert isinstance(info["format_version"], int)
    assert (info["cuda"] is None) == (info["kernels"] == [])


def test_include_directory() -> None:
    header = Path(bitdecoding.get_include()) / "bitdecoding" / "version.hpp"
    assert f'"{bitdecoding.__version__}"' in header.read_text()


def test_the_module_docstring_works() -> None:
    k = np.ones((1, 3, 8, 128), np.float16)
    q = np.ones((1, 1, 32, 128), np.float16)
    format = bitdecoding.KvFormat(k_bits=4, v_bits=2)
    cache = bitdecoding.PagedKvCache(format, batch=1, num_kv_heads=8, max_tokens=4096)
    cache.append(k, k)
    assert np.all(cache.decode(q) == 1)
