"""What a run or an update will cost, before it: time, memory and bytes on the disk."""

from perpetune.forecast.estimating import estimate

__all__ = ["estimate"]
