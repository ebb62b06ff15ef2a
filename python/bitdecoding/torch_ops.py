# SPDX-License-Identifier: Apache-2.0
"""torch operators over the tensors of a cache, for engines that own their memory and compile.

    from bitdecoding import torch_ops    # registers torch.ops.bitdecoding; nothing else does

    append(k, v, *cache, counters, error_word, *zones, max_tokens=None, leftpad=None,
           num_tokens=None, threads=0, k_mean=None)
    decode(q, *cache, workspace, error_word, *zones, softmax_scale=None, threads=0,
           kernel_name=None, k_mean=None) -> out, lse
    decode_into(q, out, lse, *cache, workspace, ...)    # the rest as in decode
    pack(k, v, pool, block_table, error_word, format, keep_first=0, first_page=None, leftpad=None,
         num_tokens=None, threads=0, k_mean=None)

    cache: pool, side, block_table, slots, lengths, packed    zones: format, keep_first, keep_last
    k_mean: that of the cache, in all its calls

They are `PagedKvCache.append`, its `decode` and `pack_pages`: the same shapes, checks and errors;
arrays as in `PagedKvCache.wrap`, `format` a canonical name, every argument by place or by name.
`append` writes pool, side, lengths, packed and, on CUDA, counters and error_word; `decode` writes
workspace and error_word, `decode_into` also out (contiguous, q's shape and type) and lse (float32
(B, Hq, Sq), or None); `pack` writes pool and error_word. No gradients pass.

`scratch` makes what CUDA calls need besides the cache; on a CPU all of it is None. Calls run on
torch's current stream, never wait, and go into a CUDA graph once each has run outside with the same
shapes. What only the device finds wrong is in the error word: `check` raises it. torch.compile and
fake tensors meet the same checks of what the host can see, with the sizes of the example; Inductor
writes in place, while aot_eager copies what an operator writes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from bitdecoding._ext import CacheArrays, KvFormat, pack_arrays, plan_decode, traced_array
from bitdecoding.arrays import (
    as_format,
    count,
    device_name,
    empty_like,
    empty_lse,
    query_columns,
)
from bitdecoding.cache import ARRAYS, PagedKvCache
from bitdecoding.device_errors import raise_device_error
from bitdecoding.workspace import Workspace

try:
    import torch
except ImportError as error:
    raise ImportError(f"bitdecoding.torch_ops needs torch: {error}") from error

__all__ = ["Scratch", "append", "check", "decode", "decode_into", "pack", "scratch", "tensors_of"]


class Scratch(NamedTuple):
    """Zeroed memory of calls on one CUDA device that never overlap in time; all None on a CPU.

    Calls leave workspace and counters as they need them; graphs may point to all three.
    """

    workspace: torch.Tensor | None  # uint8 (n,), of decode
    counters: torch.Tensor | None  # int32 (batch,), of append
    error_word: torch.Tensor | None  # int32 (4,), what was first found wrong


def scratch(
    format: KvFormat | str,
    *,
    batch: int,
    num_kv_heads: int,
    query_heads: int,
    query_tokens: int = 1,
    device: object = "cuda",
) -> Scratch:
    """For caches of that format and batch, and decodes of that many queries; calls refuse what is
    too small for them. Waits for the device.

    Raises ValueError, TypeError for arguments, NotImplementedError where this build has no kernel.
    """
    columns = query_columns(query_heads, query_tokens, num_kv_heads)
    if device_name(device) == "cpu":
        return Scratch(None, None, None)
    memory = Workspace(device)
    index = int(memory.device.partition(":")[2])
    plan = plan_decode(as_format(format), columns=columns, device=index)
    return Scratch(
        memory.decode_memory(plan["workspace_bytes"]),
        memory.append_counters(count("batch", batch, least=1)),
        memory.error_word(),
    )


def check(error_word: torch.Tensor | None) -> None:
    """Raises ValueError, once, for what calls with that error word were the first to find.

    Waits for torch's current stream, on which the calls were.
    """
    if error_word is not None:
        raise_device_error(error_word)


def tensors_of(cache: PagedKvCache) -> dict[str, torch.Tensor]:
    """The memory of a cache by the operators' names: pool, side, block_table, slots, lengths,
    packed."""
    return {name: torch.as_tensor(getattr(cache, name)) for name in ARRAYS}


@functools.cache
def _format(name: str) -> KvFormat:
    return as_format(name)


class _Given:
    """The scratch of one call, where a cache has a `Workspace`."""

    def __init__(self, workspace: Any, counters: Any, error_word: Any) -> None:
        self._workspace, self._counters, self._error_word = workspace, counters, error_word

    def decode_memory(self, nbytes: int) -> Any:
        return self._workspace

    def append_counters(self, batch: int) -> Any:
        return self._counters

    def error_word(self) -> Any:
        return self._error_word


def _arrays(
    format: str,
    keep_first: int,
    keep_last: int,
    tensors: tuple[Any, ...],
    k_mean: Any,
    workspace: Any = None,
    counters: Any = None,
    error_word: Any = None,
) -> CacheArrays:
    """The checked cache of one call. tensors: in the order of ARRAYS."""
    pool, side, block_table, slots, lengths, packed = tensors
    arrays = CacheArrays(
        _format(format),
        keep_first=count("keep_first", keep_first, least=0),
        keep_last=count("keep_last", keep_last, least=0),
        pool=pool,
        side=side,
        block_table=block_table,
        slots=slots,
        lengths=lengths,
        packed=packed,
        k_mean=k_mean,
        keep=False,
    )
    if arrays.device != "cpu":
        arrays.use_workspace(_Given(workspace, counters, error_word))
    else:
        _refuse_on_cpu(workspace=workspace, counters=counters, error_word=error_word)
    return arrays


def _refuse_on_cpu(**given: Any) -> None:
    for name, tensor in given.items():
        if tensor is not None:
            raise ValueError(f"{name} = an array; allowed: None, since the arrays are on cpu")


def _append(
    k: Any,
    v: Any,
    pool: Any,
    side: Any,
    block_table: Any,
    slots: Any,
    lengths: Any,
    packed: Any,
    counters: Any,
    error_word: Any,
    format: str,
    keep_first: int,
    keep_last: int,
    max_tokens: int | None = None,
    leftpad: Any = None,
    num_tokens: Any = None,
    threads: int = 0,
    k_mean: Any = None,
    checks_only: bool = False,
) -> None:
    tensors = (pool, side, block_table, slots, lengths, packed)
    arrays = _arrays(
        format, keep_first, keep_last, tensors, k_mean, counters=counters, error_word=error_word
    )
    if max_tokens is None:
        max_tokens = arrays.capacity_tokens
    arrays.append(
        k,
        v,
        leftpad=leftpad,
        num_tokens=num_tokens,
        max_tokens=count("max_tokens", max_tokens, least=0),
        threads=count("threads", threads, least=0),
        stream=None,
        checks_only=checks_only,
    )


def _decode_into(
    q: Any,
    out: Any,
    lse: Any,
    pool: Any,
    side: Any,
    block_table: Any,
    slots: Any,
    lengths: Any,
    packed: Any,
    workspace: Any,
    error_word: Any,
    format: str,
    keep_first: int,
    keep_last: int,
    softmax_scale: float | None = None,
    threads: int = 0,
    kernel_name: str | None = None,
    k_mean: Any = None,
    checks_only: bool = False,
) -> None:
    tensors = (pool, side, block_table, slots, lengths, packed)
    arrays = _arrays(
        format, keep_first, keep_last, tensors, k_mean, workspace=workspace, error_word=error_word
    )
    if softmax_scale is None:
        softmax_scale = 1 / math.sqrt(_format(format).head_dim)
    arrays.decode(
        q,
        out,
        lse=lse,
        softmax_scale=softmax_scale,
        threads=count("threads", threads, least=0),
        stream=None,
        kernel=kernel_name,
        checks_only=checks_only,
    )


def _decode(q: Any, *rest: Any, **named: Any) -> tuple[Any, Any]:
    out, lse = empty_like(q, "q"), empty_lse(q)
    _decode_into(q, out, lse, *rest, **named)
    return out, lse


def _pack(
    k: Any,
    v: Any,
    pool: Any,
    block_table: Any,
    error_word: Any,
    format: str,
    keep_first: int = 0,
    first_page: Any = None,
    leftpad: Any = None,
    num_tokens: Any = None,
    threads: int = 0,
    k_mean: Any = None,
    checks_only: bool = False,
) -> None:
    pack_arrays(
        k,
        v,
        pool,
        block_table,
        format=_format(format),
        keep_first=count("keep_first", keep_first, least=0),
        first_page=first_page,
        leftpad=leftpad,
        num_tokens=num_tokens,
        k_mean=k_mean,
        threads=count("threads", threads, least=0),
        stream=None,
        error_word=error_word,
        checks_only=checks_only,
    )


class _NoHint(Exception):
    """A size of which a trace knows nothing."""


# The code and bits that DLPack has for a type; another's code is 3, opaque.
_DLPACK = {
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
}


def _hint(size: Any) -> int:
    """A size, or the example's where it is symbolic: no guard keeps the trace to that one."""
    if isinstance(size, torch.SymInt):
        if not size.node.has_hint():
            raise _NoHint
        return int(size.node.hint)
    return int(size)


def _traced(value: Any) -> Any:
    """Of a fake tensor what checks ask for; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    code, bits = _DLPACK.get(value.dtype, (3, 8 * value.dtype.itemsize))
    return traced_array(
        [_hint(size) for size in value.shape],
        strides=[_hint(stride) for stride in value.stride()],
        code=code,
        bits=bits,
        cuda_device=value.device.index if value.is_cuda else None,
    )


def _fake(operation: Any) -> Any:
    """The operation without its work: every check of what the host can see."""

    @functools.wraps(operation)
    def checked(*arguments: Any, **named: Any) -> None:
        try:
            known = [_traced(value) for value in arguments]
            named = {name: _traced(value) for name, value in named.items()}
        except _NoHint:
            return
        operation(*known, **named, checks_only=True)

    return checked


def _fake_decode(q: Any, *rest: Any, **named: Any) -> tuple[Any, Any]:
    out, lse = empty_like(q, "q"), empty_lse(q)
    _fake(_decode_into)(q, out, lse, *rest, **named)
    return out, lse


_FORMAT = "str format, int keep_first, int keep_last"
_TABLES = "Tensor block_table, Tensor slots"
_READ = f"Tensor pool, Tensor side, {_TABLES}, Tensor lengths, Tensor packed"
_WRITTEN = f"Tensor(a!) pool, Tensor(b!) side, {_TABLES}, Tensor(c!) lengths, Tensor(d!) packed"
_MEAN = "Tensor? k_mean=None"
_RUNS = f"Tensor? leftpad=None, Tensor? num_tokens=None, int threads=0, {_MEAN}"
_SCRATCH = "Tensor(e!)? workspace, Tensor(f!)? error_word"
_DECODE = f"{_FORMAT}, float? softmax_scale=None, int threads=0, str? kernel_name=None, {_MEAN}"
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_LIBRARY = torch.library.Library("bitdecoding", "DEF")


def _register(name: str, schema: str, operation: Any, fake: Any) -> Any:
    _LIBRARY.define(name + schema, tags=_TAGS)
    for backend in ("CPU", "CUDA"):
        _LIBRARY.impl(name, operation, backend)
    torch.library.register_fake(f"bitdecoding::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.bitdecoding, name).default


append = _register(
    "append",
    f"(Tensor k, Tensor v, {_WRITTEN}, Tensor(e!)? counters, Tensor(f!)? error_word, {_FORMAT}, "
    f"int? max_tokens=None, {_RUNS}) -> ()",
    _append,
    _fake(_append),
)
decode_into = _register(
    "decode_into",
    f"(Tensor q, Tensor(a!) out, Tensor(b!)? lse, {_READ}, {_SCRATCH}, {_DECODE}) -> ()",
    _decode_into,
    _fake(_decode_into),
)
decode = _register(
    "decode",
    f"(Tensor q, {_READ}, {_SCRATCH}, {_DECODE}) -> (Tensor, Tensor)",
    _decode,
    _fake_decode,
)
pack = _register(
    "pack",
    "(Tensor k, Tensor v, Tensor(a!) pool, Tensor block_table, Tensor(b!)? error_word, "
    f"str format, int keep_first=0, Tensor? first_page=None, {_RUNS}) -> ()",
    _pack,
    _fake(_pack),
)
