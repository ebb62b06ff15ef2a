# SPDX-License-Identifier: Apache-2.0
"""Arrays of NumPy and torch, told apart and allocated. torch is imported for CUDA devices only."""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from bitdecoding._ext import KvFormat

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = Any  # of NumPy, torch or, where no output is made, any DLPack library
ArrayT = TypeVar("ArrayT")

LARGEST = 2**30  # of a count of tokens, heads or sequences: sums of two still fit an int32


def count(name: str, value: int, *, least: int, most: int = LARGEST) -> int:
    """`value` as an int; ValueError or TypeError names it where it isn't a count."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}; allowed: an int, {least} or more") from None
    if not least <= number <= most:
        raise ValueError(f"{name} = {number}; allowed: {least} to {most}")
    return number


def query_columns(query_heads: int, query_tokens: int, num_kv_heads: int) -> int:
    """Queries of a KV head: what a plan of decode asks for. ValueError where heads don't divide."""
    heads = count("num_kv_heads", num_kv_heads, least=1)
    query_heads = count("query_heads", query_heads, least=1)
    if query_heads % heads != 0:
        raise ValueError(
            f"query_heads = {query_heads}; allowed: multiples of num_kv_heads ({heads})"
        )
    columns = count("query_tokens", query_tokens, least=1) * (query_heads // heads)
    return count("columns", columns, least=1)


def real(name: str, value: float) -> float:
    """`value` as a float; TypeError names it where it isn't a number."""
    try:
        return math.ldexp(value, 0)  # unlike float() it reads no text
    except (TypeError, OverflowError):
        raise TypeError(f"{name} = {value!r}; allowed: a finite number") from None


def as_format(format: KvFormat | str) -> KvFormat:
    """The format that a `KvFormat` or its canonical name means."""
    if isinstance(format, KvFormat):
        return format
    if isinstance(format, str):
        return KvFormat.parse(format)
    raise TypeError(f"format = {format!r}; allowed: a KvFormat or its canonical name")


def torch_of(array: object) -> Any | None:
    """The torch module where `array` is a tensor. Whoever made the tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def given_stream(stream: int | None) -> int | None:
    """The argument `stream` of a call, checked."""
    return None if stream is None else count("stream", stream, least=0, most=2**64 - 1)


def stream_of(array: Any) -> int | None:
    """torch's current stream on the device of `array`; None where it is no tensor on CUDA. Calls
    ask it without a `stream`, and where the array's library has no quicker answer."""
    torch = torch_of(array)
    if torch is None or not array.is_cuda:
        return None
    handle: int = torch.cuda.current_stream(array.device).cuda_stream
    return handle


def empty_like(array: Any, name: str) -> Any:
    """A new contiguous array of the library, shape, dtype and device of `array`."""
    if (torch := torch_of(array)) is not None:
        return torch.empty_like(array, memory_format=torch.contiguous_format)
    if isinstance(array, np.ndarray):
        return np.empty(array.shape, array.dtype)
    raise _no_library(array, name)


def empty_lse(q: Any) -> Array:
    """A new float32 (B, Hq, Sq) of the library and device of q (B, Sq, Hq, D)."""
    batch, tokens, heads = (*getattr(q, "shape", ()), 0, 0, 0)[:3]  # who reads q refuses its rank
    if (torch := torch_of(q)) is not None:
        return torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if isinstance(q, np.ndarray):
        return np.empty((batch, heads, tokens), np.float32)
    raise _no_library(q, "q")


def _no_library(array: object, name: str) -> TypeError:
    kind = type(array).__name__
    return TypeError(
        f"{name} = {kind}; allowed: a NumPy array or a torch tensor (outputs are of its library)"
    )


def zeros(shape: tuple[int, ...], dtype: str, device: str) -> Array:
    """Zeroed memory: a NumPy array on 'cpu', a torch tensor on 'cuda' or 'cuda:<index>'."""
    if device == "cpu":
        return np.zeros(shape, dtype)
    import torch

    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


def on_device(values: npt.NDArray[Any], device: str) -> Array:
    """`values` themselves on 'cpu', else a torch tensor of them."""
    if device == "cpu":
        return values
    import torch

    return torch.from_numpy(values).to(device)


def to_host(array: Any) -> Any:
    """A NumPy copy of an array on CUDA, made on torch's current stream."""
    import torch

    tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
    return tensor.cpu().numpy()


def wait_for(device: object) -> None:
    """Waits for all work on a CUDA device, whatever its stream."""
    import torch

    torch.cuda.synchronize(device)


def device_name(device: object, *, cpu: bool = True) -> str:
    """'cpu' (if `cpu`), 'cuda' or 'cuda:<index>', from such a text or a torch.device."""
    text = str(device)
    kind, _, index = text.partition(":")
    if (text == "cpu" and cpu) or (kind == "cuda" and (index.isdigit() or text == "cuda")):
        return text
    allowed = "'cpu', 'cuda', 'cuda:<index>'" if cpu else "'cuda', 'cuda:<index>'"
    raise ValueError(f"device = {text!r}; allowed: {allowed}")
