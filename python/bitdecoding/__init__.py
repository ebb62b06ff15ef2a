# SPDX-License-Identifier: Apache-2.0
"""Decode attention over 4-bit and 2-bit KV caches.

    cache = bitdecoding.PagedKvCache(KvFormat(k_bits=4, v_bits=2), batch=1, num_kv_heads=8,
                                     max_tokens=4096)
    cache.append(k, v)      # (B, S, H, D), NumPy or torch, any number of tokens at a time
    out = cache.decode(q)   # (B, Sq, Hq, D)

Arrays are never copied: what doesn't fit is refused with its name, value and what is allowed.
"""

from bitdecoding._ext import KvFormat, build_info
from bitdecoding.cache import PagedKvCache
from bitdecoding.locations import get_cmake_dir, get_include
from bitdecoding.pack import pack_pages
from bitdecoding.workspace import Workspace

__version__: str = build_info()["version"]

__all__ = [
    "KvFormat",
    "PagedKvCache",
    "Workspace",
    "build_info",
    "get_cmake_dir",
    "get_include",
    "pack_pages",
]
