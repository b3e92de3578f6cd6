"""What messages and pages tell somebody to run exists: each command with its options, each call."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sqla_byok import Byok, jobs
from sqla_byok.cli import app

ROOT = Path(__file__).parent.parent
COMMAND = typer.main.get_command(app)

_QUOTED = re.compile(r"['`](byok [^'`\n]+)['`]")
_CALLS = re.compile(r"\b(byok|Byok|jobs|sqla_byok\.jobs)\.([a-z_]+)\(")
_MODULES = re.compile(r"\bsqla_byok\.jobs\.([a-z_]+)")


def texts() -> Iterator[tuple[str, str]]:
    """Every string of the package, and every page."""
    for path in sorted((ROOT / "sqla_byok").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value for part in node.values if isinstance(part, ast.Constant))
                yield str(path.relative_to(ROOT)), " … ".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield str(path.relative_to(ROOT)), node.value
    for page in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"):
        yield str(page.relative_to(ROOT)), page.read_text()


def commands() -> dict[str, str]:
    """What is quoted as a command, and where."""
    found = {}
    for where, text in texts():
        for quoted in _QUOTED.findall(text):
            found[quoted] = where
        for example in re.findall(r"Example: (byok .+)", text):
            found[example.strip()] = where
        for line in re.findall(r"^\$ (byok .+)$", text, re.MULTILINE):
            found[line] = where
    return found


def parse(words: list[str]) -> None:
    """Walk down the commands, and look whether each option is there."""
    group: Any = COMMAND
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            options = {name for each in group.params for name in (*each.opts, *each.secondary_opts)}
            name = word.partition("=")[0]
            assert name in options or name in {"--install-completion", "--help"}, word
            if words and name in {"--app", "--database"}:
                words.pop(0)
        elif hasattr(group, "commands"):
            assert word in group.commands, word
            group = group.commands[word]


def test_there_are_some() -> None:
    assert len(commands()) > 25


@pytest.mark.parametrize("command", sorted(commands()))
def test_each_command_exists(command: str) -> None:
    words = command.split()[1:]
    if words and words[0].startswith("…"):
        return
    parse([word for word in words if word != "…"])


def test_each_call_exists() -> None:
    """Of the Byok and of the module of jobs."""
    missing = set()
    for where, text in texts():
        if where == "CHANGELOG.md":
            continue
        for of, name in _CALLS.findall(text):
            there = Byok if of in ("byok", "Byok") else jobs
            if not hasattr(there, name):
                missing.add((where, f"{of}.{name}"))
        for name in _MODULES.findall(text):
            if not hasattr(jobs, name):
                missing.add((where, f"sqla_byok.jobs.{name}"))
    assert missing == set()
