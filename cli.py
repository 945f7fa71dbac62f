"""The `shoal` command (DESIGN §8). Each command reads its flags, hands them on, and turns errors into one line and an exit code.

Rules
- Exit codes follow sysexits: 64 usage, 66 no such script, 69 unavailable, 70 our fault, 77 keys, 78 a setting.
- A user's mistake never shows a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import click

from . import __version__
from .cli_models import models, tasks
from .launch.connect import check_platform
from .launch.settings import JOIN, RUN, SERVER, BadFlag, Setting, settle
from .protocol.errors import AuthError, ConfigError, NoServerError, ServerLost, ShoalError, VersionError, WaitTimeout
from .protocol.join import read_join

Command: TypeAlias = Callable[..., int]

USAGE, NO_INPUT, UNAVAILABLE, SOFTWARE, CANT_CREATE, PROTOCOL, NO_PERMISSION, CONFIG = 64, 66, 69, 70, 73, 76, 77, 78


def options(settings: tuple[Setting, ...], short: dict[str, str] | None = None) -> Callable[[Command], Command]:
    """A flag for each setting. Values are read by `settle`, which knows the other places that they may come from."""

    def decorate(function: Command) -> Command:
        for setting in reversed(settings):
            names = [setting.option, *((short or {}).get(setting.name, "").split())]
            default = f"{setting.default:g}" if isinstance(setting.default, float) else setting.default
            text = (
                f"{setting.help} [{setting.env}" + (f"; default {default}" if default not in ("", False) else "") + "]"
            )
            if setting.flag:
                function = click.option(*names, setting.name, is_flag=True, default=None, help=text)(function)
            else:
                function = click.option(*names, setting.name, metavar=setting.metavar or None, default=None, help=text)(
                    function
                )
        return function

    return decorate


class Group(click.Group):
    """Commands in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="shoal %(version)s")
def shoal() -> None:
    """Train with parameters on servers and gradients from workers, within a staleness bound.

    \b
    shoal run -n 4 train.py                       servers and 4 workers on this machine
    shoal server --bind 10.0.0.1                  servers for other machines; prints the join string
    SHOAL_JOIN=shoal1:… python train.py           a worker, on any machine
    """


@shoal.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
@options(RUN, {"workers": "-n"})
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...], **given: Any) -> int:
    """Run SCRIPT as several workers, with servers, on this machine.

    \b
    shoal run train.py
    shoal run -n 4 --servers 2 --staleness 8 train.py --lr 0.1
    shoal run --mode sync --report run.json train.py
    """
    from .launch.run import Run

    return Run(given, script, args).go()


@shoal.command()
@options(SERVER)
@click.option("--join", default="", metavar="STRING", help="Add shards to the server that printed this join string.")
@click.option("--join-file", default="", metavar="FILE", help="Write the join string there once the server is ready.")
def server(join: str, join_file: str, **given: Any) -> int:
    """Start servers for workers on this and other machines; they run until Ctrl-C.

    \b
    shoal server                                  this machine only
    shoal server --bind 10.0.0.1 --shards 2       other machines too; keys are made on first use
    shoal server --join shoal1:… --bind 10.0.0.2  more shards, from another machine
    """
    from .launch.serve import serve

    return serve(given, join, join_file)


@shoal.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--join", default=None, metavar="STRING", help="The join string that `shoal server` printed. [SHOAL_JOIN]"
)
@click.option("--name", default="", help="The worker's name; by default made from host and process.")
@click.option(
    "--max-restarts",
    default=3,
    show_default=True,
    type=click.IntRange(0),
    help="Start it again so often when it fails.",
)
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def worker(join: str | None, name: str, max_restarts: int, script: str, args: tuple[str, ...]) -> int:
    """Run SCRIPT as one worker of a server elsewhere; start it again when it fails.

    \b
    shoal worker --join shoal1:… train.py --lr 0.1
    SHOAL_JOIN=shoal1:… shoal worker train.py
    """
    from .launch.supervise import supervise

    return supervise(joining(join, needed=True), script, args, name, max_restarts)


@shoal.command()
@click.option(
    "--join", default=None, metavar="STRING", help="Which server; by default the one on this machine. [SHOAL_JOIN]"
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def status(join: str | None, as_json: bool) -> int:
    """Show who is here, who is slow, and what was refused.

    \b
    shoal status
    SHOAL_JOIN=shoal1:… shoal status --json
    """
    from .launch.inquiry import inquire, tasks_of
    from .launch.status import show

    address = read_join(joining(join))
    found = inquire(address, "status")
    found["tasks"] = tasks_of(address)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


@shoal.command()
@click.argument("mode")
@click.option("--staleness", default=None, metavar="K|inf", help="The bound in async mode; by default as it is.")
@click.option(
    "--join", default=None, metavar="STRING", help="Which server; by default the one on this machine. [SHOAL_JOIN]"
)
@click.option("--json", "as_json", is_flag=True, help="What it is now, as one JSON object.")
def mode(mode: str, staleness: str | None, join: str | None, as_json: bool) -> int:
    """Train on in MODE, async or sync: workers go on, and no weight or optimizer state is lost.

    \b
    shoal mode sync
    shoal mode async --staleness 8
    """
    from .launch.mode import change

    now = change(read_join(joining(join)), mode, staleness)
    bound = "" if now["mode"] == "sync" else f", staleness {now['staleness']}"
    click.echo(json.dumps(now, indent=2) if as_json else f"mode {now['mode']}{bound}, from clock {now['clock']} on")
    return 0


@shoal.command()
@click.argument("join", required=False)
@click.option("--json", "as_json", is_flag=True, help="The findings, as one JSON object.")
def doctor(join: str | None, as_json: bool) -> int:
    """Find out which step on the way to a server fails.

    \b
    shoal doctor
    shoal doctor 'shoal1:10.0.0.1:7450:…'
    """
    from .launch.doctor import examine

    findings = []
    for finding in examine(read_join(joining(join))):
        findings.append(finding)
        if not as_json:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark}  {finding.step:<10} {finding.text}")
            if finding.hint and not finding.ok:
                click.echo(f"{'':16} try: {finding.hint}")
    failed = next((finding for finding in findings if not finding.ok), None)
    if as_json:
        steps = [{"step": f.step, "ok": f.ok, "text": f.text, "hint": f.hint} for f in findings]
        click.echo(json.dumps({"ok": failed is None, "steps": steps}, indent=2))
    return failed.code if failed else 0


@shoal.group()
def keys() -> None:
    """Keys that are yours to make. The servers make their own."""


@keys.command()
@click.argument("file")
@click.option("--name", default="NAME", help="The worker's name, for the line that is printed.")
def identity(file: str, name: str) -> int:
    """What a worker signs with in federated rounds: made in FILE if it is not there. Prints its line for the list of all.

    \b
    shoal keys identity ~/.shoal/clinic-a --name clinic-a >> identities.txt
    """
    from .launch.identities import load_or_make
    from .protocol.join import key_text

    click.echo(f"{name} {key_text(load_or_make(file).public)}")
    return 0


@keys.command("vault")
@click.argument("file")
def vault_key(file: str) -> int:
    """What an owner's files are encrypted with (`shoal.Vault`): made in FILE if it is not there. Prints which key it is.

    Whoever loses it loses what it has locked: keep a copy elsewhere.

    \b
    shoal keys vault ~/.shoal/vault.key
    """
    from pathlib import Path

    from .worker.vault import VaultKey

    there = Path(file).expanduser().exists()
    key = VaultKey.load(file) if there else VaultKey.make(file)
    click.echo(f"vault key {key.fingerprint} in {file}{'' if there else ', new: keep a copy elsewhere'}")
    return 0


shoal.add_command(models)
shoal.add_command(tasks)


@shoal.group()
def bench() -> None:
    """Measure this machine, beside the limits of the same run."""


@bench.command()
@click.option(
    "--sizes", default="", metavar="SIZE,…", help="Payloads, as 100, 10kB or 2.5MB; by default 100 B to 100 MB."
)
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(3), help="Runs of each; medians are printed."
)
@click.option("--shards", default=1, show_default=True, type=click.IntRange(1, 64), help="Shard processes.")
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    type=click.Choice(["sgd", "adam"]),
    help="What a push is applied by.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def pushpull(sizes: str, repeat: int, shards: int, optimizer: str, as_json: bool) -> int:
    """Push and pull, from 100 bytes to 100 MB, beside memory copy, raw TCP and bare pyzmq.

    \b
    shoal bench pushpull
    shoal bench pushpull --sizes 4MB,100MB --optimizer adam --json
    """
    from .bench.pushpull import main as measure

    return measure(sizes, repeat, shards, optimizer, as_json)


@bench.command()
@click.option(
    "--sizes", default="", metavar="SIZE,…", help="Payloads, as 400, 10kB or 2.5MB; by default 400 B to 100 MB."
)
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(3), help="Runs of each; medians are printed."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--save", default="", metavar="PATH", help="Write PATH.json, PATH.png and PATH.svg, too.")
def peers(sizes: str, repeat: int, as_json: bool, save: str) -> int:
    """Push and pull beside others doing the same work: torch RPC, gloo, raw ZeroMQ, and Ray where it is installed.

    \b
    Examples:
    shoal bench peers --sizes 4MB
    make bench-peers
    """
    from .bench.peers import main as measure

    return measure(sizes, repeat, as_json, save)


@bench.command()
@click.option("--width", default=1536, show_default=True, type=click.IntRange(8, 8192), help="Of a layer.")
@click.option("--layers", default=6, show_default=True, type=click.IntRange(1, 64), help="How many.")
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(3), help="Turns of each; medians are printed."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def overlap(width: int, layers: int, repeat: int, as_json: bool) -> int:
    """Steps per second with gradients that leave during backward and weights fetched ahead, and without.

    \b
    Examples:
    shoal bench overlap
    shoal bench overlap --width 2048 --json
    """
    from .bench.overlap import main as measure

    return measure(width, layers, repeat=repeat, as_json=as_json)


@bench.command()
@click.option(
    "--elements", default=10_000_000, show_default=True, type=click.IntRange(1000, 250_000_000), help="float32 numbers."
)
@click.option("--codecs", default="", metavar="CODEC,…", help="Which, as raw,int8,topk:0.05; by default all.")
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(3), help="Runs of each; medians are printed."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def codecs(elements: int, codecs: str, repeat: int, as_json: bool) -> int:
    """What each codec costs, loses and saves: time, error, bytes, and push and pull over TCP.

    \b
    shoal bench codecs
    shoal bench codecs --elements 1000000 --codecs raw,int8,topk:0.05
    """
    from .bench.codecs import CODECS
    from .bench.codecs import main as measure

    return measure(elements, codecs.split(",") if codecs else CODECS, repeat, as_json)


@bench.command()
@click.option("--workers", default="2,4", show_default=True, metavar="N,…", help="How many workers, 2 to 4.")
@click.option("--only", type=click.Choice(["bounds", "remedies"]), help="One part; both by default.")
@click.option("--compute", default=10.0, show_default=True, help="Emulated computing of a step, in milliseconds.")
@click.option("--slow", default=4.0, show_default=True, help="How much slower the last worker is.")
@click.option("--seconds", default=6.0, show_default=True, help="Of a race.")
@click.option(
    "--repeat", default=3, show_default=True, type=click.IntRange(1), help="Races of each way, with other seeds."
)
@click.option("--lr", default=0.2, show_default=True, help="Learning rate of the bounds.")
@click.option(
    "--rates", default="0.2,0.6,0.8", show_default=True, metavar="LR,…", help="Learning rates of the remedies."
)
@click.option("--target", default=0.3, show_default=True, help="Loss to reach.")
@click.option("--plot", default="", metavar="FILE", help="Draw it, to FILE.png and FILE.svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def stragglers(workers: str, only: str | None, rates: str, plot: str, as_json: bool, **given: Any) -> int:
    """One slow worker: staleness bounds, sync and torch DDP side by side; what helps against stale gradients.

    \b
    shoal bench stragglers
    shoal bench stragglers --only bounds --workers 4 --plot stragglers
    """
    from .bench.stragglers import PARTS, Plan, read_rates, read_workers
    from .bench.stragglers import main as measure

    given["compute"] /= 1e3
    parts = (only,) if only else PARTS
    return measure(Plan(read_workers(workers), parts, rates=read_rates(rates), **given), as_json, plot)


@bench.command()
@click.option(
    "--only", default="", metavar="PART,…", help="Some of: shards,workers,tensors,bytes,memory,idle,simulated."
)
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(3), help="Runs of each; medians are printed."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--plot", default="", metavar="PATH", help="Draw PATH.png and PATH.svg, too.")
def growth(only: str, repeat: int, as_json: bool, plot: str) -> int:
    """What grows with shards, workers, tensors and bytes: time, memory, idle load; a thousand workers are simulated.

    \b
    shoal bench growth
    shoal bench growth --only memory,idle --json
    """
    from .bench.growth import main as measure

    return measure(only, repeat, as_json, plot)


@bench.command()
@click.option("--only", default="", metavar="PART,…", help="Some of: client,sum,rounds,scale.")
@click.option(
    "--repeat", default=9, show_default=True, type=click.IntRange(1), help="Turns of each; medians are printed."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--save", default="", metavar="PATH", help="Write PATH.json, PATH.png and PATH.svg, too.")
def federated(only: str, repeat: int, as_json: bool, save: str) -> int:
    """What a masked round costs its clients and servers, beside Flower where it is installed; 10,000 clients are simulated.

    \b
    Examples:
    shoal bench federated --only rounds
    make bench-federated
    """
    from .bench.federated import main as measure

    return measure(only, repeat=repeat, as_json=as_json, save=save)


@bench.command("tasks")
@click.option(
    "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Turns of each; medians are printed."
)
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0.1), help="Of a turn.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--save", default="", metavar="PATH", help="Write PATH.json, too.")
def bench_tasks(repeat: int, seconds: float, as_json: bool, save: str) -> int:
    """Small tasks a second, and how long each waits at half of that; beside Ray actors where Ray is installed.

    \b
    Examples:
    shoal bench tasks --seconds 1
    make bench-tasks
    """
    from .bench.tasks import main as measure

    return measure(repeat, seconds, as_json, save)


def joining(given: str | None, needed: bool = False) -> str:
    """The join string: the flag, $SHOAL_JOIN, shoal.toml; else the server on this machine."""
    found = str(settle([JOIN], {"join": given}, "worker")["join"])
    if not found and needed:
        raise ConfigError("no server is named", hint="--join with the line that `shoal server` printed, or SHOAL_JOIN")
    return found or "127.0.0.1"


def exit_code(error: ShoalError) -> int:
    """Which code says whose fault it was."""
    from .launch.workers import ScriptMissing

    if isinstance(error, ScriptMissing):
        return NO_INPUT
    if isinstance(error, AuthError):
        return NO_PERMISSION
    if isinstance(error, VersionError):
        return PROTOCOL
    if isinstance(error, NoServerError | ServerLost | WaitTimeout):
        return UNAVAILABLE
    if isinstance(error, BadFlag):
        return USAGE
    if isinstance(error, ConfigError):
        return UNAVAILABLE if "in use" in error.what else CONFIG
    return SOFTWARE


def main() -> None:
    """The entry point."""
    code: Any = 0
    try:
        check_platform()
        code = shoal.main(standalone_mode=False, prog_name="shoal")
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = USAGE
    except click.ClickException as error:
        error.show()
        code = USAGE
    except click.exceptions.Abort:
        code = 130
    except ShoalError as error:
        click.echo(f"shoal: {error}", err=True)
        code = exit_code(error)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
