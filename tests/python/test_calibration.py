# SPDX-License-Identifier: Apache-2.0
"""Means of K against a cache of transformers; V's rotation in the weights against V's rotation in
the cache."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_transformers_layers import make_gemma  # noqa: E402
from tiny_models import forward, make_model, tokens  # noqa: E402

from bitdecoding import KvFormat  # noqa: E402
from bitdecoding.calibration import (  # noqa: E402
    choose_key_rotations,
    fold_value_rotation,
    key_means,
)
from bitdecoding.transformers import ATTENTION, LowBitCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FLOAT32 = 1e-4  # of the deviation: what rounding weights and sums to float32 does to a logit
PACKED, TEXT = 260, 300  # tokens before and after a later prompt


def biased() -> Any:
    """A Llama whose projections have biases; V's are not zero."""
    torch.manual_seed(1)
    config = make_model((8, 2, 128)).config
    config.attention_bias = True
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.v_proj.bias, std=0.1)
    model.set_attn_implementation(ATTENTION)
    return model


MODELS = {"llama": make_model, "gemma": make_gemma, "biased": biased}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def dense(model: Any, ids: Any, past: Any = None) -> Any:
    """Logits (B, S, V) through a cache of transformers, in float32."""
    model.set_attn_implementation("sdpa")
    past = past or transformers.DynamicCache(config=model.config)
    logits = forward(model, ids, past)
    model.set_attn_implementation(ATTENTION)
    return logits


def later(model: Any, format: str) -> Any:
    """Logits of a prompt that reads a packed past; PACKED - 64 tokens of it are one page."""
    ids, cache = tokens(2, TEXT), LowBitCache(model.config, format)
    forward(model, ids[:, :PACKED], cache)
    return forward(model, ids[:, PACKED:], cache)


@pytest.mark.parametrize("implementation", [ATTENTION, "sdpa"])
def test_key_means_are_those_of_a_cache(model: Any, implementation: str) -> None:
    ids, past = tokens(2, 80), transformers.DynamicCache(config=model.config)
    dense(model, ids, past)
    model.set_attn_implementation(implementation)
    means = key_means(model, ids)
    assert len(means) == len(past.layers)
    assert model.config._attn_implementation == implementation
    for mean, layer in zip(means, past.layers, strict=True):
        if layer.is_sliding:
            assert mean is None
            continue
        assert mean is not None
        expected = layer.keys[:, :, 16:].mean(dim=(0, 2))
        assert mean.shape == expected.shape
        assert mean.dtype == torch.float16
        # K and its mean are rounded to 11 bits; errors of K's single values average out
        assert (mean.float() - expected).abs().max() < 2**-10 * layer.keys.abs().max()


def test_key_means_are_what_a_cache_takes() -> None:
    model = make_model()
    for layer in model.model.layers:  # keys with an offset, which RoPE turns only in part
        layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.full((192,), 2.0))
    ids = tokens(2, TEXT)
    means = key_means(model, tokens(1, 700, seed=5))
    errors = []
    expected = dense(model, ids)[:, PACKED:]
    for given in (None, means):
        cache = LowBitCache(model.config, "hadamard-4", k_means=given)
        forward(model, ids[:, :PACKED], cache)
        found = forward(model, ids[:, PACKED:], cache)
        errors.append(float((found - expected).pow(2).mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("shape", [(80,), (2, 16), (1, 0)])
def test_texts_that_have_no_mean(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"allowed: \(rows, tokens\), more than 16 tokens"):
        key_means(make_model(), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("block", [16, 64])
def test_a_fold_changes_no_prediction_and_undoes_itself(model: Any, block: int) -> None:
    ids = tokens(2, 80)
    before, weights = dense(model, ids), [p.clone() for p in model.parameters()]
    fold_value_rotation(model, block)
    changed = [not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)]
    full = 1 if model.config.model_type.startswith("gemma") else 2
    with_bias = getattr(model.config, "attention_bias", False)
    assert sum(changed) == full * (3 if with_bias else 2)
    assert (dense(model, ids) - before).abs().max() < FLOAT32 * before.std()
    fold_value_rotation(model, block)
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(weights, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("bits", [4, 2])
def test_a_fold_is_what_the_cache_does(model: Any, bits: int) -> None:
    """V arrives turned where the cache would have turned it. There it is rounded to fp16 once more,
    an error of e = 2^-12 of a value at most on average; a code of step s flips with probability
    e / s, which adds e * s to the mean square beside the s^2 / 12 of quantisation. Steps are above
    a seventh of a value (15 steps for a range of several deviations): at most
    (12 * 7 / 2^12)^0.5 = 0.14 of quantisation's own error; later layers flip codes of K too."""
    head_dim = model.config.head_dim
    base = f"k{bits}v{bits}_c32_v32_p128_d{head_dim}"
    exact = dense(model, tokens(2, TEXT))[:, PACKED:]
    turned, plain = later(model, f"{base}_vr64"), later(model, base)
    fold_value_rotation(model, 64)
    folded = later(model, base)
    noise = (turned - exact).pow(2).mean().sqrt()
    assert (folded - turned).pow(2).mean().sqrt() < 0.2 * noise
    assert (plain - turned).pow(2).mean().sqrt() > 0.4 * noise  # a rotation is not nothing


@pytest.mark.parametrize("block", [0, 1, 32, 128, 256])
def test_blocks_that_are_none(block: int) -> None:
    with pytest.raises(ValueError, match=rf"block = {block}; allowed: 16, 64, 128, at most head_"):
        fold_value_rotation(make_model(), block)


def replaced(name: str, module: Any) -> Any:
    model = make_model()
    setattr(model.model.layers[1].self_attn, name, module)
    return model


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("v_proj", torch.nn.Sequential(), "has Sequential as v_proj, not Linear"),
        ("o_proj", torch.nn.Identity(), "has Identity as o_proj, not Linear"),
        ("v_norm", torch.nn.Identity(), "has v_norm in its attention"),
        ("q_proj", torch.nn.Linear(144, 1152), "has q_proj.out_features = 1152, not 576"),
    ],
)
def test_layers_that_cannot_be_folded(name: str, module: Any, message: str) -> None:
    model = replaced(name, module)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=f"layer 1 {message}"):
        fold_value_rotation(model, 64)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_clipped_v_cannot_be_folded() -> None:
    model = make_model()
    model.config.clip_qkv = 8.0
    with pytest.raises(NotImplementedError, match=r"layer 0 clips V \(clip_qkv = 8.0\)"):
        fold_value_rotation(model, 64)


@pytest.mark.parametrize("large", [False, True])
def test_keys_are_rotated_where_no_channel_is_far_larger_than_others(large: bool) -> None:
    """Large channels (in pairs of the rotary embedding) that queries make up for: scores stay what
    they were, but a rotation spreads the errors of such channels to where queries look."""
    model, channels = make_model((4, 2, 64)), [5, 5 + 32, 11, 11 + 32]
    for layer in model.model.layers if large else ():
        layer.self_attn.k_proj.weight.data.view(2, 64, -1)[:, channels] *= 40
        layer.self_attn.q_proj.weight.data.view(4, 64, -1)[:, channels] /= 40
    ids = tokens(2, 512)
    model.set_attn_implementation("sdpa")
    found = choose_key_rotations(model, ids, "int2")
    assert model.config._attn_implementation == "sdpa"
    assert [format.k_rotation for format in found if format] == [0 if large else 64] * 2
    base = KvFormat.recommended(bits=2, head_dim=64)
    assert {str(format).replace("_kr64", "") for format in found} == {str(base)}
    model.set_attn_implementation(ATTENTION)
    forward(model, ids, LowBitCache(model.config, found))


def test_windows_have_no_keys_to_rotate() -> None:
    found = choose_key_rotations(make_gemma(), tokens(1, 400), "kivi-2-g32")
    assert [format is None for format in found] == [True, False, True]


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ids = \(1, 319\); allowed: \(rows, tokens\), 320"):
        choose_key_rotations(make_model(), tokens(1, 319), "int4")
