"""The databases' own planners choose the hash column's index for a search."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, Select, String, event, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, Encrypted, hash_index
from sqla_byok.normalize import last


class Base(DeclarativeBase):
    pass


class Planned(Base):
    __tablename__ = "planned"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)
    name: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))
    phone: Mapped[str] = mapped_column(Encrypted(String(20)))
    phone_last4 = hash_index("phone", transform=last(4))


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
    """== and IN are look-ups in a unique index, a plain one and that of a hybrid; != is none, so the check can fail."""
    Base.metadata.create_all(engine)
    with byok.tenant("t1"), engine.connect() as connection:
        rows = [
            {"id": number, "mrn": f"M-{number}", "name": f"N-{number}", "phone": f"0{number:04}"}
            for number in range(1, _ROWS + 1)
        ]
        connection.execute(insert(Planned), rows)
        analyze = (
            "ANALYZE planned" if engine.dialect.name in ("sqlite", "postgresql") else "ANALYZE TABLE planned"
        )
        connection.execute(text(analyze))
        connection.commit()
        for attribute, index, one, two in (
            (Planned.mrn, _unique_index(connection), "M-7", "M-8"),
            (Planned.name, "ix_planned_name_hash", "N-7", "N-8"),
            (Planned.phone_last4, "ix_planned_phone_last4_hash", "0007", "0008"),
        ):
            for look_up, found in ((attribute == one, [7]), (attribute.in_([one, two, "none"]), [7, 8])):
                statement = select(Planned.id, Planned.name).where(look_up)
                plan = _plan(connection, statement)
                assert index in plan, plan
                assert sorted(connection.execute(statement).scalars()) == found
            plan = _plan(connection, select(Planned.id, Planned.name).where(attribute != one))
            assert index not in plan, plan


def _unique_index(connection: Connection) -> str:
    """What the database calls the index behind unique=True."""
    names = {"sqlite": "sqlite_autoindex_planned_1", "postgresql": "planned_mrn_hash_key"}
    return names.get(connection.dialect.name, "mrn_hash")
