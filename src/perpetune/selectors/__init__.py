"""Selectors: which members of a pool act on which example."""

from perpetune.selectors.base import Chosen, Selection, Selector

__all__ = ["Chosen", "Selection", "Selector"]
