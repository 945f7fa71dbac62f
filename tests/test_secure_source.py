"""What no file of the secure mathematics may do: draw from what can be guessed, or show a secret (rung T0, SPEC §14)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shoal.protocol import secure
from shoal.protocol.secure.fixed import Quantiser, ratio
from shoal.protocol.secure.keys import Identity, Pair
from shoal.protocol.secure.masks import Masks
from shoal.protocol.secure.scale import Scale
from shoal.protocol.secure.shares import Combiner, split

FILES = sorted(Path(str(secure.__file__)).parent.glob("*.py"))
CHANCE = {"noise.py": {"np.random.Generator", "np.random.PCG64DXSM"}}
"""Who may name a generator that is not the system's, and which: for noise, seeded from the system."""
SYSTEM = {"shares.py": {"secrets.randbelow"}, "fixed.py": {"secrets.token_bytes"}, "noise.py": {"secrets.randbits"}}
"""Who draws from the system itself, and how; keys are drawn by cryptography."""


def names(tree: ast.AST) -> set[str]:
    """Every dotted name, and every module that is imported."""
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def chance(source: str) -> set[str]:
    """What of a source is not the system's chance."""
    return {
        name
        for name in names(ast.parse(source))
        if name.startswith(("random", "np.random.", "numpy.random", "torch", "uuid", "time"))
    }


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_nothing_is_drawn_from_what_can_be_guessed(path: Path) -> None:
    """No `random`, no `np.random` but the noise's own generator, and no global state of it."""
    source = path.read_text()

    assert CHANCE.get(path.name, set()) == chance(source)
    drawn = {name for name in names(ast.parse(source)) if name.startswith(("secrets.", "os."))}
    assert SYSTEM.get(path.name, set()) == drawn


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import randbytes",
        "import numpy as np\nnp.random.default_rng(3)",
        "import numpy as np\nnp.random.seed(1)",
        "from numpy.random import default_rng",
        "import torch\ntorch.rand(3)",
        "import uuid",
    ],
)
def test_the_search_finds(source: str) -> None:
    """The control: each of these is noticed."""
    assert chance(source)


def test_there_are_files() -> None:
    assert {"masks.py", "fixed.py", "keys.py", "shares.py", "noise.py"} <= {path.name for path in FILES}
    assert not [
        node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)
    ]


def test_no_secret_is_in_a_repr() -> None:
    """Of anything that holds one: neither as bytes, nor in hex, nor as a number."""
    secret = bytes(range(7, 39))
    holders: list[object] = [
        Pair.of(secret),
        Identity.of(secret),
        Masks([secret], [secret]),
        Combiner([1, 2]),
        Quantiser(Scale(16, 1.0, 8.0, 2), ratio(7.25, 1.0, 8.0), secret),
        ratio(7.25, 1.0, 8.0),
    ]
    forms = [
        repr(secret)[2:20],
        secret.hex()[:16],
        str(int.from_bytes(secret, "big"))[:12],
        "7.25",
        str(round(7.25 * 2**20)),
    ]
    for holder in holders:
        for form in forms:
            assert form not in f"{holder!r} {holder} {[holder]}"
    with pytest.raises(ValueError, match="32 bytes in 1 shares") as refused:
        split(secret, 2, [1])
    assert not [form for form in forms if form in str(refused.value)]
