# SPDX-License-Identifier: Apache-2.0
"""What is found or changed in a transformers model before it reads: means of K, folded rotations.

    from bitdecoding.calibration import fold_value_rotation, key_means

    fold_value_rotation(model, 64)  # its V is turned: decode need not turn back
    cache = LowBitCache(model.config, "hadamard-4", k_means=key_means(model, ids))

A fold goes with a format whose v_rotation is 0.
"""

from __future__ import annotations

from typing import Any, NoReturn

from bitdecoding.recipes import FULL_ATTENTION
from bitdecoding.transformers import ATTENTION, SIXTEEN_BIT, LowBitCache, layer_kinds

import torch  # isort: skip  # after the line above, which says what to install
from transformers.cache_utils import DynamicCache  # isort: skip

FIRST_TOKENS = 16  # left out of means: they stay in 16 bit, and models make them unlike all others
ROTATIONS = (16, 64, 128)
# What may lie between the projections and the scores without seeing single channels of V.
_HARMLESS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}

__all__ = ["fold_value_rotation", "key_means"]


def key_means(model: Any, ids: torch.Tensor) -> list[torch.Tensor | None]:
    """The mean of K per layer, over the tokens of a text, for ``LowBitCache(k_means=...)``.

    model   a causal model of transformers that LowBitCache serves
    ids     (B, S) token ids without padding; S > 16: a row's first 16 tokens don't count

    Returns per layer (Hkv, D) fp16, on the layer's device: of K as a cache gets it, after the
    rotary embedding and the norm of K; None where a layer has a sliding window. A few thousand
    tokens of any text do: what matters is the constant offset of a channel.
    Raises ValueError for ids of another shape, NotImplementedError as LowBitCache.
    """
    if ids.ndim != 2 or ids.shape[1] <= FIRST_TOKENS:
        raise ValueError(
            f"ids = {tuple(ids.shape)}; allowed: (rows, tokens), more than {FIRST_TOKENS} tokens"
        )
    text = model.config.get_text_config(decoder=True)
    kinds = layer_kinds(text)
    packs = text._attn_implementation == ATTENTION  # which reads no other cache
    past = LowBitCache(text, SIXTEEN_BIT) if packs else DynamicCache(config=text)
    with torch.no_grad():
        model.base_model(ids.to(model.device), past_key_values=past, use_cache=True)
    means: list[torch.Tensor | None] = []
    for kind, layer in zip(kinds, past.layers, strict=True):
        full = kind == FULL_ATTENTION
        means.append(_mean(layer.keys[:, :, FIRST_TOKENS:]) if full else None)
    return means


def _mean(keys: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, S, D) -> (Hkv, D) fp16."""
    return keys.double().mean(dim=(0, 2)).half()


def fold_value_rotation(model: Any, block: int) -> None:
    """Turns V in the weights of a model, in place, so that no cache has to.

    Rows of v_proj (and its bias) and columns of o_proj of every full-attention layer are multiplied
    by the Walsh-Hadamard transform of ``block`` channels of a head, in float64, and rounded to
    their dtype. The model computes what it did before; its V is as a cache with v_rotation = block
    would hold it, so that a format with v_rotation = 0 keeps it as well, and decode need not turn
    its output back. Calling it again undoes it, up to rounding.

    block   16, 64 or 128, at most head_dim

    Raises ValueError for another block; NotImplementedError naming the layer where v_proj and
    o_proj are no plain Linear layers of whole heads, or where something else than attention lies
    between them, a norm of V say. Then nothing has been changed.
    """
    text = model.config.get_text_config(decoder=True)
    layers = model.get_decoder().layers
    found = [
        _projections(index, layer, text, block)
        for index, (kind, layer) in enumerate(zip(layer_kinds(text), layers, strict=True))
        if kind == FULL_ATTENTION
    ]
    with torch.no_grad():
        for v_proj, o_proj in found:
            v_proj.weight.copy_(_turned(v_proj.weight.T, block).T)
            if v_proj.bias is not None:
                v_proj.bias.copy_(_turned(v_proj.bias, block))
            o_proj.weight.copy_(_turned(o_proj.weight, block))


def _projections(
    index: int, layer: Any, text: Any, block: int
) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """v_proj and o_proj of a layer. Raises where a rotation of V doesn't pass between them."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        _refuse(index, "has no self_attn")
    head_dim = attention.head_dim
    if block not in ROTATIONS or block > head_dim:
        allowed = ", ".join(map(str, ROTATIONS))
        raise ValueError(f"block = {block}; allowed: {allowed}, at most head_dim ({head_dim})")
    if getattr(text, "clip_qkv", None) is not None:
        _refuse(index, f"clips V (clip_qkv = {text.clip_qkv})")
    children = dict(attention.named_children())
    if others := sorted(set(children) - _HARMLESS):
        _refuse(index, f"has {', '.join(others)} in its attention")
    queries = text.num_attention_heads * head_dim
    sizes = {
        "q_proj": ("out_features", queries),  # twice as many: the other half gates the output
        "v_proj": ("out_features", text.num_key_value_heads * head_dim),
        "o_proj": ("in_features", queries),
    }
    for name, (side, size) in sizes.items():
        child = children.get(name)
        if type(child) is not torch.nn.Linear:
            _refuse(index, f"has {type(child).__name__} as {name}, not Linear")
        if (own := getattr(child, side)) != size:
            _refuse(index, f"has {name}.{side} = {own}, not {size}")
    return children["v_proj"], children["o_proj"]


def _refuse(index: int, what: str) -> NoReturn:
    raise NotImplementedError(f"layer {index} {what}: its V cannot be turned in the weights")


def _turned(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (..., channels) float64, every ``block`` channels transformed; orthogonal, symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    y = x.double().unflatten(-1, (-1, block)) @ (matrix * block**-0.5)
    return y.flatten(-2)
