"""Reports and comparisons: what they say, that they are safe, and that a browser shows them without a complaint."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perpetune.errors import StateError, UsageError
from perpetune.numerics.metrics import Cell, summarise
from perpetune.report import checked, compare, form, palette, svg, tables, terminal, write_comparison, write_report
from perpetune.report.compare import spread
from perpetune.report.matrix import matrix_table

CHROMIUM = Path("/usr/bin/chromium")


def fake_results(
    n_tasks: int = 5,
    classes_per_task: int = 2,
    *,
    seed: int = 0,
    method: str = "finetune",
    keep: float = 0.55,
    rows: int | None = None,
    ahead: bool = False,
    names: list[str] | None = None,
) -> dict[str, Any]:
    """A results document as a real run would leave it: learned well, forgotten by `1 - keep` with each task."""
    rng = np.random.default_rng([seed, n_tasks, classes_per_task])
    labels = names or [f"class-{k:03d}" for k in range(n_tasks * classes_per_task)]
    tasks = [
        {
            "index": t,
            "name": f"task-{t + 1}",
            "classes": labels[t * classes_per_task : (t + 1) * classes_per_task],
            "train": 135 * classes_per_task,
            "test": 45 * classes_per_task,
        }
        for t in range(n_tasks)
    ]

    def measure(i: int, j: int) -> Cell | None:
        if j > i and not ahead:
            return None
        level = 0.5 if j > i else 0.97 * (0.25 + 0.75 * keep ** ((i - j) * 3 / n_tasks))
        level = float(np.clip(level + rng.normal(0, 0.03), 0, 1))
        per_class = {name: [int(rng.binomial(45, level)), 45] for name in tasks[j]["classes"]}  # type: ignore[attr-defined]
        correct, total = (sum(counts[k] for counts in per_class.values()) for k in (0, 1))
        return {"correct": correct, "total": total, "per_class": per_class}

    learned = n_tasks if rows is None else rows
    cells = [[measure(i, j) for j in range(n_tasks)] for i in range(learned)]
    recipe = {
        "name": "demo",
        "seed": seed,
        "setting": "class",
        "backbone": {"name": "perpetune:micro", "pretrained": True},
        "pet": {"name": "lora", "rank": 8, "alpha": 16.0, "at": ["q", "v"]},
        "method": {"name": method, "mask": "task"},
        "head": {"name": "linear"},
        "train": {"epochs": 4, "batch_size": 32, "optimizer": "adamw", "lr": 0.003},
        "data": {"name": "digits"},
        "stream": {"classes_per_task": classes_per_task},
        "run": {"device": "auto", "precision": "no", "workers": 0},
    }
    return {
        "format": 1,
        "name": f"demo-{method}",
        "setting": "class",
        "seed": seed,
        "tasks": tasks,
        "cells": cells,
        "metrics": dict(summarise(cells, tasks)),
        "timings": [
            {
                "task": t,
                "learn_s": float(rng.uniform(9, 14)),
                "evaluate_s": 0.3 + 0.1 * t,
                "images": 540 * classes_per_task,
                "images_per_s": 90.0 if t else None,
                "peak_memory_bytes": 512_000_000 + 1_000_000 * t,
            }
            for t in range(learned)
        ],
        "storage": [
            {
                "task": t,
                "pet.safetensors": 148_000,
                "head.safetensors": 1_600 * (t + 1),
                "method.safetensors": 800,
                "metrics.json": 2_400,
            }
            for t in range(learned)
        ],
        "trainable_parameters": 36_864,
        "backbone_parameters": 2_700_000,
        "bad_files": [],
        "warnings": [],
        "recipe": recipe,
        "versions": {"perpetune": "0.1.0", "python": "3.11.9", "torch": "2.15.0+cpu", "transformers": "5.23.0"},
        "device": "cpu",
        "complete": learned == n_tasks,
        "extra": {},
    }


def troubled() -> dict[str, Any]:
    """Names and messages that a page must not take for markup, in a run with problems."""
    names = ["<script>alert(1)</script>", 'a "quoted" & <b>bold</b>', "猫 | pipe", "back`tick*_", *"cdefgh"]
    results = fake_results(5, 2, names=names, rows=3)
    results["name"] = "<img src=x onerror=alert(2)>"
    results["warnings"] = [
        "class </style><script>alert(3)</script> has no test image",
        "2 duplicates between train and test",
    ]
    results["bad_files"] = [
        {"task": 0, "file": "photos/<b>.png", "reason": "truncated"},
        {"task": None, "file": "photos/\udcff.jpg", "reason": "not an image"},
    ]
    results["recipe"]["description"] = "</code></pre><script>alert(4)</script> ``` {{ 7 * 7 }}"
    results["device"] = "<i>cpu</i>"
    results["versions"]["</dd>"] = "<u>1</u>"
    results["storage"][0]["<s>.bin"] = 10
    return results


SIZES: dict[str, Callable[[], dict[str, Any]]] = {
    "one": lambda: fake_results(1, 2),
    "two": lambda: fake_results(2, 5),
    "five": lambda: fake_results(5, 2, ahead=True),
    "twenty": lambda: fake_results(20, 5, keep=0.8),
    "hundred": lambda: fake_results(100, 10, keep=0.6),
    "begun": lambda: fake_results(5, 2, rows=0),
    "troubled": troubled,
}


def fake_runs() -> list[tuple[str, dict[str, Any]]]:
    runs = []
    for method, keep in (("finetune", 0.4), ("joint", 1.0), ("frozen", 0.85)):
        for seed in range(3 if method != "frozen" else 1):
            runs.append((f"runs/{method}-{seed}", fake_results(8, 4, seed=seed, method=method, keep=keep)))
    return runs
