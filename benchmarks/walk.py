"""Walks one statement of each kind through the package: which functions it calls, and how often it changes file.

Whoever wants to know what happens to a statement has to read along, and every change of file is a place to get lost.
Each statement is walked warm (the same was done before, all is cached) on SQLite, from the opening of its session to
the end. What is counted are the calls of the package's own functions, in the order in which they begin. **A change of
file** is two of them in a row that are defined in different files; returning to a caller is none.

Then the size of the code: lines that are neither blank nor comment, how many of them are docstrings, functions, and
the highest cyclomatic complexities, by ruff.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from sqlalchemy import String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqla_byok
from sqla_byok import Byok, Encrypted, LocalKms

PACKAGE = Path(sqla_byok.__file__).parent
TENANT = "org-42"
COMPLEX = 10  # functions above it are listed

# How often a walk may change file. A test holds the walks to it, on both lines of SQLAlchemy.
MOST_CHANGES = {"INSERT": 17, "SELECT": 12, "search": 16}


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Encrypted(String(40)))
    mrn: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))


# -- the walk --------------------------------------------------------------------------------------------------------


def insert_one(session: Session) -> None:
    session.add(Patient(name="Ada", mrn="A-1"))
    session.commit()


def select_three(session: Session) -> None:
    assert len(session.execute(select(Patient.id, Patient.name).where(Patient.id <= 3)).all()) == 3


def search(session: Session) -> None:
    assert len(session.scalars(select(Patient).where(Patient.mrn == "A-2")).all()) == 1


STATEMENTS: dict[str, Callable[[Session], None]] = {
    "INSERT": insert_one,
    "SELECT": select_three,
    "search": search,
}


class Call(NamedTuple):
    """A function of the package, by its file below it."""

    file: str
    function: str


@dataclass(frozen=True)
class Walk:
    """The calls of one statement."""

    name: str
    calls: list[Call]

    @property
    def changes(self) -> int:
        return sum(one.file != next_.file for one, next_ in pairwise(self.calls))

    @property
    def files(self) -> dict[str, int]:
        """How many calls each file has, those with most first."""
        counted = Counter(call.file for call in self.calls)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


class StandingClock:
    """A clock that stands, so that no look at the keystore is due in the middle of a walk."""

    def boot(self) -> float:
        return 1_000.0

    def wall(self) -> float:
        return 1_700_000_000.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here waits")


def walked(work: Callable[[], None]) -> list[Call]:
    """The calls of the package's functions while ``work`` runs."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(PACKAGE):
                calls.append(Call(file.relative_to(PACKAGE).as_posix(), name_of(frame)))

    gc.collect()
    gc.disable()  # finalizers belong to nobody's walk
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def name_of(frame: FrameType) -> str:
    return str(
        getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    )  # Python 3.10 knows the short one only


def walks() -> list[Walk]:
    """One walk of each statement."""
    with tempfile.TemporaryDirectory() as folder:
        byok = Byok(keystore=f"sqlite:///{folder}/keystore.db", clock=StandingClock())
        byok.create_keystore()
        byok.onboard(TENANT, LocalKms.create(Path(folder) / "customer.key"))
        engine = create_engine(f"sqlite:///{folder}/data.db")
        byok.attach(engine)
        Base.metadata.create_all(engine)

        def run(statement: Callable[[Session], None]) -> None:
            with byok.session(TENANT, engine) as session:
                statement(session)

        with byok.session(TENANT, engine) as session:
            session.add_all([Patient(name="Ada", mrn=f"A-{number}") for number in (2, 3, 4)])
            session.commit()
        found = []
        for name, statement in STATEMENTS.items():
            for _ in range(2):
                run(statement)
            found.append(Walk(name, walked(lambda statement=statement: run(statement))))  # type: ignore[misc]
        byok.close()
        engine.dispose()
    return found


# -- the code --------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Lines that are neither blank nor comment, how many of them are docstrings, and functions."""

    lines: int
    docstrings: int
    functions: int

    def plus(self, other: Size) -> Size:
        return Size(*(one + another for one, another in zip(self, other, strict=True)))


def sizes() -> dict[str, Size]:
    """The size of each file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): size_of(file) for file in files}


def size_of(file: Path) -> Size:
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    nothing |= {tokenize.ENCODING, tokenize.ENDMARKER}
    with tokenize.open(file) as opened:
        lines = {
            line
            for token in tokenize.generate_tokens(opened.readline)
            if token.type not in nothing
            for line in range(token.start[0], token.end[0] + 1)
        }
    source = file.read_text(encoding="utf-8")
    blank = {number for number, line in enumerate(source.splitlines(), 1) if not line.strip()}
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = sum(
        sum(bool(line.strip()) for line in docstring.splitlines())
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (docstring := ast.get_docstring(node, clean=False)) is not None
    )
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes)
    return Size(len(lines - blank), docstrings, functions)


def by_room(files: dict[str, Size]) -> dict[str, Size]:
    """The sizes summed by folder, the modules at the top each by itself."""
    rooms: dict[str, Size] = {}
    for file, size in files.items():
        room = f"{file.split('/')[0]}/" if "/" in file else file
        rooms[room] = rooms.get(room, Size(0, 0, 0)).plus(size)
    return rooms


def complexities() -> dict[str, int]:
    """The functions of a complexity above COMPLEX, by file, line and name, the most complex first."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--select", "C901"]
    command += [
        "--config",
        f"lint.mccabe.max-complexity = {COMPLEX}",
        "--output-format",
        "json",
        "--exit-zero",
    ]
    found = subprocess.run([*command, str(PACKAGE)], check=True, capture_output=True, text=True)
    return dict(sorted(_complexities(json.loads(found.stdout)), key=lambda item: (-item[1], item[0])))


def _complexities(found: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    for each in found:
        file = Path(each["filename"]).relative_to(PACKAGE).as_posix()
        # "`name` is too complex (12 > 10)"
        name, number = each["message"].split("`")[1], each["message"].split("(")[1].split(" ")[0]
        yield f"{file}:{each['location']['row']} {name}", int(number)


# -- the report ------------------------------------------------------------------------------------------------------


def walks_as_data(found: list[Walk]) -> dict[str, Any]:
    return {
        walk.name: {
            "calls": len(walk.calls),
            "files": walk.files,
            "changes of file": walk.changes,
            "at most": MOST_CHANGES[walk.name],
        }
        for walk in found
    }


def code_as_data() -> dict[str, Any]:
    files = sizes()
    return {
        "rooms": {room: size._asdict() for room, size in by_room(files).items()},
        "files": {file: size._asdict() for file, size in files.items()},
        f"complexity above {COMPLEX}": complexities(),
    }


def show_walks(console: Console, found: list[Walk], every_call: bool) -> None:
    table = Table(
        "statement", "calls", "files", "changes of file", "at most", title="The walk of a statement"
    )
    for walk in found:
        most = MOST_CHANGES[walk.name]
        colour = "green" if walk.changes <= most else "red"
        changes = f"[{colour}]{walk.changes}[/]"
        table.add_row(walk.name, str(len(walk.calls)), str(len(walk.files)), changes, str(most))
    console.print(table)
    for walk in found:
        console.print(f"{walk.name}: {', '.join(f'{file} {calls}' for file, calls in walk.files.items())}")
        for call in walk.calls if every_call else ():
            console.print(f"    {call.file:24} {call.function}", markup=False)


def show_code(console: Console) -> None:
    files = sizes()
    table = Table(
        "code", "lines", "docstrings", "functions", title="The code, without blank lines and comments"
    )
    rows = by_room(files)
    rows["all"] = reduce(Size.plus, files.values())
    rows |= {file: size for file, size in files.items() if "/" in file}
    for name, size in rows.items():
        table.add_row(name, *(f"{number:,}" for number in size), end_section=name == "all")
    console.print(table)
    complex_ = complexities()
    console.print(f"{len(complex_)} functions are of a cyclomatic complexity above {COMPLEX}:")
    for name, number in complex_.items():
        console.print(f"    {number:3} {name}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="The walk of a statement, and the size of the code.")
    parser.add_argument("--calls", action="store_true", help="list every call")
    parser.add_argument(
        "--walks-only", action="store_true", help="without the size of the code, which needs ruff"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = walks()
    if options.json:
        code = {} if options.walks_only else code_as_data()
        print(json.dumps({"walks": walks_as_data(found), **code}, indent=2))
        return 0
    console = Console(width=120, highlight=False)
    show_walks(console, found, options.calls)
    if not options.walks_only:
        show_code(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
