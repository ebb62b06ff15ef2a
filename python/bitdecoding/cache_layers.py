# SPDX-License-Identifier: Apache-2.0
"""The layers of a LowBitCache: packed pages, or transformers' own 16-bit layers.

``update`` of each hands the model a NewTokens in place of K and V; the attention function finds in
it the layer that knows how to attend. (B, Hkv, S, D) are the K and V of a step, (B, Hq, S, D) its
queries.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask

from bitdecoding import KvFormat, PagedKvCache, Workspace
from bitdecoding.columns import Columns
from bitdecoding.prompt_attention import causal_attention, causal_attention_with_lse, merge

ATTENTION = "bitdecoding"
_USE_IT = f"call model.set_attn_implementation({ATTENTION!r})"


def unsupported(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} is not supported with a LowBitCache")


class NewTokens:
    """K and V of one step on their way from ``update`` to the attention function.

    It stands where other attention functions expect tensors: whatever they ask of it is an error
    that says what to do, so a model with another implementation never produces text.
    """

    __slots__ = ("keys", "layer", "values")

    def __init__(
        self, layer: LowBitLayer | SixteenBitLayer, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.layer = layer
        self.keys = keys  # (B, Hkv, S, D); of a 16-bit layer with the past in front
        self.values = values

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"this attention implementation cannot read a LowBitCache: {_USE_IT}")


class _GrowsOnly:
    """What no layer does, so that all layers of a cache stay alike."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            unsupported("removing tokens (crop)")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        unsupported("beam search (reorder_cache)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        unsupported("repeating rows (batch_repeat_interleave)")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        unsupported("selecting rows (batch_select_indices)")

    def offload(self) -> None:
        unsupported("offloading")

    def prefetch(self) -> None:
        unsupported("offloading")


class LowBitLayer(_GrowsOnly, CacheLayerMixin):  # type: ignore[misc]
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
            unsupported(f"K {tuple(key_states.shape)} beside V {tuple(value_states.shape)}")
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
        if "k_mean" in self.settings:
            mean = self.settings["k_mean"].to(key_states.device, torch.float16).contiguous()
            self.settings = {**self.settings, "k_mean": mean}
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
    ) -> tuple[NewTokens, NewTokens]:
        self.lazy_initialization(key_states, value_states)
        new = NewTokens(self, key_states, value_states)
        return new, new  # what the model hands to the attention function as K and V

    def leftpad(self, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        return self.columns.leftpad(mask, keys.shape[0], self.seen, keys.shape[2])

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        new: NewTokens,
        mask: torch.Tensor | None,
        scale: float,
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

    def fill(self, source: CacheLayerMixin, attention_mask: torch.Tensor | None) -> None:
        """Appends what a 16-bit layer holds."""
        self.lazy_initialization(source.keys, source.values)
        leftpad = self.leftpad(source.keys, attention_mask)
        self.append(source.keys, source.values, leftpad)

    @property
    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def check(self) -> None:
        if self.cache is not None:
            self.cache.check()

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


class SixteenBitLayer(_GrowsOnly, DynamicLayer):  # type: ignore[misc]
    """transformers' growing layer and its SDPA, in 16 bits whatever the model computes in."""

    is_croppable = False
    keys: Any  # (B, Hkv, S, D), None or empty before the first tokens
    values: Any

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[NewTokens, NewTokens]:
        dtype = key_states.dtype
        stored = torch.float16 if dtype == torch.float32 else dtype
        keys, values = super().update(key_states.to(stored), value_states.to(stored))
        new = NewTokens(self, keys.to(dtype), values.to(dtype))
        return new, new

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        """As LowBitLayer.attend; the mask is the 2-D one of full attention."""
        columns, rows = new.keys.shape[2], query.shape[2]
        wide = sdpa_mask(
            query.shape[0],
            rows,
            columns,
            q_offset=columns - rows,
            attention_mask=None if mask is None else mask.to(query.device, torch.bool),
            device=query.device,
        )
        return _sdpa(query, new, wide, scale)

    def fill(self, source: CacheLayerMixin, attention_mask: torch.Tensor | None) -> None:
        """Appends what another 16-bit layer holds."""
        self.update(source.keys, source.values)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def check(self) -> None:
        """There is nothing that only a device could know."""

    def reset(self) -> None:
        self.is_initialized = False  # the next tokens find no past
        self.keys = self.values = None


class WindowLayer(SixteenBitLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' sliding layer, with its own mask: (B, 1, S, columns), or None for causal."""

    cumulative_length: int

    def attend(
        self, module: Any, query: torch.Tensor, new: NewTokens, mask: Any, scale: float
    ) -> torch.Tensor:
        return _sdpa(query, new, mask, scale)

    def fill(self, source: CacheLayerMixin, attention_mask: torch.Tensor | None) -> None:
        seen = self.cumulative_length + source.get_seq_length()  # more than both still hold
        self.update(source.keys, source.values)
        self.cumulative_length = seen

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


def _sdpa(
    query: torch.Tensor, new: NewTokens, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """As attend; mask (B, 1, S, columns), or None for causal. Beside a mask every query head gets
    keys and values of its own: where heads share them, as transformers' sdpa has it for a single KV
    head, torch 2.11's kernel on CUDA gives a wrong last row for S = 1 (mod 64), in float32."""
    keys, values = new.keys, new.values
    if mask is not None:
        heads = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(heads, dim=1) for x in (keys, values))
    out = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out.transpose(1, 2)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x without its history, in 16 bits where the cache is on CUDA: its kernels read no others."""
    x = x.detach()
    return x.half() if x.is_cuda and x.dtype == torch.float32 else x


def _ahead(tokens: int) -> int:
    """Room to allocate for that many tokens: a quarter more, so that growth is rare."""
    return tokens + tokens // 4
