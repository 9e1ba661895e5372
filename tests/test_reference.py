"""Protection of what the pretrained model already knows, before the first task: features and perplexity."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import picture, picture_folder, recipe, split_folder, vit_folder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import perpetune
from perpetune.pets import using
from perpetune.seeding import generator, own_global_state

GENERAL, NARROW, LENGTH = 32, 16, 24  # general words, words of the narrow task, words in a text


def grammar() -> Tensor:
    """`(32, 32)`: after each general word four others may follow, some more often."""
    rng, chances = generator("grammar"), torch.zeros(GENERAL, GENERAL)
    for word in range(GENERAL):
        chances[word, torch.randperm(GENERAL, generator=rng)[:4]] = torch.tensor([0.55, 0.25, 0.15, 0.05])
    return chances


def general(count: int, seed: int) -> Tensor:
    """Texts `(count, 24)` of the grammar."""
    rng, chances = generator("general", seed), grammar()
    words = [torch.randint(GENERAL, (count,), generator=rng)]
    while len(words) < LENGTH:
        words.append(torch.multinomial(chances[words[-1]], 1, generator=rng)[:, 0])
    return torch.stack(words, 1)


def narrow(count: int, seed: int) -> Tensor:
    """Texts of one task: its own words in order, after each the general word that belongs to it."""
    belongs = torch.randint(GENERAL, (NARROW,), generator=generator("belongs"))
    start = torch.randint(NARROW, (count, 1), generator=generator("narrow", seed))
    own = (start + torch.arange(LENGTH // 2)) % NARROW
    return torch.stack([own + GENERAL, belongs[own]], 2).flatten(1)


def tune(model: nn.Module, optimizer: torch.optim.Optimizer, texts: Any, steps: int) -> None:
    model.train()
    for step in range(steps):
        words = texts(16, step)
        optimizer.zero_grad()
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()


@torch.no_grad()
def perplexity(model: nn.Module, words: Tensor) -> float:
    return float(model.eval()(input_ids=words, labels=words).loss.exp())


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    """A language model of two blocks that knows the grammar."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with own_global_state("pretrained"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=GENERAL + NARROW, initializer_range=0.1, **size))
    tune(model, torch.optim.AdamW(model.parameters(), lr=3e-3), general, 250)
    return model


def tuned_on_one_task(pretrained: nn.Module, protected: bool) -> tuple[nn.Module, list[float]]:
    """PEFT's LoRA on every linear layer, tuned on the narrow task; the ranks protected, if any."""
    with own_global_state("lora"):
        model = get_peft_model(copy.deepcopy(pretrained), LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    protection = perpetune.protect(model, energy=0.99)
    if protected:
        protection.guard(optimizer)
        protection.consolidate([{"input_ids": general(32, 1000 + i)} for i in range(8)])
    rooms = [protection.of(w).room for w in protection.sites]
    tune(model, optimizer, narrow, 100)
    return model, rooms


def test_general_perplexity_survives_a_narrow_task(pretrained: nn.Module) -> None:
    """Held-out general text, before and after; the narrow task is learned all the same."""
    held_out, task = general(64, 5000), narrow(64, 5000)
    before, unlearned = perplexity(pretrained, held_out), perplexity(pretrained, task)
    assert before < 5  # of 32 words: it means something
    after = {}
    for protected in (True, False):
        model, rooms = tuned_on_one_task(pretrained, protected)
        after[protected] = (perplexity(model, held_out), perplexity(model, task))
        if protected:
            assert min(rooms[1::2]) >= 0.5  # B, which was zero, has room to learn
    print(f"general {before:.2f}, narrow {unlearned:.0f}; protected {after[True]}, free {after[False]}")
    assert after[True][0] - before < 0.2 * (after[False][0] - before)
    assert after[False][1] < 1.5
    assert after[True][1] < 3  # where chance is 48 and the pretrained model is in the hundreds
    assert unlearned > 100


def features(learner: perpetune.Learner, pixels: Tensor) -> Tensor:
    """Features `(B, D)` of pictures by the model as it is tuned now."""
    method: Any = learner.method
    with torch.no_grad(), using(method.model, method.answering):
        found: Tensor = method.model.features(pixels)
    return found


def test_features_of_general_pictures_survive_a_narrow_task(tmp_path: Path) -> None:
    """`protect.reference` in a recipe: features of other pictures of the reference's kind, before and after."""
    vit, kinds = vit_folder(tmp_path / "vit"), ["g", "h"]
    data = split_folder(tmp_path / "data", ["a", "b"], 12, 2)
    folder = picture_folder(tmp_path / "general", kinds, 20)
    held_out = torch.stack([torch.from_numpy(np.array(picture(k, n))) for k in kinds for n in range(500, 506)])
    moved, correct = {}, {}
    for reference in ({"path": str(folder), "samples": 32}, None):
        protect = {"energy": 0.99, "reference": reference}
        train = {"epochs": 8, "batch_size": 8, "lr": 0.02}
        learner = perpetune.Learner(recipe(vit, data, protect=protect, train=train))
        pixels = held_out.permute(0, 3, 1, 2).contiguous()
        before = features(learner, pixels)
        (row,) = learner.run()["cells"]
        key = reference is not None
        moved[key] = float((features(learner, pixels) - before).norm() / before.norm())
        correct[key] = row[0]["correct"] / row[0]["total"]
    print(f"moved {moved}, right {correct}")
    assert moved[True] < 0.2 * moved[False]
    assert correct[True] >= 0.75
