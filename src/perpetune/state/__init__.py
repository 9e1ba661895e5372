"""The state folder: a tuned model, and everything that is needed to continue its training."""

from perpetune.state import candidate
from perpetune.state.accumulated import Accumulated
from perpetune.state.committed import DOCUMENTS, LEARNED, START, Committed
from perpetune.state.folder import State
from perpetune.state.meaning import training_digest
from perpetune.state.midtask import MidTask, interrupted
from perpetune.state.prune import Pruned

__all__ = [
    "DOCUMENTS",
    "LEARNED",
    "START",
    "Accumulated",
    "Committed",
    "MidTask",
    "Pruned",
    "State",
    "candidate",
    "interrupted",
    "training_digest",
]
