"""From features to answers: classifiers that grow by class name."""

from perpetune.heads.base import Head
from perpetune.heads.cosine import Cosine
from perpetune.heads.linear import Linear
from perpetune.heads.ncm import NCM
from perpetune.heads.ridge import Ridge

__all__ = ["NCM", "Cosine", "Head", "Linear", "Ridge"]
