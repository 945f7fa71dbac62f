"""Images: a small network on the scikit-learn digits (1,797 images of 8 x 8 pixels, 10 classes).

    shoal run -n 2 --servers 2 examples/digits.py

The same file trains on several machines: start `shoal server` on one of them, set SHOAL_JOIN on the others, run this with python.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import shoal


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16.0, dtype=torch.float32)
    labels = torch.tensor(labels)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with shoal.connect() as worker:
        opt = worker.optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model)
        for x, y in worker.partition((train_x, train_y), batch_size=32, epochs=20):
            opt.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            worker.log(loss=loss.item())
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        worker.log(accuracy=accuracy)
        print(f"{worker.name}: test accuracy {accuracy:.4f} after {worker.stats.steps} steps of this worker")


if __name__ == "__main__":
    main()
