# SPDX-License-Identifier: Apache-2.0
"""LowBitCache with a format per layer and with sliding-window layers, against transformers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    EVERYTHING,
    FLIPS,
    forward,
    generate,
    generate_16bit,
    left_padded,
    make_model,
    tokens,
)  # fmt: skip

from bitdecoding import KvFormat, PagedKvCache  # noqa: E402
from bitdecoding.cache_layers import LowBitLayer, SixteenBitLayer, WindowLayer  # noqa: E402
from bitdecoding.recipes import RECIPES  # noqa: E402
from bitdecoding.transformers import ATTENTION, LowBitCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WINDOW = 48
FP16 = 1e-2  # of the deviation: what rounding keys and values does to the farthest logit
INT2 = "k2v2_c32_v32_p128_d128"


def make_gemma() -> Any:
    """Two layers of three have a window, as in Gemma 3; K and Q are normalised."""
    torch.manual_seed(1)
    config = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=2048,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.05,
        query_pre_attn_scalar=64,  # attention that prefers some tokens over others
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation(ATTENTION)
    return model


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_gemma() if request.param == "gemma" else make_model((8, 2, 128))


@pytest.fixture(scope="module")
def gemma() -> Any:
    return make_gemma()


@pytest.mark.parametrize("format", ["16-bit", "int2"])
@pytest.mark.parametrize("rows", [[150, 150], [150, 40], [30, 7]])
def test_16_bit_equals_transformers(model: Any, format: str, rows: list[int]) -> None:
    """Both the layers of transformers' own and ours with everything in its 16-bit zone; prompts
    longer and shorter than a window, padded and not."""
    ids, mask = left_padded([tokens(1, count, seed=count)[0] for count in rows])
    sequences, logits = generate_16bit(model, ids, 40, mask=mask)
    cache = LowBitCache(model.config, format, keep_last=EVERYTHING)
    ours, our_logits = generate(model, ids, cache, 40, mask=mask)
    assert torch.equal(ours, sequences)
    assert (our_logits - logits).abs().max() < FP16 * logits.std()


@pytest.mark.parametrize("format", ["16-bit", "int2"])
def test_a_second_prompt_equals_transformers(model: Any, format: str) -> None:
    ids = tokens(2, 137)
    cache = LowBitCache(model.config, format, keep_last=EVERYTHING)
    found = [forward(model, part, cache) for part in ids.split([100, 30, 7], 1)]
    model.set_attn_implementation("sdpa")
    expected = forward(model, ids, None)
    model.set_attn_implementation(ATTENTION)
    assert (torch.cat(found, 1) - expected).abs().max() < FP16 * expected.std()


def test_left_padded_windows_equal_each_prompt_alone(gemma: Any) -> None:
    rows = [tokens(1, count, seed=count)[0] for count in (230, 90, 1)]
    ids, mask = left_padded(rows)
    settings: dict[str, Any] = {"keep_first": 4, "keep_last": 16, "max_tokens": 400}
    batch, logits = generate(gemma, ids, LowBitCache(gemma.config, **settings), 150, mask=mask)
    for b, row in enumerate(rows):
        alone, alone_logits = generate(gemma, row[None], LowBitCache(gemma.config, **settings), 150)
        assert torch.equal(batch[b, ids.shape[1] :], alone[0, len(row) :])
        assert (logits[:, b] - alone_logits[:, 0]).abs().max() < FLIPS * logits.std()


def test_only_full_layers_are_packed(gemma: Any) -> None:
    cache = LowBitCache(gemma.config, INT2)
    assert [type(layer) for layer in cache.layers] == [WindowLayer, LowBitLayer, WindowLayer]
    assert cache.formats == [None, KvFormat.parse(INT2), None]
    assert cache.is_sliding == [True, False, True]
    forward(gemma, tokens(2, 300), cache)
    assert cache.get_seq_length() == 300
    assert cache.layers[0].keys.dtype == torch.float16  # of a float32 model
    window = 2 * 2 * 128 * (WINDOW - 1) * 2  # K and V, rows, head_dim, tokens, bytes
    assert cache.layers[0].nbytes == window
    assert cache.nbytes == cache.layers[1].cache.nbytes + 2 * window
    cache.check()


def test_a_format_per_layer() -> None:
    model = make_model((8, 2, 128))
    formats: list[Any] = ["int4", None]
    errors = []
    ids = tokens(2, 600)
    expected = forward(model, ids, LowBitCache(model.config, "16-bit"))[:, 500:]
    for given in (["int2", "int2"], formats, ["16-bit", None]):
        cache = LowBitCache(model.config, given)
        forward(model, ids[:, :500], cache)
        found = forward(model, ids[:, 500:], cache)
        errors.append(float((found - expected).pow(2).mean().sqrt() / expected.std()))
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] < 1e-3  # a later prompt reads fp16
    mixed = LowBitCache(model.config, formats)
    assert [type(layer) for layer in mixed.layers] == [LowBitLayer, SixteenBitLayer]


def test_a_recipe_with_edges() -> None:
    config = make_model().config
    config.num_hidden_layers, config.layer_types = 4, None
    cache = LowBitCache(config, "kivi-2-edges")
    format = RECIPES["kivi-2-edges"].format(64)
    assert cache.formats == [None, format, format, None]
    with pytest.raises(ValueError, match="of 2 full-attention layers it leaves all in 16 bit"):
        LowBitCache(make_model().config, "kivi-2-edges")
    with pytest.raises(ValueError, match="format = 'kivi-2-edges': it leaves the first and last"):
        LowBitCache(config, ["kivi-2-edges"] * 4)


def test_fill_and_reset(gemma: Any) -> None:
    ids = tokens(2, 300)
    past = LowBitCache(gemma.config, "16-bit")
    forward(gemma, ids[:, :260], past)
    filled, prompted = (LowBitCache(gemma.config, "int4") for _ in range(2))
    filled.fill(past)
    forward(gemma, ids[:, :260], prompted)
    logits = [forward(gemma, ids[:, 260:], cache) for cache in (filled, prompted)]
    assert (logits[0] - logits[1]).abs().max() < FLIPS * logits[1].std()
    filled.reset()
    forward(gemma, ids[:1, :260], filled)  # another batch
    again = forward(gemma, ids[:1, 260:], filled)
    assert (again - logits[1][:1]).abs().max() < FLIPS * logits[1].std()


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (["int4"], "formats = 1; the model has 3 layers"),
        (["int4", "int4", None], "layer 0 = int4; allowed: '16-bit'"),
        ([None, "int5", None], "int5"),
        ([None, "k4v4_c64_v64_p64_d64", None], "head_dim"),
    ],
)
def test_formats_that_do_not_fit_the_layers(gemma: Any, format: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowBitCache(gemma.config, format)


@pytest.mark.skipif(
    "k_mean" not in inspect.signature(PagedKvCache).parameters, reason="no means of K in this build"
)
def test_means_of_k_change_nothing_but_rounding() -> None:
    model, ids = make_model((8, 2, 128)), tokens(2, 300)
    means = [torch.full((2, 128), 0.25), None]
    plain, centred = (
        LowBitCache(model.config, "int4", k_means=given, keep_last=EVERYTHING)
        for given in (None, means)
    )
    logits = []
    for cache in (plain, centred):
        forward(model, ids[:, :260], cache)
        logits.append(forward(model, ids[:, 260:], cache))
    assert (logits[0] - logits[1]).abs().max() < FP16 * logits[0].std()
    assert not torch.equal(
        torch.as_tensor(plain.layers[0].cache.side), torch.as_tensor(centred.layers[0].cache.side)
    )


def test_as_many_means_as_layers(gemma: Any) -> None:
    with pytest.raises(ValueError, match="k_means = 1; the model has 3 layers"):
        LowBitCache(gemma.config, k_means=[None])


@pytest.mark.parametrize("call", [lambda c: c.crop(-1), lambda c: c.layers[0].offload()])
def test_no_layer_does_what_others_refuse(gemma: Any, call: Any) -> None:
    cache = LowBitCache(gemma.config, "16-bit")
    forward(gemma, tokens(1, 4), cache)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="LowBitCache"):
        call(cache)


def test_models_of_windows_alone_are_refused() -> None:
    config = make_gemma().config
    config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(NotImplementedError, match="sliding_window = 48"):
        LowBitCache(config)
