"""What is legal stays legal: each form gives the rows that it gives over the plaintext twin, on every database."""

from __future__ import annotations

from typing import Any

from orm.guard_forms import ENCRYPTED, LEGAL, PLAIN, Models, rows
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from sqla_byok import Byok


def _plain(value: Any) -> Any:
    """An entity as the values of its columns and of the collections that were loaded with it."""
    mapper = getattr(type(value), "__mapper__", None)
    if mapper is None:
        return bytes(value) if isinstance(value, bytes) else value
    shown = [getattr(value, name) for name, _ in mapper.columns.items() if not name.endswith("_hash")]
    for relationship in mapper.relationships:
        name = relationship.key
        loaded = value.__dict__.get(name)
        if isinstance(loaded, list):
            shown.append((name, [_plain(one) for one in loaded]))
    return tuple(shown)


def _rows(session: Session, form: Any, models: Models) -> list[Any]:
    session.expunge_all()
    result: Any = session.execute(form(models))
    found = [tuple(_plain(value) for value in row) for row in result.unique().all()]
    session.expunge_all()
    return found


def _known_to(engine: Engine) -> dict[str, Any]:
    """MariaDB has no FILTER."""
    mariadb = engine.dialect.name in ("mysql", "mariadb")
    return {name: form for name, form in LEGAL.items() if not (mariadb and "FILTER" in name)}


def test_legal_forms_give_their_twins_rows(engine: Engine, byok: Byok) -> None:
    """No false alarm, and no other row than in plaintext."""
    for models in (ENCRYPTED, PLAIN):
        models.Base.metadata.create_all(engine)
    wrong: dict[str, Any] = {}
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.add_all(rows(PLAIN))
        session.commit()
        for name, form in _known_to(engine).items():
            try:
                mine, theirs = (_rows(session, form, models) for models in (ENCRYPTED, PLAIN))
            except Exception as error:
                session.rollback()
                mine, theirs = repr(error), None  # type: ignore[assignment]
            if mine != theirs or not mine:
                wrong[name] = mine, theirs
    assert wrong == {}


async def test_legal_forms_give_their_twins_rows_from_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """The same over AsyncSession."""
    wrong: dict[str, Any] = {}
    async with async_engine.begin() as connection:
        for models in (ENCRYPTED, PLAIN):
            await connection.run_sync(models.Base.metadata.create_all)
    async with abyok.asession("t1", async_engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.add_all(rows(PLAIN))
        await session.commit()
        for name, form in _known_to(async_engine.sync_engine).items():
            mine, theirs = [await session.run_sync(_rows, form, models) for models in (ENCRYPTED, PLAIN)]
            if mine != theirs or not mine:
                wrong[name] = mine, theirs
    assert wrong == {}
