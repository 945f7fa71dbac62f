"""What a run comes to: the report's JSON object, and the same as rows for people (DESIGN §8)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..protocol.errors import ConfigError


def summarise(status: dict[str, Any]) -> dict[str, Any]:
    """The report's figures, from a cluster's last status.

    `seconds` are from the first clock to the end; `bytes` is payload, both ways; `staleness_histogram` counts pulls by own clock
    minus least clock; `logged` is the newest value of everything logged.
    """
    totals = status["totals"]
    data = status["data"]
    seconds = status["seconds"]
    workers = status["workers"]
    return {
        "mode": status["mode"],
        "staleness": status["staleness"],
        "workers": len({worker["name"] for worker in workers}),
        "servers": len(status["shards"]),
        "steps": totals["steps"],
        "seconds": seconds,
        "steps_per_second": round(totals["steps"] / seconds, 3) if seconds else 0.0,
        "bytes": totals["bytes_pushed"] + totals["bytes_pulled"],
        "bytes_pushed": totals["bytes_pushed"],
        "bytes_pulled": totals["bytes_pulled"],
        "staleness_histogram": totals["staleness"],
        "completed_partitions": sum(job["completed"] for job in data),
        "lost_partitions": sum(job["lost"] for job in data),
        "re_leased_partitions": sum(job["re_leased"] for job in data),
        "lost_workers": totals["workers_lost"],
        "skipped_steps": totals["skipped"],
        "retries": totals["retries"],
        "rejected": status["rejected"],
        "insecure": status["insecure"],
        "logged": status["logged"],
        "rounds": status["rounds"],
        "evaluations": status["evaluations"],
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The closing table."""
    bound = f", staleness {number(report['staleness'])}" if report["mode"] == "async" else ""
    if report["mode"] == "federated":
        rounds = report["rounds"]
        bound = f", {rounds['protection']}, {rounds['completed']} rounds complete, {rounds['abandoned']} abandoned"
    found = [
        ("mode", report["mode"] + bound),
        ("workers / servers", f"{report['workers']} / {report['servers']}"),
        ("steps", f"{report['steps']} in {report['seconds']:.1f} s ({report['steps_per_second']:.1f} per second)"),
        ("pushed / pulled", f"{human_bytes(report['bytes_pushed'])} / {human_bytes(report['bytes_pulled'])}"),
    ]
    histogram = report["staleness_histogram"]
    total = sum(histogram.values())
    if total:
        shares = "  ".join(f"{k}: {100 * v / total:.0f}%" for k, v in histogram.items())
        found.append(("staleness seen", shares))
    if report["completed_partitions"]:
        words = f"{report['completed_partitions']} completed"
        if report["lost_partitions"]:
            words += f", {report['lost_partitions']} lost, {report['re_leased_partitions']} leased again"
        found.append(("partitions", words))
    if report["lost_workers"]:
        found.append(("workers lost", str(report["lost_workers"])))
    if report["skipped_steps"]:
        found.append(("steps skipped", f"{report['skipped_steps']} (gradients with NaN or infinity)"))
    if report["rejected"]:
        found.append(("rejected", "  ".join(f"{reason}: {count}" for reason, count in report["rejected"].items())))
    for last in {each["name"]: each for each in report["evaluations"]}.values():
        found.append((f"held out: {last['name']}", evaluated(last)))
    if report["insecure"]:
        found.append(("security", "NONE (--insecure)"))
    return found + [(name, number(value)) for name, value in report["logged"].items()]


def evaluated(result: dict[str, Any]) -> str:
    """An evaluation in a line."""
    unit = "round" if result["mode"] == "federated" else "clock"
    means = "  ".join(f"{what} {number(mean)}" for what, mean in result["means"].items())
    return f"{means}  ({unit} {result['clock']}, {result['examples']} examples)"


def check_writable(path: str) -> None:
    """
    Raises:
        ConfigError: a report could not be written there.
    """
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--report {path}: no file can be written there", hint="a file in a folder that exists")


def write(path: str, report: dict[str, Any]) -> None:
    """Write the report whole, or not at all."""
    fresh = Path(f"{path}.{os.getpid()}")
    fresh.write_text(json.dumps(report, indent=2) + "\n")
    fresh.replace(path)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "nan" if value is None else str(value)


def human_seconds(seconds: float) -> str:
    """A duration, short."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds > 0 else "0"


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
