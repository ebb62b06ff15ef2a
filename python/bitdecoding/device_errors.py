# SPDX-License-Identifier: Apache-2.0
"""What CUDA calls find wrong in device memory, as the ValueError that a CPU call raises at once.

A CUDA call cannot raise for a value that only the device knows: it leaves the affected sequence
alone, and four numbers (the library's error word) say what was wrong first.
"""

from __future__ import annotations

from bitdecoding.arrays import Array, wait_for

# DeviceError of the library: what is wrong with sequence {b}, and the rule.
_TEXTS = {
    1: "leftpad, num_tokens of sequence {b} = {value}; allowed: runs inside a row's {limit} tokens",
    2: "first_page of sequence {b} = {value}; "
    "allowed: pages inside the {limit} columns of block_table",
    3: "block_table of sequence {b} = {value}; allowed: 0 to {last} (pages of the pool)",
    4: "slots[{b}] = {value}; allowed: 0 to {last} (slots of the side buffer)",
    5: "lengths[{b}] - packed[{b}] = {value}; allowed: at most {limit} (tail_tokens)",
    6: "packed[{b}] = {value}; allowed: multiples of page_tokens from 0 to lengths[{b}], "
    "at most {limit} (max_pages * page_tokens)",
    7: "lengths[{b}] = {value} after the append; allowed: at most {limit} (max_tokens)",
    8: "lengths[{b}] after the append, which fills {value} pages; allowed: max_pages ({limit})",
}
_LENGTH = 5  # reported for a negative length, too


def raise_device_error(error_word: Array) -> None:
    """Raises and clears what an error word says, if it says a thing.

    error_word  torch int32 (4,): sequence + 1, value, limit, DeviceError; all 0 where all is well;
                those who write it are done, or on torch's current stream
    """
    sequence, value, limit, error = error_word.tolist()
    if sequence == 0:
        return
    error_word.zero_()
    wait_for(error_word.device)  # before a call on another stream reports anew
    text = _TEXTS[error]
    if error == _LENGTH and value < 0:
        text = "lengths[{b}] = {value}; allowed: 0 or more"
    raise ValueError(text.format(b=sequence - 1, value=value, limit=limit, last=limit - 1))
