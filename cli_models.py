"""`shoal models` and `shoal tasks`: versions of trained models, and the tasks that they do."""

from __future__ import annotations

import json

import click

STATE = click.option(
    "--state-dir", default="", metavar="DIR", help="A folder of this machine's, in place of a cluster's."
)
WHERE = click.option(
    "--join", default=None, metavar="STRING", help="Which cluster; without one, this machine's folder. [SHOAL_JOIN]"
)
SERVER = click.option(
    "--join", default=None, metavar="STRING", help="Which cluster; by default the one on this machine. [SHOAL_JOIN]"
)
NAME = click.argument("name")
WHY = click.option("--why", default="", help="For the history.")


@click.group()
def models() -> None:
    """Versions of trained models, and which of them is served: of a cluster if one is named, else of this machine."""


@models.command("ls")
@STATE
@WHERE
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def models_ls(state_dir: str, join: str | None, as_json: bool) -> int:
    """A line for each model."""
    from .launch.models import print_listing
    from .launch.shelf import shelf

    with shelf(state_dir, join) as kept:
        found = kept.listing()
    click.echo(json.dumps(found, indent=2)) if as_json else print_listing(found)
    return 0


@models.command("show")
@NAME
@STATE
@WHERE
@click.option("--json", "as_json", is_flag=True, help="One JSON object: cards and history.")
def models_show(name: str, state_dir: str, join: str | None, as_json: bool) -> int:
    """Versions of a model, with quality, data and lineage, and what was promoted when."""
    from .launch.models import print_shown
    from .launch.shelf import shelf

    with shelf(state_dir, join) as kept:
        found = kept.shown(name)
    click.echo(json.dumps(found, indent=2)) if as_json else print_shown(found)
    return 0


@models.command("promote")
@NAME
@click.argument("version", type=click.IntRange(1))
@STATE
@WHERE
@WHY
@click.option(
    "--canary", default=0.0, metavar="SHARE", help="Try it first, on this share of the tasks: feedback decides."
)
def models_promote(name: str, version: int, state_dir: str, join: str | None, why: str, canary: float) -> int:
    """Serve this version from now on. It must have been evaluated."""
    from .launch.shelf import shelf

    with shelf(state_dir, join) as kept:
        done = kept.promote(name, version, why, canary)
    click.echo(f"{done} is tried on {canary:.0%} of the tasks" if canary else f"{done} is promoted")
    return 0


@models.command("rollback")
@NAME
@STATE
@WHERE
@WHY
def models_rollback(name: str, state_dir: str, join: str | None, why: str) -> int:
    """Serve again what was served before."""
    from .launch.shelf import shelf

    with shelf(state_dir, join) as kept:
        click.echo(f"{kept.rollback(name, why)} is promoted again")
    return 0


@models.command("export")
@NAME
@click.argument("file")
@STATE
@WHERE
@click.option("--version", type=click.IntRange(1), help="By default the promoted one.")
def models_export(name: str, file: str, state_dir: str, join: str | None, version: int | None) -> int:
    """Write a version's parameters to FILE, which safetensors opens anywhere."""
    from .launch.shelf import shelf

    with shelf(state_dir, join) as kept:
        card = kept.export(name, version, file)
    click.echo(f"{card}: {card.size} bytes in {file}")
    return 0


@click.group()
def tasks() -> None:
    """What a cluster's models were asked, where it went, and why."""


@tasks.command("ls")
@SERVER
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def tasks_ls(join: str | None, as_json: bool) -> int:
    """The newest tasks."""
    from .launch.shelf import patron
    from .launch.tasks import print_tasks

    with patron(join) as client:
        found = client.tasks()
    click.echo(json.dumps(found, indent=2)) if as_json else print_tasks(found)
    return 0


@tasks.command("show")
@SERVER
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def tasks_show(join: str | None, as_json: bool) -> int:
    """How the dispatcher is: what waits, who serves what, how good it is."""
    from .launch.shelf import patron
    from .launch.tasks import print_dispatcher

    with patron(join) as client:
        found = client.status()
    click.echo(json.dumps(found, indent=2)) if as_json else print_dispatcher(found)
    return 0


@tasks.command("why")
@click.argument("id")
@SERVER
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def tasks_why(id: str, join: str | None, as_json: bool) -> int:  # noqa: A002 - what people type
    """Where a task went, and why there."""
    from .launch.shelf import patron
    from .launch.tasks import print_why

    with patron(join) as client:
        found = client.why(id)
    click.echo(json.dumps(found, indent=2)) if as_json else print_why(found)
    return 0
