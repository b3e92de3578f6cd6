"""docs/statements.md, the way through the code for those who change it, names what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import sqla_byok
from sqla_byok import crypto, keys, orm
from sqla_byok.orm import kept

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "statements.md").read_text(encoding="utf-8")
PICTURE = (DOCS / "images" / "statement.svg").read_text(encoding="utf-8")
PACKAGE = Path(sqla_byok.__file__).parent
CALLED = re.compile(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`")
STEPS = re.compile(r'<text class="code"[^>]*>(?:\d  )?([^<]*)</text>')

# SQLAlchemy's, or a word of the example.
THEIRS = {"Session.info", "Column.info", "cursor.execute"}


def modules() -> Iterator[ModuleType]:
    for room in (orm, keys, crypto):
        yield from (import_module(f"{room.__name__}.{found.name}") for found in iter_modules(room.__path__))


def exists(name: str) -> bool:
    """Whether there is such a name: in a module, which may go without its room, or in any of them."""
    there = [*modules()]
    first, *rest = name.removeprefix("crypto.").split(".")
    named = [module for module in there if module.__name__.endswith(f".{first}")]
    candidates = [(module, rest) for module in named] or [(module, [first, *rest]) for module in there]
    missing = object()
    return any(
        reduce(lambda found, part: getattr(found, part, missing), path, module) is not missing
        for module, path in candidates
    )


@pytest.mark.parametrize(
    "name", sorted({*CALLED.findall(PAGE)} - THEIRS - {*re.findall(r"[a-z_]+\.py", PAGE)})
)
def test_each_name_of_the_page_exists(name: str) -> None:
    """Whoever reads the page finds what it names; a name that moved is moved there too."""
    assert exists(name)


def test_each_name_of_the_picture_exists() -> None:
    """Likewise in the picture."""
    names = {name for text in STEPS.findall(PICTURE) for name in re.split(r", | / ", text)} - THEIRS
    assert len(names) > 8
    assert [name for name in names if not exists(name if name != "get" else "Keyrings.get")] == []


def test_each_file_of_the_page_exists() -> None:
    """Likewise of files, which are those of orm/ where no folder is named; and no file of orm/ is left out."""
    named = set(re.findall(r"`((?:[a-z]+/)?[a-z_]+\.py)`", PAGE))
    assert [name for name in named if not (PACKAGE / ("" if "/" in name else "orm") / name).is_file()] == []
    there = {file.name for file in (PACKAGE / "orm").glob("[a-z]*.py")}
    assert there - named == set()
    assert all(
        (PACKAGE / "orm" / f"{module}.py").is_file() for module in re.findall(r"\(([a-z_]+)\)", PICTURE)
    )


def test_contributors_are_told_each_file() -> None:
    """CONTRIBUTING.md has a line for each file of orm/, and for none that is gone."""
    house = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("Its files:")[2]
    told = re.findall(r"`([a-z_]+\.py)`", house.partition("A name means")[0])
    assert sorted(told) == sorted(file.name for file in (PACKAGE / "orm").glob("[a-z]*.py"))


def test_what_is_kept_is_on_the_page() -> None:
    """State on SQLAlchemy's objects is what surprises: each of it is told."""
    names = [name for name, value in vars(kept).items() if name.isupper() and isinstance(value, str)]
    assert len(names) >= 7
    assert [name for name in names if f"`kept.{name}`" not in PAGE] == []
