"""Heads: classifiers that turn features into scores and grow by class name."""

from perpetune.heads.base import Borrowed, Head
from perpetune.heads.cosine import Cosine
from perpetune.heads.drawn import Drawn
from perpetune.heads.linear import Linear
from perpetune.heads.ncm import NCM
from perpetune.heads.ridge import Ridge

__all__ = ["NCM", "Borrowed", "Cosine", "Drawn", "Head", "Linear", "Ridge"]
