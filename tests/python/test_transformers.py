# SPDX-License-Identifier: Apache-2.0
"""LowBitCache under model.generate, on tiny random Llama models, against transformers' cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from bitdecoding import KvFormat  # noqa: E402
from bitdecoding.transformers import ATTENTION, LowBitCache, low_bit_mask  # noqa: E402

SHAPES = [(9, 3, 64), (8, 2, 128)]  # query heads, KV heads, head_dim
FLIPS = 0.02  # of the logits' deviation: sums in another order can flip a code at a rounding tie
EVERYTHING = 1 << 10  # keep_last: the whole text stays in 16 bit


def make_model(shape: tuple[int, int, int] = SHAPES[0], dtype: Any = torch.float32) -> Any:
    heads, kv_heads, head_dim = shape
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16 * heads,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        initializer_range=0.05,  # attention that prefers some tokens over others
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.set_attn_implementation(ATTENTION)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads, far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def tokens(rows: int, count: int, seed: int = 0) -> Any:
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Any, cache: Any, new: int, mask: Any = None, **options: Any) -> Any:
    """(sequences, logits (new, B, V)) of greedy decoding that never stops early."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


def generate_16bit(model: Any, ids: Any, new: int, **options: Any) -> Any:
    model.set_attn_implementation("sdpa")
    try:
        return generate(model, ids, transformers.DynamicCache(config=model.config), new, **options)
    finally:
        model.set_attn_implementation(ATTENTION)


def forward(model: Any, ids: Any, cache: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def left_padded(rows: list[Any]) -> tuple[Any, Any]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()


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
    assert str(cache.format) == "k4v2_c128_v32_p128_d64"
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


@pytest.mark.parametrize("format", ["int3", "k4v4_c128_v128_p128_d128", KvFormat(head_dim=128)])
def test_formats_that_do_not_fit(model: Any, format: Any) -> None:
    with pytest.raises(ValueError, match=r"int3|head_dim"):
        LowBitCache(model.config, format)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens = 0; allowed: 1 to"),
        ({"max_tokens": -5}, ValueError, "max_tokens = -5; allowed: 1 to"),
        ({"max_tokens": 8.0}, TypeError, "max_tokens = 8.0; allowed: an int"),
        ({"keep_first": 999}, ValueError, "keep_first = 999; allowed: 0 to page_tokens"),
        ({"keep_last": 2**29}, ValueError, "keep_last = 536870912; allowed: 0 to"),
        ({"threads": -1}, ValueError, "threads = -1; allowed: 0 to"),
        ({"format": None}, TypeError, "format = None; allowed: a KvFormat"),
    ],
)
def test_settings_are_checked_at_once(
    model: Any, setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LowBitCache(model.config, **setting)


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_implementation_is_an_error(model: Any, other: str) -> None:
    model.set_attn_implementation(other)
    try:
        with pytest.raises(RuntimeError, match="set_attn_implementation"):
            generate(model, tokens(1, 9), LowBitCache(model.config), 2)
    finally:
        model.set_attn_implementation(ATTENTION)


def test_the_attention_without_the_cache_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="LowBitCache"):
        generate(model, tokens(1, 9), None, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_unsupported_generation(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        generate(model, tokens(1, 20), LowBitCache(model.config), 4, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.crop(-1),
        lambda c: c.reorder_cache(torch.tensor([0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0])),
        lambda c: c.offload(0),
    ],
)
def test_unsupported_operations(model: Any, call: Any) -> None:
    cache = LowBitCache(model.config)
    forward(model, tokens(1, 4), cache)
    with pytest.raises(NotImplementedError, match="LowBitCache"):
        call(cache)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("sliding_window", 128, "sliding"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
        ("layer_types", ["full_attention", "linear_attention"], "linear_attention"),
        ("attention_chunk_size", 64, "chunked"),
        ("is_encoder_decoder", True, "cross attention"),
        ("attn_logit_softcapping", 30.0, "soft cap"),
        ("num_kv_shared_layers", 1, "share"),
        ("kv_lora_rank", 64, "latent"),
    ],
)
def test_unsupported_models(attribute: str, value: Any, message: str) -> None:
    config = make_model().config
    setattr(config, attribute, value)
    with pytest.raises(NotImplementedError, match=message):
        LowBitCache(config)


def test_training_and_other_masks(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        low_bit_mask(1, 4, 4, mask_function=lambda *index: True)
    with pytest.raises(NotImplementedError, match="2-D"):
        forward(
            model, tokens(1, 4), LowBitCache(model.config), attention_mask=torch.ones(1, 1, 4, 4)
        )
    model.train()
    try:
        with pytest.raises(NotImplementedError, match="training"):
            forward(model, tokens(1, 4), LowBitCache(model.config))
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 0]], "left padding"),
        ([[1, 0, 1, 1]], "left padding"),
        ([[0, 1, 1]], "shape"),
    ],
)
def test_masks_that_are_not_left_padding(model: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(model, tokens(1, 4), LowBitCache(model.config), attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("later", [None, [[1, 1, 1, 1, 1]], [[1, 0, 1, 1, 1]]])
def test_a_mask_that_contradicts_the_past(model: Any, later: Any) -> None:
    cache = LowBitCache(model.config)
    forward(model, tokens(1, 4), cache, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    mask = None if later is None else torch.tensor(later)
    with pytest.raises(ValueError, match="differs"):
        forward(model, tokens(1, 1), cache, attention_mask=mask)


def test_another_batch_on_a_filled_cache(model: Any) -> None:
    cache = LowBitCache(model.config)
    forward(model, tokens(2, 4), cache)
    with pytest.raises(ValueError, match="batch = 3"):
        forward(model, tokens(3, 4), cache)
