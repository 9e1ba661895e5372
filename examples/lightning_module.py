"""Protection in Lightning: guard the optimizer where it is made, protect what was learned when training ends."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import perpetune


class Classifier(lightning.LightningModule):
    def __init__(self, protected: bool):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
        self.protected, self.protection = protected, perpetune.protect(self.model, energy=0.999)  # in every checkpoint

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        if self.protected:
            self.protection.guard(optimizer)
        return optimizer

    def on_train_end(self) -> None:
        if self.protected:
            self.protection.consolidate(self.trainer.train_dataloader)


def task(number: int) -> tuple[Tensor, Tensor]:
    """Inputs `(256, 32)` in a few directions of their own, and four classes."""
    rng = torch.Generator().manual_seed(number)
    middles, directions = torch.randn(4, 6, generator=rng), torch.randn(6, 32, generator=rng)
    targets = torch.arange(256) % 4
    return (middles[targets] + 0.3 * torch.randn(256, 6, generator=rng)) @ directions, targets


def learn(protected: bool, steps: int) -> dict[str, float]:
    """Learn both tasks; how far the outputs on the first have moved after the second, and the loss on either."""
    torch.manual_seed(0)
    learner, before = Classifier(protected), None
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for number in (1, 2):
        trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, enable_model_summary=False, **quiet)
        trainer.fit(learner, DataLoader(TensorDataset(*task(number)), batch_size=64))
        before = learner.model(task(1)[0]).detach() if before is None else before
    print(learner.protection if protected else "without protection")
    with torch.no_grad():
        after, learned = learner.model(task(1)[0]), learner.model(task(2)[0])
    change, targets = (after - before).norm() / before.norm(), task(1)[1]
    losses = [F.cross_entropy(outputs, targets).item() for outputs in (after, learned)]
    return {"change": change.item(), "first": losses[0], "second": losses[1]}


def main(steps: int = 200) -> dict[str, dict[str, float]]:
    found = {name: learn(name == "protected", steps) for name in ("protected", "free")}
    print(*found.items(), sep="\n")
    return found


if __name__ == "__main__":
    main()
