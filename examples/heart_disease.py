"""Four hospitals train one model of heart disease, and none shows its patients or what it learned from them.

    make data
    shoal run -n 4 --servers 2 --mode federated --rounds 60 examples/heart_disease.py

Each worker is one hospital. On four machines: `shoal server --mode federated --rounds 60 --min-workers 4` on one of them, and this
script with SHOAL_JOIN and its own `--hospital` on each. `--made-up 1` takes patients that do not exist.
"""

import argparse

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sources import HOSPITALS, heart_disease
from torch.nn.functional import binary_cross_entropy_with_logits

import shoal

LOCAL_STEPS, LEARNING_RATE, DECAY = 5, 0.5, 3e-3


def held_out(hospitals: np.ndarray, seed: int) -> np.ndarray:
    """A quarter of each hospital's patients, whom nobody trains on."""
    draw, chosen = np.random.default_rng(seed), np.zeros(len(hospitals), bool)
    for hospital in range(len(HOSPITALS)):
        patients = draw.permutation(np.flatnonzero(hospitals == hospital))
        chosen[patients[: len(patients) // 4]] = True
    return chosen


def fresh(features: int) -> torch.nn.Linear:
    """A logistic regression that knows nothing yet."""
    model = torch.nn.Linear(features, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


def train(model: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    """Plain gradient descent on these patients. Returns the loss before the last step."""
    opt = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    for _ in range(steps):
        opt.zero_grad()
        loss = binary_cross_entropy_with_logits(model(x)[:, 0], y)
        loss.backward()
        opt.step()
    return loss.item()


def auc(model: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor) -> float:
    """Area under the receiver operating characteristic: 0.5 is chance, 1 is perfect."""
    return float(roc_auc_score(y, model(x)[:, 0].detach()))


def main() -> None:
    parser = argparse.ArgumentParser(description="one hospital of four")
    parser.add_argument("--hospital", choices=HOSPITALS, help="by default the one with this worker's number")
    parser.add_argument("--seed", type=int, default=0, help="of who is held out")
    parser.add_argument("--made-up", type=int, metavar="SEED", help="patients that do not exist")
    parser.add_argument("--plot", metavar="FILE", help="a picture by the first hospital, .png or .svg")
    args = parser.parse_args()
    x, y, hospitals = heart_disease(args.made_up)
    test = held_out(hospitals, args.seed)

    model, curve = fresh(x.shape[1]), []
    with shoal.connect() as worker:
        number = HOSPITALS.index(args.hospital) if args.hospital else int(worker.name[1:]) % len(HOSPITALS)
        mine = (hospitals == number) & ~test
        for round_ in worker.rounds(model, examples=int(mine.sum()), require="secagg", metrics=["loss"]):
            loss = train(model, x[mine], y[mine], LOCAL_STEPS)
            outcome = round_.submit(metrics={"loss": loss})
            curve.append(outcome.metrics["loss"] if outcome.applied else float("nan"))
    # A hospital would now test on its own patients. Here all are at hand, to see what federation was worth.
    steps = LOCAL_STEPS * max(1, len(curve))
    alone = []
    for hospital in range(len(HOSPITALS)):
        theirs = (hospitals == hospital) & ~test
        one = fresh(x.shape[1])
        train(one, x[theirs], y[theirs], steps)
        alone.append(auc(one, x[test], y[test]))
    union = fresh(x.shape[1])
    train(union, x[~test], y[~test], steps)
    found, pooled = auc(model, x[test], y[test]), auc(union, x[test], y[test])
    if number == 0:
        for hospital, value in zip(HOSPITALS, alone, strict=True):
            print(f"trained on {hospital + ' alone':<20} AUC {value:.3f}")
        print(f"{'trained on the union':<31} AUC {pooled:.3f}")
        if args.plot:
            plot(args.plot, alone, pooled, found, curve)
    print(f"federated over {len(curve)} rounds: AUC {found:.3f}, {found - pooled:+.3f} from the union's")


def plot(path: str, alone: list[float], union: float, federated: float, curve: list[float]) -> None:
    """Bars of AUC, and the loss over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    left.barh([*HOSPITALS, "union", "federated"], [*alone, union, federated], color=["0.7"] * 4 + ["C0", "C1"])
    left.set(xlim=(0.5, 1.0), xlabel="AUC on held-out patients of all four")
    left.invert_yaxis()
    right.plot(range(1, len(curve) + 1), curve, color="C1")
    right.set(xlabel="round", ylabel="loss, averaged under the masks")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
