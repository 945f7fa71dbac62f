"""`shoal bench peers`: seconds of a push and of a pull, shoal beside those who could do the same work, in one run.

Rules
- Contestants take turns, round by round, so that noise hits all alike. What is printed is the median of the repetitions' medians.
- A size is measured in a process of its own: some rivals can be started once a process.
- After the last round each must hold exactly the weights that its pushes have made: who has not done the work is an error.
- Who is not installed does not take part, and that is said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..protocol.errors import ConfigError, ShoalError
from .pushpull import WARM_UP, machine, measure, read_sizes
from .table import PLAIN_WIDTH, size_text

SIZES = (400, 40_000, 4_000_000, 100_000_000)
MOST_ROUNDS = 50
BYTES_OF_ROUNDS = 10**7
OURS = "shoal"


def main(sizes: str = "", repeat: int = 9, as_json: bool = False, plot: str = "") -> int:
    """Measure, and print.

    Args:
        sizes: as typed; empty for 400 B to 100 MB.
        repeat: repetitions.
        plot: a path without its ending, for a PNG and an SVG; empty for none.

    Raises:
        BadFlag: `sizes` cannot be read. ShoalError: a contestant failed, or did not do the work.
    """
    wanted = read_sizes(sizes) if sizes.strip() else SIZES
    found = []
    for nbytes in wanted:
        click.echo(f"measuring {size_text(nbytes)}", err=True)
        found.append(_in_a_process(nbytes, repeat))
    from .rivals import versions

    report = {"machine": machine(), "versions": versions(), "repeat": repeat, "sizes": found}
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    if plot:
        draw(report, plot)
    return 0


def _in_a_process(nbytes: int, repeat: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", __spec__.name, str(nbytes), str(repeat)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        timeout=1800,
    )
    if done.returncode:
        raise ShoalError(f"measuring {size_text(nbytes)} failed (exit {done.returncode})")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(nbytes: int, repeat: int) -> dict[str, Any]:
    """Seconds of every contestant for one size.

    Raises:
        ShoalError: one has not done the work.
    """
    import torch

    from .rivals import CONTESTANTS, LR

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "You are using a Backend")  # torch RPC's own use of gloo
    rounds = max(1, min(MOST_ROUNDS, BYTES_OF_ROUNDS // nbytes))
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        entered = {}
        for name, contestant in CONTESTANTS.items():
            try:
                entered[name] = stack.enter_context(contestant(nbytes))
            except ImportError as error:
                absent[name] = str(error)
        named = [{f"{name}|{way}": call for way, call in calls.items()} for name, calls in entered.items()]
        seconds = measure(named, repeat, rounds)
        pushes = (WARM_UP + repeat) * rounds
        for name, calls in entered.items():
            values = calls["pull"]()
            if not (values[0] == values[-1] == -pushes * LR):
                raise ShoalError(f"{name}: {pushes} pushes have made {values[0]} and {values[-1]}, not {-pushes * LR}")
    ways = {name: {way: float(f"{seconds[f'{name}|{way}']:.4g}") for way in ("push", "pull")} for name in entered}
    return {"bytes": nbytes, "seconds": ways, "absent": absent}


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    known = ", ".join(f"{name} {number or 'not installed'}" for name, number in report["versions"].items())
    console.print(f"{report['machine']['cpus']} CPUs, Python {report['machine']['python']}, {known}")
    console.print(f"milliseconds, medians of {report['repeat']}; (x) is theirs / shoal's\n")
    for way in ("push", "pull"):
        names = list(dict.fromkeys(name for size in report["sizes"] for name in size["seconds"]))
        table = Table(box=None, pad_edge=False)
        table.add_column(way)
        for name in names:
            table.add_column(name, justify="right")
        for size in report["sizes"]:
            table.add_row(size_text(size["bytes"]), *(_cell(size["seconds"], name, way) for name in names))
        console.print(table, "\n")


def _cell(seconds: dict[str, dict[str, float]], name: str, way: str) -> str:
    if name not in seconds:
        return "-"
    mine, theirs = seconds[OURS][way], seconds[name][way]
    ratio = "" if name == OURS else f" ({theirs / mine:.2g}x)"
    return f"{1e3 * theirs:.3g}{ratio}"


def draw(report: dict[str, Any], path: str) -> None:
    """Times over sizes, both logarithmic: `path`.png and `path`.svg.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed", hint="pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "shoal"
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    sizes = [size["bytes"] for size in report["sizes"]]
    for pane, way in zip(panes, ("push", "pull"), strict=True):
        for name in report["sizes"][0]["seconds"]:
            times = [1e3 * size["seconds"].get(name, {}).get(way, float("nan")) for size in report["sizes"]]
            pane.loglog(sizes, times, marker="o", lw=2.5 if name == OURS else 1.2, label=name)
        pane.set_title(way)
        pane.set_xlabel("bytes")
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("milliseconds")
    panes[0].legend()
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(
            Path(path).with_suffix(f".{ending}"), dpi=120, metadata={"Date": None} if ending == "svg" else None
        )
    pyplot.close(figure)


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]))))
