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

from typing import Any, NoReturn

from bitdecoding import KvFormat, PagedKvCache, Workspace
from bitdecoding._ext import sequence_extents
from bitdecoding.arrays import count
from bitdecoding.recipes import resolve_format

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import causal_mask_function
except ImportError as error:
    raise ImportError(
        "bitdecoding.transformers needs torch and transformers 5.17 or newer: "
        f"pip install 'bitdecoding[transformers]' ({error})"
    ) from error

from bitdecoding.columns import Columns
from bitdecoding.prompt_attention import causal_attention, causal_attention_with_lse, merge

ATTENTION = "bitdecoding"
_USE_IT = f"call model.set_attn_implementation({ATTENTION!r})"

__all__ = ["ATTENTION", "LowBitCache"]


def _unsupported(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} is not supported with a LowBitCache")


class LowBitCache(Cache):  # type: ignore[misc]
    """KV cache of a Llama-family model in 4 or 2 bits, for ``generate(past_key_values=...)``.

    config      the model's config: full causal attention, one KV cache per layer
    format      "int4" (K and V 4 bits), "k4v2", "int2", a canonical name, or a KvFormat
    max_tokens  room per sequence; None grows with the text, a quarter ahead of it
    keep_first, keep_last   first and newest tokens of a sequence that stay in 16 bit
    threads     of the CPU backend; 0 = all cores; on CUDA only 0

    For inference: no gradients pass through it. Every layer is on the device of its keys. On CUDA a
    float32 model's queries, keys and values become float16 on their way to the cache, and its
    results float32 again; `check` raises what only the device can know.

    Raises NotImplementedError for models with sliding or chunked windows, cross attention, soft
    caps, latent attention or layers that share a cache; ValueError for a format that does not fit.
    """

    def __init__(
        self,
        config: Any,
        format: KvFormat | str = "int4",
        *,
        max_tokens: int | None = None,
        keep_first: int = 16,
        keep_last: int = 64,
        threads: int = 0,
    ) -> None:
        text = config.get_text_config(decoder=True)
        _refuse_model(text)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.format = resolve_format(format, head_dim)
        self._columns = Columns()
        workspaces: dict[str, Workspace] = {}  # layers run one after the other: one per device
        threads = count("threads", threads, least=0)
        settings: dict[str, Any] = {
            "keep_first": count("keep_first", keep_first, least=0),
            "keep_last": count("keep_last", keep_last, least=0),
        }
        if max_tokens is not None:
            max_tokens = count("max_tokens", max_tokens, least=1)
        sequence_extents(self.format, **settings, max_tokens=max_tokens or 1)  # refuses bad zones
        super().__init__(
            layers=[
                _LowBitLayer(self.format, self._columns, workspaces, max_tokens, threads, settings)
                for _ in range(text.num_hidden_layers)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers: pages, 16-bit zones, tables."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)

    def fill(self, past: Cache, attention_mask: torch.Tensor | None = None) -> None:
        """Appends everything that a 16-bit cache holds (after a prefill done elsewhere).

        past            layers[i].keys, .values (B, Hkv, S, D), for example a DynamicCache
        attention_mask  (B, columns so far + S) where rows are left-padded
        """
        for layer, source in zip(self.layers, past.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.append(source.keys, source.values, layer.leftpad(source.keys, attention_mask))

    def check(self) -> None:
        """Raises ValueError where a layer's tables are damaged or, on CUDA, were when a call ran.
        Waits for the device."""
        for layer in self.layers:
            if layer.cache is not None:
                layer.cache.check()

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self._columns.reset()
        super().reset()

    def activate_past_recording(self) -> None:
        _unsupported("assisted decoding")


class _LowBitLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a PagedKvCache and how many columns (tokens and padding) it has seen."""

    is_sliding = False

    def __init__(
        self,
        format: KvFormat,
        columns: Columns,
        workspaces: dict[str, Workspace],
        max_tokens: int | None,
        threads: int,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.format = format
        self.columns = columns
        self.workspaces = workspaces
        self.max_tokens = max_tokens
        self.threads = threads
        self.settings = settings
        self.cache: PagedKvCache | None = None
        self.is_initialized = False
        self.seen = 0
        self.batch_size = -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, tokens, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            _unsupported(f"K {tuple(key_states.shape)} beside V {tuple(value_states.shape)}")
        if head_dim != self.format.head_dim:
            raise ValueError(f"head_dim = {head_dim}; the cache has {self.format.head_dim}")
        if self.is_initialized and batch == self.batch_size:
            return
        if self.seen:
            raise ValueError(f"batch = {batch}; the cache is filled with {self.batch_size} rows")
        room = _ahead(tokens) if self.max_tokens is None else self.max_tokens
        device = str(key_states.device)
        if key_states.is_cuda and device not in self.workspaces:
            self.workspaces[device] = Workspace(device)
        self.cache = PagedKvCache(
            self.format,
            batch=batch,
            num_kv_heads=heads,
            max_tokens=room,
            device=device,
            workspace=self.workspaces.get(device),
            **self.settings,
        )
        self.batch_size = batch
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[_NewTokens, _NewTokens]:
        self.lazy_initialization(key_states, value_states)
        new = _NewTokens(self, key_states, value_states)
        return new, new  # what the model hands to the attention function as K and V

    def leftpad(self, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        return self.columns.leftpad(mask, keys.shape[0], self.seen, keys.shape[2])

    def attend(
        self, query: torch.Tensor, new: _NewTokens, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """query (B, Hq, S, D), the new tokens, the 2-D mask -> (B, S, Hq, D); appends them."""
        keys, values = new.keys, new.values
        leftpad = self.leftpad(keys, mask)
        if self.seen and query.shape[2] == 1:
            self.append(keys, values, leftpad)
            return self._decode(query, scale).to(query.dtype)
        if self.seen == 0:
            out = causal_attention(query, keys, values, scale, leftpad)
        else:
            past = self._decode(query, scale, return_softmax_lse=True)
            out = merge(past, causal_attention_with_lse(query, keys, values, scale, leftpad))
        self.append(keys, values, leftpad)
        return out.to(query.dtype)

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, leftpad: torch.Tensor | None
    ) -> None:
        """keys, values (B, Hkv, S, D); row b's tokens begin at leftpad[b]."""
        assert self.cache is not None
        self._reserve(self.seen + keys.shape[2])
        self.cache.append(
            _readable(keys).transpose(1, 2),  # (B, S, Hkv, D)
            _readable(values).transpose(1, 2),
            leftpad=None if leftpad is None else leftpad.to(keys.device),
            threads=self.threads,
        )
        self.seen += keys.shape[2]

    def _decode(self, query: torch.Tensor, scale: float, **options: Any) -> Any:
        """(B, Hq, S, D) -> out (B, S, Hq, D) over the whole cache, as PagedKvCache.decode."""
        assert self.cache is not None
        q = _readable(query).transpose(1, 2)
        return self.cache.decode(q, softmax_scale=scale, threads=self.threads, **options)

    def _reserve(self, tokens: int) -> None:
        """Room for that many columns. A cache without a fixed size gets pages: new ids at the end
        of pool and table."""
        cache = self.cache
        assert cache is not None
        if tokens <= cache.max_tokens:
            return
        if self.max_tokens is not None:
            if (longest := self.columns.longest()) > self.max_tokens:
                raise ValueError(
                    f"tokens of a row = {longest}; allowed: at most {self.max_tokens} (max_tokens)"
                )
            return
        cache.check()  # on CUDA what was found wrong so far would go with it
        pool, table = torch.as_tensor(cache.pool), torch.as_tensor(cache.block_table)
        pages = -(-(_ahead(tokens) - cache.max_tokens) // self.format.page_tokens)  # of each row
        new = torch.arange(self.batch_size * pages, dtype=table.dtype, device=table.device)
        ids = (new + pool.shape[0]).view(self.batch_size, pages)
        self.cache = PagedKvCache.wrap(
            self.format,
            pool=torch.cat([pool, pool.new_zeros(len(new), *pool.shape[1:])]),
            side=cache.side,
            block_table=torch.cat([table, ids], dim=1),
            slots=cache.slots,
            lengths=cache.lengths,
            packed=cache.packed,
            workspace=cache.workspace,
            **self.settings,
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            _unsupported("removing tokens (crop)")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        _unsupported("beam search (reorder_cache)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        _unsupported("repeating rows (batch_repeat_interleave)")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        _unsupported("selecting rows (batch_select_indices)")

    def offload(self) -> None:
        _unsupported("offloading")

    def prefetch(self) -> None:
        _unsupported("offloading")


class _NewTokens:
    """K and V of one step on their way from ``update`` to the attention function.

    It stands where other attention functions expect tensors: whatever they ask of it is an error
    that says what to do, so a model with another implementation never produces text.
    """

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: _LowBitLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layer = layer
        self.keys = keys  # (B, Hkv, S, D)
        self.values = values

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"this attention implementation cannot read a LowBitCache: {_USE_IT}")


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x without its history, in 16 bits where the cache is on CUDA: its kernels read no others."""
    x = x.detach()
    return x.half() if x.is_cuda and x.dtype == torch.float32 else x


def _ahead(tokens: int) -> int:
    """Room to allocate for that many tokens: a quarter more, so that growth is rare."""
    return tokens + tokens // 4


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
    if not isinstance(key, _NewTokens):
        raise ValueError(
            f"attn_implementation {ATTENTION!r} attends through a LowBitCache: pass "
            "past_key_values=LowBitCache(model.config, ...), or choose another implementation"
        )
    if module.training or dropout:
        _unsupported("training (dropout)")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        _unsupported("attention that is not causal")
    if getattr(module.config, "output_attentions", False):
        _unsupported("output_attentions")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            _unsupported(name)
    for name in ("output_attentions", "cu_seq_lens_q", "block_table"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            _unsupported(name)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.attend(query, key, attention_mask, scale), None


def low_bit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function: the 2-D mask as it is, None when nothing is padded."""
    if mask_function is not causal_mask_function:
        _unsupported("a mask other than causal with left padding (windows, blocks, packed rows)")
    if attention_mask is None or (
        attention_mask.shape[-1] == kv_length and bool(attention_mask.all())
    ):
        return None
    return attention_mask


def _refuse_model(config: Any) -> None:
    """Raises for every kind of attention whose result would differ from ours."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        _unsupported(f"a model with {', '.join(others)} layers")
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        _unsupported(f"sliding-window attention (sliding_window = {config.sliding_window})")
    if getattr(config, "is_encoder_decoder", False):
        _unsupported("cross attention (an encoder-decoder model)")
    for name, what in {
        "attention_chunk_size": "chunked attention",
        "attn_logit_softcapping": "a soft cap of the scores",
        "num_kv_shared_layers": "layers that share a KV cache",
        "kv_lora_rank": "latent attention (MLA)",
    }.items():
        if getattr(config, name, None):
            _unsupported(f"{what} ({name} = {getattr(config, name)})")


AttentionInterface.register(ATTENTION, low_bit_attention)
AttentionMaskInterface.register(ATTENTION, low_bit_mask)
