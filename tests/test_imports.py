"""Who may know whom, and what no file may hold (DESIGN §3): read from the source, and from what an import really loads."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
ROOMS = ("protocol", "protocol/secure", "ps", "worker", "tasks", "launch", "bench", "examples")
FILES = {str(path.relative_to(ROOT)): path for room in ("", *ROOMS) for path in sorted((ROOT / room).glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MOST_LINES = 575

MAY_KNOW = {
    "protocol": {"protocol"},
    "protocol/secure": {"protocol"},
    "ps": {"protocol", "tasks", "ps"},
    "worker": {"protocol", "tasks", "worker"},
    "tasks": {"protocol", "tasks"},
    "launch": {"protocol", "ps", "worker", "tasks", "launch"},
}
"""The face, the command, bench and examples may know all."""

ONLY = {
    "zmq": {"ps/loop.py", "ps/zap.py", "ps/__main__.py", "worker/loop.py", "worker/wires.py", "launch/keys.py"},
    "threading": {"worker/loop.py", "worker/exchange.py", "worker/finite.py", "worker/serving.py"},
    "time": {
        "ps/loop.py",
        "ps/__main__.py",
        "worker/loop.py",
        "worker/client.py",
        "worker/data.py",
        "worker/evaluate.py",
        "worker/exchange.py",
        "worker/serving.py",
    },
    "socket": {"worker/address.py", "worker/client.py", "worker/greeting.py"},
    "random": {"ps/__main__.py"},
    "asyncio": set(),
    "subprocess": set(),
    "click": {"cli.py", "cli_models.py"},
}
"""Who may import these, of the rooms that the rule is for; what is not named there is decided by events that come in."""
EVERYWHERE = {"zmq": (*ROOMS[:6], ""), "click": (*ROOMS[:6], "")}

TORCH = {
    *(
        "ps/fedopt.py",
        "ps/uncompiled.py",
        "worker/scaffold.py",
        "ps/rules.py",
        "ps/weights.py",
        "ps/averaging.py",
        "ps/store.py",
        "ps/stale.py",
    ),
    *("worker/optimizer.py", "worker/views.py", "worker/devices.py"),
}
"""Who imports torch when it is imported itself; others do it when they are given a tensor, or not at all."""


def imports(name: str, *, lazy: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) for each import in a file; ours begin with `shoal.`. Without `lazy` only those of the module itself."""
    package = ["shoal", *Path(name).parent.parts]
    for node in ast.walk(TREES[name]) if lazy else TREES[name].body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def roots(name: str, *, lazy: bool = True) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(name, lazy=lazy)}


def room(name: str) -> str:
    return name.rpartition("/")[0]


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in MAY_KNOW])
def test_a_room_knows_only_whom_it_may(name: str) -> None:
    """Above all, the servers and the worker know the protocol and not each other."""
    known = {module.split(".")[1] for module, _ in imports(name) if module.startswith("shoal.")}

    assert known <= MAY_KNOW[room(name)]


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in ("", *ROOMS[:6])])
def test_imports_are_relative_and_name_the_defining_file(name: str) -> None:
    """A name is imported from where it is made: nothing is handed on from file to file."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("shoal"), ast.unparse(node)
    for module, imported in imports(name):
        file = module.removeprefix("shoal").strip(".").replace(".", "/")
        if not module.startswith("shoal") or f"{file}/{imported}.py".strip("/") in FILES:
            continue
        home = next((at for at in (f"{file}.py", f"{file}/__init__.py".strip("/")) if at in FILES), None)
        assert home, f"{name} imports {module}, which is not there"
        defining = TREES[home]
        made = {node.name for node in defining.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        for node in defining.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            made |= {name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)}
        assert imported in made, f"{name}: {module}.{imported}"


def test_the_protocol_is_pure() -> None:
    """What can be said needs nothing but msgpack: no socket, no clock, no thread, no torch; numpy in one file, for codecs, and with
    cryptography in the mathematics of a secure round."""
    for name in FILES:
        if room(name).startswith("protocol"):
            others = {"numpy"} if name == "protocol/coding.py" else {"msgpack"}
            others |= {"numpy", "cryptography"} if room(name) == "protocol/secure" else set()
            assert roots(name) - {"shoal", *others} <= sys.stdlib_module_names, name
            impure = {
                "socket",
                "time",
                "datetime",
                "threading",
                "os",
                "select",
                "pathlib",
                "random",
                "asyncio",
                "subprocess",
            }
            assert not roots(name) & impure, name


@pytest.mark.parametrize("module", ONLY)
def test_cores_decide_and_loops_do(module: str) -> None:
    """Sockets, clocks, threads and chance are in the files that are for them, and in no core."""
    rooms = EVERYWHERE.get(module, ("protocol", "protocol/secure", "ps", "worker"))
    found = {name for name in FILES if room(name) in rooms and module in roots(name)}

    assert ONLY[module] == found


def test_torch_is_imported_where_it_is_needed() -> None:
    """A worker without torch, a coordinator and the command never wait for it."""
    found = {name for name in FILES if room(name) in ("", *ROOMS[:5]) and "torch" in roots(name, lazy=False)}

    assert TORCH == found


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("shoal", "torch numpy zmq click rich msgpack"),
        ("shoal.cli", "torch rich"),
        ("shoal.ps.coordinator", "torch numpy zmq"),
        ("shoal.worker.client", "torch click rich"),
        ("shoal.worker.core", "torch numpy zmq"),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(module: str, absent: str) -> None:
    """As a fresh process sees it, whatever the source says."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not set(absent.split()) & set(loaded)


def test_importing_the_face_is_quick() -> None:
    """A small part of what numpy takes, by medians side by side."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"

    def seconds(module: str) -> float:
        return float(
            subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, check=True).stdout
        )

    pairs = [(seconds("shoal"), seconds("numpy")) for _ in range(5)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))

    assert ours < theirs / 3


def test_the_face_has_what_it_promises() -> None:
    """Every name can be had, is the one of its defining file, and is listed; another is an ordinary AttributeError."""
    for name in shoal.__all__:
        assert name in dir(shoal)
        assert name in ("__version__", getattr(getattr(shoal, name), "__name__", None))
    assert set(shoal.__all__) == {*shoal._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        shoal.nope  # noqa: B018


FORBIDDEN = r"""\b(c?pickle|dill|cloudpickle|joblib|marshal|shelve|yaml|allow_pickle)\b|torch\.load|
    (?<![\w.])(eval|exec|compile|__import__)\(|os\.system|shell=True"""


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_comes_in_is_run(name: str) -> None:
    """No format that carries code, no evaluation; a module is chosen by name in one place, from our own table."""
    text = FILES[name].read_text()
    found = re.search(FORBIDDEN, text, re.VERBOSE)

    assert not found, found
    assert ("importlib" in text) == (name == "__init__.py")


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    """In its docstring; and it is short enough to be read."""
    text = FILES[name].read_text()

    assert not text or ast.get_docstring(TREES[name])
    assert len(text.splitlines()) <= MOST_LINES
