# SPDX-License-Identifier: Apache-2.0
"""What LowBitCache refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import forward, generate, make_model, tokens  # noqa: E402

from bitdecoding import KvFormat  # noqa: E402
from bitdecoding.transformers import ATTENTION, LowBitCache, low_bit_mask  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.mark.parametrize("format", ["int5", "k4v4_c128_v128_p128_d128", KvFormat(head_dim=128)])
def test_formats_that_do_not_fit(model: Any, format: Any) -> None:
    with pytest.raises(ValueError, match=r"int5|head_dim"):
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
        ("layer_types", ["full_attention", "sliding_attention"], "sliding_window = None"),
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
