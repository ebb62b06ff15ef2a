# SPDX-License-Identifier: Apache-2.0
"""Arrays on a CUDA device, or on two, as a machine without one can check them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS
from pretended_cuda import PretendedCuda
from samples import FORMATS

from bitdecoding import PagedKvCache, build_info, pack_pages

F = FORMATS[0]


def cuda_cache(device: int = 0) -> PagedKvCache:
    own = PagedKvCache(F, batch=2, num_kv_heads=2, max_tokens=300)
    arrays = {name: PretendedCuda(getattr(own, name), device) for name in ARRAYS}
    return PagedKvCache.wrap(F, **arrays, keep_first=16, keep_last=64)


def tokens(device: int | None = None, count: int = 1) -> Any:
    x = np.zeros((2, count, 2, F.head_dim), np.float16)
    return x if device is None else PretendedCuda(x, device)


def test_operations_without_a_kernel_are_named() -> None:
    cache = cuda_cache(1)
    k = tokens(1)
    for operation in (
        lambda: cache.append(k, k),
        lambda: cache.decode(k, out=tokens(1)),
        cache.check,
    ):
        with pytest.raises(NotImplementedError, match=r"no CUDA kernel.*cuda:1; allowed: cpu"):
            operation()


@pytest.mark.parametrize("place", range(1, len(ARRAYS)))
def test_a_cache_is_on_one_device(place: int) -> None:
    own = PagedKvCache(F, batch=2, num_kv_heads=2, max_tokens=300)
    arrays = {name: getattr(own, name) for name in ARRAYS}
    name = ARRAYS[place]
    arrays[name] = PretendedCuda(arrays[name], 3)
    with pytest.raises(ValueError, match=f"{name}: device = cuda:3; allowed: cpu, where pool is"):
        PagedKvCache.wrap(F, **arrays, keep_first=16, keep_last=64)


def test_two_devices_are_named() -> None:
    own, cache = PagedKvCache(F, batch=2, num_kv_heads=2, max_tokens=300), cuda_cache()
    ints = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="k: device = cuda:0; allowed: cpu, where pool is"):
        own.append(tokens(0), tokens(0), num_tokens=ints)
    with pytest.raises(ValueError, match="v: device = cpu; allowed: cuda:0, where k is"):
        cache.append(tokens(0), tokens())
    with pytest.raises(ValueError, match="num_tokens: device = cuda:1; allowed: cpu, where k is"):
        own.append(tokens(), tokens(), num_tokens=PretendedCuda(ints, 1))
    with pytest.raises(ValueError, match="k: device = cuda:1; allowed: cuda:0, where pool is"):
        cache.append(tokens(1), tokens(1))
    with pytest.raises(ValueError, match="q: device = cuda:0; allowed: cpu, where pool is"):
        own.decode(tokens(0), out=tokens())
    with pytest.raises(ValueError, match="out: device = cpu; allowed: cuda:0, where q is"):
        cache.decode(tokens(0), out=tokens())


def test_outputs_are_not_invented_for_other_libraries() -> None:
    with pytest.raises(TypeError, match="q = PretendedCuda; allowed: a NumPy array or a torch"):
        cuda_cache().decode(tokens(0))


def test_pack_needs_a_stream_and_a_kernel() -> None:
    cache = cuda_cache()
    k = tokens(0, 256)
    with pytest.raises(ValueError, match=r"stream = None; allowed: a cudaStream_t.*cuda:0"):
        pack_pages(k, k, cache.pool, cache.block_table, format=F)
    if "pack_k4v4_c_d128" not in build_info()["kernels"]:
        with pytest.raises(NotImplementedError, match=r"no CUDA kernels|kernels of this build"):
            pack_pages(k, k, cache.pool, cache.block_table, format=F, stream=0)
    elif build_info()["cuda_driver"] is None:
        with pytest.raises(RuntimeError, match=r"driver found: none, needed: CUDA 1\d\.0 or newer"):
            pack_pages(k, k, cache.pool, cache.block_table, format=F, stream=0)
