"""Methods: how pets and heads are trained task after task, and how they answer. One file for each method."""

from perpetune.methods.base import Method

__all__ = ["Method"]
