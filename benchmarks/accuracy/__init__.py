# SPDX-License-Identifier: Apache-2.0
"""The accuracy bench, run by benchmarks/accuracy.py: real models and texts, the packed cache."""
