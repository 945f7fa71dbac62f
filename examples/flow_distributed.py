"""The distributed flow, all of it: data are partitioned, trained on in parallel, synchronised, optimised on the servers,
evaluated while training goes on, deployed, executed, fed back, and trained on again.

    make data-images
    shoal run -n 2 --servers 2 examples/flow_distributed.py

Fashion-MNIST. Both workers train and evaluate one net; the first publishes it. Then both serve it: one as an executor, the
other also as its client, whose images have been turned upside down, so that the first version is bad at them. They are fed
back with what they show, trained on, and the next version is promoted because it is better at what came. `--made-up 1` takes
images that do not exist.
"""

import argparse
import time

import torch
from sources import fashion
from torch import nn
from torch.nn import functional

import shoal

BATCH, TASK = 64, 50


def predict(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Scores by kind of garment."""
    hidden = functional.relu(functional.linear(images, weights["0.weight"], weights["0.bias"]))
    return functional.linear(hidden, weights["2.weight"], weights["2.bias"])


def measure(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over a batch; shoal adds them up exactly."""
    return {"correct": (model(batch[0]).argmax(1) == batch[1]).sum()}


def main() -> None:
    parser = argparse.ArgumentParser(description="the distributed flow")
    parser.add_argument("--made-up", type=int, metavar="SEED", help="images that do not exist")
    seed = parser.parse_args().made_up
    (x, y), (test_x, test_y) = fashion("train", seed), fashion("t10k", seed)
    x, y, test_x, test_y = x[:12_000], y[:12_000], test_x[:4_000], test_y[:4_000]
    turned_x, turned_y = x.flip(1)[:3_000], y[:3_000]  # what will come: every image upside down
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    with shoal.connect() as worker, shoal.connect(role="client") as client:
        first, kind = worker.number == 0, f"clothes-{worker.run}"  # versions of other runs are in the registry, too
        opt = worker.optimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model)

        def train(data: tuple[torch.Tensor, torch.Tensor], epochs: int, name: str) -> None:
            """Partition, train in parallel, synchronise within the bound, optimise on the shards."""
            for images, labels in worker.partition(data, batch_size=BATCH, epochs=epochs, name=name):
                opt.zero_grad()
                functional.cross_entropy(model(images), labels).backward()
                opt.step()

        worker.evaluation((test_x, test_y), measure, model=model, every=40, name="test")
        train((x, y), 3, "images")
        found = worker.evaluate((test_x, test_y), measure, model=model, name="final")
        if first:
            accuracy = found.means["correct"]
            card = worker.publish(kind, {"accuracy": accuracy}, trained_on=["12,000 images"], promote=True)
            print(f"version {card.version}: accuracy {accuracy:.3f} of {found.examples} held-out images")

        serving = worker.serve({kind: predict})
        until(lambda: kind in {each["name"] for each in client.models()})
        until(lambda: serving.loaded == (f"{kind} 1",))
        if first:
            right, executors = 0.0, set()
            pending = [client.submit(kind, turned_x[at : at + TASK]) for at in range(0, len(turned_x), TASK)]
            answers = [each.result(120) for each in pending]
            for answer, at in zip(answers, range(0, len(turned_x), TASK), strict=True):
                truth = turned_y[at : at + TASK]
                client.feedback(answer, truth=truth.numpy())
                right += float((answer.outputs.argmax(1) == truth).sum())
                executors.add(answer.executor)
            told = f"{len(answers)} tasks on {len(executors)} executors"
            print(f"executed: {told}; accuracy {right / len(turned_x):.3f} on what came, upside down")
            client.submit(kind, turned_x[:1]).result(60)
        else:
            until(lambda: sum(each["feedback"] for each in client.status()["quality"]) >= len(turned_x) // TASK)

        back = list(client.fed_back(kind))  # both have the same, in the same order
        learned = (
            torch.cat([each.inputs for each in back]),
            torch.cat([torch.from_numpy(each.truth.copy()) for each in back]),
        )
        held = len(learned[0]) // 4
        train((torch.cat([x[:4_000], learned[0][held:]]), torch.cat([y[:4_000], learned[1][held:]])), 3, "feedback")
        if first:
            new = predict(dict(worker.pull()), learned[0][:held]).argmax(1)
            old = predict(client.load(kind, 1), learned[0][:held]).argmax(1)
            after, before = (float((said == learned[1][:held]).float().mean()) for said in (new, old))
            parent = client.model(kind)["versions"][0]["identity"]
            card = worker.publish(kind, {"accuracy": after}, parent=parent, trained_on=["4,000 images", "feedback"])
            if after > before:
                client.promote(kind, card.version, why=f"{after:.3f} on what came, {before:.3f} before")
            promoted = client.model(kind)["promoted"]
            told = f"accuracy {after:.3f} on what came and nobody learned from, {before:.3f} before"
            print(f"version {card.version}: {told}; version {promoted} is promoted")


def until(condition: object) -> None:
    """Wait for the other worker, at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit("the other worker is not there")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
