# SPDX-License-Identifier: Apache-2.0
"""Caches on two CUDA devices: calls run where their tensors are, whatever device is current."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cache_contents import ARRAYS
from cuda_kernels import multiplies_bytes
from decode_inputs import Built, Contents, Queries, build, on_device, on_host
from half_budget import assert_close
from samples import FORMATS

from bitdecoding import PagedKvCache

pytestmark = pytest.mark.gpu

F = FORMATS[0]
CONTENTS = Contents(F, (700, 0, 129, 300), 2)
QUERIES = (Queries(4), Queries(8, 2, "bfloat16"))


@pytest.fixture(autouse=True)
def two_devices(torch: Any) -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    before = torch.cuda.current_device()
    yield
    for device in range(2):
        torch.cuda.synchronize(device)
    torch.cuda.set_device(before)


def check_decode(built: Built, cache: PagedKvCache, device: str) -> None:
    for case in built.cases:
        out, lse = cache.decode(case.q.to(device), return_softmax_lse=True)
        assert str(out.device) == str(lse.device) == device
        assert_close(
            out.float().cpu().numpy(),
            lse.cpu().numpy(),
            case.expected,
            case.queries.dtype,
            kind="two devices",
            what=device,
            of_bytes=multiplies_bytes(None, case.queries.ratio * case.queries.tokens),
        )


@pytest.mark.parametrize(("current", "other"), [(0, "cuda:1"), (1, "cuda:0")])
def test_the_device_that_is_not_current(torch: Any, current: int, other: str) -> None:
    built = build(CONTENTS, QUERIES)
    torch.cuda.set_device(current)
    cache = on_device(built.cache, other)
    check_decode(built, cache, other)
    cache.check()

    host = on_host(built.cache)
    k = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 4, 150, 2, F.head_dim)))
    k, v = k.half()
    counts = torch.tensor([3, 100, 150, 150], dtype=torch.int32)
    host.append(k, v, num_tokens=counts)
    cache = on_device(on_host(built.cache), other)
    cache.append(k.to(other), v.to(other), num_tokens=counts.to(other))
    assert torch.cuda.current_device() == current
    found = on_host(cache)
    for name in ARRAYS:
        ours, theirs = (getattr(c, name).view(np.uint8) for c in (found, host))
        assert np.array_equal(ours, theirs), name
    cache.slots[1] = 99
    cache.decode(built.cases[0].q.to(other))
    cache.slots[1] = int(host.slots[1])
    with pytest.raises(ValueError, match=r"slots\[1\] = 99"):
        cache.check()
    assert torch.cuda.current_device() == current


def test_cuda_means_the_current_device(torch: Any) -> None:
    torch.cuda.set_device(1)
    cache = PagedKvCache(F, batch=1, num_kv_heads=1, max_tokens=300, device="cuda")
    assert str(cache.pool.device) == "cuda:1"
    torch.cuda.set_device(0)
    k = torch.randn(1, 300, 1, F.head_dim, device="cuda:1").half()
    cache.append(k, k)
    out = cache.decode(k[:, :1])
    assert str(out.device) == "cuda:1"
    assert bool(out.isfinite().all())
    cache.check()


def test_both_at_once(torch: Any) -> None:
    """Streams of two devices, work on both queued before either is waited for."""
    built = build(CONTENTS, QUERIES[:1])
    (case,) = built.cases
    caches, queries, expected, streams, outs = {}, {}, {}, {}, {}
    for index in range(2):
        device = f"cuda:{index}"
        caches[index] = on_device(built.cache, device)
        queries[index] = case.q.to(device)
        expected[index] = caches[index].decode(queries[index])
        streams[index] = torch.cuda.Stream(device)
        outs[index] = [torch.empty_like(queries[index]) for _ in range(20)]
        torch.cuda.synchronize(device)
    for turn in range(20):
        for index in range(2):
            if turn % 2:
                with torch.cuda.stream(streams[index]):
                    caches[index].decode(queries[index], out=outs[index][turn])
            else:
                handle = streams[index].cuda_stream
                caches[index].decode(queries[index], out=outs[index][turn], stream=handle)
    for index in range(2):
        streams[index].synchronize()
        for out in outs[index]:
            assert torch.equal(out, expected[index])
    assert torch.equal(expected[0].cpu(), expected[1].cpu())  # the same GPU gives the same bits


def test_graphs_on_both(torch: Any) -> None:
    built = build(CONTENTS, QUERIES[:1])
    (case,) = built.cases
    torch.cuda.set_device(0)
    for device in ("cuda:0", "cuda:1"):
        cache, q = on_device(built.cache, device), case.q.to(device)
        expected = cache.decode(q)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                out = cache.decode(q)
            graph.replay()
            torch.cuda.synchronize(device)
        assert torch.equal(out, expected)


def test_two_devices_are_named(torch: Any) -> None:
    built = build(CONTENTS, QUERIES[:1])
    cache = on_device(built.cache, "cuda:0")
    q = built.cases[0].q.to("cuda:1")
    with pytest.raises(ValueError, match="q: device = cuda:1; allowed: cuda:0, where pool is"):
        cache.decode(q)
    with pytest.raises(ValueError, match="out: device = cuda:1; allowed: cuda:0, where q is"):
        cache.decode(q.to("cuda:0"), out=torch.empty_like(q))
    k = torch.zeros(4, 1, 2, F.head_dim, dtype=torch.float16, device="cuda:1")
    with pytest.raises(ValueError, match="k: device = cuda:1; allowed: cuda:0, where pool is"):
        cache.append(k, k)
    with pytest.raises(ValueError, match="v: device = cuda:1; allowed: cuda:0, where k is"):
        cache.append(k.to("cuda:0"), k)
    counts = torch.zeros(4, dtype=torch.int32, device="cuda:1")
    near = k.to("cuda:0")
    with pytest.raises(ValueError, match="num_tokens: device = cuda:1; allowed: cuda:0"):
        cache.append(near, near, num_tokens=counts)
    arrays = {name: getattr(cache, name) for name in ARRAYS}
    arrays["slots"] = arrays["slots"].to("cuda:1")
    with pytest.raises(ValueError, match="slots: device = cuda:1; allowed: cuda:0, where pool is"):
        PagedKvCache.wrap(F, **arrays, keep_first=16, keep_last=64)
    cache.check()
