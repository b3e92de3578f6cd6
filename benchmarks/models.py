"""What is measured: encrypted models, each with its twin in plaintext; and on which databases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    insert,
    make_url,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from databases import ASYNC, SYNC, Databases, NotFoundError

from sqla_byok import Byok, Encrypted

__all__ = [
    "ASYNC",
    "COLUMNS",
    "STORED",
    "SYNC",
    "TENANT",
    "Base",
    "Databases",
    "Plain",
    "PlainEntity",
    "PlainLookUp",
    "Secret",
    "SecretEntity",
    "SecretLookUp",
    "fill",
    "urls",
    "value",
    "values",
]

TENANT = "org-42"
COLUMNS = ("a", "b", "c", "d", "e")


class Base(DeclarativeBase):
    pass


class Plain(Base):
    __tablename__ = "bench_plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    a: Mapped[str] = mapped_column(String(40))
    b: Mapped[str] = mapped_column(String(40))
    c: Mapped[str] = mapped_column(String(40))
    d: Mapped[str] = mapped_column(String(40))
    e: Mapped[str] = mapped_column(String(40))


class Secret(Base):
    __tablename__ = "bench_encrypted"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    a: Mapped[str] = mapped_column(Encrypted(String(40)))
    b: Mapped[str] = mapped_column(Encrypted(String(40)))
    c: Mapped[str] = mapped_column(Encrypted(String(40)))
    d: Mapped[str] = mapped_column(Encrypted(String(40)))
    e: Mapped[str] = mapped_column(Encrypted(String(40)))


class PlainLookUp(Base):
    """For look-ups over many rows."""

    __tablename__ = "bench_plain_look_up"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(String(40), index=True)


class SecretLookUp(Base):
    __tablename__ = "bench_encrypted_look_up"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))


class PlainEntity(Base):
    """What a request of an application reads."""

    __tablename__ = "bench_plain_entity"
    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[str] = mapped_column(String(40), index=True)
    b: Mapped[str] = mapped_column(String(40))
    c: Mapped[str] = mapped_column(String(40))
    d: Mapped[str] = mapped_column(String(40))
    e: Mapped[str] = mapped_column(String(40))


class SecretEntity(Base):
    __tablename__ = "bench_encrypted_entity"
    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))
    b: Mapped[str] = mapped_column(Encrypted(String(40)))
    c: Mapped[str] = mapped_column(Encrypted(String(40)))
    d: Mapped[str] = mapped_column(Encrypted(String(40)))
    e: Mapped[str] = mapped_column(Encrypted(String(40)))


# The encrypted rows as they are stored, for what the fetch alone costs.
STORED = Table("bench_encrypted", MetaData(), *(Column(name, LargeBinary) for name in COLUMNS))


def value(row: int, column: str) -> str:
    """A text of 32 characters."""
    return f"{column}-{row:030d}"


def values(model: Any, row: int) -> dict[str, Any]:
    """A row but for its primary key."""
    number = {"number": row} if "number" in model.__table__.c else {}
    names = ("mrn",) if "mrn" in model.__table__.c else COLUMNS
    return {**number, **{name: value(row, name) for name in names}}


def fill(byok: Byok, attached: Engine, model: Any, rows: int) -> None:
    """Make these the rows of a model: so many, counted from 1."""
    with byok.tenant(TENANT), attached.begin() as connection:
        connection.execute(delete(model.__table__))
        for batch in _batches(rows):
            given = [{"id": row, **values(model, row)} for row in batch]
            connection.execute(insert(model.__table__), given)
    analyze(attached, model.__tablename__)


def _batches(rows: int) -> Iterator[range]:
    for start in range(1, rows + 1, 10_000):
        yield range(start, min(start + 10_000, rows + 1))


def analyze(engine: Engine, table: str) -> None:
    """Tell the database's planner what there is."""
    command = "ANALYZE TABLE" if engine.dialect.name in ("mysql", "mariadb") else "ANALYZE"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"{command} {table}"))


def urls(folder: Path, databases: Databases) -> dict[str, URL]:
    """A database of each kind that is there; SQLite's is in the folder."""
    found = {"sqlite": make_url(f"sqlite:///{folder}/bench.db")}
    for kind in (kind for kind in SYNC if kind != "sqlite"):
        try:
            found[kind] = databases.get(kind).url.set(drivername=SYNC[kind])
        except NotFoundError as error:
            Console(stderr=True).print(f"[yellow]without {kind}: {error}[/]")
    return found
