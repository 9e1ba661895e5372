"""Protection in transformers' Trainer, and the examples of every trainer."""

from __future__ import annotations

import runpy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import chiefly
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import perpetune
from perpetune.integrations.transformers import FILE, ProtectionCallback
from perpetune.protection.dropin import DropIn
from perpetune.seeding import own_global_state

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8, initializer_range=0.2, **ENDS)
    with own_global_state("integrations"):
        return get_peft_model(
            GPT2LMHeadModel(config),
            LoraConfig(r=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_dropout=0.1),
        )


def texts(first: int) -> list[dict[str, Tensor]]:
    rows = [torch.arange(start, start + 6) % 4 + first for start in range(8)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(
    model: nn.Module, folder: Path, data: list[dict[str, Tensor]], *calls: TrainerCallback, **args: Any
) -> Trainer:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02, "save_strategy": "no", **args}
    quiet = {"use_cpu": True, "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    return Trainer(
        model, TrainingArguments(str(folder), **settings, **quiet), train_dataset=data, callbacks=list(calls)
    )


def logits(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.stack([row["input_ids"] for row in data])).logits
    return found


class StopsAt(TrainerCallback):
    """As if the process ended after that step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# -- the callback --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    chiefly(
        [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.1}],
        [{"gradient_accumulation_steps": 2}],
    ),
)
def test_two_tasks_one_after_the_other(how: dict[str, Any], tmp_path: Path) -> None:
    """The logits of the first task stay where they were, and move without protection."""
    moved = {}
    for protected in (True, False):
        model = tiny_gpt2()
        protection = perpetune.protect(model, energy=0.999)
        calls = [ProtectionCallback(protection)] if protected else []
        trainer(model, tmp_path, texts(0), *calls, **how).train()
        before = logits(model, texts(0))
        trainer(model, tmp_path, texts(8), *calls, **how).train()
        moved[protected] = float((logits(model, texts(0)) - before).norm() / before.norm())
    assert moved[True] < 0.1 * moved[False]


def test_the_optimizer_is_let_go_at_the_end(tmp_path: Path) -> None:
    model = tiny_gpt2()
    protection = perpetune.protect(model)
    runs = trainer(model, tmp_path, texts(0), ProtectionCallback(protection, consolidate=False))
    runs.train()
    assert protection.consolidated == 0
    assert not protection.guards
    protection.consolidate(texts(0)[:0] or [{"input_ids": texts(0)[0]["input_ids"][None]}])
    assert not runs.optimizer.optimizer._optimizer_step_post_hooks


def second_task(folder: Path, *calls: TrainerCallback, resume: bool = False) -> tuple[nn.Module, DropIn]:
    """Learn the second task after a first one, saving at each third step."""
    model = tiny_gpt2()
    protection = perpetune.protect(model, energy=0.99)
    if not resume:
        protection.consolidate([torch.stack([row["input_ids"] for row in texts(0)])])
    runs = trainer(
        model, folder, texts(8), ProtectionCallback(protection), *calls, save_strategy="steps", save_steps=3, seed=1
    )
    runs.train(resume_from_checkpoint=resume)
    return model, protection


def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, its_protection = second_task(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        second_task(tmp_path / "cut", StopsAt(4))
    assert (tmp_path / "cut" / "checkpoint-3" / FILE).is_file()
    model, protection = second_task(tmp_path / "cut", resume=True)
    assert protection.consolidated == its_protection.consolidated == 2
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert protection.report()["room"] == its_protection.report()["room"]


def test_a_checkpoint_without_protection_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        second_task(tmp_path, StopsAt(4))
    (tmp_path / "checkpoint-3" / FILE).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-3 has no protection\.safetensors, so nothing is protected"):
        second_task(tmp_path, resume=True)


@pytest.mark.parametrize("saved", ["no", "steps"])
def test_what_is_protected_in_the_end_is_in_the_output_folder(saved: str, tmp_path: Path) -> None:
    """Checkpoints are for resuming: a run that had ended may be resumed and does not count its data twice."""
    model = tiny_gpt2()
    protection = perpetune.protect(model)
    quick = {"save_strategy": saved, "save_steps": 3}
    trainer(model, tmp_path, texts(0), ProtectionCallback(protection), **quick).train()
    later = perpetune.protect(model)
    later.load(tmp_path / FILE)
    assert later.consolidated == 1
    assert later.report() == protection.report()
    if saved == "steps":
        again = perpetune.protect(model)
        again.load(tmp_path / "checkpoint-6" / FILE)
        assert again.consolidated == 0
        runs = trainer(model, tmp_path, texts(0), ProtectionCallback(again), **quick)
        runs.train(resume_from_checkpoint=True)
        assert again.consolidated == 1


def test_a_run_that_knows_nothing_of_an_earlier_one_is_told(tmp_path: Path) -> None:
    for number in range(3):
        model = tiny_gpt2()
        protection = perpetune.protect(model)
        if number == 2:
            protection.load(tmp_path / FILE)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(model, tmp_path, texts(0), ProtectionCallback(protection), max_steps=1).train()
        told = [str(w.message) for w in said if str(w.message).startswith("protect: ")]
        assert len(told) == (number == 1)
        assert not told or f"{tmp_path / FILE} holds the protection of an earlier run" in told[0]
        assert protection.consolidated == 1 + (number == 2)


# -- the examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"),
    chiefly(
        [("own_loop", 100), ("trainer", 40), ("trl_sft", 40), ("lightning_module", 100)],  # trl's is a Trainer too
        [("own_loop", 100), ("trainer", 40), ("lightning_module", 100)],
    ),
)
@pytest.mark.filterwarnings("ignore")  # of other people's trainers
def test_example(name: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](steps)
    protected, free = found["protected"], found["free"]
    assert protected["change"] < 0.4 * free["change"]
    assert protected["first"] < 0.6 * free["first"]
    shutil.rmtree(tmp_path / "trainer_output", ignore_errors=True)
    assert not list(tmp_path.iterdir())
