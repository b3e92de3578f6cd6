"""Results in PostgreSQL's binary format, where psycopg makes the same values of them.

As text, a stored value travels as hexadecimal digits, twice as long, and is parsed byte by byte; that is what reading
ciphertext with psycopg costs most. Which types a statement returns is not known before it was executed once, and what
is declared may be something else in the database. So a statement is executed as text first; where psycopg makes the
same Python values of all that it returned in either format, it asks for binary from then on, and looks at the types
each time. asyncpg has always fetched in binary.

https://www.psycopg.org/psycopg3/docs/basic/params.html#binary-parameters-and-results
"""

from __future__ import annotations

from typing import Any

from sqla_byok.errors import UnsupportedQueryError
from sqla_byok.orm import upstream
from sqla_byok.orm.kept import BINARY

__all__ = ["ask_for_binary", "learn_of_binary"]

# The OIDs of the types that come out the same (PostgreSQL's pg_type): bool bytea name int8 int2 int4 text oid json
# float8 bpchar varchar date time timestamp timestamptz interval timetz numeric uuid jsonb.
_ALIKE = frozenset(
    (
        16,
        17,
        19,
        20,
        21,
        23,
        25,
        26,
        114,
        701,
        1042,
        1043,
        1082,
        1083,
        1114,
        1184,
        1186,
        1266,
        1700,
        2950,
        3802,
    )
)
_FORMATS = (0, 1)  # text, binary
_PSYCOPG = frozenset(("psycopg", "psycopg_binary", "psycopg_c"))
_CURSORS = frozenset(("Cursor", "AsyncCursor"))


def ask_for_binary(context: Any) -> None:
    """Have a statement's result come in binary, where it is known to come out the same.

    :param context: its execution, which is not sent yet.
    """
    if context.compiled.__dict__.get(BINARY):
        upstream.driver_cursor(context).format = 1


def learn_of_binary(context: Any) -> None:
    """Look at the types of what was returned.

    :param context: the statement's execution, whose rows are not fetched yet.
    :raises UnsupportedQueryError: they came in binary, and are not the types that they were before: somebody changed
        the table.
    """
    kept = context.compiled.__dict__
    known = kept.get(BINARY)
    if known is False:
        return
    cursor = upstream.driver_cursor(context)
    rows = cursor.pgresult if _is_plain(cursor) else None
    if rows is None:
        return
    oids = {rows.ftype(place) for place in range(rows.nfields)}
    if known and not oids <= _ALIKE:
        kept[BINARY] = False
        raise UnsupportedQueryError(
            "the types of the columns that this statement returns were changed in the database since it was executed "
            "last; execute it again"
        )
    if known is None:
        kept[BINARY] = oids <= _ALIKE and all(_is_psycopgs(cursor, oid) for oid in oids)


def _is_plain(cursor: Any) -> bool:
    """Whether it is a cursor of psycopg's that can fetch in binary; neither client-side nor somebody's own."""
    cls = type(cursor)
    return cls.__name__ in _CURSORS and cls.__module__.partition(".")[0] == "psycopg"


def _is_psycopgs(cursor: Any, oid: int) -> bool:
    """Whether no loader of the application's stands in the place of psycopg's, in either format."""
    loaders = [cursor.adapters.get_loader(oid, format_) for format_ in _FORMATS]
    return all(getattr(one, "__module__", "").partition(".")[0] in _PSYCOPG for one in loaders)
