"""The databases' own planners choose the hash column's index for a search."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    event,
    insert,
    select,
    text,
)

from sqla_byok import Byok, Encrypted

_table = Table(
    "planned",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(String(20), searchable=True), unique=True),
    Column("name", Encrypted(String(20), searchable=True)),
)
_ROWS = 2_000


def _plan(connection: Connection, statement: Select[Any]) -> str:
    """The database's plan for the statement, with the parameters that a search really sends."""
    explain = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "

    def add(conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> tuple[str, Any]:
        return explain + sql, parameters

    event.listen(connection, "before_cursor_execute", add, retval=True)
    cursor: Any = connection.execute(statement).cursor
    rows = cursor.fetchall()
    event.remove(connection, "before_cursor_execute", add)
    # MariaDB also lists the indexes that it might have used; "key" is the one it uses.
    return "\n".join(
        str(row if connection.dialect.name in ("sqlite", "postgresql") else row[5]) for row in rows
    )


def test_equality_and_in_use_the_hash_index(engine: Engine, byok: Byok) -> None:
    """== and IN are look-ups in the unique index and in the plain one; != is none, so the check can fail."""
    _table.metadata.create_all(engine)
    with byok.tenant("t1"), engine.connect() as connection:
        rows = [{"id": number, "mrn": f"M-{number}", "name": f"N-{number}"} for number in range(1, _ROWS + 1)]
        connection.execute(insert(_table), rows)
        analyze = (
            "ANALYZE planned" if engine.dialect.name in ("sqlite", "postgresql") else "ANALYZE TABLE planned"
        )
        connection.execute(text(analyze))
        connection.commit()
        for column, index in (
            (_table.c.mrn, _unique_index(connection)),
            (_table.c.name, "ix_planned_name_hash"),
        ):
            prefix = column.name[0].upper()
            for look_up in (column == f"{prefix}-7", column.in_([f"{prefix}-7", f"{prefix}-8", "none"])):
                plan = _plan(connection, select(_table.c.id, column).where(look_up))
                assert index in plan, plan
            plan = _plan(connection, select(_table.c.id, column).where(column != f"{prefix}-7"))
            assert index not in plan, plan


def _unique_index(connection: Connection) -> str:
    """What the database calls the index behind unique=True."""
    names = {"sqlite": "sqlite_autoindex_planned_1", "postgresql": "planned_mrn_hash_key"}
    return names.get(connection.dialect.name, "mrn_hash")
