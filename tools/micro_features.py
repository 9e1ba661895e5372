"""What the features of a small vision transformer are worth; `pretrain_micro.py` writes it on the card."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from perpetune.data.examples import Augment
from perpetune.data.names import natural
from perpetune.data.pictures.digits import DigitsSource
from perpetune.data.pictures.tables import PictureTable
from perpetune.data.pictures.view import PictureView
from perpetune.runtime import Runtime
from perpetune.tasks import Examples, evaluation_batches

BATCH = 256  # pictures per forward pass


class Pictures(Examples):
    """Some pictures of a table, whose target is their own number: what belongs to picture i (its label, its teacher's
    features) is row i of a tensor."""

    def __init__(
        self, table: PictureTable, rows: Sequence[int], preprocess: PictureView, augment: Augment = "crop_flip"
    ):
        self.table, self.rows, self.preprocess, self.augment = table, rows, preprocess, augment
        self.targets = range(len(rows))

    @property
    def classes(self) -> list[str]:
        """Those of the whole table."""
        return natural(set(self.table.labels))

    @property
    def labels(self) -> Tensor:
        """int64 `(N,)`, positions in `classes`."""
        position = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([position[self.table.labels[row]] for row in self.rows], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, seed: int | None) -> Tensor:
        return self.preprocess(self.table.open(self.rows[index]), self.augment, seed)


class Encoder(nn.Module):
    """A frozen or trained network around which pixels are normalised: uint8 `(B, 3, H, W)` to `(B, D)`."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: PictureView):
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.network((inputs / 255 - self.mean) / self.std)
        feature: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state[:, 0]
        return feature

    @torch.no_grad()
    def features(self, pictures: Pictures, runtime: Runtime) -> Tensor:
        """float32 `(N, D)` on the CPU, of the pictures in their order and without augmentation."""
        self.eval()
        found = []
        for batch in evaluation_batches(pictures, BATCH, runtime):
            with runtime.autocast():
                found.append(self(batch.inputs.pixels).float().cpu())
        return torch.cat(found)


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Accuracy on test of a ridge regression and of the nearest mean, both on features `(N, D)` that
    are standardised on train; the ridge is chosen on train too (leave one out)."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(train.numpy())
    x, y = scale.transform(train.numpy()), train_labels.numpy()
    judges = {"ridge": RidgeClassifierCV(alphas=np.logspace(-1, 5, 7)), "nearest mean": NearestCentroid()}
    return {
        name: float(judge.fit(x, y).score(scale.transform(test.numpy()), test_labels.numpy()))
        for name, judge in judges.items()
    }


def measure(
    student: Encoder, classify: nn.Linear, known: Pictures, held_out: Pictures, runtime: Runtime
) -> dict[str, float]:
    """Accuracies of `student`: its own classifier and both probes on held-out pictures, and both
    probes on scikit-learn's digits, which it never saw, one in four held out."""
    digits = DigitsSource()
    splits = {
        "held-out pictures": (known, held_out),
        "scikit-learn digits": tuple(
            Pictures(table, range(len(table)), student.preprocess) for table in (digits.train(), digits.test())
        ),
    }
    figures = {}
    for name, (ours, test) in splits.items():
        features = student.features(test, runtime)
        if test is held_out:
            right = classify.cpu()(features).argmax(1) == test.labels
            figures[f"{name}: own classifier"] = float(right.float().mean())
        found = probe(student.features(ours, runtime), ours.labels, features, test.labels)
        figures |= {f"{name}: {judge}": accuracy for judge, accuracy in found.items()}
    return figures
