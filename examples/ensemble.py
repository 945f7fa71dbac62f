"""Several models on one task: mean, vote, weights by what is believed, a stack, and a cascade, over the wire.

    python examples/ensemble.py

Three models that see other halves of a digit's pixels are published, and one worker serves them. A client asks them
together. In the cascade the smallest is asked first, and the next only about what it is not sure of. Three copies of one
model gain nothing by voting.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import shoal
from shoal.tasks import together
from shoal.worker import ensemble

torch.set_num_threads(1)
VIEWS = {"left": slice(0, 5), "right": slice(3, 8), "small": slice(0, 8)}
HIDDEN = {"left": 64, "right": 64, "small": 6}


def predict(name: str):
    def function(weights: dict[str, torch.Tensor], inputs: np.ndarray) -> np.ndarray:
        seen = torch.tensor(inputs).view(-1, 8, 8)[:, :, VIEWS[name]].flatten(1)
        hidden = functional.relu(functional.linear(seen, weights["0.weight"], weights["0.bias"]))
        return functional.linear(hidden, weights["2.weight"], weights["2.bias"]).softmax(1).numpy()

    return function


def train(name: str, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    torch.manual_seed(len(name))
    seen = x.view(-1, 8, 8)[:, :, VIEWS[name]].flatten(1)
    model = nn.Sequential(nn.Linear(seen.shape[1], HIDDEN[name]), nn.ReLU(), nn.Linear(HIDDEN[name], 10))
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        chosen = torch.randint(0, len(x), (64,))
        opt.zero_grad()
        functional.cross_entropy(model(seen[chosen]), y[chosen]).backward()
        opt.step()
    return model


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    x, rest_x, y, rest_y = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    held_x, test_x, held_y, test_y = train_test_split(
        rest_x.numpy(), rest_y.numpy(), test_size=0.5, random_state=0, stratify=rest_y
    )
    names = list(VIEWS)
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as worker:
        with shoal.connect(cluster.join, role="client") as client:
            models = {name: train(name, x, y) for name in names}
            for name, model in models.items():
                with torch.no_grad():
                    right = (predict(name)(model.state_dict(), held_x).argmax(1) == held_y).mean()
                client.publish(name, model.state_dict(), {"accuracy": float(right)}, kind="digit", promote=True)
            worker.serve({name: predict(name) for name in names})

            def accuracy(outputs: np.ndarray) -> float:
                said = outputs if outputs.ndim == 1 else outputs.argmax(1)
                return float((said == test_y).mean())

            held = [np.asarray(client.submit("digit", held_x, model=name).result(60)) for name in names]
            alone = {
                name: accuracy(np.asarray(client.submit("digit", test_x, model=name).result(60))) for name in names
            }
            stack = together.Stack.fit(held, held_y)
            found = {
                "mean": ensemble.ask(client, "digit", test_x, names).outputs,
                "vote": ensemble.ask(client, "digit", test_x, names, together.vote).outputs,
                "weighted": ensemble.believed(client, "digit", test_x, names).outputs,
                "stack": ensemble.ask(client, "digit", test_x, names, stack).outputs,
            }
            print("alone: " + ", ".join(f"{name} {value:.3f}" for name, value in alone.items()))
            print("together: " + ", ".join(f"{how} {accuracy(outputs):.3f}" for how, outputs in found.items()))
            copies = ensemble.ask(client, "digit", test_x, ["left"] * 3, together.vote).outputs
            print(f"three copies of left: vote {accuracy(copies):.3f}")
            stage = together.Cascade.calibrate(held[2], held_y, 0.98)
            done = ensemble.cascade(client, "digit", test_x, ["small", "left"], [stage])
            share = done.asked["left"] / done.asked["small"]
            print(
                f"cascade small, then left: {accuracy(done.outputs):.3f}, and {share:.0%} of the inputs went to the second"
            )


if __name__ == "__main__":
    main()
