"""Two jobs on one cluster share an encoder: each has data and a head of its own, and both train what they have in common.

    shoal run -n 2 --servers 2 examples/shared_encoder.py
    shoal run -n 2 --servers 2 examples/shared_encoder.py --unrelated

Job 0 has 40 labelled digits. Job 1 has 1,257 digits of which it knows only the pair that they belong to (0 and 1, 2 and 3,
…). Every worker registers the whole model and pushes what it has gradients for: the encoder and its own head. With
`--unrelated` the second job's labels are noise, and sharing does harm.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import shoal

FEW, STEPS = 40, 400


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    return nn.ModuleDict({"encoder": encoder, "digit": nn.Linear(32, 10), "pair": nn.Linear(32, 5)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--unrelated", action="store_true", help="The second job's labels are noise.")
    unrelated = parser.parse_args().unrelated
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    pairs = torch.randint(0, 5, (len(y),), generator=torch.Generator().manual_seed(0)) if unrelated else y // 2
    jobs = {"digit": (x[:FEW], y[:FEW]), "pair": (x, pairs)}

    def accuracy(net: nn.ModuleDict) -> float:
        return (net["digit"](net["encoder"](test_x)).argmax(1) == test_y).float().mean().item()

    def step(
        net: nn.ModuleDict, opt: torch.optim.Optimizer, job: str, inputs: torch.Tensor, truth: torch.Tensor
    ) -> None:
        opt.zero_grad()  # heads of other jobs have no gradient, and are not pushed
        functional.cross_entropy(net[job](net["encoder"](inputs)), truth).backward()
        opt.step()

    with shoal.connect() as worker:
        net, job = model(), "digit" if worker.number % 2 == 0 else "pair"
        opt = worker.optimizer(torch.optim.Adam(net.parameters(), lr=3e-3), net)
        batch = FEW // 2 if job == "digit" else 64
        epochs = STEPS * batch // len(jobs[job][0])
        for inputs, truth in worker.partition(
            jobs[job], batch_size=batch, epochs=epochs, name=job
        ):  # each job its own data
            step(net, opt, job, inputs, truth)
        if job == "digit":
            alone = model()
            plain = torch.optim.Adam(alone.parameters(), lr=3e-3)
            for _ in range(STEPS):
                chosen = torch.randint(0, FEW, (batch,))
                step(alone, plain, job, x[chosen], y[chosen])
            print(f"{FEW} labelled digits: accuracy {accuracy(net):.3f} shared, {accuracy(alone):.3f} alone")


if __name__ == "__main__":
    main()
