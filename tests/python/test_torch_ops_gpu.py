# SPDX-License-Identifier: Apache-2.0
"""The torch operators on CUDA: opcheck, compiled, an engine's step captured once and replayed."""

from __future__ import annotations

from typing import Any

import pytest
import seeds
from cache_contents import ARRAYS
from samples import FORMATS
from test_graphs_gpu import GROUP, START, STEPS, H, Inputs, assert_same_tokens, started

from bitdecoding import KvFormat

torch = pytest.importorskip("torch")

from torch.library import opcheck  # noqa: E402
from torch_op_calls import OpCache  # noqa: E402

from bitdecoding import torch_ops  # noqa: E402

pytestmark = pytest.mark.gpu


def ops_on(f: KvFormat, zones: tuple[int, int], name: str, queries: int = 1) -> OpCache:
    return OpCache.of(started(torch, f, zones, name), H * GROUP, queries)


@pytest.mark.parametrize(
    ("f", "zones", "dtype", "new", "queries"),
    [
        (FORMATS[0], (16, 64), "float16", 1, 1),
        (FORMATS[2], (0, 0), "bfloat16", 3, 2),
        (FORMATS[5], (16, 0), "float16", 2, 1),
    ],
    ids=str,
)
def test_captured_step_equals_eager(
    f: KvFormat, zones: tuple[int, int], dtype: str, new: int, queries: int
) -> None:
    """Append, the plan on the device and decode in one graph, over page boundaries; beside it
    PagedKvCache, whose calls share the code below."""
    torch.manual_seed(seeds.SEED)
    inputs = Inputs.empty(torch, f, dtype, new, queries)
    captured, eager = ops_on(f, zones, "captured", queries), started(torch, f, zones, "eager")
    for _ in range(2):  # of no tokens: kernels are loaded
        captured.step(inputs.k, inputs.v, inputs.counts, inputs.q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = captured.step(inputs.k, inputs.v, inputs.counts, inputs.q)
    assert captured.cache.lengths.tolist() == list(START)  # capturing runs nothing
    packed = captured.cache.packed.clone()
    for number in range(STEPS):
        inputs.fill(torch)
        graph.replay()
        eager.append(inputs.k, inputs.v, num_tokens=inputs.counts)
        expected, expected_lse = eager.decode(inputs.q, return_softmax_lse=True)
        assert torch.equal(out, expected), f"seed {seeds.SEED}: out of step {number}"
        assert torch.equal(lse, expected_lse), f"seed {seeds.SEED}: lse of step {number}"
    grown = captured.cache.packed - packed
    assert bool((grown >= f.page_tokens).all()), "no page boundary was crossed"
    torch_ops.check(captured.scratch.error_word)
    eager.check()
    assert_same_tokens(captured.cache, eager)


def test_compiled_step_captured() -> None:
    """torch.compile over the operators, its result in a CUDA graph."""
    torch.manual_seed(seeds.SEED)
    torch._dynamo.reset()
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    ours, eager = ops_on(f, (16, 64), "captured"), started(torch, f, (16, 64), "eager")
    appended, decoded = ours.append_arguments(), ours.decode_arguments()

    def step(k: Any, v: Any, counts: Any, q: Any) -> tuple[Any, Any]:
        torch_ops.append(k * 2, v, **appended, num_tokens=counts)
        out, lse = torch_ops.decode(q, **decoded)
        return out + 1, lse

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = (inputs.k, inputs.v, inputs.counts, inputs.q)
    for _ in range(3):
        run(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(*arguments)
    for number in range(150):
        inputs.fill(torch)
        graph.replay()
        eager.append(inputs.k * 2, inputs.v, num_tokens=inputs.counts)
        expected, expected_lse = eager.decode(inputs.q, return_softmax_lse=True)
        assert torch.equal(out, expected + 1), f"seed {seeds.SEED}: out of step {number}"
        assert torch.equal(lse, expected_lse), f"seed {seeds.SEED}: lse of step {number}"
    torch_ops.check(ours.scratch.error_word)
    assert_same_tokens(ours.cache, eager)


@pytest.mark.parametrize("name", ["append", "decode", "decode_into", "pack"])
def test_opcheck(name: str) -> None:
    f = FORMATS[0]
    ours = ops_on(f, (16, 64), "checked")
    inputs = Inputs.empty(torch, f, "float16", 128 if name == "pack" else 3, 1)
    inputs.fill(torch)
    q, out = inputs.q, torch.zeros_like(inputs.q)
    arguments: tuple[Any, ...] = (inputs.k, inputs.v)
    named = {**ours.append_arguments(), "num_tokens": inputs.counts}
    if name == "pack":
        tensors = torch_ops.tensors_of(ours.cache)
        table = tensors["block_table"][:, :1].contiguous()
        named = {**tensors, "block_table": table, "error_word": ours.scratch.error_word}
        named = {key: named[key] for key in ("pool", "block_table", "error_word")}
        named["format"] = str(f)
    elif name == "decode":
        arguments, named = (q,), ours.decode_arguments()
    elif name == "decode_into":
        lse = torch.zeros(q.shape[0], q.shape[2], 1, device="cuda")
        arguments, named = (q, out, lse), ours.decode_arguments()
    opcheck(getattr(torch_ops, name), arguments, named)
    torch_ops.check(ours.scratch.error_word)


def test_calls_run_on_the_current_stream() -> None:
    """Work that waits behind a long copy on a side stream sees what that stream wrote before."""
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    ours = ops_on(f, (16, 64), "side stream")
    inputs.fill(torch)
    expected = ours.cache.decode(inputs.q)
    late, big = torch.zeros_like(inputs.q), torch.zeros(2**28, device="cuda")
    torch_ops.decode(late, **ours.decode_arguments())  # loads the kernel
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            big.add_(1)
        late.copy_(inputs.q)
        out, _ = torch_ops.decode(late, **ours.decode_arguments())
        own = ours.cache.decode(late)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert torch.equal(own, expected)


def test_what_only_the_device_finds() -> None:
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    ours = ops_on(f, (16, 64), "bad")
    slot = int(ours.cache.slots[2])
    ours.cache.slots[2] = 1000
    out, lse = torch_ops.decode(inputs.q, **ours.decode_arguments())
    assert out.isnan().flatten(1).all(1).tolist() == [False, False, True, False]
    assert lse.shape == (len(START), H * GROUP, 1)
    ours.cache.slots[2] = slot
    with pytest.raises(ValueError, match=r"slots\[2\] = 1000; allowed: 0 to"):
        torch_ops.check(ours.scratch.error_word)
    torch_ops.check(ours.scratch.error_word)


def test_scratch_that_does_not_fit() -> None:
    f = FORMATS[0]
    inputs = Inputs.empty(torch, f, "float16", 1, 1)
    ours = ops_on(f, (16, 64), "small")
    small = torch.zeros(100, dtype=torch.uint8, device="cuda")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"workspace": small}, r"workspace: shape = \(100,\); allowed: \(n,\), n at least \d+"),
        ({"workspace": small.cpu()}, "workspace: "),
        ({"error_word": None}, "error_word = NoneType; allowed: "),
    ]
    for changed, words in bad:
        with pytest.raises((TypeError, ValueError), match=words):
            torch_ops.decode(inputs.q, **ours.decode_arguments() | changed)
    state = ours.append_arguments() | {"counters": torch.zeros(1, dtype=torch.int32, device="cuda")}
    before = {name: getattr(ours.cache, name).clone() for name in ARRAYS}
    with pytest.raises(ValueError, match=r"counters: shape = \(1,\); allowed: \(n,\), n at least"):
        torch_ops.append(inputs.k, inputs.v, **state)
    for name, array in before.items():
        assert torch.equal(getattr(ours.cache, name).view(torch.uint8), array.view(torch.uint8))
