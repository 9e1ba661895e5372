"""TreeLoRA: an adapter for each task, and a tree that finds the earlier tasks that resemble the one at hand.

Qian et al., ICML 2025, arXiv:2506.10355, as the paper means it: docs/design.md says where its released code differs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.heads.ncm import NCM
from perpetune.methods.adapters import AdapterBank
from perpetune.methods.base import Answers, Method, training
from perpetune.methods.gradients import GradientSketch, in_groups
from perpetune.models.base import Model
from perpetune.models.classifier import ImageClassifier, Mask, learn_statistics
from perpetune.numerics.signature import RunningMean, distance, normalised
from perpetune.numerics.similarity_tree import LowerConfidenceSearch, Node, SimilarityTree
from perpetune.pets import parameters, pets, slots, using
from perpetune.tasks import Batch, Inputs, Pick, Task, balanced, load_batches, questions

Mode = Literal["last", "merged", "routed"]
MODES: tuple[Mode, ...] = ("last", "merged", "routed")
DEFAULT, MERGED = "default", "merged"


class TreeLoRA(Method):
    """Trains a LoRA for each task and keeps it; the tasks that resemble the one at hand, found layer by layer, hold it.

    Every task has a signature: the mean of its gradients with respect to LoRA's `B` in a fixed basis, sketched
    (`GradientSketch`). Signatures stand in a tree whose levels are groups of layers. At each step a search by lower
    confidence bounds picks an earlier task; the loss gets `λ mean_l (1 − cos(ΔW_l, ΔW'_l))`, which draws the update of
    each module towards that of the picked task, in shallow layers towards one that stands for its whole branch. It is
    in [0, 2λ], whatever the loss is. With `regularise: 0` and `start: last` this is `finetune`, bit for bit.

    Args:
        model: with LoRA injected under the name `default`.
        train: how each task is trained.
        mask: for classifiers; see `ImageClassifier`.
        regularise: `λ`.
        start: what a task's adapter starts from: that of the `nearest` task, of the `last` one, or a `fresh` one.
        answer: how it predicts: with the adapter of the `last` task, with all of them `merged` into one, or `routed`:
            by the adapter of the task whose prototype is nearest among features of the bare backbone. No task is
            told; the other two ways are reported beside it.
        search: what is picked at each step: by lower confidence bounds (`lcb`), or of all the `nearest`; `random` and
            `farthest` are controls.
        confidence: the factor `c` of the bounds.
        probe: batches whose gradients say at the start which task is nearest.
        every: steps from one look at the gradient to the next.
        size: numbers of a signature for each module.
        groups: groups of layers, shallow to deep, that the tree's levels go by.
        budget: adapters that are kept; over it the two of the nearest tasks become one. None keeps all.

    Raises:
        UsageError: a pet that is no LoRA, or none.
    """

    points: Tensor
    distances: Tensor
    _tree: SimilarityTree | None

    def __init__(
        self,
        model: Model,
        *,
        train: FitConfig,
        mask: Mask = "task",
        regularise: Annotated[float, Field(ge=0)] = 0.1,
        start: Literal["nearest", "last", "fresh"] = "nearest",
        answer: Mode = "routed",
        search: Literal["lcb", "nearest", "random", "farthest"] = "lcb",
        confidence: Annotated[float, Field(ge=0)] = 0.3,
        probe: Annotated[int, Field(ge=1)] = 8,
        every: Annotated[int, Field(ge=1)] = 1,
        size: Annotated[int, Field(ge=1)] = 256,
        groups: Annotated[int, Field(ge=1)] = 4,
        budget: Annotated[int, Field(ge=1)] | None = None,
    ):
        super().__init__(model)
        if not any(DEFAULT in slot.pets for _, slot in slots(model)):
            raise UsageError("method treelora tunes LoRA, and the recipe has no pet: use `pet: lora`")
        if isinstance(model, ImageClassifier):
            model.mask = mask
        self.train_config, self.regularise, self.start, self.answer = train, regularise, start, answer
        self.searching, self.confidence, self.probe, self.every = search, confidence, probe, every
        self.pet = DEFAULT
        self.gradients = GradientSketch(model, DEFAULT, size=size)
        blocks = [int(found[1]) if (found := re.search(r"\.(\d+)(\.|$)", n)) else -1 for n in self.gradients.names]
        self.layers, self.layer_names = in_groups(self.gradients.names, blocks, groups)
        self.bank = AdapterBank(model, DEFAULT, budget)
        self.router = NCM(model.backbone.dim)
        self.mean = RunningMean(self.gradients.shape)
        self._store(SimilarityTree(self.layers))
        self._begun()

    def _begun(self) -> None:
        """What is known of a task before its first step."""
        self.mean.reset()
        self.steps = 0
        """Of the optimizer, in this task."""
        self.picked: int | None = None
        """The earlier task that the next step is drawn to."""
        self.drawn: int | None = None
        """And that which the bank is ready to be drawn to."""
        self.helped: list[dict[int, int]] = [{} for _ in self.layers]
        self.told: dict[str, Any] = {"start": None, "asked": self.start, "helped": [], "merged": []}
        self.looking: LowerConfidenceSearch | None = None

    # -- learning -------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config = self.train_config
        self._begin(task)
        groups = [(parameters(self.model, DEFAULT), config.lr), (self.model.trained(), config.head_lr or config.lr)]
        with training(self.model), self.model.resting(task), self.gradients.on():
            fit(self.loss, groups, task, config, each_step=lambda count: self._look(task, count))
        self._keep(task)
        with using(self.model, DEFAULT):
            self.model.summarise(task, config.batch_size)
        self._prototypes(task)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, DEFAULT):
            loss = self.model.loss(task, batch)
        if self.picked is None or self.regularise == 0:
            return loss
        if self.drawn != self.picked:
            helpers = self._helpers(self.picked)
            self.bank.draw_to({m: h for layer, h in zip(self.layers, helpers, strict=True) for m in layer})
            self.drawn = self.picked
        return loss + self.regularise * (1 - self.bank.alignment())

    def _begin(self, task: Task) -> None:
        """Choose where the adapter starts, and make ready to search."""
        self._begun()
        if not len(self.tree):
            return
        signature = normalised(self._probed(task))
        nearest = self.tree.nearest(signature).id
        if self.start == "nearest":
            self.bank.load(nearest)
        elif self.start == "fresh":
            self.bank.reset()
        chosen = {"nearest": nearest, "last": self.bank.newest, "fresh": None}[self.start]
        self.told["start"] = None if chosen is None else self.bank.called(chosen)
        self.looking = LowerConfidenceSearch(
            self.tree,
            self.confidence,
            seed=task.seed_of("search") % 2**31,
            delta=lambda node: node.spread / (2 * self._widest()),
        )
        for known in self.tree.ids:  # what the probe has shown, so that the first steps need not go through all
            self.looking.observe(known, self._distance(known, signature))
        self._pick(signature, task)

    @torch.enable_grad()
    def _probed(self, task: Task) -> Tensor:
        """The gradient `(L, k)` of a few batches where the last task has left the adapter."""
        run, size = task.runtime, self.train_config.batch_size
        few = balanced(task.train, self.probe * size, task.generator("probe"))
        trained = parameters(self.model, DEFAULT)
        mean = RunningMean(self.gradients.shape)
        for p in trained:
            p.requires_grad_(True)
        try:
            with self.gradients.on():
                mine = range(run.rank, len(few), run.world)
                requests = [[(i, None) for i in mine[s : s + size]] for s in range(0, len(mine), size)]
                for batch in load_batches(few, requests, run):
                    with run.autocast(), using(self.model, DEFAULT):
                        loss = self.model.loss(task, batch)
                    loss.backward()
                    mean.update(self.gradients.take().cpu(), len(batch))
        finally:
            for p in [*trained, *self.model.trained()]:
                p.requires_grad_(False)
                p.grad = None
        summed = run.sum((mean.mean * mean.weight).to(run.device, torch.float32))
        return summed.cpu() / len(few)

    def _look(self, task: Task, count: int) -> None:
        """After a step: what its gradient was, how far that is from the picked task, and which task is next."""
        self.steps += 1
        if self.steps % self.every:
            self.gradients.take()
            return
        run = task.runtime
        scaler = run.accelerator.scaler
        found = run.sum(self.gradients.take().to(run.device)).cpu()
        found = found / (scaler.get_scale() if scaler is not None else 1.0)
        if scaler is not None and not bool(torch.isfinite(found).all()):
            return  # a step that overflowed, and is not taken
        self.mean.update(found, count)
        if self.looking is None or self.picked is None:
            return
        signature = normalised(self.mean.value.cpu())
        self.looking.observe(self.picked, self._distance(self.picked, signature))
        self._pick(signature, task)

    def _distance(self, known: int, signature: Tensor) -> float:
        """How far a signature is from a known task's, for the search: in [0, 1], 1/2 where it is as far as from the mean
        of all tasks. What is common to all distances says nothing, and by the triangle inequality the rest is at most
        the spread of the tree; without this scale the bounds could not tell near tasks apart."""
        assert self.tree.root is not None
        more = distance(self.tree.point(known), signature) - distance(self.tree.root.mean, signature)
        return min(1.0, max(0.0, 0.5 + float(more) / (2 * self._widest())))

    def _widest(self) -> float:
        return self.tree.root.spread if self.tree.root is not None and self.tree.root.spread > 0 else 1.0

    def _pick(self, signature: Tensor, task: Task) -> None:
        """The earlier task that the next step is drawn to, and those that stand for its branch in shallow layers."""
        assert self.looking is not None
        if self.searching == "lcb":
            self.picked = self.looking.select()
        elif self.searching == "nearest":
            self.picked = self.tree.nearest(signature).id
        elif self.searching == "farthest":
            self.picked = max(self.tree.ids, key=lambda known: self._distance(known, signature))
        else:
            draw = task.generator("random arm", self.steps)
            self.picked = self.tree.ids[int(torch.randint(len(self.tree), (1,), generator=draw))]
        for counts, helper in zip(self.helped, self._helpers(self.picked), strict=True):
            counts[helper] = counts.get(helper, 0) + 1

    def _helpers(self, picked: int) -> list[int]:
        """For each group of layers the task in the middle of the branch that the tree has made by it."""
        path = self.tree.path(picked)
        return [self._middle(path[min(level + 1, len(path) - 1)]) for level in range(len(self.layers))]

    def _middle(self, node: Node) -> int:
        """The task of a node that is nearest to the mean of all; worked out once for each node."""
        key = (node.depth, node.tasks[0])
        if key not in self._middles:
            points = torch.stack([self.tree.point(known) for known in node.tasks])
            self._middles[key] = node.tasks[int(distance(points, node.mean).argmin())]
        return self._middles[key]

    def _keep(self, task: Task) -> None:
        """Store the adapter and the signature, and merge what is over the budget."""
        tree = self.tree
        self.told["helped"] = [
            {"group": name, "steps": {self.bank.called(helper): n for helper, n in counts.items()}}
            for name, counts in zip(self.layer_names, self.helped, strict=True)
            if counts
        ]
        slot = tree.insert(normalised(self.mean.value.cpu()))
        self.bank.keep(slot, task.name, task.classes, len(task.train))
        while (pair := self.bank.over(tree)) is not None:
            kept, gone = pair
            self.told["merged"].append([self.bank.called(kept), self.bank.called(gone)])
            share = self.bank.weight(gone) / (self.bank.weight(kept) + self.bank.weight(gone))
            middle = torch.lerp(tree.point(kept), tree.point(gone), share)
            self.bank.merge(kept, gone)
            tree.remove(gone)
            tree.replace(kept, normalised(middle))
        self.bank.merge_all(MERGED)
        self._store(tree)
        self.picked, self.drawn, self.looking = None, None, None

    def _prototypes(self, task: Task) -> None:
        """Means of the bare backbone's features, by which a question finds its task."""
        asked = questions(task.train)
        own = Pick([asked], [(0, i) for i in range(len(asked))], [[0] * max(1, len(task.classes))])
        self.router.grow([task.name], task.generator("router"))

        def bare(batch: Batch) -> Tensor:
            with using(self.model, None):
                return self.model.features(batch.inputs)

        as_one = dataclasses.replace(task, classes=(task.name,), train=own)
        learn_statistics(as_one, self.train_config.batch_size, [(self.router, bare)])

    # -- predicting -----------------------------------------------------------------------------------

    def predict(self, inputs: Inputs) -> Tensor:
        return self._by(self.answer, inputs)

    def answers(self, inputs: Inputs) -> Answers:
        others: dict[str, Tensor] = {mode: self._by(mode, inputs) for mode in MODES if mode != self.answer}
        return Answers(self.predict(inputs), others)

    def _by(self, mode: Mode, inputs: Inputs) -> Tensor:
        if mode == "routed":
            return self.bank.routed(inputs, self._slots_of(inputs))
        with using(self.model, DEFAULT if mode == "last" else MERGED):
            return self.model.predict(inputs)

    def _slots_of(self, inputs: Inputs) -> list[int]:
        """The adapter of the task that each input seems to be of."""
        with using(self.model, None):
            scores = self.router(self.model.features(inputs))
        return [self.bank.slot_of(self.router.classes[row]) for row in scores.argmax(1).tolist()]

    # -- telling and storing --------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        ids = self.tree.ids
        called = {i: self.bank.called(i) for i in ids}
        tree = {
            "kind": "similarity tree",
            "names": {str(i): called[i] for i in ids},
            "nodes": self.tree.nodes(),
            "groups": self.layer_names,
            "distances": [[round(value, 4) for value in row] for row in self.tree.distances.tolist()],
            **self.told,
            "adapters": self.bank.facts(),
            "signature_bytes": 4 * self.gradients.shape[0] * self.gradients.shape[1],
        }
        return {**super().facts(), "tree": tree}

    @property
    def tree(self) -> SimilarityTree:
        """The tree of the tasks learned so far; after loading it is made again from what was stored."""
        if self._tree is None:
            self._tree = SimilarityTree.from_state({"points": self.points, "distances": self.distances}, self._rest)
        return self._tree

    def _store(self, tree: SimilarityTree) -> None:
        tensors, self._rest = tree.state()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._tree = tree
        self._middles: dict[tuple[int, int], int] = {}

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "tree": self._rest,
            "search": self.looking.state() if self.looking is not None else None,
            "steps": self.steps,
            "picked": self.picked,
            "helped": [{str(k): n for k, n in counts.items()} for counts in self.helped],
            "told": self.told,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._rest, count = state["tree"], len(state["tree"]["ids"])
        shape = self.gradients.shape if count else (0, 0)
        self.register_buffer("points", torch.zeros(count, *shape))
        self.register_buffer("distances", torch.zeros(count, count))
        self._tree, self._middles = None, {}
        self.steps, self.picked, self.told = state["steps"], state["picked"], state["told"]
        self.drawn = None
        self.helped = [{int(k): n for k, n in counts.items()} for counts in state["helped"]]
        if state["search"] is None:
            self.looking = None
        elif self.looking is not None:  # a task that was stopped in the middle: `_begin` has made the search anew
            self.looking.load_state(state["search"])
