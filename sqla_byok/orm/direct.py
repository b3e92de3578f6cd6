"""Columns in ``mode="direct"``: each value is encrypted by the customer's KMS itself.

Inside is an ordinary value, so tenant and column are bound as ever. Writing, the bind processor makes that value and
leaves it in a :class:`Pending`; just before the statement is sent, :func:`send` has the KMS encrypt all of them.
Reading on a sync engine, :func:`decrypted` has the KMS decrypt each batch of rows as it is fetched. On an async engine
rows are made where nothing can be awaited: a read gives :class:`~sqla_byok.orm.sealed.Sealed`, which :func:`areveal`
opens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from sqlalchemy import inspect
from sqlalchemy.orm import object_session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from sqla_byok.crypto.formats import HEADER_SIZE, PLAIN, VALUE_MAGIC, is_direct, value_header
from sqla_byok.crypto.values import Opening, Taker
from sqla_byok.errors import ConfigurationError, EncodeError, NotAttachedError
from sqla_byok.keys.direct import Cell, adecrypt, aencrypt, decrypt, encrypt
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.orm import upstream
from sqla_byok.orm.current import Attachment, Turn, attachment_of
from sqla_byok.orm.rings import SEALED, AcrossRing, StatementRing
from sqla_byok.orm.sealed import Sealed

__all__ = ["Cells", "Pending", "areveal", "decrypted", "refusing", "resealed", "reveal", "send", "writer"]

_Process = Callable[[Any], Any]


# -- writing ---------------------------------------------------------------------------------------------------------


class Pending:
    """A parameter that the customer's KMS has yet to encrypt. No driver takes it, so it is never stored as it is."""

    __slots__ = ("cell", "final", "stored")

    def __init__(self, cell: Cell, final: _Process | None) -> None:
        self.cell, self.final = cell, final
        self.stored: Any = None

    def __repr__(self) -> str:
        return f"<a value of {self.cell.column}, not yet encrypted by the customer's KMS>"

    def __str__(self) -> NoReturn:
        raise TypeError(f"{self!r} is not for the database")  # PyMySQL sends str() of what it does not know


def writer(
    attachment: Attachment, column: str, taker: Taker, seal: _Process, final: _Process | None
) -> _Process:
    """Build the bind processor of a direct column.

    :param seal: from a Python value to what another column would store.
    :param final: what the driver wants around bytes.
    """

    def bind(value: Any) -> Any:
        if type(value) is Sealed:
            stored = resealed(attachment, column, taker.ring(), value)
            return stored if final is None else final(stored)
        inner = seal(value)
        return None if inner is None else Pending(Cell(column, inner), final)

    return bind


def refusing(process: _Process, column: str) -> _Process:
    """``process`` for a hash column, whose hash cannot be made of a sealed value."""

    def bind(value: Any) -> Any:
        if type(value) is Sealed:
            raise EncodeError(
                f"{column}: a sealed value has no search hash; reveal it first, with byok.reveal() or areveal(), and "
                "give the plaintext",
                column=column,
            )
        return process(value)

    return bind


def send(context: Any, keyrings: Keyrings, ring: Keyring) -> None:
    """Have the KMS encrypt what a statement is about to send: all its rows, so that it refuses all or none.

    :param context: the statement's execution, whose parameters are bound; they are replaced by the stored values.
    """
    waiting = [
        value
        for row in context.parameters
        for value in (row.values() if isinstance(row, dict) else row)
        if type(value) is Pending
    ]
    if waiting:
        cells = [pending.cell for pending in waiting]
        stored = upstream.run_or_await(
            lambda: encrypt(keyrings, ring, cells), lambda: aencrypt(keyrings, ring, cells)
        )
        for pending, value in zip(waiting, stored, strict=True):
            pending.stored = value if pending.final is None else pending.final(value)
        context.parameters = [_sent(row) for row in context.parameters]


def _sent(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: _stored(value) for name, value in row.items()}
    return type(row)([_stored(value) for value in row])


def _stored(value: Any) -> Any:
    return value.stored if type(value) is Pending else value


def resealed(attachment: Attachment, column: str, ring: Any, value: Sealed) -> bytes:
    """The stored value that is written for a sealed one: the same bytes, to the same column, for the same tenant.

    :param ring: the keyring of the running statement.

    :raises EncodeError: if it is another column's.
    :raises TenantMismatchError: if it is another tenant's.
    """
    if value.column != column:
        raise EncodeError(
            f"{column}: a sealed value of {value.column} can be written to that column only; "
            "reveal it first, with byok.reveal() or areveal()",
            column=column,
        )
    if isinstance(ring, AcrossRing):
        ring.write  # noqa: B018 - says whose it would be
    if ring is not SEALED:
        _check_owner(attachment, column, ring, value.stored)
    return value.stored


# -- reading ---------------------------------------------------------------------------------------------------------


class Cells:
    """What the customer's KMS has to decrypt of the stored values of a direct column, before they are opened.

    :param to_bytes: undoes what the driver puts around bytes.
    :param is_async: whether values are left sealed.
    """

    __slots__ = ("_attachment", "_column", "_is_async", "_to_bytes")

    def __init__(
        self, attachment: Attachment, column: str, to_bytes: _Process | None, *, is_async: bool
    ) -> None:
        self._attachment, self._column = attachment, column
        self._to_bytes, self._is_async = to_bytes, is_async

    def cell(self, ring: StatementRing | None, value: Any) -> Any:
        """What the KMS has to decrypt of a raw value: a Cell. Where there is nothing to: the value's bytes, or what is
        left of it sealed.

        It stays sealed where there are several tenants, too: whoever wants one reveals it for its tenant.
        """
        if self._to_bytes is not None:
            value = self._to_bytes(value)
        if value is None or ring is SEALED:
            return value
        if self._is_async or isinstance(ring, AcrossRing):
            _check_owner(self._attachment, self._column, ring, value)
            return Sealed(self._column, bytes(value))
        stored = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""
        if not is_direct(stored):
            return value
        _check_owner(self._attachment, self._column, ring, stored)
        return Cell(self._column, stored)

    def decrypted(self, ring: StatementRing | None, value: Any) -> Any:
        """A raw value as the KMS gives it, or as :meth:`cell` does."""
        cell, keyrings = self.cell(ring, value), self._attachment.keyrings
        if type(cell) is Cell and isinstance(ring, Keyring) and keyrings is not None:
            (cell,) = decrypt(keyrings, ring, [cell])
        return cell

    @staticmethod
    def opening(opening: Opening) -> Opening:
        """What opens the values that :meth:`cell` and the KMS gave; sealed ones stay so."""

        def one(ring: Any, value: Any) -> Any:
            return value if type(value) is Sealed else opening.one(ring, value)

        return Opening(one, lambda ring, values: [one(ring, value) for value in values])


def decrypted(rows: Sequence[Any], columns: Sequence[tuple[int, Cells]], turn: Turn) -> Sequence[Any]:
    """Rows with what the customer's KMS gave in the places of direct values.

    A value that stands in several of the rows, as a joined load repeats it, is decrypted once.
    """
    ring, keyrings = turn.rings.get(None), turn.attachment.keyrings
    places: dict[Cell, list[tuple[int, int]]] = {}
    given = [list(row) for row in rows]
    for number, row in enumerate(given):
        for place, cells in columns:
            row[place] = cell = cells.cell(ring, row[place])
            if type(cell) is Cell:
                places.setdefault(cell, []).append((number, place))
    if places and isinstance(ring, Keyring) and keyrings is not None:
        for value, where in zip(decrypt(keyrings, ring, list(places)), places.values(), strict=True):
            for number, place in where:
                given[number][place] = value
    return given


def _check_owner(attachment: Attachment, column: str, ring: StatementRing | None, value: Any) -> None:
    """Refuse another tenant's value, or one that is not ours, before the KMS hears of it."""
    value = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""
    key_id = value[2:HEADER_SIZE]
    known = value[:1] == bytes((VALUE_MAGIC,)) and len(key_id) == HEADER_SIZE - 2
    if ring is None or not known or value_header(PLAIN, key_id) not in ring.openers:
        attachment.refuse(column, ring, value_header(PLAIN, key_id) + value[HEADER_SIZE:] if known else value)


# -- revealing -------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A sealed attribute of an object, and what it takes to open it."""

    value: Sealed
    type_: Any
    dialect: Any
    tenant: str


def reveal(obj: Any, attribute: str, keyrings: Keyrings, tenant_of: Callable[[Any, Any], str | None]) -> Any:
    """See :meth:`sqla_byok.Byok.reveal`.

    :param tenant_of: tells the tenant of a session, by what it is bound to.
    """
    if upstream.in_greenlet():
        return await_only(areveal(obj, attribute, keyrings, tenant_of))
    value = getattr(obj, attribute)
    if type(value) is not Sealed:
        return value
    found = _find(obj, attribute, value, keyrings, tenant_of)
    ring = keyrings.get(found.tenant)
    cell = _cell(found, ring)
    inner = found.value.stored if cell is None else decrypt(keyrings, ring, [cell])[0]
    return _settle(obj, attribute, found, ring, inner)


async def areveal(
    obj: Any, attribute: str, keyrings: Keyrings, tenant_of: Callable[[Any, Any], str | None]
) -> Any:
    """:func:`reveal` from asyncio."""
    value = inspect(obj).dict.get(attribute)
    if value is None:
        value = await greenlet_spawn(getattr, obj, attribute)  # loads it where it has to be
    if type(value) is not Sealed:
        return value
    found = _find(obj, attribute, value, keyrings, tenant_of)
    ring = await keyrings.aget(found.tenant)
    cell = _cell(found, ring)
    inner = found.value.stored if cell is None else await adecrypt(keyrings, ring, cell)
    return _settle(obj, attribute, found, ring, inner)


def _find(
    obj: Any, attribute: str, value: Sealed, keyrings: Keyrings, tenant_of: Callable[[Any, Any], str | None]
) -> _Found:
    session = object_session(obj)
    if session is None:
        raise DetachedInstanceError(
            f"{value.column}: the object is in no session, so nothing says whose keys to use; reveal it before the "
            "session closes"
        )
    mapper = inspect(obj).mapper
    if attribute not in mapper.column_attrs:
        raise ConfigurationError(
            f"{attribute}: give the name of the attribute that is mapped to {value.column}"
        )
    type_ = mapper.column_attrs[attribute].columns[0].type
    if getattr(type_, "column_id", None) != value.column:
        raise EncodeError(
            f"{attribute}: it was given a sealed value of {value.column}, which opens in that column only",
            column=value.column,
        )
    bind = session.get_bind(mapper)
    attachment = attachment_of(bind.dialect)
    if attachment.keyrings is not keyrings:
        raise NotAttachedError(f"{value.column}: the object's engine is not attached to this Byok")
    tenant = type_.owner or tenant_of(session, bind)
    if tenant is None:
        attachment.nobody(value.column)
    return _Found(value, type_, bind.dialect, tenant)


def _cell(found: _Found, ring: Keyring) -> Cell | None:
    value = found.value
    _check_owner(attachment_of(found.dialect), value.column, ring, value.stored)
    return Cell(value.column, value.stored) if is_direct(value.stored) else None


def _settle(obj: Any, attribute: str, found: _Found, ring: Keyring, inner: bytes) -> Any:
    plaintext = found.type_.opening(found.dialect).one(ring, inner)
    state = inspect(obj)
    # Not where it was assigned: that is yet to be written, or was changed while the KMS was asked.
    if state.dict.get(attribute) is found.value and attribute not in state.committed_state:
        set_committed_value(obj, attribute, plaintext)
    return plaintext
