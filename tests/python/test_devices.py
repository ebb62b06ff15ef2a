# SPDX-License-Identifier: Apache-2.0
"""Arrays on a CUDA device, or on two, as a machine without one can check them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS
from pretended_cuda import CUDA, PretendedCuda, PretendedLibrary
from samples import FORMATS

from bitdecoding import PagedKvCache, Workspace, build_info, pack_pages

F = FORMATS[0]


def cuda_cache(device: int = 0, workspace: Any = None) -> PagedKvCache:
    own = PagedKvCache(F, batch=2, num_kv_heads=2, max_tokens=300)
    arrays = {name: PretendedCuda(getattr(own, name), device) for name in ARRAYS}
    return PagedKvCache.wrap(F, **arrays, keep_first=16, keep_last=64, workspace=workspace)


def tokens(device: int | None = None, count: int = 1) -> Any:
    x = np.zeros((2, count, 2, F.head_dim), np.float16)
    return x if device is None else PretendedCuda(x, device)


def test_operations_need_a_stream_and_a_kernel() -> None:
    cache = cuda_cache(1)
    k = tokens(1)
    operations: list[Callable[..., object]] = [
        lambda **options: cache.append(k, k, **options),
        lambda **options: cache.decode(k, out=tokens(1), **options),
    ]
    for operation in operations:
        with pytest.raises(ValueError, match=r"stream = None; allowed: a cudaStream_t.*cuda:1"):
            operation()
        with pytest.raises(ValueError, match=r"threads = 2; allowed: 0, since .* on cuda:1"):
            operation(threads=2, stream=0)
        with pytest.raises(ValueError, match="stream = -1; allowed: 0 to"):
            operation(stream=-1)
        if not build_info()["kernels"]:
            with pytest.raises(NotImplementedError, match=r"cuda:1: .*no CUDA kernels.*: cpu"):
                operation(stream=0)
    if not build_info()["kernels"]:
        with pytest.raises(NotImplementedError, match="no CUDA kernels"):
            cache.plan_decode(query_heads=4)


@pytest.mark.skipif(bool(build_info()["kernels"]), reason="kernels would run on a stream of nobody")
def test_a_library_says_what_its_stream_is() -> None:
    """By DLPack's table of C functions, of the device of the arrays, where no stream is given."""
    cache, x = cuda_cache(1), np.zeros((2, 1, 2, F.head_dim), np.float16)
    k, out = PretendedLibrary(x, 1), PretendedLibrary(x, 1)
    operations: list[Callable[..., object]] = [
        lambda **options: cache.append(k, k, **options),
        lambda **options: cache.decode(k, out=out, **options),
    ]
    for operation in operations:
        for options, asked in (({}, [(CUDA, 1)]), ({"stream": 7}, [])):
            PretendedLibrary.asked.clear()
            with pytest.raises(NotImplementedError, match="no CUDA kernels"):
                operation(**options)
            assert PretendedLibrary.asked == asked
    with pytest.raises(ValueError, match=r"out: shape = \(2, 1, 2, 64\); allowed: q's shape"):
        cache.decode(k, out=PretendedLibrary(x[..., :64], 1))


def test_queries_are_16_bit_and_read_in_pairs() -> None:
    cache = cuda_cache()
    q = np.zeros((2, 1, 2, F.head_dim), np.float32)
    with pytest.raises(ValueError, match="q dtype = float32; allowed on a CUDA device: float16"):
        cache.decode(PretendedCuda(q), out=PretendedCuda(q), stream=0)
    odd = np.zeros((2, 1, 2, F.head_dim + 1), np.float16)[..., :-1]
    with pytest.raises(ValueError, match=r"q stride = 129 elements; allowed.*multiples of 2"):
        cache.decode(PretendedCuda(odd), out=tokens(0), stream=0)
    wide = np.zeros((2, 1, 3, F.head_dim), np.float16)
    with pytest.raises(ValueError, match="query_heads = 3; allowed: multiples of num_kv_heads"):
        cache.decode(PretendedCuda(wide), out=PretendedCuda(wide), stream=0)
    with pytest.raises(ValueError, match="query_heads = 3; allowed: multiples of num_kv_heads"):
        cache.plan_decode(query_heads=3)


def test_workspaces_are_of_the_device_of_the_arrays() -> None:
    own, other = cuda_cache(1).workspace, cuda_cache(1).workspace
    assert isinstance(own, Workspace)
    assert own is not other
    shared = Workspace("cuda:1")
    assert (shared.device, shared.nbytes, repr(shared)) == ("cuda:1", 0, "Workspace('cuda:1')")
    assert cuda_cache(1, workspace=shared).workspace is shared
    with pytest.raises(ValueError, match=r"Workspace\('cuda:1'\); allowed: None, .*'cuda:0'"):
        cuda_cache(0, workspace=shared)
    with pytest.raises(ValueError, match=r"Workspace\('cuda:1'\); allowed: None, since .* on cpu"):
        PagedKvCache(F, batch=1, num_kv_heads=1, max_tokens=1, workspace=shared)
    with pytest.raises(ValueError, match="workspace = 7; allowed: None, Workspace"):
        cuda_cache(0, workspace=7)
    for bad in ("cpu", "cuda:x", 3):
        with pytest.raises(ValueError, match=f"device = '{bad}'; allowed: 'cuda'"):
            Workspace(bad)
    one, two = copy.deepcopy([shared, shared])
    assert one is two is not shared
    assert one.device == "cuda:1"


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
