"""What the pages say is true: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from shoal import cli
from shoal.launch.settings import CLUSTER, SERVER

ROOT = Path(cli.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("protocol/*.md")])


def blocks(kind: str) -> list[tuple[str, str]]:
    """Fenced blocks of one kind: (where, text)."""
    return [
        (f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}", found[1])
        for page in PAGES
        for found in re.finditer(rf"^```{kind}\n(.*?)^```", page.read_text(), re.M | re.S)
    ]


def commands() -> list[tuple[str, list[str]]]:
    """Each `shoal …` in a shell block: (where, words), without comments and settings of the environment."""
    found = []
    for where, text in blocks("sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] == "shoal":
                found.append((where, words[1:]))
    return found


@pytest.mark.parametrize(("where", "code"), blocks("python"), ids=[where for where, _ in blocks("python")])
def test_python_on_the_pages_runs(where: str, code: str, tmp_path: Path) -> None:
    """As a script of its own, in an empty folder, with a server of its own."""
    script = tmp_path / "page.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), f"{where}: {done.stderr}"


@pytest.mark.parametrize(("where", "words"), commands(), ids=[" ".join(words)[:60] for _, words in commands()])
def test_commands_on_the_pages_exist(where: str, words: list[str]) -> None:
    """The command and its flags are known. Nothing is run."""
    group: click.Command = cli.shoal
    rest = list(words)
    while isinstance(group, click.Group):
        name = rest.pop(0)
        assert name in group.commands, f"{where}: no command {name}"
        group = group.commands[name]
    group.make_context(name, rest)


def test_there_is_something_to_run() -> None:
    """The two tests above would pass on empty pages."""
    assert len(blocks("python")) >= 4
    assert len(commands()) >= 6


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is a file of the project."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_files_that_pages_name_exist() -> None:
    """`folder/file` in backticks, where the folder is one of ours."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:protocol|ps|worker|launch|bench|tests|examples|docs)/[\w./-]*)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"


def test_settings_on_the_page_have_their_defaults() -> None:
    """The table of docs/running.md against the settings themselves."""
    rows = re.findall(r"^\| `--([\w-]+)` \| ([^|]+) \|", (ROOT / "docs/running.md").read_text(), re.M)
    known = {setting.option[2:]: setting for setting in (*CLUSTER, *SERVER)}
    assert {name for name, _ in rows} == {setting.option[2:] for setting in CLUSTER}
    for name, default in rows:
        if name != "state-dir":
            setting = known[name]
            assert setting.read(default.split(";")[0].strip()) == setting.default, name


def test_decisions_are_numbered_in_a_row() -> None:
    """docs/adr/0001-…, 0002-…: none missing, each titled with its number."""
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    for number, page in enumerate(pages, 1):
        assert page.name.startswith(f"{number:04d}-")
        assert page.read_text().startswith(f"# {number}. ")
