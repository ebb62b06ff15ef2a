# SPDX-License-Identifier: Apache-2.0
"""Prefill pack: whole pages of keys and values, quantised straight into a pool."""

from __future__ import annotations

from bitdecoding._ext import KvFormat, pack_arrays
from bitdecoding.arrays import Array, as_format, count, given_stream, torch_of
from bitdecoding.device_errors import raise_device_error


def pack_pages(
    k: Array,
    v: Array,
    pool: Array,
    block_table: Array,
    *,
    format: KvFormat | str,
    keep_first: int = 0,
    first_page: Array | None = None,
    leftpad: Array | None = None,
    num_tokens: Array | None = None,
    k_mean: Array | None = None,
    threads: int = 0,
    stream: int | None = None,
    check: bool = False,
) -> None:
    """Quantises the whole pages of new tokens into `pool`, on the device of the arrays.

    Row b's tokens are the positions from page_tokens * first_page[b] on of its sequence; the page i
    of floor(num_tokens[b] / page_tokens) goes to pool[block_table[b, first_page[b] + i]]. Tokens
    after the last whole page are not touched. The bytes (docs/format.md) are the same on every
    device. BitDecoding (arXiv 2503.18773) calls this the prefill of its residual kernel.

    Parameters
    ----------
    k, v : (B, S, H, D) float16, bfloat16 or, on a CPU, float32; any strides but a unit last one (on
        CUDA: 16-byte aligned rows). Values become fp16 first, as in `PagedKvCache.append`
    pool : uint8 (num_pages, H, page_bytes), contiguous, 16-byte aligned; written
    block_table : int32 (B, max_pages), page ids
    format : a `KvFormat` or its canonical name
    keep_first : positions below it don't widen the ranges of channel-axis K groups
    first_page, leftpad, num_tokens : int32 (B,); None: 0, 0, S - leftpad
    k_mean : float16 (H, D), as in `PagedKvCache`; None: none
    threads : CPU threads; 0: one per hardware thread (on CUDA: 0)
    stream : a cudaStream_t as an int. None: torch's current stream on the tensors' device; needed
        where CUDA arrays are not torch tensors
    check : on CUDA, wait for the result and raise ValueError for an index in device memory that is
        out of range (torch's current stream only). Without it nothing waits and what such an index
        concerns is silently not written. On a CPU every index is checked before anything is written

    Raises ValueError, TypeError; NotImplementedError where the build has no kernel for the format;
    RuntimeError for an error of the CUDA driver.
    """
    error_word = _error_word(k, stream) if check else None
    pack_arrays(
        k,
        v,
        pool,
        block_table,
        format=as_format(format),
        keep_first=count("keep_first", keep_first, least=0),
        first_page=first_page,
        leftpad=leftpad,
        num_tokens=num_tokens,
        k_mean=k_mean,
        threads=count("threads", threads, least=0),
        stream=given_stream(stream),
        error_word=error_word,
    )
    if error_word is not None:
        raise_device_error(error_word)


def _error_word(k: Array, stream: int | None) -> Array | None:
    """What a checked call on CUDA reports to; None on a CPU, which needs none."""
    if stream is not None:
        raise ValueError(f"check = True with stream = {stream}; allowed: stream = None")
    torch = torch_of(k)
    if torch is None or not k.is_cuda:
        return None
    return torch.zeros(4, dtype=torch.int32, device=k.device)
