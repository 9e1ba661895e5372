"""What every test runs under: one torch thread, no network, the same hypothesis examples each time."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Read by the libraries when they are first imported, so they are set before that; a subprocess inherits them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["PERPETUNE_CACHE"] = ""  # nothing is kept outside a test's own folder
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
import typer.main
from warm import Warm

torch.set_num_threads(1)

# What hundreds of runs ask for again. No file of a test has to outlive a crash of the machine, so nobody waits for the
# disk; `fault_server.py` and the tests that watch the order of syncs put their own in its place.
importlib.metadata.version = functools.cache(importlib.metadata.version)
typer.main.get_command = functools.cache(typer.main.get_command)
os.fsync = lambda fd: None  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


# A slow or busy machine must not fail a test, nor luck decide which examples it sees.
hypothesis.settings.register_profile("perpetune", deadline=None, derandomize=True, max_examples=25, database=None)
hypothesis.settings.load_profile("perpetune")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout; its tests carry the marker `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a chromium; its tests carry the marker `browser`."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("chromium is not installed")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts Python programs that do not import everything anew."""
    warm = Warm()
    yield warm
    warm.close()
