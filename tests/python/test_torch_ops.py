# SPDX-License-Identifier: Apache-2.0
"""The torch operators on a CPU: PagedKvCache's results and errors, traced and compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_contents import contents, scattered_cache
from samples import FORMATS

from bitdecoding import PagedKvCache, pack_pages

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.library import opcheck  # noqa: E402
from torch_op_calls import OpCache  # noqa: E402

from bitdecoding import torch_ops  # noqa: E402

F = FORMATS[1]  # head_dim 64
B, H, GROUP = 2, 2, 4


def filled(tokens: int = 150) -> OpCache:
    rng = np.random.default_rng(11)
    cache = scattered_cache(
        F, batch=B, heads=H, max_tokens=700, keep_first=4, keep_last=10, rng=rng
    )
    x = rng.standard_normal((B, tokens, H, F.head_dim)).astype(np.float32)
    cache.append(x, -x)
    return OpCache.of(cache, H * GROUP)


def inputs(seed: int, tokens: int = 1) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, tokens, H, F.head_dim, generator=generator)
    counts = torch.randint(0, tokens + 1, (B,), generator=generator, dtype=torch.int32)
    return k, v, counts, torch.randn(B, tokens, H * GROUP, F.head_dim, generator=generator)


def test_results_of_the_cache() -> None:
    ours, theirs = filled(), filled().cache
    for number in range(6):
        k, v, counts, q = inputs(number, 70)
        out, lse = ours.step(k, v, counts, q)
        theirs.append(k, v, num_tokens=counts)
        expected, expected_lse = theirs.decode(q, return_softmax_lse=True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert contents(ours.cache) == contents(theirs)
        torch_ops.decode_into(q, out.zero_(), None, **ours.decode_arguments())
        assert torch.equal(out, expected)
    assert (theirs.packed > 128).all()
    torch_ops.check(None)


def test_pack_of_the_package() -> None:
    k, v, *_ = inputs(3, 300)
    pools = [torch.zeros(9, H, F.page_bytes(), dtype=torch.uint8) for _ in range(2)]
    table = torch.randperm(9, dtype=torch.int32)[:6].view(B, 3)
    runs = {"leftpad": torch.tensor([0, 30], dtype=torch.int32), "keep_first": 4}
    torch_ops.pack(k, v, pools[0], table, None, str(F), **runs)
    pack_pages(k, v, pools[1], table, format=F, **runs)
    assert torch.equal(pools[0], pools[1])
    assert bool(pools[0].any())


def test_a_mean_of_k_and_rotations() -> None:
    f = f"{F}_kr64_vr16"
    mean = torch.randn(H, F.head_dim).half()
    sizes: dict[str, Any] = {"batch": B, "num_kv_heads": H, "max_tokens": 700}
    theirs = PagedKvCache(f, **sizes, keep_last=10, k_mean=mean)
    ours = OpCache.of(PagedKvCache(f, **sizes, keep_last=10, k_mean=mean), H * GROUP)
    k, v, counts, q = inputs(8, 300)
    theirs.append(k, v, num_tokens=counts)
    expected, expected_lse = theirs.decode(q, return_softmax_lse=True)
    out, lse = ours.step(k, v, counts, q)
    assert contents(ours.cache) == contents(theirs)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    pools = [torch.zeros(6, H, F.page_bytes(), dtype=torch.uint8) for _ in range(2)]
    table = torch.arange(6, dtype=torch.int32).view(B, 3)
    torch_ops.pack(k, v, pools[0], table, None, f, k_mean=mean)
    pack_pages(k, v, pools[1], table, format=f, k_mean=mean)
    assert torch.equal(*pools)


def arguments_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ours = filled()
    k, v, counts, q = inputs(5, 128)
    mean = torch.ones(H, F.head_dim, dtype=torch.float16)
    if name == "append":
        runs = {"num_tokens": counts, "max_tokens": 700, "k_mean": mean}
        return (k, v), {**ours.append_arguments(), **runs}
    if name == "pack":
        tensors = torch_ops.tensors_of(ours.cache)
        return (k, v, tensors["pool"], tensors["block_table"][:, :1].clone(), None), {
            "format": str(F),
            "k_mean": mean,
        }
    lse = torch.zeros(B, H * GROUP, 128)
    before = (q,) if name == "decode" else (q, torch.zeros_like(q), lse)
    return before, {**ours.decode_arguments(), "softmax_scale": 0.2, "k_mean": mean}


@pytest.mark.parametrize("name", ["append", "decode", "decode_into", "pack"])
def test_opcheck(name: str) -> None:
    opcheck(getattr(torch_ops, name), *arguments_of(name))


def test_schemas_say_what_is_written() -> None:
    cache = {"pool", "side", "lengths", "packed"}
    expected = {
        "append": cache | {"counters", "error_word"},
        "decode": {"workspace", "error_word"},
        "decode_into": {"out", "lse", "workspace", "error_word"},
        "pack": {"pool", "error_word"},
    }
    for name, written in expected.items():
        arguments = getattr(torch_ops, name)._schema.arguments
        marked = {a.name for a in arguments if a.alias_info and a.alias_info.is_write}
        assert marked == written, name


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_step(backend: str) -> None:
    """One graph serves all lengths, over page boundaries."""
    torch._dynamo.reset()
    compiled, eager = filled(), filled()
    appended, decoded = compiled.append_arguments(), compiled.decode_arguments()

    def step(k: Any, v: Any, counts: Any, q: Any) -> tuple[Any, Any]:
        torch_ops.append(k + 1, v, **appended, num_tokens=counts)
        out, lse = torch_ops.decode(2 * q, **decoded)
        return out + 1, lse

    run = torch.compile(step, backend=backend, fullgraph=True)
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        for number in range(50):
            k, v, counts, q = inputs(number, 7)
            out, lse = run(k, v, counts, q)
            expected, expected_lse = eager.step(k + 1, v, counts, 2 * q)
            assert torch.equal(out, expected + 1)
            assert torch.equal(lse, expected_lse)
    finally:
        torch._dynamo.config.error_on_recompile = before
    assert contents(compiled.cache) == contents(eager.cache)
    assert (eager.cache.packed > 128).all()


def test_sizes_stay_symbolic() -> None:
    torch._dynamo.reset()
    ours = filled()
    state = ours.decode_arguments()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda q: torch_ops.decode(q, **state), backend=counter, fullgraph=True, dynamic=True
    )
    for tokens in (3, 5, 9):
        q = inputs(1, tokens)[3]
        assert torch.equal(run(q)[0], ours.cache.decode(q))
    assert counter.frame_count == 1


# ---- errors ----


def rows(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.ones(shape or (B, 9, H, F.head_dim), dtype=dtype)


def ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


# What the host can see: the operator, its fake and the cache say the same.
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("append", {"k": rows(B, 9, F.head_dim)}, "k: shape"),
    ("append", {"k": rows(B, 9, 3, F.head_dim)}, "k: shape"),
    ("append", {"v": rows(B, 8, H, F.head_dim)}, "v: shape"),
    ("append", {"k": rows(dtype=torch.float64)}, "k: dtype = float64"),
    ("append", {"v": rows(dtype=torch.bool)}, "v: dtype = bool"),
    ("append", {"k": rows(B, 9, H, 128)[..., ::2]}, "k: stride"),
    ("append", {"k": rows(3, 9, H, 64), "v": rows(3, 9, H, 64)}, "batch of k and v = 3"),
    ("append", {"leftpad": ints(0)}, "leftpad: shape"),
    ("append", {"num_tokens": ints(1, 2).long()}, "num_tokens: dtype = int64"),
    ("append", {"num_tokens": ints(1, 2, 3, 4)[::2]}, "num_tokens: strides"),
    ("append", {"threads": -1}, "threads = -1"),
    ("decode", {"q": rows(B, 8, 64)}, "q: shape"),
    ("decode", {"q": rows(B, 1, 8, 128)}, "q: shape"),
    ("decode", {"q": rows(3, 1, 8, 64)}, "q: shape"),
    ("decode", {"q": rows(B, 1, 3, 64)}, "query_heads = 3"),
    ("decode", {"q": rows(B, 1, 8, 64).int()}, "q: dtype = int32"),
    ("decode", {"q": rows(B, 1, 8, 128)[..., ::2]}, "q: stride"),
    ("decode", {"softmax_scale": float("nan")}, "softmax_scale = nan"),
    ("decode", {"softmax_scale": 0.0}, "softmax_scale = 0"),
    ("decode", {"threads": 2**40}, "threads = 1099511627776"),
    ("decode", {"kernel": "decode_x"}, "kernel = 'decode_x'"),
    ("wrap", {"pool": torch.zeros(4, H, 17, dtype=torch.uint8)}, "pool: shape"),
    ("wrap", {"side": torch.zeros(B, H, 2, 20, 64)}, "side: dtype"),
    ("wrap", {"side": torch.zeros(B, H, 2, 20, 64).half()}, "tail_tokens = 16"),
    ("wrap", {"block_table": ints(1, 2)}, "block_table: shape"),
    ("wrap", {"slots": ints(0)}, "slots: shape"),
    ("wrap", {"lengths": ints(0, 0, 0, 0)[::2]}, "lengths: strides"),
    ("wrap", {"packed": ints(0, 0).float()}, "packed: dtype"),
    ("wrap", {"keep_first": 129}, "keep_first = 129"),
    ("wrap", {"keep_last": -1}, "keep_last = -1"),
    ("wrap", {"format": "k3"}, "format = 'k3'"),
]


def refusal(call: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return caught.type, str(caught.value)


def by_operator(name: str, bad: dict[str, Any], tensor: Callable[[Any], Any]) -> object:
    """The call on tensors that `tensor` makes of the real ones."""
    ours = filled()
    given: dict[str, Any] = {"q": rows(B, 1, 8, 64), **ours.decode_arguments()}
    if name == "append":
        given = {"k": rows(), "v": rows(), **ours.append_arguments()}
    given |= bad
    if "kernel" in given:
        given["kernel_name"] = given.pop("kernel")  # Inductor has an argument of that name
    for key, value in given.items():
        given[key] = tensor(value) if isinstance(value, torch.Tensor) else value
    return getattr(torch_ops, name)(**given)


def by_cache(name: str, bad: dict[str, Any]) -> object:
    ours = filled()
    held = {**torch_ops.tensors_of(ours.cache), "format": F, "keep_first": 4, "keep_last": 10}
    given = {"k": rows(), "v": rows()} if name == "append" else {"q": rows(B, 1, 8, 64)}
    cache = PagedKvCache.wrap(**{key: bad.get(key, value) for key, value in held.items()})
    given |= {key: value for key, value in bad.items() if key not in held}
    return getattr(cache, name)(**given)


@pytest.mark.parametrize(("name", "bad", "words"), BAD, ids=lambda x: str(x)[:40])
def test_errors_of_the_cache(name: str, bad: dict[str, Any], words: str) -> None:
    operator = "decode" if name == "wrap" else name
    expected = refusal(lambda: by_cache(operator, bad))
    assert words in expected[1]
    assert refusal(lambda: by_operator(operator, bad, lambda x: x)) == expected
    fake = FakeTensorMode().from_tensor
    assert refusal(lambda: by_operator(operator, bad, fake)) == expected


def test_values_are_found_when_it_runs() -> None:
    ours = filled()
    state = ours.append_arguments()
    before = contents(ours.cache)
    with pytest.raises(ValueError, match=r"num_tokens\[1\] = 10; allowed: 0 to 9"):
        torch_ops.append(rows(), rows(), **state, num_tokens=ints(0, 10))
    with pytest.raises(ValueError, match=r"= 159 after .*; allowed: at most 158 \(max_tokens\)"):
        torch_ops.append(rows(), rows(), **state, max_tokens=158)
    slot = int(ours.cache.slots[1])
    ours.cache.slots[1] = -1
    with pytest.raises(ValueError, match=r"slots\[1\] = -1; allowed: 0 to"):
        torch_ops.decode(rows(B, 1, 8, 64), **ours.decode_arguments())
    ours.cache.slots[1] = slot
    x, table = rows(B, 128, H, 64), torch.full((B, 1), -7, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] = -7; allowed: 0 to"):
        torch_ops.pack(x, x, state["pool"], table, None, str(F))
    assert contents(ours.cache) == before


def test_scratch_is_for_cuda() -> None:
    ours = filled()
    assert ours.scratch == (None, None, None)
    word = torch.zeros(4, dtype=torch.int32)
    match = "error_word = an array; allowed: None, since the arrays are on cpu"
    with pytest.raises(ValueError, match=match):
        torch_ops.decode(rows(B, 1, 8, 64), **ours.decode_arguments() | {"error_word": word})
    x, tensors = rows(B, 128, H, 64), torch_ops.tensors_of(ours.cache)
    with pytest.raises(ValueError, match=match):
        torch_ops.pack(x, x, tensors["pool"], tensors["block_table"], word, str(F))
    for bad in ({"query_heads": 3}, {"num_kv_heads": 0}, {"query_tokens": 0}, {"device": "tpu"}):
        given: dict[str, Any] = {"num_kv_heads": 2, "query_heads": 4, "device": "cpu", **bad}
        with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*; allowed: "):
            torch_ops.scratch(F, batch=1, **given)


def cuda_arguments(mode: Any) -> dict[str, Any]:
    given = {"q": rows(B, 1, 8, 64).half(), **filled().decode_arguments()}
    with mode:
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        given["workspace"] = torch.empty(8, dtype=torch.uint8, device="cuda")
        given["error_word"] = torch.empty(4, dtype=torch.int32, device="cuda")
    return given


def test_fakes_on_cuda() -> None:
    """What a CUDA call asks besides, on a machine that may have none."""
    mode = FakeTensorMode()
    given = cuda_arguments(mode)
    out, lse = torch_ops.decode(**given)
    assert (out.shape, out.dtype, out.device.type) == ((B, 1, 8, 64), torch.float16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((B, 8, 1), torch.float32, "cuda")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"q": given["q"].float()}, "q dtype = float32; allowed on a CUDA device: float16"),
        ({"threads": 2}, "threads = 2; allowed: 0, since the arrays are on cuda:0"),
        ({"workspace": None}, "workspace = NoneType; allowed: "),
        ({"workspace": given["q"]}, "workspace: dtype = float16; allowed: uint8"),
        ({"error_word": given["lengths"]}, "error_word: shape = .*; allowed: .4,."),
    ]
    with mode:
        bad.append(({"slots": torch.empty(B, dtype=torch.int32)}, "slots: device = cpu; .* cuda:0"))
    for changed, words in bad:
        with pytest.raises((TypeError, ValueError), match=words):
            torch_ops.decode(**given | changed)


def test_meta_tensors() -> None:
    given = {"q": rows(B, 3, 8, 64), **filled().decode_arguments()}
    moved = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    out, lse = torch_ops.decode(**moved)
    assert (out.shape, lse.shape, out.device.type) == ((B, 3, 8, 64), (B, 8, 3), "meta")


def test_registered_when_asked_for() -> None:
    code = """
import torch, bitdecoding
assert not hasattr(torch.ops.bitdecoding, "decode")
from bitdecoding import torch_ops
assert torch.ops.bitdecoding.decode.default is torch_ops.decode
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import bitdecoding.torch_ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: bitdecoding.torch_ops needs torch" in done.stderr
