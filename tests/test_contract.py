"""The contract holds for every method, and each rule catches a method that breaks it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import written
from torch import Tensor, nn

from perpetune.check import Checker, check_method, rules
from perpetune.cli import call
from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.methods.finetune import FineTune
from perpetune.models.classifier import Classifier
from perpetune.pets import copy_set, parameters, using
from perpetune.tasks import Task


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


LOW_AND_HIGH = ("pets.low={name: lora, blocks: [0]}", "pets.high={name: adapter, blocks: [1]}", "pet=none")
METHODS = [
    ("finetune", ()),
    ("finetune", ("mask=none", "head=cosine", "pet=adapter")),
    ("finetune", ("head=ncm", "protect=true", "pet=prefix")),
    _slow("finetune", ("pet=none",)),
    _slow("finetune", ("mask=seen",)),
    _slow("finetune", ("mask=none", "head=cosine")),
    _slow("finetune", ("head=ncm",)),
    _slow("finetune", ("pet=adapter",)),
    _slow("finetune", ("pet=prefix",)),
    _slow("finetune", ("pet=prompt",)),
    ("finetune", ("pet.name=prompt", "pet.deep=false", "pet.at=[block]")),
    _slow("finetune", ("head=ncm", "protect=true")),
    _slow("finetune", ("pet=adapter", "protect.energy=0.9", "head_first=0.5", "merge=falling")),
    _slow("finetune", ("head.name=ridge", "head.projection=40", "protect=true")),
    _slow("finetune", ("head=ncm", "protect.renew=true")),
    ("finetune", ("protect.renew=true", "protect.start=leading", "protect.rest=5", "merge=falling")),
    _slow("finetune", (*LOW_AND_HIGH, "protect.renew=[low]", "mask=seen")),
    _slow("finetune", LOW_AND_HIGH),
    _slow("finetune", ("pets.low={name: lora, blocks: [0]}", "protect.renew=[low]")),
    _slow("frozen", ("head=ncm",)),
    ("frozen", ("head=lm", "pet=none")),
    ("olora", ()),
    ("frozen", ("head.name=ridge", "head.projection=40", "head.balance=true", "pet=none")),
    ("first_session", ("head.name=ridge", "head.projection=200")),
    _slow("first_session", ("head=ncm", "concat=true", "pet=adapter")),
    ("safe", ("head.name=ridge", "head.projection=40", "pet=adapter", "protect=true")),
    _slow("safe", ("head.name=ridge", "head.projection=40")),
    _slow("safe", ("head=ncm", "pet=adapter", "protect=true")),
    ("treelora", ()),
    _slow("treelora", ("head=ncm", "start=fresh", "search=random", "answer=merged", "budget=1", "every=2")),
    _slow("treelora", ("protect=true", "start=last", "answer=last")),
    ("joint", ()),
    _slow("joint", ("head=ncm",)),
    _slow("joint", ("head.name=ridge", "head.projection=40")),
]


@pytest.mark.parametrize(("method", "changes"), METHODS)
def test_every_method_keeps_the_contract(method: str, changes: tuple[str, ...]) -> None:
    faults = [f"{o.rule}: {o.fault}" for o in check_method(method, changes) if o.fault is not None]
    assert faults == []


def test_what_is_not_tested_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pet that cannot be protected, and a language model that cannot have the pet."""
    monkeypatch.setattr(rules, "RULES", (rules.scores_only_for_classes_seen, rules.protection_protects))
    found = {(o.on, o.rule.partition(" ")[0]): o.left_out for o in check_method("finetune", ["pet=ssf"])}
    assert "ssf cannot be protected" in found["pictures", "under"]
    assert found["pictures", "there"] == ""
    assert found["texts", "there"] == "answers are texts"
    (texts,) = [o for o in check_method("finetune", ["pet=prefix"]) if o.on == "texts"]
    assert "pet: prefix adds tokens, but the tokens of a text have a fixed order" in texts.left_out
    (leak,) = [o.left_out for o in check_method("finetune", ["merge=falling"]) if o.rule.startswith("under")]
    assert leak == "merge mixes in a copy that was free to move"
    assert call(["check", "finetune", "--set", "pet=prefix"]) == 0
    assert "--    texts: all rules: not tested, pet: prefix adds tokens" in capsys.readouterr().out
    assert call(["check", "finetune", "--set", "pet=prefix", "--json"]) == 0
    assert written(capsys.readouterr().out, "rule")[-1]["holds"] is None


def test_what_protection_cannot_hold_is_told_before_any_rule() -> None:
    with pytest.raises(UsageError, match="joint keeps all data, so there is nothing for protect: to keep"):
        check_method("joint", ["protect=true"])
    for changes, why in {
        ("finetune", "pet=adapter"): "adapter cannot be renewed: use lora, or leave renew out",
        ("treelora", "start=last"): "treelora decides by itself whether its pet is renewed: leave protect",
        ("safe", "head=ncm"): "safe decides by itself whether its pet is renewed: leave protect",
        ("finetune", "protect.strength=soft"): "renew needs strength: hard",
        ("finetune", "protect.sites=[up]"): "there is no site 'up'; sites here are down",
    }.items():
        with pytest.raises(UsageError, match=why):
            check_method(changes[0], ["protect.renew=true", changes[1]])
    with pytest.raises(UsageError, match="there is no site 'dwn'; sites here are down, up"):
        check_method("finetune", ["protect.sites=[dwn]"])


class Breaker(FineTune):
    """Plain fine-tuning whose subclasses each break one rule."""

    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)


class MovesTheBackbone(Breaker):
    def learn(self, task: Task) -> None:
        super().learn(task)
        with torch.no_grad():
            next(p for n, p in self.model.backbone.net.named_parameters() if "pets" not in n).add_(1e-6)


class LeavesGradientsOn(Breaker):
    def learn(self, task: Task) -> None:
        super().learn(task)
        self.model.head.weight.requires_grad_(True)


class DrawsFromTheGlobalGenerator(Breaker):
    def learn(self, task: Task) -> None:
        super().learn(task)
        random.random()


class IsNotRepeatable(Breaker):
    count = 0

    def learn(self, task: Task) -> None:
        super().learn(task)
        type(self).count += 1
        with torch.no_grad():
            self.model.head.weight.mul_(1 + self.count / 100)


class HidesMemory(Breaker):
    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)
        self.factor = 1.0  # not a buffer, so no checkpoint has it

    def learn(self, task: Task) -> None:
        super().learn(task)
        self.factor += 1

    def predict(self, inputs: Tensor) -> Tensor:
        return super().predict(inputs) * self.factor


class LooksAtItsCompanions(Breaker):
    def predict(self, inputs: Tensor) -> Tensor:
        scores = super().predict(inputs)
        return scores - scores.mean(0)


class ScoresUnseenClasses(Breaker):
    def predict(self, inputs: Tensor) -> Tensor:
        return nn.functional.pad(super().predict(inputs), (0, 1))


class WantsTheTask(Breaker):
    def predict(self, inputs: Tensor, task: Any = None) -> Tensor:
        return super().predict(inputs)


class LooksAtTheTest(Breaker):
    def learn(self, task: Task) -> None:
        super().learn(task)
        assert len(task.test) >= 0


class NeedsTwoClasses(Breaker):
    def learn(self, task: Task) -> None:
        assert len(task.classes) > 1, "needs two classes"
        super().learn(task)


class ForgetsItsPhase(Breaker):
    """Learns from how often `loss` was called, which a resumed phase does not repeat."""

    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)
        self.calls = 0

    def loss(self, task: Task, batch: Any) -> Tensor:
        self.calls += 1
        return super().loss(task, batch) * (1 + self.calls)

    def learn(self, task: Task) -> None:
        self.calls = 0
        super().learn(task)


class ForgetsItsGuard(Breaker):
    """Trains without what keeps the optimizer out of old directions."""

    def companions(self) -> list[Any]:
        return []


class AnswersWithAnUnprotectedCopy(Breaker):
    """Trains the first set, and says that what answers, its average, is what it trains: the guard holds the average."""

    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)
        copy_set(model, "default", "average")
        self.trained = self.answering = ("average",)

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        fit(self.loss, self.groups(self.train_config, ["default"]), task, self.train_config)
        with torch.no_grad():
            for own, mean in zip(parameters(self.model, "default"), parameters(self.model, "average"), strict=True):
                mean.lerp_(own, 0.5)

    def loss(self, task: Task, batch: Any) -> Tensor:
        with using(self.model, "default"):
            return self.model.loss(task, batch)


# Each with the rule that has to catch it, and a part of what is said.
BROKEN: dict[type, tuple[Callable[[Checker], None], str]] = {
    MovesTheBackbone: (rules.backbone_untouched, "bit-identical"),
    LeavesGradientsOn: (rules.only_own_parameters_trained, "requires_grad"),
    DrawsFromTheGlobalGenerator: (rules.global_generators_untouched, "global generator"),
    IsNotRepeatable: (rules.same_seed_same_result, "same seed"),
    HidesMemory: (rules.checkpoint_round_trip, "restores the whole method"),
    LooksAtItsCompanions: (rules.batch_companions_do_not_matter, "other inputs of its batch"),
    ScoresUnseenClasses: (rules.scores_only_for_classes_seen, "one score for each class"),
    WantsTheTask: (rules.nothing_but_inputs_reaches_predict, "takes only inputs"),
    LooksAtTheTest: (rules.nothing_but_inputs_reaches_predict, "takes only inputs"),
    NeedsTwoClasses: (rules.small_tasks, "a task of one class"),
    ForgetsItsGuard: (rules.protection_protects, "the worst site"),
    AnswersWithAnUnprotectedCopy: (rules.protection_protects, "the optimizer trains the set of pets 'default'"),
    ForgetsItsPhase: (rules.stopping_inside_a_task_changes_nothing, "starting again"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_each_rule_catches_a_method_that_breaks_it(broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, says = BROKEN[broken]
    assert rule in rules.RULES
    monkeypatch.setattr(rules, "RULES", (rule,))  # the others take the most of the time
    outcomes = check_method(f"{__name__}:{broken.__name__}")
    faults = " ".join(f"{o.rule}: {o.fault}" for o in outcomes if o.fault is not None)
    assert says in faults
