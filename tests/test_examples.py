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
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
PROMISES = {
    "breast_cancer.py": (r"test accuracy ([0-9.]+)", 0.95, 1.0),
    "digits.py": (r"test accuracy ([0-9.]+)", 0.95, 1.0),
    "linear_regression.py": (r"largest difference from the exact solution ([0-9.]+)", 0.0, 0.02),
}
"""What an example says at its end: the words, and the least and the largest number in them."""
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
    if example in PROMISES:
        pattern, least, most = PROMISES[example]
        found = [float(number) for number in re.findall(pattern, out)]
        assert found and all(least <= number <= most for number in found), out


def test_examples_are_found() -> None:
    """The folder holds those that we know promises of."""
    assert set(PROMISES) <= set(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
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
    assert re.search(rf"^    shoal run .*examples/{example}$", (ROOT / "examples" / example).read_text(), re.MULTILINE)


def test_an_example_runs_alone() -> None:
    """`python examples/digits.py` has a server of its own and needs nothing else."""
    check("digits.py", run("examples/digits.py")[0])


def test_an_example_does_not_know_the_mode() -> None:
    """The same script in sync mode keeps its promise: the servers average each step."""
    out, errors = run("-m", "shoal.cli", "run", "--mode", "sync", "examples/linear_regression.py")

    check("linear_regression.py", out)
    assert re.search(r"mode +sync", errors)
