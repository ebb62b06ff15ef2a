# SPDX-License-Identifier: Apache-2.0
"""What is found or changed in a transformers model before it reads: rotations and means of K,
folded rotations of V.

    from bitdecoding.calibration import choose_key_rotations, fold_value_rotation, key_means

    cache = LowBitCache(model.config, choose_key_rotations(model, ids, "int2"))
    cache = LowBitCache(model.config, "hadamard-4", k_means=key_means(model, ids))
    fold_value_rotation(model, 64)  # its V is turned: decode need not turn back

A fold goes with a format whose v_rotation is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from bitdecoding import KvFormat
from bitdecoding.cache_layers import LowBitLayer, NewTokens, SixteenBitLayer
from bitdecoding.recipes import FULL_ATTENTION, WHOLE, fields_of, resolve_format
from bitdecoding.transformers import ATTENTION, SIXTEEN_BIT, LowBitCache, head_dim_of, layer_kinds

import torch  # isort: skip  # after the line above, which says what to install
from transformers.cache_utils import DynamicCache  # isort: skip

FIRST_TOKENS = 16  # left out of means: they stay in 16 bit, and models make them unlike all others
ROTATIONS = (16, 64, 128)
COMPARED_TOKENS = 128  # the last ones of a text, whose attention is compared
# What may lie between the projections and the scores without seeing single channels of V.
_HARMLESS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}

__all__ = ["choose_key_rotations", "fold_value_rotation", "key_means"]


class ProbedLayer(SixteenBitLayer):
    """A 16-bit layer that compares what others, packed ones, make of the same step."""

    def __init__(self, probes: Sequence[LowBitLayer | SixteenBitLayer], dense: int) -> None:
        super().__init__()
        self.probes, self.dense = probes, dense  # tokens of the first step, which isn't compared
        self.error = torch.zeros(len(probes), dtype=torch.float64)  # summed squares
        self.signal = torch.zeros((), dtype=torch.float64)

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        out = super().attend(module, query, new, mask, scale)
        tokens, found = query.shape[2], []
        keys, values = new.keys[:, :, -tokens:], new.values[:, :, -tokens:]
        for probe in self.probes:
            theirs, _ = probe.update(keys, values)
            found.append(probe.attend(module, query, theirs, mask, scale))
        if new.keys.shape[2] > self.dense:
            self.compare(out, found)
        return out

    def compare(self, out: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        for index, theirs in enumerate(found):
            self.error[index] += (theirs - out).double().square().sum().cpu()
        self.signal += out.double().square().sum().cpu()

    def relative(self) -> list[float]:
        """Of every probe: the error's norm over that of the output."""
        return [float(x) for x in (self.error / self.signal).sqrt()]


def choose_key_rotations(
    model: Any, ids: torch.Tensor, format: KvFormat | str
) -> list[KvFormat | None]:
    """Per layer the format with a rotation of K over the whole head or without, as ``LowBitCache``
    takes them: whichever comes closer to the attention of 16 bits on a text.

    A rotation spreads the large channels of K over all others. Where none is far larger than the
    rest it halves the error of two bits, where some are (Gemma 3) it multiplies it
    (docs/accuracy.md).

    model   a causal model of transformers that LowBitCache serves
    ids     (B, S) token ids without padding; the last 128 tokens of a row are compared, and a page
            of the format and 64 tokens, or more, lie before them. About a thousand do
    format  a name or a KvFormat, as resolve_format takes it; its own k_rotation doesn't count

    Returns None for layers with a sliding window. Raises ValueError for ids of another shape,
    NotImplementedError as LowBitCache.
    """
    text = model.config.get_text_config(decoder=True)
    kinds, dim = layer_kinds(text), head_dim_of(text)
    given = fields_of(resolve_format(format, dim))
    candidates = [
        KvFormat(**given | {"k_rotation": channels}, head_dim=dim)
        for channels in (0, min(dim, WHOLE))
    ]
    least = candidates[0].page_tokens + 64 + COMPARED_TOKENS
    if ids.ndim != 2 or ids.shape[1] < least:
        raise ValueError(f"ids = {tuple(ids.shape)}; allowed: (rows, tokens), {least} or more")
    dense = ids.shape[1] - COMPARED_TOKENS
    probes = [LowBitCache(text, one, max_tokens=ids.shape[1]) for one in candidates]
    cache = LowBitCache(text, SIXTEEN_BIT)
    for index, kind in enumerate(kinds):
        if kind == FULL_ATTENTION:
            cache.layers[index] = ProbedLayer([p.layers[index] for p in probes], dense)
    before = text._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        with torch.no_grad():
            for block in ids.to(model.device).split([dense, COMPARED_TOKENS], dim=1):
                model.base_model(block, past_key_values=cache, use_cache=True)
    finally:
        model.set_attn_implementation(before)
    return [_better(layer, candidates) for layer in cache.layers]


def _better(layer: Any, candidates: Sequence[KvFormat]) -> KvFormat | None:
    if not isinstance(layer, ProbedLayer):
        return None
    errors = layer.relative()
    return candidates[errors.index(min(errors))]


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
