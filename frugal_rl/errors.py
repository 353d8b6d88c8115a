"""The kinds of failure that a person is told about without a traceback."""

from __future__ import annotations


class FrugalError(Exception):
    """Something failed while running (exit code 1)."""


class InputError(FrugalError):
    """What was asked for cannot be done: bad input, refused before any work is lost (exit code 2)."""


class OutOfMemory(FrugalError):
    """A library that is not PyTorch got no memory; for less it may get it (shortage.py)."""
