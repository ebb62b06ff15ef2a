# SPDX-License-Identifier: Apache-2.0
"""The seed of a run: a new one, or the one given to `pytest --seed`; it is in pytest's header."""

from __future__ import annotations

import secrets

SEED = secrets.randbits(32)
