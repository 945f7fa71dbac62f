"""A model that is served, a world that changes, and nobody who lifts a hand: the scanner is turned by 90 degrees.

    python examples/shift.py
    python examples/shift.py --nothing

Digits come as tasks, one image each and each image once; what was right comes back. After `BEFORE` of them the images lie on their
side. The fall is noticed in the rewards, what came since is learned from with shoal itself, on a cluster of its own, and the new
version is promoted because it was better on what was held out. The second does not turn anything, but has one truth in eight wrong:
noise is no drift, and nothing should happen. `--plot FILE` draws what `--save FILE` or this run has measured.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shoal

FIRST, BEFORE, STEP = 400, 400, 8
"""Images of the first training; tasks before the turn; tasks that come together."""
WRONG = 1 / 8
LAST = 160
"""Tasks at the end, which wait for an attempt that is under way: a slow machine sees the recovery, too."""
RULE = shoal.Rule(examples=200, margin=0.05, rest=5.0)

Weights = dict[str, torch.Tensor]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All of them, in an order of their own: float32 [1797, 8, 8] from 0 to 1, and classes."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(images[order] / 16.0, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(labels[order])


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def predict(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Scores by class."""
    with torch.no_grad():
        return torch.func.functional_call(network(), weights, (x,))


def fit(weights: Weights | None, x: torch.Tensor, y: torch.Tensor, epochs: int) -> Weights:
    """Train on a cluster that lives as long, data leased."""
    model = network()
    if weights is not None:
        model.load_state_dict(weights)
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as worker:
        opt = worker.optimizer(torch.optim.Adam(model.parameters(), lr=3e-3), model)
        for batch, truth in worker.partition((x, y), batch_size=32, epochs=epochs):
            opt.zero_grad()
            functional.cross_entropy(model(batch), truth).backward()
            opt.step()
    return dict(model.state_dict())


def train(weights: Weights, examples: list[Any]) -> Weights:
    """From the version that is served, on what came back."""
    x, y = torch.cat([each.inputs for each in examples]), torch.tensor([int(each.truth[0]) for each in examples])
    return fit(weights, x, y, epochs=80)


def evaluate(weights: Weights, examples: list[Any]) -> dict[str, float]:
    """The share that is right."""
    right = [int(predict(weights, each.inputs).argmax(1)) == int(each.truth[0]) for each in examples]
    return {"accuracy": float(np.mean(right))}


def stream(
    client: shoal.Client, improving: Any, x: torch.Tensor, y: torch.Tensor, nothing: bool, rate: float
) -> list[tuple[bool, int]]:
    """Tasks at a steady pace, and what was right after each few. Of each: was it answered rightly, and by which version."""
    draw, found = np.random.default_rng(1), []
    began = time.monotonic()
    for start in range(0, len(x), STEP):
        if len(x) - LAST <= start < len(x) - LAST + STEP:
            paused = time.monotonic()
            while improving.state not in ("watching", "resting") and time.monotonic() < paused + 60:
                time.sleep(0.1)
            began += time.monotonic() - paused
        images, truths = x[start : start + STEP], y[start : start + STEP].numpy()
        if not nothing and start >= BEFORE:
            images = images.rot90(1, (1, 2))
        if nothing:
            truths = np.where(draw.random(len(truths)) < WRONG, (truths + 1) % 10, truths)
        answers = [each.result(30) for each in [client.submit("digit", image[None]) for image in images]]
        client.feedback(answers, truth=[truth[None] for truth in truths])
        found += [(bool(np.argmax(a) == t), a.version) for a, t in zip(answers, truths, strict=True)]
        time.sleep(max(0.0, began + (start + STEP) / rate - time.monotonic()))
    return found


def run(nothing: bool, rate: float) -> dict[str, Any]:
    """One stream, from the first training to its end."""
    x, y = digits()
    weights = fit(None, x[:FIRST], y[:FIRST], epochs=30)
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join, role="client") as client:
        check, truths = x[FIRST : FIRST + 100], y[FIRST : FIRST + 100]
        accuracy = float((predict(weights, check).argmax(1) == truths).float().mean())
        client.publish("digit", weights, {"accuracy": accuracy}, promote=True)
        with shoal.connect(cluster.join) as worker, worker.serve({"digit": predict}):
            with shoal.improve(client, "digit", train=train, evaluate=evaluate, rule=RULE, poll=0.1) as improving:
                answered = stream(client, improving, x[FIRST + 100 :], y[FIRST + 100 :], nothing, rate)
                outcomes = [vars_of(each) for each in improving.outcomes]
        lineage = [(c["version"], c["quality"], c["lineage"]["data"]) for c in client.model("digit")["versions"]]
    return {
        "right": [right for right, _ in answered],
        "versions": [v for _, v in answered],
        "outcomes": outcomes,
        "cards": lineage,
    }


def vars_of(outcome: Any) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("end", "reason", "text", "before", "after", "version")}


def say(found: dict[str, Any], nothing: bool) -> None:
    """What has happened."""
    right = np.array(found["right"], dtype=float)
    if nothing:
        print(
            f"nothing changes, one truth in eight is wrong: {right.mean():.3f} of {len(right)} answers were called right"
        )
        print(f"attempts {len(found['outcomes'])}")
        return
    first = next((n for n, version in enumerate(found["versions"]) if version > 1), len(right))
    print(f"right before the turn        {right[:BEFORE].mean():.3f}  ({BEFORE} tasks)")
    print(f"right until it was mended    {right[BEFORE:first].mean():.3f}  ({first - BEFORE} tasks)")
    print(f"right afterwards             {right[first:].mean():.3f}  ({len(right) - first} tasks)")
    for each in found["outcomes"]:
        print(f"{each['end']}: {each['reason']}; {each['text']}")


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The share of right answers, of the last 40, as tasks come: `path`.png and `path`.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 3.4), sharey=True, squeeze=False)
    for axis, (name, found) in zip(axes[0], runs.items(), strict=True):
        right = np.array(found["right"], dtype=float)
        axis.plot(np.arange(40, len(right) + 1), np.convolve(right, np.ones(40) / 40, "valid"), lw=1.3)
        if name == "shift":
            axis.axvline(BEFORE, color="0.4", ls=":", lw=1, label="the images are turned")
        for each in found["outcomes"]:
            noticed = int(each["reason"].rsplit(" ", 1)[1]) if "noticed at" in each["reason"] else None
            if noticed:
                axis.axvline(noticed, color="tab:red", ls="--", lw=1, label="the fall is noticed")
        changes = [n for n in range(1, len(right)) if found["versions"][n] > max(found["versions"][:n])]
        for number, place in enumerate(changes):
            axis.axvline(place, color="tab:green", lw=1, label="" if number else "a new version answers")
        axis.set(title=name, xlabel="tasks", ylim=(0, 1.02))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="lower right", fontsize=8)
    axes[0][0].set_ylabel("right, of the last 40")
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "shoal"}):
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nothing", action="store_true", help="turn nothing; one truth in eight is wrong")
    parser.add_argument("--rate", type=float, default=60.0, help="tasks per second")
    parser.add_argument("--save", type=Path, help="add what was measured to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw it: FILE.png and FILE.svg")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    found = run(given.nothing, given.rate)
    say(found, given.nothing)
    name = "noise" if given.nothing else "shift"
    runs = json.loads(given.save.read_text()) if given.save and given.save.exists() else {}
    runs[name] = found
    if given.save:
        given.save.write_text(json.dumps(runs))
    if given.plot:
        plot(dict(sorted(runs.items(), reverse=True)), given.plot)


if __name__ == "__main__":
    main()
