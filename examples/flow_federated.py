"""The federated flow, all of it: four hospitals collect, train under masks, aggregate, deploy, execute, feed back, and train
again.

    make data
    python examples/flow_federated.py

A cluster and four hospitals (threads here; each would be a machine of its own). Version 1 is of the first half of their
patients. It is served by every hospital for its own patients alone, who come in as tasks; what was right of them stays in
the hospital's vault, encrypted. Version 2 has learned from them too, in rounds, and is promoted because it is better.
`--made-up 1` takes patients that do not exist.
"""

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sources import HOSPITALS, heart_disease
from torch.nn.functional import binary_cross_entropy_with_logits

import shoal
from shoal.worker.vault import Vault, VaultKey

ROUNDS, LOCAL_STEPS, RATE, DECAY = 25, 5, 0.5, 3e-3
KIND = "heart-risk"


def predict(weights: dict[str, torch.Tensor], patients: torch.Tensor) -> torch.Tensor:
    """The risk of each patient."""
    return torch.sigmoid(patients @ weights["weight"][0] + weights["bias"])


class Hospital:
    """One owner: its patients, its worker, its vault. Nothing of `x` and `y` leaves but under a mask, or as a task to itself."""

    def __init__(self, join: str, folder: Path, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        self.name, self.label = HOSPITALS[number], f"site:{HOSPITALS[number]}"
        self.known, self.coming, self.test = parts(number, len(x))
        self.x, self.y, self.number = x, y, number
        key = folder / f"key{number}"
        VaultKey.make(key)
        self.vault = Vault(folder / f"vault{number}", key)
        self.worker = shoal.connect(join, name=f"hospital{number}")
        self.client = shoal.connect(join, role="client")
        self.model = torch.nn.Linear(x.shape[1], 1)
        torch.nn.init.zeros_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)

    def train(self) -> None:
        """Collect what is there, train, encrypt, aggregate: so many rounds."""
        x, y = self.x[self.known], self.y[self.known]
        with self.vault.open("feedback") as kept:
            learned = list(kept)
        if learned:
            x = torch.cat([x, *(each["x"] for each in learned)])
            y = torch.cat([y, *(each["y"] for each in learned)])
        rounds = self.worker.rounds(self.model, examples=len(x), require="secagg", count=ROUNDS)
        for round_ in rounds:
            opt = torch.optim.SGD(self.model.parameters(), lr=RATE, weight_decay=DECAY)
            for _ in range(LOCAL_STEPS):
                opt.zero_grad()
                binary_cross_entropy_with_logits(self.model(x)[:, 0], y).backward()
                opt.step()
            round_.submit()

    def serve(self) -> None:
        """Execute: for this hospital's own patients, and for nobody else's."""
        self.worker.serve({KIND: predict}, data={self.label})

    def see_patients(self) -> list[tuple[str, int]]:
        """Tasks, and feedback once the truth is known. Returns which executor and version answered."""
        answers = []
        for batch in np.array_split(self.coming, 5):
            x, y = self.x[batch], self.y[batch]
            answer = self.client.submit(KIND, x, shoal.Needs(privacy=self.label, deadline=60)).result(60)
            right = float(((answer.outputs >= 0.5) == (y > 0)).float().mean())
            self.client.feedback(answer, reward=right)  # how good it was leaves; what was right does not
            with self.vault.open("feedback") as kept:
                kept.append({"x": x, "y": y})
            answers.append((answer.executor, answer.version))
        return answers

    def close(self) -> None:
        self.client.close()
        self.worker.close()


def parts(number: int, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one hospital's patients: those it knows, those who will come, and those whom nobody learns from."""
    order = np.random.default_rng(number).permutation(patients)
    quarter, half = patients // 4, (patients - patients // 4) // 2
    return order[quarter : quarter + half], order[quarter + half :], order[:quarter]


def main() -> None:
    parser = argparse.ArgumentParser(description="the federated flow")
    parser.add_argument("--made-up", type=int, metavar="SEED", help="patients that do not exist")
    x, y, hospitals = heart_disease(parser.parse_args().made_up)
    torch.set_num_threads(1)
    of = [torch.tensor(np.flatnonzero(hospitals == number)) for number in range(len(HOSPITALS))]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(HOSPITALS)) as pool:
        cluster = shoal.LocalCluster(mode="federated", shards=2, min_workers=len(HOSPITALS))
        with cluster:
            places = [(cluster.join, Path(folder), number, x[of[number]], y[of[number]]) for number in range(len(of))]
            owners = list(pool.map(lambda place: Hospital(*place), places))

            def auc(model: torch.nn.Module) -> float:
                """On held-out patients of all four: an example may, a hospital would know its own alone."""
                said = [model(owner.x[owner.test])[:, 0].detach() for owner in owners]
                return float(roc_auc_score(np.concatenate([owner.y[owner.test] for owner in owners]), torch.cat(said)))

            def deploy(parent: str, trained_on: Iterator[str]) -> tuple[shoal.Worker, float, str]:
                """Publish the parameters of the last round, with what they may see, and promote them if they are better."""
                quality, first = auc(owners[0].model), owners[0]
                labels = {owner.label for owner in owners}
                card = first.worker.publish(
                    KIND, {"auc": quality}, data=labels, parent=parent, trained_on=list(trained_on)
                )
                return card, quality, card.identity

            list(pool.map(Hospital.train, owners))
            card, before, identity = deploy("", (f"{len(owner.known)} patients" for owner in owners))
            owners[0].client.promote(KIND, card.version, why="the first")
            for owner in owners:
                owner.serve()
            seen = list(pool.map(Hospital.see_patients, owners))
            at_home = all(
                name == f"hospital{owner.number}" for owner, each in zip(owners, seen, strict=True) for name, _ in each
            )
            print(
                f"version {card.version}: AUC {before:.3f}; {sum(map(len, seen))} tasks, each answered at home: {at_home}"
            )
            feedback = owners[0].client.status()["quality"]
            print(
                f"feedback: {feedback[0]['mean']:.3f} of {feedback[0]['feedback']} tasks; what was right is in four vaults"
            )

            list(pool.map(Hospital.train, owners))
            count = (f"{len(owner.known) + len(owner.coming)} patients" for owner in owners)
            card, after, _ = deploy(identity, count)
            if after > before:
                owners[0].client.promote(KIND, card.version, why=f"AUC {after:.3f} after {before:.3f}")
            promoted = owners[0].client.model(KIND)["promoted"]
            print(f"version {card.version}: AUC {after:.3f} with what came back; version {promoted} is promoted")
            for owner in owners:
                owner.close()


if __name__ == "__main__":
    main()
