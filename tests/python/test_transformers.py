# SPDX-License-Identifier: Apache-2.0
"""LowBitCache under model.generate, on tiny random Llama models, against transformers' cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    EVERYTHING,
    FLIPS,
    SHAPES,
    forward,
    generate,
    generate_16bit,
    left_padded,
    make_model,
    tokens,
)  # fmt: skip

from bitdecoding.transformers import ATTENTION, LowBitCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.mark.parametrize("shape", SHAPES)
def test_all_in_the_16_bit_zone_equals_transformers(shape: tuple[int, int, int]) -> None:
    model, ids = make_model(shape), tokens(2, 150)
    sequences, logits = generate_16bit(model, ids, 40)
    cache = LowBitCache(model.config, "int2", max_tokens=200, keep_last=EVERYTHING)
    ours, our_logits = generate(model, ids, cache, 40)
    assert torch.equal(ours, sequences)
    assert (our_logits - logits).abs().max() < 2e-3 * logits.std()  # fp16 keys and values


@pytest.mark.parametrize(("recipe", "worst"), [("int4", 0.06), ("k4v2", 0.25), ("int2", 0.25)])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_shrinks_with_bits(shape: tuple[int, int, int], recipe: str, worst: float) -> None:
    model, ids = make_model(shape), tokens(2, 600)
    reference = transformers.DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    forward(model, ids[:, :500], reference)
    expected = torch.cat([forward(model, ids[:, i : i + 1], reference) for i in range(500, 520)], 1)
    model.set_attn_implementation(ATTENTION)
    cache = LowBitCache(model.config, recipe, max_tokens=600)
    forward(model, ids[:, :500], cache)
    found = torch.cat([forward(model, ids[:, i : i + 1], cache) for i in range(500, 520)], 1)
    error = (found - expected).pow(2).mean().sqrt() / expected.std()
    assert 1e-4 < error < worst


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models(dtype: Any) -> None:
    model, ids = make_model(dtype=dtype), tokens(1, 200)
    cache = LowBitCache(model.config, "int4", keep_last=EVERYTHING)
    _, logits = generate(model, ids, cache, 1)
    step = forward(model, ids[:, :1], cache)
    assert step.dtype == dtype
    assert step.isfinite().all()
    _, expected = generate_16bit(model, ids, 1)
    assert (logits - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize("recipe", ["int4", "int2"])
def test_left_padded_batch_equals_each_prompt_alone(model: Any, recipe: str) -> None:
    rows = [tokens(1, count, seed=count)[0] for count in (230, 90, 128, 1)]
    ids, mask = left_padded(rows)
    settings: dict[str, Any] = {"keep_first": 4, "keep_last": 16, "max_tokens": 400}
    batch, logits = generate(
        model, ids, LowBitCache(model.config, recipe, **settings), 150, mask=mask
    )
    for b, row in enumerate(rows):
        cache = LowBitCache(model.config, recipe, **settings)
        alone, alone_logits = generate(model, row[None], cache, 150)
        assert torch.equal(batch[b, ids.shape[1] :], alone[0, len(row) :])
        assert (logits[:, b] - alone_logits[:, 0]).abs().max() < FLIPS * logits.std()


def test_padding_enters_no_page(model: Any) -> None:
    row = tokens(1, 300)[0]
    ids, mask = left_padded([row, tokens(1, 340, seed=1)[0]])
    padded = LowBitCache(model.config, "int4", max_tokens=512)
    generate(model, ids, padded, 2, mask=mask)
    alone = LowBitCache(model.config, "int4", max_tokens=512)
    generate(model, row[None], alone, 2)
    assert padded.layers[0].cache.lengths.tolist() == [301, 341]
    ours, theirs = padded.layers[0].cache, alone.layers[0].cache
    assert np.array_equal(ours.pool[: len(theirs.pool)], theirs.pool)
    assert np.array_equal(ours.side[0], theirs.side[0])


@pytest.mark.parametrize("format", ["int4", "k4v4_c128_v64_p128_d64_kr64_vr16"])
def test_second_prompt_in_the_16_bit_zone_equals_transformers(model: Any, format: str) -> None:
    first, second = tokens(2, 100), tokens(2, 37, seed=5)
    cache = LowBitCache(model.config, format, keep_last=EVERYTHING)
    forward(model, first, cache)
    found = forward(model, second, cache)
    model.set_attn_implementation("sdpa")
    expected = forward(model, torch.cat([first, second], 1), None)[:, 100:]
    model.set_attn_implementation(ATTENTION)
    assert (found - expected).abs().max() < 2e-3 * expected.std()


def test_second_prompt_over_pages_equals_token_by_token(model: Any) -> None:
    first, second = tokens(2, 330), tokens(2, 40, seed=5)  # 256 tokens packed before and after
    together, single = (LowBitCache(model.config, "int2", max_tokens=512) for _ in range(2))
    forward(model, first, together)
    forward(model, first, single)
    found = forward(model, second, together)
    expected = torch.cat([forward(model, second[:, i : i + 1], single) for i in range(40)], 1)
    assert (found - expected).abs().max() < 1e-3 * expected.std()
    assert together.layers[0].cache.packed.tolist() == [256, 256]


def test_second_left_padded_prompt_equals_each_alone(model: Any) -> None:
    firsts = [tokens(1, count, seed=count)[0] for count in (200, 131)]
    seconds = [tokens(1, count, seed=count)[0] for count in (7, 60)]
    ids, mask = left_padded(firsts)
    more, more_mask = left_padded(seconds)
    both = torch.cat([mask, more_mask], 1)
    cache = LowBitCache(model.config, "int4", max_tokens=400)
    generate(model, ids, cache, 1, mask=mask)
    batch, logits = generate(model, torch.cat([ids, more], 1), cache, 30, mask=both)
    for b, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        cache = LowBitCache(model.config, "int4", max_tokens=400)
        generate(model, first[None], cache, 1)
        whole = torch.cat([first, second])[None]
        alone, alone_logits = generate(model, whole, cache, 30)
        assert torch.equal(batch[b, both.shape[1] :], alone[0, whole.shape[1] :])
        assert (logits[:, b] - alone_logits[:, 0]).abs().max() < FLIPS * logits.std()


def test_a_corrupted_page_byte_changes_the_logits(model: Any) -> None:
    """There is no hidden 16-bit copy of what is in the pages."""
    ids = tokens(1, 400)
    for layer in (0, 1):
        for kind in ("K", "V"):
            intact, broken = (LowBitCache(model.config, "int4", max_tokens=512) for _ in range(2))
            forward(model, ids, intact)
            forward(model, ids, broken)
            record = broken.layers[layer].cache.pool[1, 0]  # second page, first KV head
            record[512 if kind == "K" else 4096 + 512] ^= 0x77
            step = ids[:, :1]
            assert not torch.equal(forward(model, step, intact), forward(model, step, broken))


def test_chunked_prefill(model: Any) -> None:
    ids = tokens(1, 300)
    _, expected = generate_16bit(model, ids, 5)
    cache = LowBitCache(model.config, "int4", keep_last=EVERYTHING)
    _, logits = generate(model, ids, cache, 5, prefill_chunk_size=64)
    assert (logits - expected).abs().max() < 2e-3 * expected.std()


def test_growing_equals_fixed_size(model: Any) -> None:
    ids = tokens(2, 20)
    growing = LowBitCache(model.config, "int4", keep_last=16)
    fixed = LowBitCache(model.config, "int4", keep_last=16, max_tokens=700)
    sequences, logits = generate(model, ids, growing, 600)
    expected, expected_logits = generate(model, ids, fixed, 600)
    assert torch.equal(sequences, expected)
    assert torch.equal(logits, expected_logits)
    assert growing.layers[0].cache.pool.shape[0] > 8


def test_a_full_cache_says_so(model: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        generate(model, tokens(1, 200), LowBitCache(model.config, "int4", max_tokens=205), 20)


def test_padding_takes_no_room(model: Any) -> None:
    ids = tokens(2, 200)
    mask = (torch.arange(200) >= torch.tensor([[50], [20]])).long()
    generate(model, ids, LowBitCache(model.config, "int4", max_tokens=185), 5, mask=mask)
    with pytest.raises(ValueError, match=r"tokens of a row = 186; .* at most 185 \(max_tokens"):
        generate(model, ids, LowBitCache(model.config, "int4", max_tokens=185), 7, mask=mask)


def test_reset_and_reuse(model: Any) -> None:
    cache = LowBitCache(model.config, "int4", max_tokens=300)
    first, _ = generate(model, tokens(2, 200), cache, 10)
    allocated = cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == 0
    again, _ = generate(model, tokens(2, 200), cache, 10)
    assert torch.equal(first, again)
    assert cache.nbytes == allocated
    cache.reset()
    generate(model, tokens(3, 20), cache, 2)  # another batch
    assert cache.batch_size == 3


def test_fill_from_a_16_bit_cache_equals_the_prompt(model: Any) -> None:
    ids, mask = left_padded([tokens(1, 300)[0], tokens(1, 210)[0]])
    past = transformers.DynamicCache(config=model.config)
    position_ids = mask.cumsum(1) - 1
    model.set_attn_implementation("sdpa")
    forward(model, ids, past, attention_mask=mask, position_ids=position_ids)
    model.set_attn_implementation(ATTENTION)
    filled, prompted = (LowBitCache(model.config, "int4", max_tokens=320) for _ in range(2))
    filled.fill(past, attention_mask=mask)
    forward(model, ids, prompted, attention_mask=mask, position_ids=position_ids)
    assert filled.get_seq_length() == 300
    ours, theirs = filled.layers[0].cache, prompted.layers[0].cache
    assert ours.lengths.tolist() == [300, 210]
    assert np.array_equal(ours.pool, theirs.pool)


def test_facts_that_generate_asks_for(model: Any) -> None:
    cache = LowBitCache(model.config, "k4v2", max_tokens=256)
    assert str(cache.formats[0]) == "k4v2_c128_v32_p128_d64"
    assert (cache.get_seq_length(), cache.get_mask_sizes(5, 0), cache.nbytes) == (0, (5, 0), 0)
    assert (cache.is_compileable, cache.is_croppable, cache.is_sliding) == (
        False,
        False,
        [False] * 2,
    )
    assert cache.get_max_length() == 256
    assert LowBitCache(model.config).get_max_length() == -1
    forward(model, tokens(1, 9), cache)
    assert (cache.get_seq_length(), cache.get_mask_sizes(5, 0)) == (9, (14, 0))
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers) > 0
