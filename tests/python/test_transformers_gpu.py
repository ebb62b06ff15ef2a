# SPDX-License-Identifier: Apache-2.0
"""LowBitCache on CUDA: the CPU's logits on a tiny random Llama, and nothing hidden beside pages."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cuda_kernels import DEVICES  # noqa: E402
from tiny_models import (  # noqa: E402
    FLIPS,
    SHAPES,
    forward,
    generate,
    left_padded,
    make_model,
    tokens,
)

from bitdecoding.cache_layers import NewTokens, SixteenBitLayer, _sdpa  # noqa: E402
from bitdecoding.transformers import LowBitCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS = 150  # over a page boundary of every row
SETTINGS: dict[str, Any] = {"keep_first": 4, "keep_last": 16, "max_tokens": 400}


def forced(model: Any, ids: Any, mask: Any, more: Any, cache: Any) -> Any:
    """Logits (B, 1 + steps, V) on the CPU where the next tokens are `more`, not the model's own."""
    device = next(model.parameters()).device
    ids, mask, more = (x.to(device) for x in (ids, mask, more))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = [forward(model, ids, cache, attention_mask=mask, position_ids=positions)[:, -1:]]
    for i in range(more.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        last = mask.sum(1, keepdim=True) - 1
        token = more[:, i : i + 1]
        logits.append(forward(model, token, cache, attention_mask=mask, position_ids=last))
    return torch.cat(logits, 1).float().cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["int4", "k4v2", "int2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_left_padded_batch_equals_the_cpus(
    shape: tuple[int, int, int], recipe: str, device: str
) -> None:
    ids, mask = left_padded([tokens(1, count, seed=count)[0] for count in (230, 90, 128, 1)])
    more = tokens(4, STEPS, seed=7)
    model = make_model(shape)
    expected = forced(model, ids, mask, more, LowBitCache(model.config, recipe, **SETTINGS))
    cache = LowBitCache(model.config, recipe, **SETTINGS)
    found = forced(model.to(device), ids, mask, more, cache)
    assert (found - expected).abs().max() < 2 * FLIPS * expected.std()
    difference = (found - expected).pow(2).mean().sqrt()
    print(f"{shape} {recipe}: {difference / expected.std():.2e} of the logits' deviation")
    assert difference < 0.25 * FLIPS * expected.std()
    assert all(layer.cache.packed.tolist() == [256, 128, 256, 128] for layer in cache.layers)
    if device == "cuda":
        assert all(layer.cache.pool.is_cuda for layer in cache.layers)


@pytest.mark.parametrize("device", DEVICES)
def test_a_corrupted_page_byte_changes_the_logits(device: str) -> None:
    model = make_model().to(device)
    ids = tokens(1, 400).to(device)
    for layer in (0, 1):
        for byte in (512, 4096 + 512):  # codes of K, of V
            intact, broken = (LowBitCache(model.config, "int4", max_tokens=512) for _ in range(2))
            forward(model, ids, intact)
            forward(model, ids, broken)
            broken.layers[layer].cache.pool[1, 0, byte] ^= 0x77  # second page, first KV head
            step = ids[:, :1]
            assert not torch.equal(forward(model, step, intact), forward(model, step, broken))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_in_16_bit(dtype: Any) -> None:
    """Rows of a left-padded batch equal the same prompts alone, over growth and pages."""
    model = make_model(dtype=dtype).cuda()
    rows = [tokens(1, count, seed=count)[0].cuda() for count in (230, 90)]
    ids, mask = left_padded(rows)
    batch, logits = generate(model, ids, LowBitCache(model.config, "int4"), 80, mask=mask.cuda())
    assert logits.isfinite().all()
    assert batch.shape == (2, 230 + 80)
    for b, row in enumerate(rows):
        cache = LowBitCache(model.config, "int4")
        _, alone = generate(model, row[None], cache, 1)
        assert (logits[0, b] - alone[0, 0]).abs().max() < 0.15 * alone.float().std()
        cache.check()


@pytest.mark.gpu
def test_a_second_prompt_and_reuse() -> None:
    model = make_model().cuda()
    first, second = tokens(2, 330).cuda(), tokens(2, 40, seed=5).cuda()
    together, single = (LowBitCache(model.config, "int2", max_tokens=512) for _ in range(2))
    forward(model, first, together)
    forward(model, first, single)
    found = forward(model, second, together)
    expected = torch.cat([forward(model, second[:, i : i + 1], single) for i in range(40)], 1)
    assert (found - expected).abs().max() < FLIPS * expected.std()
    together.reset()
    forward(model, first, together)
    again = forward(model, second, together)
    assert (again - found).abs().max() < FLIPS * expected.std()
    together.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 66, 129])
def test_attention_of_16_bit_layers_beside_a_window(rows: int, device: str) -> None:
    """One KV head, as Gemma 3 270m has it. For 65 rows torch 2.11's own sharing of heads gave a
    wrong last row on CUDA."""
    generator = torch.Generator().manual_seed(rows)
    columns = 511 + rows
    query = torch.randn(10, rows, 4, 256, generator=generator).transpose(1, 2).to(device)
    keys, values = torch.randn(2, 10, 1, columns, 256, generator=generator).to(device)
    row = torch.arange(columns - rows, columns, device=device)[:, None]
    column = torch.arange(columns, device=device)
    mask = ((column <= row) & (column > row - 512)).expand(10, 1, rows, columns)
    found = _sdpa(query, NewTokens(SixteenBitLayer(), keys, values), mask, 1.0)
    scores = (query.double() @ keys.double().transpose(2, 3)).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ values.double()).transpose(1, 2)
    assert (found - expected).abs().max() < 1e-4
