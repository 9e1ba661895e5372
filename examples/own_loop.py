"""Protection in a training loop of one's own: a network learns two tasks one after the other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perpetune


def task(number: int) -> tuple[Tensor, Tensor]:
    """Inputs `(256, 32)` in a few directions of their own, and four classes."""
    rng = torch.Generator().manual_seed(number)
    middles, directions = torch.randn(4, 6, generator=rng), torch.randn(6, 32, generator=rng)
    targets = torch.arange(256) % 4
    return (middles[targets] + 0.3 * torch.randn(256, 6, generator=rng)) @ directions, targets


def learn(protected: bool, steps: int) -> dict[str, float]:
    """Learn both tasks; how far the outputs on the first have moved after the second, and the loss on either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    protection = perpetune.protect(model, energy=0.999)
    if protected:
        protection.guard(optimizer)
    (first, answers), before = task(1), None
    for number in (1, 2):
        inputs, targets = task(number)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if before is None:
            before = model(first).detach()
            protection.consolidate(inputs.split(64))
    print(protection if protected else "without protection")
    with torch.no_grad():
        after, learned = model(first), model(inputs)
    change, losses = (
        (after - before).norm() / before.norm(),
        (F.cross_entropy(after, answers), F.cross_entropy(learned, targets)),
    )
    return {"change": change.item(), "first": losses[0].item(), "second": losses[1].item()}


def main(steps: int = 200) -> dict[str, dict[str, float]]:
    found = {name: learn(name == "protected", steps) for name in ("protected", "free")}
    print(*found.items(), sep="\n")
    return found


if __name__ == "__main__":
    main()
