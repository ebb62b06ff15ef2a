# SPDX-License-Identifier: Apache-2.0
"""Error words in words: each names argument, sequence, value and rule, and is raised once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bitdecoding import device_errors


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ((3, 301, 300, 1), "leftpad, num_tokens of sequence 2 = 301; allowed: runs inside .* 300"),
        ((1, -7, 4, 2), "first_page of sequence 0 = -7; allowed: pages inside the 4 columns"),
        ((3, 40, 40, 3), r"block_table of sequence 2 = 40; allowed: 0 to 39 \(pages of the pool"),
        ((2, 5, 3, 4), r"slots[1] = 5; allowed: 0 to 2 \(slots"),
        ((2, 300, 192, 5), "lengths[1] - packed[1] = 300; allowed: at most 192"),
        ((2, -4, 192, 5), "lengths[1] = -4; allowed: 0 or more"),
        ((1, 100, 512, 6), "packed[0] = 100; allowed: multiples of page_tokens .* at most 512"),
        ((1, 301, 300, 7), "lengths[0] = 301 after the append; allowed: at most 300"),
        ((1, 5, 4, 8), r"lengths[0] after the append, which fills 5 pages; allowed: .*\(4\)"),
    ],
)
def test_error_words(
    torch: Any, monkeypatch: pytest.MonkeyPatch, word: tuple[int, ...], message: str
) -> None:
    monkeypatch.setattr(device_errors, "wait_for", lambda device: None)
    error_word = torch.tensor(word, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.sub(r"\[(\d)\]", r"\[\1\]", message)):
        device_errors.raise_device_error(error_word)
    assert not error_word.any()
    device_errors.raise_device_error(error_word)  # nothing is left to say
