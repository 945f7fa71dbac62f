"""The worked example of data-parallel training: linear regression, 1,000 samples x 10 features, ten partitions of 100.

    shoal run -n 2 examples/linear_regression.py

Plain numpy through the raw API, and the exact least-squares solution to compare with.
"""

import numpy as np

import shoal

SAMPLES, FEATURES, PARTITION = 1000, 10, 100


def main() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, FEATURES))
    y = x @ random.normal(size=FEATURES) + 0.1 * random.normal(size=SAMPLES)
    exact = np.linalg.lstsq(x, y, rcond=None)[0]

    with shoal.connect() as worker:
        worker.register({"w": np.zeros(FEATURES)}, optimizer=shoal.SGD(lr=0.05))
        w = worker.pull()["w"]
        for xs, ys in worker.partition((x, y), batch_size=PARTITION, partition_size=PARTITION, epochs=40):
            error = xs @ w - ys
            worker.push({"w": 2 * xs.T @ error / len(ys)})
            worker.clock()
            worker.pull(out={"w": w})
            worker.log(loss=float(np.mean(error**2)))
        worker.pull(out={"w": w})
        distance = float(np.abs(w - exact).max())
        worker.log(distance=distance)
        print(f"{worker.name}: largest difference from the exact solution {distance:.5f}")


if __name__ == "__main__":
    main()
