"""Strategies that jobs share: population-based training through the cluster's registry, beside as many runs of random search.

    shoal run -n 4 --servers 1 examples/population.py
    shoal run -n 4 --servers 1 examples/population.py --narrow

Each worker is a job of its own, which trains a small net with settings that it has drawn. After each generation it publishes
its weights with how good they are; the worst goes on from the weights of the best, with settings near theirs. Random search
trains as long, and copies nothing.
"""

import json
import random
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import shoal
from shoal.tasks.card import Lineage
from shoal.tasks.population import Said, Space, move

torch.set_num_threads(1)
GENERATIONS, STEPS = 8, 30
SPACE = Space({"lr": (1e-4, 1.0), "decay": (1e-6, 1e-2)})
NARROW = Space({"lr": (0.2, 0.4), "decay": (1e-6, 1e-5)})
"""Where any draw will do, there is nothing to be gained."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, settings: dict[str, float], x: torch.Tensor, y: torch.Tensor) -> None:
    opt = torch.optim.SGD(model.parameters(), lr=settings["lr"], weight_decay=settings["decay"])
    for _ in range(STEPS):
        chosen = torch.randint(0, len(x), (32,))
        opt.zero_grad()
        functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        opt.step()


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    x, held_x, y, held_y = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)

    def score(model: nn.Module) -> float:
        return (model(held_x).argmax(1) == held_y).float().mean().item()

    space = NARROW if "--narrow" in sys.argv else SPACE
    with shoal.connect() as worker, shoal.connect(role="client") as client:
        population = f"{worker.run}-member-"  # those of other runs are in the registry, too
        me, dice = f"{population}{worker.number}", random.Random(worker.number)
        model, settings, parent = net(), space.draw(dice.random), ""
        lonely, drawn = net(), settings
        for _ in range(GENERATIONS):
            train(model, settings, x, y)
            train(lonely, drawn, x, y)
            lineage = Lineage(parent=parent, data=(json.dumps(settings),))
            card = client.publish(me, model.state_dict(), {"accuracy": score(model)}, kind="digits", lineage=lineage)
            said = [newest(client, each["name"]) for each in client.models() if each["name"].startswith(population)]
            following = move(me, said, space, dice.random)
            settings, parent = dict(following.settings), card.identity
            if following.source != me:
                source = client.model(following.source)["versions"][-1]
                model.load_state_dict(client.load(following.source, source["version"]))
                parent = source["identity"]
        print(
            f"member {worker.number}: accuracy {score(model):.3f} with {settings}; random search {score(lonely):.3f} with {drawn}"
        )


def newest(client: shoal.Client, name: str) -> Said:
    """What a member has said last."""
    card = client.model(name)["versions"][-1]
    return Said(name, card["quality"]["digits"]["accuracy"], json.loads(card["lineage"]["data"][0]))


if __name__ == "__main__":
    main()
