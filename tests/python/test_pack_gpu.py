# SPDX-License-Identifier: Apache-2.0
"""pack_pages on CUDA: the CPU's bytes, on the caller's stream and device, and checked indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from samples import FAMILIES, FORMATS, cuda_formats, mixed, rotated_formats

from bitdecoding import KvFormat, PagedKvCache, pack_pages

pytestmark = pytest.mark.gpu

B, H = len(FAMILIES), 2
POISON = 0x5A


def ints(values: Any) -> Any:
    return np.asarray(values, np.int32)


class Pack:
    """One ragged call of pack_pages: the same arguments on a CPU and on a CUDA device."""

    def __init__(self, f: KvFormat, x: Any, rng: np.random.Generator) -> None:
        """x: torch (2, B, S, H, D) on the CPU; k and v are strided views of it."""
        rows = x.shape[2]
        pads = rng.integers(0, 5, B)
        counts = np.minimum(rng.integers(0, 3 * f.page_tokens, B), rows - pads)
        counts[:3] = f.page_tokens, f.page_tokens - 1, 2 * f.page_tokens
        first_page = rng.integers(0, 2, B)
        self.format = f
        self.keep_first = int(rng.choice([0, 1, 16, f.page_tokens]))
        self.k, self.v = x[0], x[1]
        self.pool = np.full((5 * B, H, f.page_bytes()), POISON, np.uint8)
        self.tables: dict[str, Any] = {
            "block_table": ints(rng.permutation(5 * B)[: 4 * B].reshape(B, 4)),
            "first_page": ints(first_page),
            "leftpad": ints(pads),
            "num_tokens": ints(counts),
        }
        if f.k_rotation:
            self.tables["k_mean"] = rng.standard_normal((H, f.head_dim)).astype(np.float16)

    def on_cpu(self) -> Any:
        pool = self.pool.copy()
        self.run(self.k, self.v, pool, self.tables)
        return pool

    def on_cuda(self, torch: Any, k: Any, v: Any, device: str = "cuda", **options: Any) -> Any:
        """k, v as on the device already -> its pool; nothing has waited yet."""
        pool = torch.from_numpy(self.pool).to(device)
        tables = {name: torch.from_numpy(x).to(device) for name, x in self.tables.items()}
        self.run(k, v, pool, tables, **options)
        return pool

    def run(self, k: Any, v: Any, pool: Any, tables: dict[str, Any], **options: Any) -> None:
        named = {"format": self.format, "keep_first": self.keep_first, **tables, **options}
        pack_pages(k, v, pool, named.pop("block_table"), **named)


def values(torch: Any, head_dim: int, rng: np.random.Generator, dtype: str) -> Any:
    """(2, B, S, H, D) on the CPU: every sequence of another family."""
    x = np.stack([mixed(B, 300, H, head_dim, rng) for _ in range(2)])
    return torch.from_numpy(x).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_format_has_the_cpus_bytes(
    torch: Any, head_dim: int, dtype: str, rng: np.random.Generator
) -> None:
    x = values(torch, head_dim, rng, dtype)
    k, v = x.cuda()
    wrong = []
    for f in [*cuda_formats(), *rotated_formats()]:
        if f.head_dim != head_dim:
            continue
        pack = Pack(f, x, rng)
        expected = pack.on_cpu()
        found = pack.on_cuda(torch, k, v).cpu().numpy()
        if not np.array_equal(found, expected):
            page, head, byte = np.argwhere(found != expected)[0]
            wrong.append(f"{f} F={pack.keep_first}: first at page {page} head {head} byte {byte}")
    assert not wrong, f"{len(wrong)} formats differ:\n" + "\n".join(wrong[:20])


def test_heads_first_views_are_read_in_place(torch: Any, rng: np.random.Generator) -> None:
    for f in FORMATS:
        x = values(torch, f.head_dim, rng, "float16")
        pack = Pack(f, x, rng)
        heads_first = x.cuda().transpose(2, 3).contiguous()  # (2, B, H, S, D)
        k, v = heads_first.transpose(2, 3).requires_grad_()
        assert np.array_equal(pack.on_cuda(torch, k, v).cpu().numpy(), pack.on_cpu())


def test_runs_on_the_current_stream(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    ready = x.cuda()
    late = torch.zeros_like(ready)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        k, v = late
        torch.cuda._sleep(200_000_000)  # about 0.1 s: any other stream would read the zeros
        late.copy_(ready)
        found = pack.on_cuda(torch, k, v, check=True)
    stream.synchronize()
    assert np.array_equal(found.cpu().numpy(), pack.on_cpu())


def test_device_that_is_not_current(torch: Any, rng: np.random.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    f = FORMATS[0]
    x = values(torch, f.head_dim, rng, "bfloat16")
    pack = Pack(f, x, rng)
    torch.cuda.set_device(0)
    k, v = x.to("cuda:1")
    found = pack.on_cuda(torch, k, v, device="cuda:1", check=True)
    assert torch.cuda.current_device() == 0
    assert np.array_equal(found.cpu().numpy(), pack.on_cpu())
    with pytest.raises(ValueError, match=r"k: device = cuda:0; allowed: cuda:1, where pool is"):
        pack.on_cuda(torch, k.to("cuda:0"), v.to("cuda:0"), device="cuda:1")


def test_two_devices_are_named(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    with pytest.raises(ValueError, match=r"k: device = cpu; allowed: cuda:0, where pool is"):
        pack.on_cuda(torch, *x)
    k, v = x.cuda()
    with pytest.raises(ValueError, match=r"k: device = cuda:0; allowed: cpu, where pool is"):
        pack.on_cuda(torch, k, v, device="cpu")
    with pytest.raises(ValueError, match=r"v: device = cpu; allowed: cuda:0, where k is"):
        pack.on_cuda(torch, k, v.cpu())


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("block_table", (2, 1), 5 * B, r"block_table of sequence 2 = 40; .* 0 to 39"),
        ("block_table", (2, 1), -1, r"block_table of sequence 2 = -1; .* 0 to 39"),
        ("first_page", 2, 4, r"first_page of sequence 2 = 4; .* 4 columns"),
        ("first_page", 2, -7, r"first_page of sequence 2 = -7; .* 4 columns"),
        ("num_tokens", 2, 301, r"leftpad, num_tokens of sequence 2 = 301; .* 300 tokens"),
        ("leftpad", 2, -3, r"leftpad, num_tokens of sequence 2 = -3; .* 300 tokens"),
    ],
)
def test_bad_index_writes_nothing_and_is_reported(
    torch: Any, table: str, place: Any, value: int, message: str, rng: np.random.Generator
) -> None:
    f = FORMATS[0]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    pack.tables["first_page"][2] = 0
    expected = pack.on_cpu()
    own = pack.tables["block_table"][2].copy()
    # A bad page id spoils its page, another bad index the whole sequence.
    spoilt = own[1:2] if table == "block_table" else own
    expected[spoilt] = POISON
    pack.tables[table][place] = value
    k, v = x.cuda()
    assert np.array_equal(pack.on_cuda(torch, k, v).cpu().numpy(), expected)
    with pytest.raises(ValueError, match=message):
        pack.on_cuda(torch, k, v, check=True)
    torch.cuda.synchronize()  # no error is left behind


def test_what_the_kernel_cannot_read_is_refused(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[0]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    k, v = x.cuda()
    with pytest.raises((TypeError, ValueError), match=r"k.*float32.*allowed.*float16, bfloat16"):
        pack.on_cuda(torch, k.float(), v.float())
    odd = torch.zeros((2, B, 300, H, f.head_dim + 1), dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match=r"k.*multiple"):
        pack.on_cuda(torch, *odd[..., 1:])
    with pytest.raises(ValueError, match=r"check = True with stream"):
        pack.on_cuda(torch, k, v, check=True, stream=0)


class Foreign:
    """A CUDA array of a library that is not torch."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def test_other_libraries_say_their_stream(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[1]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    k, v = (Foreign(tensor) for tensor in x.cuda())
    with pytest.raises(ValueError, match=r"stream = None; allowed: a cudaStream_t"):
        pack.on_cuda(torch, k, v)
    stream = torch.cuda.current_stream().cuda_stream
    found = pack.on_cuda(torch, k, v, stream=stream)
    assert np.array_equal(found.cpu().numpy(), pack.on_cpu())


def test_captured_in_a_graph(torch: Any, rng: np.random.Generator) -> None:
    f = FORMATS[2]
    x = values(torch, f.head_dim, rng, "float16")
    pack = Pack(f, x, rng)
    given = torch.zeros_like(x, device="cuda")
    pool = torch.from_numpy(pack.pool).cuda()
    tables = {name: torch.from_numpy(t).cuda() for name, t in pack.tables.items()}
    k, v = given
    pack.run(k, v, pool, tables)  # the first launch loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack.run(k, v, pool, tables)
    given.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert np.array_equal(pool.cpu().numpy(), pack.on_cpu())


@pytest.fixture
def cuda_cache(torch: Any) -> Iterator[PagedKvCache]:
    yield PagedKvCache(
        FORMATS[0], batch=2, num_kv_heads=H, max_tokens=300, keep_last=0, device="cuda"
    )
    torch.cuda.synchronize()


def test_a_cache_on_cuda(torch: Any, cuda_cache: PagedKvCache, rng: np.random.Generator) -> None:
    cache, f = cuda_cache, FORMATS[0]
    own = PagedKvCache(f, batch=2, num_kv_heads=H, max_tokens=300, keep_last=0)
    assert cache.nbytes == own.nbytes
    assert all(x.is_cuda for x in (cache.pool, cache.side, cache.block_table, cache.lengths))
    k, v = values(torch, f.head_dim, rng, "float16")[:, :2]
    table = cache.block_table
    pack_pages(k.cuda(), v.cuda(), cache.pool, table, format=f, keep_first=16, check=True)
    pack_pages(k, v, own.pool, own.block_table, format=f, keep_first=16)
    assert np.array_equal(cache.pool.cpu().numpy(), own.pool)
    cache.reset()

    k = torch.zeros((2, 1, H, f.head_dim), dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match=r"k: device = cpu; allowed: cuda:0"):
        cache.append(k.cpu(), k.cpu())
    with pytest.raises(ValueError, match=r"q: device = cuda:0; allowed: cpu"):
        own.decode(k)


def test_importing_creates_no_context(torch: Any) -> None:
    import subprocess
    import sys

    code = """
import torch, bitdecoding
bitdecoding.build_info()
bitdecoding.PagedKvCache("k4v4_c128_v128_p128_d128", batch=1, num_kv_heads=1, max_tokens=9)
assert not torch.cuda.is_initialized()
import ctypes
context = ctypes.c_void_p()
driver = ctypes.CDLL("libcuda.so.1")
error = driver.cuCtxGetCurrent(ctypes.byref(context))  # 3: the driver was never initialised
assert error == 3 or not context.value, (error, context.value)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
