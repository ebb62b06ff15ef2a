# SPDX-License-Identifier: Apache-2.0
"""PagedKvCache: low-bit pages, two 16-bit zones and the tables that say what belongs to whom."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np

from bitdecoding._ext import CacheArrays, KvFormat, sequence_extents
from bitdecoding.arrays import (
    Array,
    ArrayT,
    as_format,
    count,
    device_name,
    empty_like,
    empty_lse,
    given_stream,
    on_device,
    query_columns,
    real,
    to_host,
    wait_for,
    zeros,
)
from bitdecoding.device_errors import raise_device_error
from bitdecoding.workspace import Workspace, workspace_for

_TABLES = ("block_table", "slots", "lengths", "packed")
ARRAYS = ("pool", "side", *_TABLES)


class PagedKvCache:
    """The keys and values of a batch of sequences in one layer, packed to 2 or 4 bits.

    Of every sequence the first `keep_first` and at least the newest `keep_last` tokens are attended
    in fp16; all others as the codes of their pages. Pages are quantised as they become complete and
    older than the newest `keep_last` tokens. One token at a time, many or a whole prompt give the
    same bytes. (BitDecoding, arXiv 2503.18773, section 4: its residual block is keep_first =
    keep_last = 0.)

    Parameters
    ----------
    format : a `KvFormat` or its canonical name
    batch : number of sequences, B
    num_kv_heads : H
    max_tokens : the most tokens that a sequence may have; its pages are allocated here, exactly
    keep_first : 0 to page_tokens; first tokens in fp16 (attention sinks)
    keep_last : 0 or more; newest tokens in fp16
    device : 'cpu' (NumPy arrays) or 'cuda', 'cuda:<index>' (torch tensors)
    k_mean : float16 (H, D), contiguous, 16-byte aligned, on that device; taken from every K on
        arrival. Results, lse too, are those of the keys as given. Held, not to change. None: none
    workspace : on CUDA, a `Workspace` to share with caches whose calls never overlap in time with
        this one's; None: one of its own

    Sequence b owns the pages [b * max_pages, (b + 1) * max_pages) and slot b. Arrays of any other
    arrangement: `PagedKvCache.wrap`. Calls on one cache must not overlap in time.

    On CUDA, append and decode take fp16 and bf16, are enqueued on a stream and never wait. What
    only the device knows (lengths, page ids, slots) is checked there: a sequence with a fault is
    not written, its output is NaN, all others are right, and `check` raises. Both calls can be
    captured in a CUDA graph once each has run outside with the same shapes; `Workspace` says how
    long memory must live.

    Raises
    ------
    ValueError, TypeError : an argument, named with its value and what is allowed
    NotImplementedError : this build has no CUDA kernel for the format or the device
    RuntimeError : an error of the CUDA driver
    """

    def __init__(
        self,
        format: KvFormat | str,
        *,
        batch: int,
        num_kv_heads: int,
        max_tokens: int,
        keep_first: int = 16,
        keep_last: int = 64,
        device: object = "cpu",
        k_mean: Array | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        format = as_format(format)
        batch = count("batch", batch, least=1)
        heads = count("num_kv_heads", num_kv_heads, least=1)
        max_tokens = count("max_tokens", max_tokens, least=0)
        keep_first = count("keep_first", keep_first, least=0)
        keep_last = count("keep_last", keep_last, least=0)
        where = device_name(device)
        pages, tail_tokens = sequence_extents(
            format, keep_first=keep_first, keep_last=keep_last, max_tokens=max_tokens
        )

        side_shape = (batch, heads, 2, keep_first + tail_tokens, format.head_dim)
        page_ids = np.arange(batch * pages, dtype=np.int32).reshape(batch, pages)
        self._hold(
            format=format,
            pool=zeros((batch * pages, heads, format.page_bytes()), "uint8", where),
            side=zeros(side_shape, "float16", where),
            block_table=on_device(page_ids, where),
            slots=on_device(np.arange(batch, dtype=np.int32), where),
            lengths=zeros((batch,), "int32", where),
            packed=zeros((batch,), "int32", where),
            keep_first=keep_first,
            keep_last=keep_last,
            k_mean=k_mean,
            max_tokens=max_tokens,
            workspace=workspace,
        )

    @classmethod
    def wrap(
        cls,
        format: KvFormat | str,
        *,
        pool: Array,
        side: Array,
        block_table: Array,
        slots: Array,
        lengths: Array,
        packed: Array,
        keep_first: int,
        keep_last: int,
        k_mean: Array | None = None,
        workspace: Workspace | None = None,
    ) -> PagedKvCache:
        """A cache over arrays that the caller owns, without a copy.

        All are contiguous and on one device; pool, side, lengths and packed are written.

        Parameters
        ----------
        pool : uint8 (num_pages, num_kv_heads, page_bytes), 16-byte aligned
        side : float16 (num_slots, num_kv_heads, 2, keep_first + tail_tokens, head_dim), 16-byte
            aligned; K, V; tail_tokens is keep_last + page_tokens, rounded up to 16, or more (on
            CUDA: a multiple of 16)
        block_table : int32 (batch, max_pages), page ids
        slots : int32 (batch,), rows of side
        lengths : int32 (batch,), tokens of each sequence
        packed : int32 (batch,), how many of them are in pages; a multiple of page_tokens
        k_mean, workspace : as in the constructor

        Sequences may share pages that are packed already. Pages that an append packs and slots
        belong to one sequence each; on a CPU append refuses others (`pack_pages` doesn't look), on
        CUDA nothing does.
        `max_tokens` is what the columns of the block table suffice for.
        """
        cache = cls.__new__(cls)
        cache._hold(
            format=as_format(format),
            pool=pool,
            side=side,
            block_table=block_table,
            slots=slots,
            lengths=lengths,
            packed=packed,
            keep_first=count("keep_first", keep_first, least=0),
            keep_last=count("keep_last", keep_last, least=0),
            k_mean=k_mean,
            max_tokens=None,
            workspace=workspace,
        )
        return cache

    def _hold(
        self,
        *,
        format: KvFormat,
        max_tokens: int | None,
        workspace: Workspace | None,
        **state: Any,
    ) -> None:
        self._state: dict[str, Any] = state
        self._arrays = CacheArrays(format, **state)
        self._workspace = workspace_for(self._arrays.device, workspace)
        if self._workspace is not None:
            self._arrays.use_workspace(self._workspace)
        self._format = format
        self._scale = 1 / math.sqrt(format.head_dim)
        self._max_tokens = self._arrays.capacity_tokens if max_tokens is None else max_tokens

    def append(
        self,
        k: Array,
        v: Array,
        *,
        leftpad: Array | None = None,
        num_tokens: Array | None = None,
        threads: int = 0,
        stream: int | None = None,
    ) -> None:
        """Adds new tokens to the end of every sequence.

        Parameters
        ----------
        k, v : (B, S, H, D) float16, bfloat16 or, on a CPU, float32; any strides but a unit last one
            (on CUDA: 16-byte aligned rows). Values become fp16 (magnitudes above 65504 and inf:
            65504); a NaN makes its group NaN
        leftpad : int32 (B,), rows of padding before row b's tokens; None: 0
        num_tokens : int32 (B,), row b's tokens; None: S - leftpad
        threads : CPU threads; 0: one per hardware thread (on CUDA: 0)
        stream : on CUDA, a cudaStream_t as an int. None: torch's current stream on the tensors'
            device; needed where CUDA arrays are not torch tensors

        Raises ValueError before anything is written, also where a sequence would outgrow
        `max_tokens`; on CUDA what the device finds is left to `check`.
        """
        self._arrays.append(
            k,
            v,
            leftpad=leftpad,
            num_tokens=num_tokens,
            max_tokens=self._max_tokens,
            threads=count("threads", threads, least=0),
            stream=given_stream(stream),
        )

    @overload
    def decode(
        self,
        q: ArrayT,
        *,
        softmax_scale: float | None = None,
        out: ArrayT | None = None,
        return_softmax_lse: Literal[False] = False,
        threads: int = 0,
        stream: int | None = None,
        kernel: str | None = None,
    ) -> ArrayT: ...

    @overload
    def decode(
        self,
        q: ArrayT,
        *,
        softmax_scale: float | None = None,
        out: ArrayT | None = None,
        return_softmax_lse: Literal[True],
        threads: int = 0,
        stream: int | None = None,
        kernel: str | None = None,
    ) -> tuple[ArrayT, Array]: ...

    def decode(
        self,
        q: ArrayT,
        *,
        softmax_scale: float | None = None,
        out: ArrayT | None = None,
        return_softmax_lse: bool = False,
        threads: int = 0,
        stream: int | None = None,
        kernel: str | None = None,
    ) -> ArrayT | tuple[ArrayT, Array]:
        """Attention of new queries over all tokens of their sequences (no causal mask).

        Parameters
        ----------
        q : (B, Sq, Hq, D) float16, bfloat16 or, on a CPU, float32; unit last stride (on CUDA: even
            strides); Hq a multiple of H
        softmax_scale : multiplies the scores; finite, not 0; None: 1 / sqrt(D)
        out : contiguous array of q's shape, dtype and device to write to; None: a new one of q's
            library
        return_softmax_lse : also return the natural logarithm of the sum of exponentials
        threads : CPU threads; 0: one per hardware thread (on CUDA: 0)
        stream : as in `append`
        kernel : on CUDA, the decode kernel of `build_info()["kernels"]` to use; None: the one for
            the device and the number of query columns, Sq * Hq / H

        Returns out, or (out, lse) with lse float32 (B, Hq, Sq). An empty sequence gives 0 and -inf.
        """
        threads = count("threads", threads, least=0)
        scale = self._scale if softmax_scale is None else real("softmax_scale", softmax_scale)
        result = empty_like(q, "q") if out is None else out
        lse: Array | None = empty_lse(q) if return_softmax_lse else None
        self._arrays.decode(
            q,
            result,
            lse=lse,
            softmax_scale=scale,
            threads=threads,
            stream=given_stream(stream),
            kernel=kernel,
        )
        return result if lse is None else (result, lse)

    def plan_decode(
        self, *, query_heads: int, query_tokens: int = 1, kernel: str | None = None
    ) -> dict[str, Any]:
        """How decode runs on this cache's CUDA device for queries of that shape.

        Keys: kernel, ctas, warps (of a CTA), stages (of a warp), stage_bytes, smem_bytes (of a
        CTA), workspace_bytes (of a `Workspace`). None of them depends on lengths.
        """
        columns = query_columns(query_heads, query_tokens, int(self.pool.shape[1]))
        return self._arrays.plan_decode(columns, kernel=kernel)

    def reset(self) -> None:
        """Makes every sequence empty. Pages and zones keep their bytes, which nothing reads. On
        CUDA it runs on torch's current stream and doesn't wait."""
        self.lengths[:] = 0
        self.packed[:] = 0

    def check(self) -> None:
        """Raises ValueError where page ids, slots, lengths or packed are out of range.

        On CUDA it waits for the device and raises first, once, what an append or decode since the
        last check was the first to find."""
        tables = {name: self._state[name] for name in _TABLES}
        if self._workspace is not None:
            wait_for(self._workspace.device)
            if self._arrays.error_word is not None:
                raise_device_error(self._arrays.error_word)
            tables = {name: to_host(array) for name, array in tables.items()}
        self._arrays.check(**tables)

    @property
    def format(self) -> KvFormat:
        return self._format

    @property
    def keep_first(self) -> int:
        """First tokens of every sequence that stay in fp16."""
        return int(self._state["keep_first"])

    @property
    def keep_last(self) -> int:
        """Newest tokens of every sequence that stay in fp16, at least."""
        return int(self._state["keep_last"])

    @property
    def max_tokens(self) -> int:
        """The most tokens that a sequence may have."""
        return self._max_tokens

    @property
    def pool(self) -> Array:
        """uint8 (num_pages, num_kv_heads, page_bytes): the packed pages (docs/format.md)."""
        return self._state["pool"]

    @property
    def side(self) -> Array:
        """float16 (num_slots, num_kv_heads, 2, keep_first + tail_tokens, head_dim): K and V of the
        first tokens, then a ring in which token i lies at row keep_first + i % tail_tokens."""
        return self._state["side"]

    @property
    def block_table(self) -> Array:
        """int32 (batch, max_pages): page ids of each sequence."""
        return self._state["block_table"]

    @property
    def slots(self) -> Array:
        """int32 (batch,): each sequence's row of `side`."""
        return self._state["slots"]

    @property
    def lengths(self) -> Array:
        """int32 (batch,): tokens of each sequence."""
        return self._state["lengths"]

    @property
    def packed(self) -> Array:
        """int32 (batch,): how many of each sequence's tokens are in pages."""
        return self._state["packed"]

    @property
    def k_mean(self) -> Array | None:
        """float16 (num_kv_heads, head_dim): what is taken from every K on arrival; None: none."""
        return self._state["k_mean"]

    @property
    def workspace(self) -> Workspace | None:
        """On CUDA, the memory that calls need besides the cache; not part of `nbytes`."""
        return self._workspace

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated: pages, 16-bit zones and tables, used or not."""
        return sum(int(self._state[name].nbytes) for name in ARRAYS)

    def __repr__(self) -> str:
        heads, batch = self.pool.shape[1], self.lengths.shape[0]
        return (
            f"PagedKvCache('{self._format}', batch={batch}, num_kv_heads={heads}, "
            f"max_tokens={self._max_tokens}, keep_first={self.keep_first}, "
            f"keep_last={self.keep_last}, device='{getattr(self.pool, 'device', 'cpu')}')"
        )

    # copy.deepcopy and pickle: the arrays are copied, the compiled view is made again.
    def __getstate__(self) -> dict[str, Any]:
        own = {"format": self._format, "max_tokens": self._max_tokens}
        return {**own, "workspace": self._workspace, **self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hold(**state)
