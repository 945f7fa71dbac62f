"""Versions become one: a soup of fine-tuned versions, and a student of an ensemble, each with a case in which it does not help.

    python examples/soup_and_student.py

Five versions are fine-tuned from one parent, on other data and at other learning rates; the average of their weights is
evaluated, published with its parents, and promoted if it is better. The average of five nets that began apart is not. Then a
net of 8 hidden units learns what an ensemble says of inputs without labels: it helps where labels are few, and not where
there are enough.
"""

import copy
import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import shoal
from shoal.tasks import distill, fuse
from shoal.tasks.card import Lineage

torch.set_num_threads(1)


def net(hidden: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float, steps: int, seed: int) -> nn.Module:
    """On labels, or on rows of soft targets."""
    opt, draw = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (32,), generator=draw)
        said, wanted = model(x[chosen]), y[chosen]
        loss = distill.loss(said, wanted) if wanted.ndim == 2 else functional.cross_entropy(said, wanted)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    x, rest_x, y, rest_y = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    held_x, test_x, held_y, test_y = train_test_split(rest_x, rest_y, test_size=0.5, random_state=0, stratify=rest_y)

    def accuracy(model: nn.Module, on: torch.Tensor = test_x, truth: torch.Tensor = test_y) -> float:
        return (model(on).argmax(1) == truth).float().mean().item()

    def evaluate(weights: dict[str, torch.Tensor], on: torch.Tensor = held_x, truth: torch.Tensor = held_y) -> float:
        model = net(64)
        model.load_state_dict(weights)
        return accuracy(model, on, truth)

    with tempfile.TemporaryDirectory() as folder, shoal.registry(folder) as models:
        few = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:150]
        parent = train(net(64), x[few], y[few], 0.05, 150, 0)
        first = models.publish(
            "digits", parent.state_dict(), quality={"digits": {"accuracy": accuracy(parent, held_x, held_y)}}
        )
        models.promote("digits", first.version)
        versions, cards = [], []
        for number, lr in enumerate((0.02, 0.05, 0.1, 0.15, 0.2)):
            part = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))[:250]
            versions.append(train(copy.deepcopy(parent), x[part], y[part], lr, 120, number).state_dict())
            quality = {"digits": {"accuracy": evaluate(versions[-1])}}
            cards.append(
                models.publish("digits", versions[-1], quality=quality, lineage=Lineage(parent=first.identity))
            )
        soup = fuse.uniform(versions, evaluate)
        parents = tuple(f"version {cards[number].version} ({cards[number].identity[:12]})" for number in soup.used)
        lineage = Lineage(parent=first.identity, data=("soup", *parents))
        card = models.publish("digits", soup.weights, quality={"digits": {"accuracy": soup.quality}}, lineage=lineage)
        if soup.quality >= max(soup.alone):
            models.promote("digits", card.version, "a soup that is no worse than its best version")
        alone = [evaluate(version, test_x, test_y) for version in versions]
        told = f"soup {evaluate(soup.weights, test_x, test_y):.3f}, its versions {min(alone):.3f} to {max(alone):.3f}"
        print(f"fine-tuned from one parent: {told}; version {models.find('digits').version} is promoted")

    apart = [train(net(64, 100 + number), x, y, 0.1, 200, number) for number in range(5)]
    mixed = evaluate(fuse.average([model.state_dict() for model in apart]), test_x, test_y)
    print(
        f"begun apart: soup {mixed:.3f}, its versions {min(map(accuracy, apart)):.3f} to {max(map(accuracy, apart)):.3f}"
    )

    with torch.no_grad():
        targets = distill.soft_targets([model(x) for model in apart])
        ensemble = (
            (distill.soft_targets([model(test_x) for model in apart], 1.0).argmax(1) == test_y).float().mean().item()
        )
    student = accuracy(train(net(8), x, targets, 0.05, 600, 0))
    for count in (60, len(x)):
        plain = accuracy(train(net(8), x[:count], y[:count], 0.05, 600, 0))
        print(
            f"{count} labels: student {student:.3f} of an ensemble of {ensemble:.3f}, the same net without teachers {plain:.3f}"
        )


if __name__ == "__main__":
    main()
