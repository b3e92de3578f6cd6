"""Stored values as they are, for whoever moves them: ciphertext and hashes are bytes here, and no statement is judged.

A :class:`StoredTable` stands for one table with encrypted columns: how its rows are read page by page and changed only
where nobody else has changed them, and, under a tenant's keyring, how its values are opened, sealed and hashed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    BIGINT,
    INTEGER,
    SMALLINT,
    BigInteger,
    BindParameter,
    Column,
    Connection,
    Dialect,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    and_,
    bindparam,
    cast,
    column,
    false,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from sqla_byok.crypto.formats import HEADER_SIZE, OVERHEAD, VALUE_MAGIC, is_direct
from sqla_byok.crypto.values import reseal_with
from sqla_byok.errors import ConfigurationError
from sqla_byok.keys import direct
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.searchable import OFF, ON
from sqla_byok.orm.current import RUNNING, Turn, attachment_of
from sqla_byok.orm.namesakes import Stored
from sqla_byok.orm.plain import codec_of, driver_binary, driver_bytes
from sqla_byok.orm.schema import sources_of
from sqla_byok.orm.tenant_column import Digits, exactly, python_type
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["NOBODY", "Change", "Processors", "StoredRow", "StoredTable", "UnderKeys", "key_id"]


class Bytes(TypeDecorator[bytes]):
    """What is stored, as drivers take and give it."""

    impl = LargeBinary
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Any:
        return driver_binary(dialect)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return driver_bytes(dialect, coltype)


_SINGLE = 24  # bits of precision up to which FLOAT(p) is one of four bytes

NOBODY = ""
"""In the place of a tenant: whose rows have NULL in the tenant column."""


class StoredRow(NamedTuple):
    """One row.

    :param key: the values of its primary key.
    :param tenant: the value of its tenant column, as text; None where there is no such column, or NULL in it.
    :param cells: what is stored, by the keys of the encrypted and hash columns.
    """

    key: tuple[Any, ...]
    tenant: str | None
    cells: dict[str, bytes | None]


class Change(NamedTuple):
    """What is to become of a row.

    :param row: the row as it was read.
    :param held: which of its cells must be as they were read.
    :param new: what is to be stored, by column key.
    """

    row: StoredRow
    held: tuple[str, ...]
    new: Mapping[str, bytes | None]


class Prepared(NamedTuple):
    """Changes, ready to be sent.

    :param changes: what they are.
    :param statement: it changes as many rows as were as they had been read.
    :param parameters: its parameters.
    """

    changes: Sequence[Change]
    statement: Any
    parameters: Any


class StoredTable:
    """One table with encrypted columns.

    :param table: as it is declared.
    :param tenant_column: the key of the column that says whose a row is, if there is one.
    :param keys: which of its encrypted and hash columns are read; all of them unless given.
    :ivar name: of the table, with its schema.
    :ivar values: the types of its encrypted columns, by key.
    :ivar hashes: the types of its hash columns, by key; ``sources``: the keys of the columns that they follow.
    :ivar owners: whose keys its encrypted columns take, by key.
    :raises ConfigurationError: it has no primary key, by which rows are read one after another.
    """

    def __init__(
        self, table: Table, tenant_column: str | None = None, keys: Sequence[str] | None = None
    ) -> None:
        self.name = table.fullname
        if not table.primary_key.columns:
            raise ConfigurationError(
                f"{table.fullname}: a table without a primary key cannot be worked on row by row; give it one"
            )
        ours = {each.key: each for each in table.c if isinstance(each.type, Encrypted | SearchHash)}
        self.columns: dict[str, Column[Any]] = {
            key: each for key, each in ours.items() if keys is None or key in keys
        }
        types = {key: each.type for key, each in self.columns.items()}
        self.values = {key: type_ for key, type_ in types.items() if isinstance(type_, Encrypted)}
        self.hashes = {key: type_ for key, type_ in types.items() if isinstance(type_, SearchHash)}
        self.owners = {key: type_.owner for key, type_ in self.values.items()}
        self.sources = {key: sources_of(self.columns[key]) for key in self.hashes}
        self._primary = list(table.primary_key.columns)
        plain = [*self._primary, *((table.c[tenant_column],) if tenant_column else ())]
        given = {each.name: column(each.name, each.type, _selectable=None) for each in plain}
        given.update({each.name: column(each.name, Bytes()) for each in self.columns.values()})
        self.stored = Stored(table.name, *given.values(), schema=table.schema)
        self.key = [self.stored.c[each.name] for each in self._primary]
        self.tenant = None if tenant_column is None else self.stored.c[table.c[tenant_column].name]

    # -- reading ---------------------------------------------------------------------------------------------------

    def page(
        self,
        conn: Connection,
        limit: int | None,
        *,
        behind: Any = None,
        up_to: Any = None,
        tenant: str | None = None,
    ) -> list[StoredRow]:
        """The next rows in the order of the primary key.

        :param limit: how many at most; None: all.
        :param behind: the key of the last row before them; None: from the first.
        :param up_to: the key of the last row that belongs to them; None: to the end.
        :param tenant: only this tenant's rows; :data:`NOBODY`: those whose tenant column is NULL.
        """
        where = self._within(conn, behind, up_to, tenant)
        cells = [self.cell(key) for key in self.columns]
        plain = [*self.key, *(() if self.tenant is None else (self.tenant,))]
        statement = select(*plain, *cells).where(*where).order_by(*self.key).limit(limit)
        rows = conn.execute(statement).all()
        names, width, start = tuple(self.columns), len(self.key), len(plain)
        whose = self.tenant is not None
        return [
            StoredRow(
                values[:width],
                str(values[width]) if whose and values[width] is not None else None,
                dict(zip(names, values[start:], strict=True)),
            )
            for values in map(tuple, rows)
        ]

    def boundary(self, conn: Connection, rows: int, *, behind: Any = None, tenant: str | None = None) -> Any:
        """The key of the row that stands so many rows behind another; None where there are not so many."""
        statement = select(*self.key).where(*self._within(conn, behind, None, tenant))
        found = conn.execute(statement.order_by(*self.key).offset(rows - 1).limit(1)).first()
        return None if found is None else tuple(found)

    def count(self, conn: Connection, *, behind: Any = None, tenant: str | None = None) -> int:
        """How many rows there are behind one."""
        rows = select(*self.key).where(*self._within(conn, behind, None, tenant)).subquery()
        return conn.scalar(select(func.count()).select_from(rows)) or 0

    def tenants(self, conn: Connection) -> list[str]:
        """Whose rows there are, by the tenant column."""
        if self.tenant is None:
            return []
        if (python_type(self.tenant.type) or str) is not str:
            return [str(each) for each in conn.scalars(select(self.tenant).distinct()) if each is not None]
        # Not by the names themselves, of which the column's collation may take several for one.
        found = conn.scalars(select(Digits(self.tenant)).distinct())
        return [bytes.fromhex(each).decode() for each in found if each is not None]

    def refuse_keys(self, conn: Connection) -> None:
        """Refuse a table of which a row is not found by its primary key.

        :raises ConfigurationError: rows have NULL in it, which SQLite lets in; or it is a FLOAT of MySQL or MariaDB,
            which does not compare equal to the number that they give back.
        """
        if conn.dialect.name in ("mysql", "mariadb"):
            for each in self.key:
                if each.type.__visit_name__ in ("float", "FLOAT") and (each.type.precision or 0) <= _SINGLE:  # type: ignore[attr-defined] # of a Float
                    raise ConfigurationError(
                        f"{self.name}.{each.name}: a FLOAT is not found by the number that the database gives back of "
                        "it; make the key a DOUBLE, or another type"
                    )
        if conn.dialect.name == "sqlite":
            null = or_(*(each.is_(None) for each in self.key))
            rows = conn.scalar(select(func.count()).select_from(self.stored).where(null))
            if rows:
                raise ConfigurationError(
                    f"{self.name}: {rows} of its rows have NULL in the primary key, so that nothing tells them apart; "
                    "give them keys, or delete them"
                )

    def _within(
        self, conn: Connection, behind: Any, up_to: Any, tenant: str | None
    ) -> Iterator[ColumnElement[bool]]:
        if behind is not None:
            yield self._compared(conn, behind, beyond=True)
        if up_to is not None:
            yield self._compared(conn, up_to, beyond=False)
        if tenant is not None:
            yield from self.of_tenant(tenant)

    def of_tenant(self, tenant: str) -> Iterator[ColumnElement[bool]]:
        """What finds a tenant's rows, or :data:`NOBODY`'s, where a column says whose they are."""
        if self.tenant is None:
            return
        python = python_type(self.tenant.type) or str
        if tenant == NOBODY:
            yield self.tenant.is_(None)
        elif python is str:
            yield exactly(self.tenant, _bound(self.tenant, tenant))
        else:
            try:
                yield self.tenant == python(tenant)
            except (ValueError, ArithmeticError):
                yield false()  # a name that no row can have

    def _compared(self, conn: Connection, key: Sequence[Any], *, beyond: bool) -> ColumnElement[bool]:
        if len(key) == 1:
            return self._ordered(self.key[0], key[0], beyond)
        if conn.dialect.name not in ("mysql", "mariadb"):
            mine = tuple_(*self.key)
            theirs = tuple_(*(_bound(each, value) for each, value in zip(self.key, key, strict=True)))
            return self._ordered(mine, theirs, beyond)
        # There a comparison of rows is no range of an index; this is.
        parts = []
        for last in range(len(key)):
            same = [self.key[place] == key[place] for place in range(last)]
            parts.append(and_(*same, self.key[last] > key[last] if beyond else self.key[last] < key[last]))
        if not beyond:
            parts.append(and_(*(mine == value for mine, value in zip(self.key, key, strict=True))))
        return or_(*parts)

    @staticmethod
    def _ordered(mine: Any, theirs: Any, beyond: bool) -> ColumnElement[bool]:
        found: ColumnElement[bool] = mine > theirs if beyond else mine <= theirs
        return found

    # -- changing --------------------------------------------------------------------------------------------------

    def prepared(self, dialect: Dialect, changes: Sequence[Change]) -> Prepared:
        """The statement that changes rows of which the held cells are as they were read.

        :param changes: all with the same columns, held and new.
        """
        held, new = changes[0].held, tuple(changes[0].new)
        if dialect.name == "postgresql":
            return Prepared(changes, self._joined(held, new), self._packed(changes, held, new))
        rows = [self._row(change, held, new) for change in changes]
        return Prepared(changes, self._each(held, new), rows)

    def _each(self, held: Sequence[str], new: Sequence[str]) -> Any:
        where = [mine == bindparam(f"k{place}", type_=mine.type) for place, mine in enumerate(self.key)]
        where += [self.cell(key).is_not_distinct_from(bindparam(f"o{n}")) for n, key in enumerate(held)]
        values: dict[Any, Any] = {self.cell(key): bindparam(f"n{n}") for n, key in enumerate(new)}
        return update(self.stored).where(*where).values(values)

    def _row(self, change: Change, held: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
        row: dict[str, Any] = {f"k{place}": value for place, value in enumerate(change.row.key)}
        row.update({f"o{n}": change.row.cells[key] for n, key in enumerate(held)})
        row.update({f"n{n}": change.new[key] for n, key in enumerate(new)})
        return row

    def _joined(self, held: Sequence[str], new: Sequence[str]) -> Any:
        """One statement for all rows: their keys in arrays, and all cells in one parameter, out of which it cuts them.

        Drivers take long over arrays, most of all of bytes: it is a third faster than with those, and three times as a
        statement for each row. Arrays of numbers go as text, which takes a fifth of the time.
        """
        keys = [(f"k{place}", mine.type) for place, mine in enumerate(self.key)]
        cells = [f"o{n}" for n in range(len(held))] + [f"n{n}" for n in range(len(new))]
        typed = keys + [(f"{name}{what}", Integer()) for name in cells for what in ("at", "size")]
        arrays = [_array(name, type_) for name, type_ in typed]
        columns = (column(name, type_) for name, type_ in typed)
        given = func.unnest(*arrays).table_valued(*columns).render_derived(name="given")
        bytes_ = bindparam("cells", type_=Bytes())

        def cut(name: str) -> ColumnElement[Any]:
            return func.substr(bytes_, given.c[f"{name}at"], given.c[f"{name}size"], type_=Bytes())

        where = [mine == given.c[f"k{place}"] for place, mine in enumerate(self.key)]
        where += [self.cell(key).is_not_distinct_from(cut(f"o{n}")) for n, key in enumerate(held)]
        values: dict[Any, Any] = {self.cell(key): cut(f"n{n}") for n, key in enumerate(new)}
        return update(self.stored).where(*where).values(values)

    def _packed(self, changes: Sequence[Change], held: Sequence[str], new: Sequence[str]) -> dict[str, Any]:
        packed: dict[str, Any] = {
            f"k{place}": _packed([change.row.key[place] for change in changes], mine.type)
            for place, mine in enumerate(self.key)
        }
        of = {f"o{n}": [change.row.cells[key] for change in changes] for n, key in enumerate(held)}
        of |= {f"n{n}": [change.new[key] for change in changes] for n, key in enumerate(new)}
        at = 1
        for name, cells in of.items():
            # NULL has no size, and what is cut out by it is NULL.
            sizes = [None if cell is None else len(cell) for cell in cells]
            places = list(accumulate((size or 0 for size in sizes), initial=at))
            packed[f"{name}at"], packed[f"{name}size"] = _numbers(places[:-1]), _numbers(sizes)
            at = places[-1]
        packed["cells"] = b"".join(cell for cells in of.values() for cell in cells if cell is not None)
        return packed

    @staticmethod
    def bound(blob: bytes) -> BindParameter[Any]:
        """Bytes to compare stored ones with."""
        return bindparam(None, blob, type_=Bytes())

    def cell(self, key: str) -> ColumnElement[Any]:
        """One of its encrypted or hash columns, as bytes."""
        found: ColumnElement[Any] = self.stored.c[self.columns[key].name]
        return found


_NUMBERS = (Integer, BigInteger, SmallInteger, INTEGER, BIGINT, SMALLINT)


def _array(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    if type(type_) in _NUMBERS:
        return cast(bindparam(name, type_=String()), ARRAY(type_))
    return bindparam(name, type_=ARRAY(type_))


def _packed(values: Sequence[Any], type_: TypeEngine[Any]) -> Any:
    return _numbers(values) if type(type_) in _NUMBERS else values


def _numbers(values: Sequence[int | None]) -> str:
    """An array of numbers, as PostgreSQL reads it."""
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"


def _bound(mine: ColumnElement[Any], value: Any) -> BindParameter[Any]:
    return bindparam(None, value, type_=mine.type)


# -- under tenants' keys -----------------------------------------------------------------------------------------------


class Processors:
    """What opens, seals and hashes the cells of a table: made once, for whatever keys.

    :param table: the table.
    :param dialect: that of the attached engine.
    :param keyrings: all open tenants.
    """

    def __init__(self, table: StoredTable, dialect: Dialect, keyrings: Keyrings) -> None:
        self.table, self.keyrings, self.attachment = table, keyrings, attachment_of(dialect)
        self.open = {key: type_.opening(dialect).one for key, type_ in table.values.items()}
        self.reseal = {
            key: reseal_with(
                partial(self.attachment.foreign, type_.column_id or ""),
                type_.column_id or "",
                codec_of(type_.type_).name,
                type_.pad_to,
            )
            for key, type_ in table.values.items()
        }
        self._dialect = dialect
        self._hash: dict[tuple[str, int], Any] = {}

    def hash(self, key: str, nth: int) -> Any:
        """What hashes the values of a hash column's sources by one of the live search salts."""
        found = self._hash.get((key, nth))
        if found is None:
            found = self._hash[key, nth] = self.table.hashes[key].at(nth).bind_processor(self._dialect)
        return found


class UnderKeys:
    """The cells of one row, or of several of the same tenants, under these tenants' keys.

    :param processors: those of the table.
    :param rings: the keyrings, by whose they are: None for the row's own tenant, else the owner of single columns.
    """

    def __init__(self, processors: Processors, rings: Mapping[str | None, Keyring]) -> None:
        self._processors, self._types, self.rings = processors, processors.table.values, rings
        self._turn = Turn(processors.attachment, next(iter(rings.values())).tenant, rings)
        self._may_hash: dict[str, bool] = {}

    def opened(self, key: str, blob: bytes) -> Any:
        """The value of a cell.

        :raises DecryptError: it does not open.
        """
        type_ = self._types[key]
        inner = self._inner(type_, blob) if type_.mode == "direct" and is_direct(blob) else blob
        return self._processors.open[key](self.rings[type_.owner], inner)

    def begin(self) -> None:
        """Let :meth:`hashed` work under these keys from now on, within ``running(None)``."""
        RUNNING.set(self._turn)

    def resealed(self, key: str, blob: bytes) -> bytes:
        """The cell as it would be stored now; the same object where it is already.

        :raises DecryptError: it does not open.
        """
        type_ = self._types[key]
        ring = self.rings[type_.owner]
        inner = self._inner(type_, blob) if is_direct(blob) else blob
        sealed = self._processors.reseal[key](ring, inner)
        if type_.mode != "direct":
            return sealed
        if sealed is inner and is_direct(blob):
            return blob
        return direct.encrypt(self._processors.keyrings, ring, [direct.Cell(type_.column_id or "", sealed)])[
            0
        ]

    def hashed(self, key: str, values: Mapping[str, Any], nth: int = 0) -> bytes | None:
        """What the hash column has to hold for these values; None where they have no hash. After :meth:`begin`.

        :param nth: by which of the live search salts; 0 is the active one.
        :raises EncodeError: a value that the normalizer or transform does not take.
        """
        sources = self._processors.table.sources[key]
        given = values[sources[0]] if len(sources) == 1 else tuple([values[each] for each in sources])
        hashed: bytes | None = self._processors.hash(key, nth)(given)
        return hashed

    def is_searched(self, key: str) -> bool:
        """Whether the tenant can be searched by a hash column, so that each value needs its hash."""
        type_, ring = self._of(key)
        return ring is not None and ring.searchable.state(type_.column_id or "") == ON

    def may_hash(self, key: str) -> bool:
        """Whether hashes of a column may be made as the model says: for this tenant nobody searches by others."""
        may = self._may_hash.get(key)
        if may is None:
            type_, ring = self._of(key)
            may = self._may_hash[key] = ring is None or ring.searchable.may_hash(type_.spec)
        return may

    def is_off(self, key: str) -> bool:
        """Whether the tenant gets no hashes in a column."""
        type_, ring = self._of(key)
        return ring is not None and ring.searchable.state(type_.column_id or "") == OFF

    def salts(self, key: str) -> int:
        """By how many live search salts the hashes of a column may be made."""
        _, ring = self._of(key)
        return 1 if ring is None else len(ring.live_salts)

    def _of(self, key: str) -> tuple[SearchHash, Keyring | None]:
        """The type of a hash column, and whose keys it takes; None where all that those have in the row is NULL."""
        type_ = self._processors.table.hashes[key]
        return type_, self.rings.get(type_.owner)

    def _inner(self, type_: Encrypted[Any], blob: bytes) -> bytes:
        """The value that a direct one has inside, by one call to the tenant's KMS."""
        cell = direct.Cell(type_.column_id or "", blob)
        return direct.decrypt(self._processors.keyrings, self.rings[type_.owner], [cell])[0]


def key_id(blob: bytes) -> bytes | None:
    """The id of the data key of a stored value; None where it is not one of ours."""
    return None if len(blob) < OVERHEAD or blob[0] != VALUE_MAGIC else bytes(blob[2:HEADER_SIZE])
