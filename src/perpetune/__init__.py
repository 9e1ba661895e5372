"""perpetune keeps tuning a pretrained model as new data arrive. The model does not forget, the old data need not be
kept, and only a few parameters are trained.

    import perpetune
    learner = perpetune.Learner("demo")
    learner.run()
    learner.predict(["photo.jpg"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perpetune._version import __version__

if TYPE_CHECKING:
    from perpetune.build import load_backbone
    from perpetune.errors import PerpetuneError, Refused
    from perpetune.fit import FitConfig
    from perpetune.forecast.estimating import estimate
    from perpetune.heads.base import Head
    from perpetune.hub.pulling import Pulled, pull
    from perpetune.hub.pushing import Pushed, push
    from perpetune.learner import Learner, Prediction
    from perpetune.methods.base import Method
    from perpetune.models.backbone import Backbone
    from perpetune.pets.base import PET, Place
    from perpetune.protection.config import ProtectConfig
    from perpetune.protection.dropin import protect
    from perpetune.protection.protection import Protection
    from perpetune.recipe import Recipe, load_recipe
    from perpetune.runtime import Runtime
    from perpetune.tasks import Batch, Examples, Inputs, Task

_HOME = {
    "Backbone": "perpetune.models.backbone",
    "Batch": "perpetune.tasks",
    "Examples": "perpetune.tasks",
    "FitConfig": "perpetune.fit",
    "Head": "perpetune.heads.base",
    "Inputs": "perpetune.tasks",
    "Learner": "perpetune.learner",
    "Method": "perpetune.methods.base",
    "PET": "perpetune.pets.base",
    "PerpetuneError": "perpetune.errors",
    "Place": "perpetune.pets.base",
    "Prediction": "perpetune.learner",
    "ProtectConfig": "perpetune.protection.config",
    "Protection": "perpetune.protection.protection",
    "Pulled": "perpetune.hub.pulling",
    "Pushed": "perpetune.hub.pushing",
    "Recipe": "perpetune.recipe",
    "Refused": "perpetune.errors",
    "Runtime": "perpetune.runtime",
    "Task": "perpetune.tasks",
    "estimate": "perpetune.forecast.estimating",
    "load_backbone": "perpetune.build",
    "load_recipe": "perpetune.recipe",
    "protect": "perpetune.protection.dropin",
    "pull": "perpetune.hub.pulling",
    "push": "perpetune.hub.pushing",
}

__all__ = [
    "PET",
    "Backbone",
    "Batch",
    "Examples",
    "FitConfig",
    "Head",
    "Inputs",
    "Learner",
    "Method",
    "PerpetuneError",
    "Place",
    "Prediction",
    "ProtectConfig",
    "Protection",
    "Pulled",
    "Pushed",
    "Recipe",
    "Refused",
    "Runtime",
    "Task",
    "__version__",
    "estimate",
    "load_backbone",
    "load_recipe",
    "protect",
    "pull",
    "push",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perpetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
