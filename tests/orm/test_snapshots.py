"""The SQL of each way to search, as each database is sent it, kept in ``snapshots.txt`` for reading and for review.

``--update-snapshots`` writes the file anew. Parameters appear by name, never by value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from databases import KINDS
from keys_tools import TurnableClock
from orm.search_forms import ENCRYPTED, FORMS, rows
from sqlalchemy import Engine, create_engine, delete, event, insert, select, update
from sqlalchemy.orm import Session

from sqla_byok import Byok, LocalKms

FILE = Path(__file__).with_name("snapshots.txt")
HEADER = """\
The SQL of each form of tests/orm/search_forms.py, for the databases that it is the same on.
Written by: pytest tests/orm/test_snapshots.py --update-snapshots
"""
NAMED = {"sqlite": "named", "postgresql": "pyformat", "mariadb": "pyformat"}
"""How each driver can be given its parameters by name."""

Snapshots = dict[str, dict[str, str]]
"""The SQL by form and kind of database."""

Person, Visit = ENCRYPTED.Person, ENCRYPTED.Visit
ROTATING = ["==", "!=", "in_", "not_in", "not not_in", "any", "bindparam expanding"]
NO_SYNC = {"synchronize_session": False}

WRITES: dict[str, Callable[[Session], Any]] = {
    "INSERT": lambda s: s.execute(insert(Person).values(id=9, mrn="E-5")),
    "INSERT many": lambda s: s.execute(insert(Visit), [{"id": key, "code": "z"} for key in (7, 8)]),
    "flush": lambda s: (setattr(s.get_one(Person, 1), "mrn", "F-6"), s.flush()),
    "UPDATE": lambda s: s.execute(
        update(Person).where(Person.mrn == "B-2").values(nick="bo"), execution_options=NO_SYNC
    ),
    "UPDATE many": lambda s: s.execute(update(Visit), [{"id": 1, "code": "w"}, {"id": 2, "code": None}]),
    "DELETE": lambda s: s.execute(delete(Visit).where(Visit.code.in_(["x", "y"])), execution_options=NO_SYNC),
}


def _read() -> Snapshots:
    found: Snapshots = {}
    for block in FILE.read_text(encoding="utf-8").split("\n\n[")[1:] if FILE.exists() else []:
        title, _, sql = block.strip("\n").partition("\n")
        name, _, kinds = title.partition("] ")
        found.setdefault(name, {}).update(
            dict.fromkeys(kinds.split(", "), re.sub(r"^    ", "", sql, flags=re.MULTILINE))
        )
    return found


def _write(snapshots: Snapshots) -> None:
    blocks = [HEADER.rstrip()]
    for name, by_kind in snapshots.items():
        for sql in dict.fromkeys(by_kind.values()):
            kinds = ", ".join(kind for kind in KINDS if by_kind.get(kind) == sql)
            blocks.append(f"[{name}] {kinds}\n" + "\n".join(f"    {line}" for line in sql.split("\n")))
    FILE.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


@contextmanager
def _sent(engine: Engine) -> Iterator[list[str]]:
    """The SQL that reaches the driver, with SQLAlchemy's own line breaks and one spelling of a parameter's name."""
    sent: list[str] = []

    def listen(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        named = re.sub(r"%\((\w+)\)s", r":\1", statement)
        sent.append("\n".join(line.rstrip() for line in named.split("\n")))

    event.listen(engine, "before_cursor_execute", listen)
    yield sent
    event.remove(engine, "before_cursor_execute", listen)


def _snapshots(byok: Byok, engine: Engine) -> dict[str, str]:
    found: dict[str, str] = {}
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()

        def take(name: str, run: Callable[[], Any]) -> None:
            session.expunge_all()
            session.connection()
            with _sent(engine) as sent:
                run()
            # what a flush loads first is spelled in another way by SQLAlchemy 2.0
            found[name] = ";\n".join(sql for sql in sent if name not in WRITES or "SELECT" not in sql)

        for name, form in FORMS.items():
            take(name, lambda form=form: session.scalars(form.build(ENCRYPTED, select)).all())  # type: ignore[misc]
        for name, write in WRITES.items():
            take(name, lambda write=write: write(session))  # type: ignore[misc]
        session.rollback()
        byok.rotate_salt("t1")
        for name in ROTATING:
            take(
                f"{name}, while salts are rotated",
                lambda form=FORMS[name]: session.scalars(form.build(ENCRYPTED, select)).all(),  # type: ignore[misc]
            )
    return found


def test_the_sql_of_each_form_is_the_one_on_file(
    engine: Engine, tmp_path: Path, local_kms: LocalKms, request: pytest.FixtureRequest
) -> None:
    """A change of the SQL that a database is sent shows in review, letter for letter, and tells no value."""
    kind = engine.url.get_backend_name()
    named = create_engine(engine.url, paramstyle=NAMED[kind])
    byok = Byok(
        keystore=f"sqlite:///{tmp_path / 'snapshots.db'}", clock=TurnableClock()
    )  # rotation takes time
    byok.create_keystore()
    byok.attach(named)
    byok.onboard("t1", local_kms)
    try:
        ENCRYPTED.Base.metadata.create_all(named)
        found = _snapshots(byok, named)
    finally:
        named.dispose()
        byok.close()
    on_file = _read()
    if request.config.getoption("--update-snapshots"):
        _write({name: {**on_file.get(name, {}), kind: sql} for name, sql in found.items()})
        return
    assert found == {name: by_kind[kind] for name, by_kind in on_file.items() if kind in by_kind}


def test_the_snapshots_tell_no_value() -> None:
    """Neither a value that was searched for nor one that was written is in the file."""
    content = FILE.read_text(encoding="utf-8")
    values = {value for row in rows(ENCRYPTED) for key, value in vars(row).items() if isinstance(value, str)}
    assert len(values) > 5
    assert [value for value in values if re.search(rf"['\"= ]{re.escape(value)}['\") ,]", content)] == []
    assert "_hash = :" in content
