# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and how the tests of LowBitCache run them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from bitdecoding.transformers import ATTENTION

SHAPES = [(9, 3, 64), (8, 2, 128)]  # query heads, KV heads, head_dim
EVERYTHING = 1 << 10  # keep_last: the whole text stays in 16 bit
FLIPS = 0.02  # of the logits' deviation: sums in another order can flip a code at a rounding tie


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
