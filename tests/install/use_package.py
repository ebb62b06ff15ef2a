# SPDX-License-Identifier: Apache-2.0
"""Packs, appends and decodes in an environment that holds NumPy and the wheel alone."""

import sys

import numpy as np

import bitdecoding

assert "torch" not in sys.modules
info = bitdecoding.build_info()
print(info)

kv_format = bitdecoding.KvFormat(k_bits=4, v_bits=2, v_group=64, head_dim=64)
rng = np.random.default_rng(0)
k = rng.standard_normal((2, 300, 3, 64), dtype=np.float32)
v = np.full((2, 300, 3, 64), 0.5, np.float32)  # a group of equal values is stored exactly

pool = np.zeros((4, 3, kv_format.page_bytes()), np.uint8)
table = np.array([[3, 1], [0, 2]], np.int32)
bitdecoding.pack_pages(k, v, pool, table, format=kv_format)
assert pool.any(axis=2).all(), "a page was not written"

cache = bitdecoding.PagedKvCache(kv_format, batch=2, num_kv_heads=3, max_tokens=512)
cache.append(k, v)
cache.check()
out, lse = cache.decode(
    rng.standard_normal((2, 1, 9, 64), dtype=np.float32), return_softmax_lse=True
)
assert cache.lengths.tolist() == [300, 300]
assert cache.packed.tolist() == [128, 128]
assert np.abs(out - 0.5).max() < 1e-3
assert np.isfinite(lse).all()
print("packed, appended, decoded")
