"""docs/types.md tells what an encrypted column takes: each row of its table is tried."""

from __future__ import annotations

import enum
import re
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy
from sqlalchemy import Column, Engine, Integer, MetaData, Table, insert, select

from sqla_byok import Byok, EncodeError, Encrypted

PAGE = Path(__file__).parents[2] / "docs" / "types.md"
ROW = re.compile(r"^\| `(.+?)` \| `(.+?)` \| (?:`(.+?)`|(refused))(?: \||:)", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))


class Color(enum.Enum):
    RED = "r"


NAMES = {
    **vars(sqlalchemy),
    "Color": Color,
    **{cls.__name__: cls for cls in (date, datetime, time, timedelta, timezone, Decimal, UUID)},
}


def _value(text: str) -> Any:
    return eval(text, dict(NAMES))  # noqa: S307 - our own page


@pytest.mark.parametrize(("type_", "given", "read", "refused"), ROWS)
def test_each_row_of_the_page_holds(
    byok: Byok, engine: Engine, type_: str, given: str, read: str, refused: str
) -> None:
    """On each database the value is taken and read back as the page says, or refused."""
    table = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("v", Encrypted(_value(type_)))
    )
    table.create(engine)
    with byok.session("t1", engine) as session:
        if refused:
            with pytest.raises(EncodeError):
                session.execute(insert(table).values(v=_value(given)))
            return
        session.execute(insert(table).values(v=_value(given)))
        found = session.scalars(select(table.c.v)).one()
    assert found == _value(read)
    assert type(found) is type(_value(read))


def test_the_page_has_rows_of_both_kinds() -> None:
    """A change of the table's form does not turn these tests off."""
    assert len([row for row in ROWS if row[3]]) >= 12
    assert len([row for row in ROWS if not row[3]]) >= 12
