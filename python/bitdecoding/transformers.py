# SPDX-License-Identifier: Apache-2.0
"""Low-bit KV cache for ``model.generate`` of transformers 5: a cache class and its attention.

    from bitdecoding.transformers import LowBitCache        # also registers the attention
    model.set_attn_implementation("bitdecoding")
    model.generate(**inputs, past_key_values=LowBitCache(model.config, "int4", max_tokens=8192))

A prompt attends to itself in the model's own type and is then packed; a decode step appends its
token and reads the packed pages; a later prompt does both, and the two results are merged by their
log-sum-exp, which is exact. Left padding never enters the cache. What is not supported raises
NotImplementedError that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitdecoding import KvFormat, Workspace
from bitdecoding._ext import sequence_extents
from bitdecoding.arrays import count
from bitdecoding.recipes import FULL_ATTENTION, RECIPES, resolve_format

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "bitdecoding.transformers needs torch and transformers 5.17 or newer: "
        f"pip install 'bitdecoding[transformers]' ({error})"
    ) from error

from bitdecoding.cache_layers import (
    ATTENTION,
    LowBitLayer,
    NewTokens,
    SixteenBitLayer,
    WindowLayer,
    unsupported,
)
from bitdecoding.columns import Columns

_SLIDING = "sliding_attention"
SIXTEEN_BIT = "16-bit"  # in place of a format: a layer of transformers' own

__all__ = ["ATTENTION", "SIXTEEN_BIT", "LowBitCache"]


class LowBitCache(Cache):  # type: ignore[misc]
    """KV cache of a Llama-family model in 4 or 2 bits, for ``generate(past_key_values=...)``.

    config      the model's config: causal attention, full or (as in Gemma 3) with a sliding window
                on some layers, one KV cache per layer
    format      "int4" (recommended: K and V in 4 bits), "int3" (V in 2), "int2" or another of
                bitdecoding.recipes.RECIPES, a canonical name, or a KvFormat: of every layer with
                full attention. Or a sequence with one of them per layer of the model.
                "16-bit" (in a sequence also None): the layer is transformers' own, in 16 bits, as
                layers with a sliding window always are, and as a recipe may have its edges
    max_tokens  room per sequence; None grows with the text, a quarter ahead of it
    keep_first, keep_last   first and newest tokens of a sequence that stay in 16 bit; all recipes
                of the library are meant with the defaults
    k_means     per layer of the model a mean of its keys after their rotary embedding (Hkv, D), or
                None: taken from the keys on their way to the pages, which attention doesn't see; of
                a layer in 16 bit nothing is taken
    threads     of the CPU backend; 0 = all cores; on CUDA only 0

    bitdecoding.calibration finds means of K and folds rotations of V into a model's weights.

    For inference: no gradients pass through it. Every layer is on the device of its keys. On CUDA a
    float32 model's queries, keys and values become float16 on their way to the cache, and its
    results float32 again; `check` raises what only the device can know.

    Raises NotImplementedError for models with nothing but sliding windows, with chunked windows,
    cross attention, soft caps, latent attention or layers that share a cache; ValueError for a
    format that does not fit.
    """

    def __init__(
        self,
        config: Any,
        format: KvFormat | str | Sequence[KvFormat | str | None] = "int4",
        *,
        max_tokens: int | None = None,
        keep_first: int = 16,
        keep_last: int = 64,
        k_means: Sequence[torch.Tensor | None] | None = None,
        threads: int = 0,
    ) -> None:
        text = config.get_text_config(decoder=True)
        kinds = layer_kinds(text)
        heads = text.num_attention_heads
        head_dim = head_dim_of(text)
        self.formats = _layer_formats(format, kinds, head_dim)
        self._columns = Columns()
        workspaces: dict[str, Workspace] = {}  # layers run one after the other: one per device
        threads = count("threads", threads, least=0)
        settings: dict[str, Any] = {
            "keep_first": count("keep_first", keep_first, least=0),
            "keep_last": count("keep_last", keep_last, least=0),
        }
        if max_tokens is not None:
            max_tokens = count("max_tokens", max_tokens, least=1)

        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        means = _layer_means(k_means, len(kinds), (kv_heads, head_dim))

        def layer(kind: str, format: KvFormat | None, mean: torch.Tensor | None) -> Any:
            if kind == _SLIDING:
                return WindowLayer(text.sliding_window)
            if format is None:
                return SixteenBitLayer()
            sequence_extents(format, **settings, max_tokens=max_tokens or 1)  # refuses bad zones
            own = settings if mean is None else {**settings, "k_mean": mean}
            return LowBitLayer(format, self._columns, workspaces, max_tokens, threads, own)

        super().__init__(layers=list(map(layer, kinds, self.formats, means)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers: pages, 16-bit zones, tables, K and V of 16-bit layers."""
        return sum(layer.nbytes for layer in self.layers)

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As transformers' caches. Raises ValueError where an earlier step failed between layers:
        those before have its tokens, the others don't."""
        if layer_idx == 0:
            held = {layer.get_seq_length() for layer in self.layers}
            if len(held) > 1:
                raise ValueError(
                    f"tokens of the layers = {sorted(held)}; allowed: the same in all. "
                    "A step failed halfway: reset() the cache"
                )
        found: tuple[Any, Any] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found

    def fill(self, past: Cache, attention_mask: torch.Tensor | None = None) -> None:
        """Appends everything that a 16-bit cache holds (after a prefill done elsewhere).

        past            layers[i].keys, .values (B, Hkv, S, D), for example a DynamicCache
        attention_mask  (B, columns so far + S) where rows are left-padded

        Raises ValueError before anything is written where past holds nothing of a layer.
        """
        if len(past.layers) != len(self.layers):
            raise ValueError(f"past: {len(past.layers)} layers; allowed: {len(self.layers)}")
        for index, source in enumerate(past.layers):
            if getattr(source, "keys", None) is None:
                raise ValueError(
                    f"past: layer {index}, {type(source).__name__}, has no keys; allowed: a filled "
                    "16-bit cache, for example a DynamicCache"
                )
        for layer, source in zip(self.layers, past.layers, strict=True):
            layer.fill(source, attention_mask)

    def check(self) -> None:
        """Raises ValueError where a layer's tables are damaged or, on CUDA, were when a call ran.
        Waits for the device."""
        for layer in self.layers:
            layer.check()

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self._columns.reset()
        super().reset()

    def activate_past_recording(self) -> None:
        unsupported("assisted decoding")


def low_bit_attention(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query (B, Hq, S, D) -> (B, S, Hq, D), no weights."""
    if not isinstance(key, NewTokens):
        raise ValueError(
            f"attn_implementation {ATTENTION!r} attends through a LowBitCache: pass "
            "past_key_values=LowBitCache(model.config, ...), or choose another implementation"
        )
    if module.training or dropout:
        unsupported("training (dropout)")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unsupported("attention that is not causal")
    if getattr(module.config, "output_attentions", False):
        unsupported("output_attentions")
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            unsupported(name)
    for name in ("output_attentions", "cu_seq_lens_q", "block_table"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            unsupported(name)
    if kwargs.get("sliding_window") is not None and not isinstance(key.layer, WindowLayer):
        unsupported("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.attend(module, query, key, attention_mask, scale), None


def low_bit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function: the 2-D mask as it is, None when nothing is padded; of sliding windows
    what torch's attention takes."""
    if kwargs.get("local_size") is not None:
        mask: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length,
            mask_function=mask_function, attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        return mask
    if mask_function is not causal_mask_function:
        unsupported("a mask other than causal with left padding (windows, blocks, packed rows)")
    if attention_mask is None or (
        attention_mask.shape[-1] == kv_length and bool(attention_mask.all())
    ):
        return None
    return attention_mask


def head_dim_of(config: Any) -> int:
    """Channels of a head, of a text config."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def layer_kinds(config: Any) -> list[str]:
    """Full or sliding attention, per layer. Raises for every other kind of attention, and where
    all layers slide."""
    kinds = list(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        kinds = [_SLIDING]
    kinds = kinds or [FULL_ATTENTION] * config.num_hidden_layers
    others = sorted(set(kinds) - {FULL_ATTENTION, _SLIDING})
    if others:
        unsupported(f"a model with {', '.join(others)} layers")
    window = getattr(config, "sliding_window", None)
    if FULL_ATTENTION not in kinds or (_SLIDING in kinds and not window):
        unsupported(f"a model of {', '.join(kinds)} layers with sliding_window = {window}")
    if getattr(config, "is_encoder_decoder", False):
        unsupported("cross attention (an encoder-decoder model)")
    for name, what in {
        "attention_chunk_size": "chunked attention",
        "attn_logit_softcapping": "a soft cap of the scores",
        "num_kv_shared_layers": "layers that share a KV cache",
        "kv_lora_rank": "latent attention (MLA)",
    }.items():
        if getattr(config, name, None):
            unsupported(f"{what} ({name} = {getattr(config, name)})")
    return kinds


def _layer_formats(format: Any, kinds: list[str], head_dim: int) -> list[KvFormat | None]:
    """The format of every layer; None: 16-bit."""
    if isinstance(format, (list, tuple)):
        if len(format) != len(kinds):
            raise ValueError(f"formats = {len(format)}; the model has {len(kinds)} layers")
        given = list(format)
        for index, kind in enumerate(kinds):
            if kind == _SLIDING and given[index] not in (None, SIXTEEN_BIT):
                raise ValueError(
                    f"format of layer {index} = {given[index]}; allowed: {SIXTEEN_BIT!r}, for it "
                    "has a sliding window"
                )
        given = [SIXTEEN_BIT if entry is None else entry for entry in given]
    elif isinstance(format, str) and format in RECIPES:
        found = RECIPES[format].formats(kinds, head_dim)
        if not any(found):
            full = kinds.count(FULL_ATTENTION)
            raise ValueError(
                f"format = {format!r}: of {full} full-attention layers it leaves all in 16 bit"
            )
        return found
    else:
        given = [SIXTEEN_BIT if kind == _SLIDING else format for kind in kinds]
    return [None if f == SIXTEEN_BIT else resolve_format(f, head_dim) for f in given]


def _layer_means(
    means: Sequence[torch.Tensor | None] | None, layers: int, shape: tuple[int, int]
) -> Sequence[torch.Tensor | None]:
    """K's mean of every layer. Refused here: a first prompt would fill other layers before."""
    if means is None:
        return [None] * layers
    if len(means) != layers:
        raise ValueError(f"k_means = {len(means)}; the model has {layers} layers")
    for index, mean in enumerate(means):
        if mean is None:
            continue
        allowed = f"allowed: None, or a tensor (num_kv_heads, head_dim) = {shape}"
        if not isinstance(mean, torch.Tensor):
            raise TypeError(f"k_means of layer {index} = {type(mean).__name__}; {allowed}")
        if tuple(mean.shape) != shape:
            raise ValueError(f"k_means of layer {index}: shape {tuple(mean.shape)}; {allowed}")
        if not bool(mean.to(torch.float16).isfinite().all()):
            largest = float(mean.abs().max())
            raise ValueError(
                f"k_means of layer {index}: largest magnitude {largest}; allowed: finite in float16"
            )
    return means


AttentionInterface.register(ATTENTION, low_bit_attention)
AttentionMaskInterface.register(ATTENTION, low_bit_mask)
