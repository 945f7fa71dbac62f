"""Classification with plain numpy: logistic regression on the Breast Cancer Wisconsin data (569 x 30) through the raw API.

    shoal run -n 2 examples/breast_cancer.py

Nothing here knows torch: the gradient is written out, and Adam runs on the servers.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import shoal


def main() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    mean, deviation = train_x.mean(0), train_x.std(0)
    train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation

    with shoal.connect() as worker:
        first = {"weights": np.zeros(30, np.float32), "bias": np.zeros(1, np.float32)}
        worker.register(first, optimizer=shoal.Adam(lr=0.05))
        model = worker.pull()
        for xs, ys in worker.partition((train_x.astype(np.float32), train_y), batch_size=32, epochs=15):
            p = 1 / (1 + np.exp(-(xs @ model["weights"] + model["bias"])))
            error = (p - ys).astype(np.float32)
            worker.push({"weights": xs.T @ error / len(ys), "bias": error.mean(keepdims=True)})
            worker.clock()
            worker.pull(out=model)
            worker.log(loss=float(-np.mean(np.where(ys == 1, np.log(p + 1e-7), np.log(1 - p + 1e-7)))))
        model = worker.pull()
        accuracy = float(np.mean((test_x @ model["weights"] + model["bias"] > 0) == test_y))
        worker.log(accuracy=accuracy)
        print(f"{worker.name}: test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
