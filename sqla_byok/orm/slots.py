"""Whose keys a statement uses, per dialect.

A processor sees a value and a dialect, nothing else, and SQLAlchemy keeps it for the dialect's life. So each engine's
dialect has a slot: the statement hooks put the running statement's keyring there, the processors take it out. Two
engines, and two instances of :class:`~sqla_byok.Byok`, never share one; an engine that was not attached has an empty
slot, and its processors raise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NoReturn, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect

from sqla_byok.crypto.formats import HEADER_SIZE, is_direct
from sqla_byok.crypto.values import DECRYPT_FAILURES, Ring, explain_foreign
from sqla_byok.errors import (
    DecryptError,
    KeystoreUnavailableError,
    NotAttachedError,
    NoTenantError,
    TenantMismatchError,
    UnknownDataKeyError,
)
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.orm.isolation import NOT_OPEN, SEALED, Owned, Scopes, Statements
from sqla_byok.orm.sealed import Sealed

__all__ = ["Slot", "refuse_foreign", "slot_of"]


class Slot:
    """The keyrings of what one dialect is doing now, in this thread or task.

    :ivar binding: the keyring for the parameters of the statement being prepared.
    :ivar reading: the keyring for the rows being fetched.
    :ivar binding_owned: those of columns with an owner of their own, by the owner's name; for the parameters.
    :ivar reading_owned: likewise for the rows.
    :ivar keyrings: all open tenants; ``None`` until the engine is attached.
    :ivar scopes: whose turn it is; likewise.
    """

    __slots__ = ("__weakref__", "binding", "binding_owned", "keyrings", "reading", "reading_owned", "scopes")

    def __init__(self) -> None:
        self.binding: ContextVar[Statements | None] = ContextVar("byok_binding", default=None)
        self.reading: ContextVar[Statements | None] = ContextVar("byok_reading", default=None)
        self.binding_owned: ContextVar[Owned] = ContextVar("byok_binding_owned", default=NOT_OPEN)
        self.reading_owned: ContextVar[Owned] = ContextVar("byok_reading_owned", default=NOT_OPEN)
        self.keyrings: Keyrings | None = None
        self.scopes: Scopes | None = None

    def binding_of(self, owner: str | None) -> Callable[[], Statements | None]:
        """What gives the keyring for the parameters of a column with this owner; None: the statement's own."""
        current = self.binding_owned.get
        return self.binding.get if owner is None else lambda: current().get(owner)

    def reading_of(self, owner: str | None) -> Callable[[], Statements | None]:
        """Likewise for the rows being fetched."""
        current = self.reading_owned.get
        return self.reading.get if owner is None else lambda: current().get(owner)

    def nobody(self, column: str, owner: str | None = None) -> NoReturn:
        """Raise the error for a value that has to be encrypted, hashed or decrypted with no keyring there."""
        if self.keyrings is None:
            raise NotAttachedError(
                f"{column}: this engine was not given to Byok.attach(), so the value can be neither encrypted nor "
                "decrypted; attach the engine first",
                column=column,
            )
        if owner is not None:
            raise NoTenantError(
                f"{column}: the keys of its owner {owner!r} are not open, and this statement hides that it needs them; "
                f"open them beforehand, with byok.preload([{owner!r}])",
                tenant=owner,
                column=column,
            )
        raise NoTenantError(
            f"{column}: no tenant is set for this statement; run it in byok.session(tenant, engine), within "
            "'with byok.tenant(tenant)', or with the execution option byok_tenant",
            column=column,
        )

    def foreign(self, column: str, ring: Ring | None, blob: bytes) -> Sealed:
        """What is read of a stored value whose key is not in the keyring of the result: an error, unless sealed."""
        if ring is SEALED:
            # Nothing can authenticate it, but plaintext from before a migration is not to pass for ciphertext.
            explain_foreign(blob, column, None)
            return Sealed(column, blob)
        DECRYPT_FAILURES.add()
        return self.refuse(column, ring, blob)

    def refuse(self, column: str, ring: Ring | None, blob: bytes) -> NoReturn:
        """Raise the error for a stored value whose key is not in the keyring of the result being read."""
        explain_foreign(blob, column, None if ring is None else ring.tenant)
        if ring is None or self.keyrings is None:
            self.nobody(column)
        refuse_foreign(
            self.keyrings, column, cast("Statements", ring), blob
        )  # the hooks put nothing else there


def refuse_foreign(keyrings: Keyrings, where: str, ring: Statements, blob: bytes) -> NoReturn:
    """Raise the error for a value whose key is not in the keyring that was to open it.

    :param where: the column id, or what else says what the value is.
    """
    explain_foreign(blob, where, ring.tenant)
    if ring.cleared:
        ring.expired()
    if is_direct(blob):
        raise DecryptError(
            f"{where}: a stored value was encrypted by the customer's KMS itself; only a column declared with "
            "mode='direct' reads it",
            tenant=ring.tenant,
            column=where,
        )
    owner = keyrings.owner_of(blob[:HEADER_SIZE])
    if owner is not None:
        raise TenantMismatchError(
            f"{where}: a value of tenant {owner!r} was read {_for(ring)}; filter the query by tenant",
            tenant=ring.tenant,
            column=where,
            owner=owner,
        )
    if keyrings.clock.boot() >= ring.write_until:
        raise KeystoreUnavailableError(
            f"{where}: a stored value was sealed under a data key that this process does not know "
            f"{_for(ring)}; it may be newer than the last look at the keystore, which has not answered for a while",
            tenant=ring.tenant,
            column=where,
        )
    raise UnknownDataKeyError(
        f"{where}: a stored value was sealed under a data key that is not there {_for(ring)}; it is another tenant's, "
        "who is not open in this process, or its generation was retired",
        tenant=ring.tenant,
        column=where,
    )


def _for(ring: Statements) -> str:
    return f"for tenant {ring.tenant!r}" if isinstance(ring, Keyring) else ring.tenant


_slots: WeakKeyDictionary[Dialect, Slot] = WeakKeyDictionary()


def slot_of(dialect: Dialect) -> Slot:
    """The dialect's slot, made when first asked for."""
    slot = _slots.get(dialect)
    if slot is None:
        slot = _slots.setdefault(dialect, Slot())
    return slot
