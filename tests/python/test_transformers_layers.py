# SPDX-License-Identifier: Apache-2.0
"""LowBitCache with a format per layer and with sliding-window layers, against transformers."""

from __future__ import annotations

from types import SimpleNamespace
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

from bitdecoding import KvFormat  # noqa: E402
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


@pytest.mark.parametrize("first", [20, 120])
def test_fill_behind_tokens_of_its_own(gemma: Any, first: int) -> None:
    """Windows count the columns from before: a mask begins where a layer's keys do."""
    ids = tokens(1, 160)
    cache, whole = (
        LowBitCache(gemma.config, keep_last=EVERYTHING),
        LowBitCache(gemma.config, "16-bit"),
    )
    forward(gemma, ids[:, :first], cache)
    forward(gemma, ids[:, :150], whole)
    later = 150 - first

    def newest(layer: Any) -> SimpleNamespace:
        keys, values = (x[:, :, -later:] for x in (layer.keys, layer.values))
        return SimpleNamespace(keys=keys, values=values, get_seq_length=lambda: later)

    cache.fill(SimpleNamespace(layers=list(map(newest, whole.layers))))
    assert [layer.get_seq_length() for layer in cache.layers] == [150] * 3
    found, expected = (forward(gemma, ids[:, 150:], filled) for filled in (cache, whole))
    assert (found - expected).abs().max() < FP16 * expected.std()


@pytest.mark.parametrize("layers", [slice(0), slice(2)])
def test_fill_from_what_holds_nothing(gemma: Any, layers: slice) -> None:
    past, cache = (LowBitCache(gemma.config, "16-bit") for _ in range(2))
    with pytest.raises(ValueError, match="past: layer 0, WindowLayer, has no keys"):
        cache.fill(past)
    forward(gemma, tokens(1, 9), past)
    past.layers = past.layers[layers]
    with pytest.raises(ValueError, match=r"past: \d layers; allowed: 3"):
        cache.fill(past)
    assert cache.get_seq_length() == 0


def test_no_step_follows_one_that_failed_halfway(gemma: Any) -> None:
    """The window layer has taken the tokens that the packed one behind it refuses."""
    cache = LowBitCache(gemma.config, "int4", max_tokens=110)
    forward(gemma, tokens(1, 100), cache)
    with pytest.raises(ValueError, match="tokens of a row = 120; allowed: at most 110"):
        forward(gemma, tokens(1, 20), cache)
    with pytest.raises(ValueError, match=r"tokens of the layers = \[100, 120\].*reset"):
        forward(gemma, tokens(1, 5), cache)
    cache.reset()
    forward(gemma, tokens(1, 5), cache)


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


@pytest.mark.parametrize("format", [INT2, f"{INT2}_kr128_vr64", "k4v2_b32_v32_p64_d128_kr64"])
def test_means_stay_while_a_cache_grows(format: str) -> None:
    model, ids = make_model((8, 2, 128)), tokens(2, 500)
    means = list(3 * torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(2)))
    cache = LowBitCache(model.config, format, k_means=means, keep_last=EVERYTHING)
    found = [forward(model, part, cache) for part in ids.split([10, 50, 1, 439], 1)]
    model.set_attn_implementation("sdpa")
    expected = forward(model, ids, None)
    assert (torch.cat(found, 1) - expected).abs().max() < FP16 * expected.std()


@pytest.mark.parametrize(
    ("mean", "error", "message"),
    [
        ([0.0] * 128, TypeError, r"k_means of layer 1 = list; allowed: .* = \(1, 128\)"),
        (torch.zeros(4, 128), ValueError, r"layer 1: shape \(4, 128\); allowed: .* = \(1, 128\)"),
        (torch.full((1, 128), 7e4), ValueError, "layer 1: largest magnitude 70000.0; allowed"),
        (torch.full((1, 128), torch.nan), ValueError, "layer 1: largest magnitude nan; allowed"),
    ],
)
def test_means_are_checked_at_once(
    gemma: Any, mean: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LowBitCache(gemma.config, k_means=[None, mean, None])


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
