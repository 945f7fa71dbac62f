"""Identities on disk, and rounds in which even the servers may lie (SPEC §14.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_federated import each

import shoal
from shoal.launch.identities import load, load_list, load_or_make, own
from shoal.protocol.errors import ConfigError
from shoal.protocol.join import key_text
from shoal.protocol.secure.keys import Identity, is_weak

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """On the curve of RFC 8032, §5.1."""
    (x, y), (u, v) = a, b
    k = D * x * u * y * v % P
    return (x * v + y * u) * pow(1 + k, -1, P) % P, (y * v + x * u) * pow(1 - k, -1, P) % P


def test_weak_keys_are_all_points_of_small_order() -> None:
    """Found by arithmetic: every point whose eightfold is nothing, and encodings of y that are not reduced."""
    ys = [y for y in range(P, 2**255) if y - P in (0, 1)]  # of the weak ones, those that fit 255 bits once more
    i = pow(2, (P - 1) // 4, P)
    eighth = []
    for sign in (1, -1):  # x^2 = -1/d (1 ± sqrt(1 + d)) gives order 8: doubled, y is 0
        root = pow(1 + D, (P + 3) // 8, P)
        root = root if root * root % P == (1 + D) % P else root * i % P
        assert root * root % P == (1 + D) % P
        y2 = (1 + sign * root) * pow(-D, -1, P) % P
        y = pow(y2, (P + 3) // 8, P)
        y = y if y * y % P == y2 else y * i % P
        if y * y % P == y2:
            eighth += [y, P - y]
    small = [0, 1, P - 1, *eighth]
    assert 5 == len(small)
    for y in small:
        x2 = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
        x = pow(x2, (P + 3) // 8, P)
        x = x if x * x % P == x2 else x * i % P
        assert x * x % P == x2
        point = (x, y)
        for _ in range(3):
            point = add(point, point)
        assert (0, 1) == point
    for y in [*small, *ys]:
        for sign in (0, 1 << 255):
            assert is_weak((y | sign).to_bytes(32, "little"))
    assert not any(is_weak(Identity.fresh().public) for _ in range(100))


def test_an_identity_is_its_owners(tmp_path: Path) -> None:
    """Made once, readable by nobody else, the same afterwards; what is no identity is said to be none."""
    path = tmp_path / "deep" / "me"
    made = load_or_make(str(path))
    assert made.public == load_or_make(str(path)).public == load(str(path)).public
    assert 0o600 == path.stat().st_mode & 0o777
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 640\).*chmod 600"):
        load(str(path))
    path.chmod(0o600)
    path.write_text("not a key")
    with pytest.raises(ConfigError, match="is not a key"):
        load(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "nobody"))
    with pytest.raises(ConfigError, match="no identity can be kept"):
        load_or_make(str(path / "below"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a {0} c", "line 1 of .* is not NAME KEY"),
        ("# all\n\na {0}\nb {0}", "line 4 of .* for the second time"),
        ("a {0}\na {1}", "line 2 of .* for the second time"),
        (f"a {'A' * 43}", "anybody can sign"),
        ("a short", "key in line 1"),
        ("# nobody", "lists no identity"),
    ],
)
def test_a_list_says_which_line_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(text.format(*(key_text(Identity.fresh().public) for _ in range(2))))
    with pytest.raises(ConfigError, match=told):
        load_list(str(path))


def test_a_worker_is_who_it_says(tmp_path: Path) -> None:
    mine, other = (load_or_make(str(tmp_path / name)) for name in "ab")
    peers = {"a": mine.public, "b": other.public}
    assert mine.public == own("a", str(tmp_path / "a"), peers).public
    with pytest.raises(ConfigError, match="the list of identities has no 'c'"):
        own("c", str(tmp_path / "a"), peers)
    with pytest.raises(ConfigError, match="listed for 'b' is not the one"):
        own("b", str(tmp_path / "a"), peers)
    with pytest.raises(ConfigError, match="belong together"):
        shoal.connect("127.0.0.1:1", name="a", identity=str(tmp_path / "a"))


def test_rounds_with_identities(tmp_path: Path) -> None:
    """All sign, and survivors are confirmed; who has no identity is not let in by itself, nor by a server without a list."""
    names = [f"w{number}" for number in range(4)]
    lines = [f"{name} {key_text(load_or_make(str(tmp_path / name)).public)}" for name in names]
    (tmp_path / "list").write_text("\n".join(lines))

    def script(number: int, name: str, signs: bool = True) -> Any:
        files = {"identity": str(tmp_path / name), "identities": str(tmp_path / "list")} if signs else {}
        arrays = {"w": np.zeros(100, np.float32)}
        with shoal.connect(cluster.join, name=name, **files) as worker:
            for round_ in worker.rounds(arrays):
                arrays["w"] += number
                round_.submit()
        return float(arrays["w"][0])

    with shoal.LocalCluster(
        mode="federated", min_workers=4, rounds=2, clip=8, identities=str(tmp_path / "list")
    ) as cluster:
        assert [pytest.approx(3.0, abs=1e-4)] * 4 == each(4, script)
    with shoal.LocalCluster(
        mode="federated", min_workers=4, rounds=1, clip=8, identities=str(tmp_path / "list")
    ) as cluster:
        found = each(4, lambda number, name: script(number, name, signs=number > 0))
        assert isinstance(found[0], shoal.ProtectionError) and "has none pinned" in str(found[0])
        assert [pytest.approx(2.0, abs=1e-4)] * 3 == found[1:]
    with shoal.LocalCluster(mode="federated", min_workers=3, rounds=1) as cluster:
        assert all(
            isinstance(error, shoal.ProtectionError) and "identities sign" in str(error) for error in each(3, script)
        )
