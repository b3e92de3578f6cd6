"""Whose keys the running statement uses: one small object in one context variable.

A processor sees a value and a dialect, nothing else, and SQLAlchemy keeps it for the dialect's life. So the statement's
:class:`Turn` stands in a context variable while its parameters are bound, and while SQLAlchemy reads what it returns
before it gives a result away; the processors take it out. Rows are opened as they are fetched, under the turn that
their result keeps. A turn belongs to what its engine is attached to: two engines, and two instances of
:class:`~sqla_byok.Byok`, never share one, and where an engine was not attached the processors raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, cast

from sqlalchemy import Dialect

from sqla_byok.crypto.formats import HEADER_SIZE, is_direct
from sqla_byok.crypto.values import DECRYPT_FAILURES, Ring, Taker, explain_foreign
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
from sqla_byok.orm.kept import ATTACHMENT
from sqla_byok.orm.rings import SEALED, StatementRing
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.turns import Blocks, Whose

__all__ = [
    "RUNNING",
    "Attachment",
    "Turn",
    "attachment_of",
    "refuse_foreign",
    "running",
    "taker_of",
]


@dataclass(slots=True)
class Turn:
    """Whose keys a statement uses.

    :param attachment: what its engine is attached to.
    :param tenant: the statement's own tenant.
    :param rings: the keyrings, by whose they are: None for that of the statement's own tenant, else the owner of
        single columns.
    """

    attachment: Attachment
    tenant: Whose | None
    rings: Mapping[str | None, StatementRing]


RUNNING: ContextVar[Turn | None] = ContextVar("byok_turn", default=None)
"""The turn of the statement that is being prepared in this thread or task."""


@contextmanager
def running(turn: Turn | None) -> Iterator[None]:
    """Let processors work for a turn; None: for those that are set within."""
    token = RUNNING.set(turn)
    try:
        yield
    finally:
        RUNNING.reset(token)


class Attachment:
    """What the engines of a dialect are attached to.

    :ivar keyrings: all open tenants; ``None`` until the engine is attached.
    :ivar blocks: tell whose turn it is where no execution option says it; likewise.
    """

    __slots__ = ("__weakref__", "blocks", "keyrings")

    def __init__(self) -> None:
        self.keyrings: Keyrings | None = None
        self.blocks: Blocks | None = None

    def nobody(self, column: str) -> NoReturn:
        """Raise the error for a value that has to be encrypted, hashed or decrypted with no keyring there."""
        if self.keyrings is None:
            raise NotAttachedError(
                f"{column}: this engine was not given to Byok.attach(), so the value can be neither encrypted nor "
                "decrypted; attach the engine first",
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
        refuse_foreign(self.keyrings, column, cast("StatementRing", ring), blob)  # nothing else is put there


def refuse_foreign(keyrings: Keyrings, where: str, ring: StatementRing, blob: bytes) -> NoReturn:
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


def _for(ring: StatementRing) -> str:
    return f"for tenant {ring.tenant!r}" if isinstance(ring, Keyring) else ring.tenant


def attachment_of(dialect: Dialect) -> Attachment:
    """What the dialect's engine is attached to; nothing yet, where it is asked for first."""
    there: Attachment = dialect.__dict__.setdefault(ATTACHMENT, Attachment())
    return there


def taker_of(attachment: Attachment, column: str, owner: str | None) -> Taker:
    """What finds the keyring that a column's processors work with, in the turn of the running statement.

    :param owner: whose keys the column takes; None: those of the statement's own tenant.
    """
    return Taker(RUNNING.get, attachment, owner, partial(attachment.nobody, column))
