"""Training regimes: how the parts are trained over the tasks and used at prediction. One file each."""

from perpetune.methods.base import Method

__all__ = ["Method"]
