"""Whose turn it is: the tenant of a statement, as execution options and the blocks around it say."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from sqla_byok.audit import Actor
from sqla_byok.errors import NoTenantError, TenantMismatchError
from sqla_byok.orm.kept import TURN
from sqla_byok.orm.rings import SEALED, Across, SealedRing

__all__ = [
    "SEALED_OPTION",
    "TENANT_OPTION",
    "Block",
    "Blocks",
    "SessionTurn",
    "Whose",
    "one_tenant",
    "refuse_overruled",
    "shown",
    "whose",
]

Whose = str | Across | SealedRing
"""The tenant of a statement: one, several, or nobody."""

TENANT_OPTION = "byok_tenant"
"""The execution option that says whose data a session, connection or engine works on."""

SEALED_OPTION = "byok_sealed"
"""The execution option that has a session, connection or engine work without keys; it goes before any tenant."""


class SessionTurn(NamedTuple):
    """Whose a session of :meth:`Byok.session` is; its connections carry it.

    :param tenant: the tenant of all its statements, unless an execution option says another.
    :param actor: who is named in the audit for what a statement opens.
    """

    tenant: str
    actor: Actor


class Block(NamedTuple):
    """Whose turn it is in a thread or task, and whose it is again afterwards.

    :param block: what began it.
    :param before: who was acting outside it.
    """

    tenant: Whose
    outer: Block | None
    block: object
    before: Actor


class Blocks:
    """The blocks that a thread or task is in.

    :param single: the tenant outside them, where an application serves only one.
    :ivar innermost: the block that was entered last.
    """

    __slots__ = ("innermost", "single")

    def __init__(self, single: str | None) -> None:
        self.single = single
        self.innermost: ContextVar[Block | None] = ContextVar("byok_tenant", default=None)

    def current(self) -> Whose | None:
        """Whose turn it is."""
        block = self.innermost.get()
        return self.single if block is None else block.tenant

    def begin(self, tenant: Whose, block: object, before: Actor) -> None:
        """Enter a block."""
        self.innermost.set(Block(tenant, self.innermost.get(), block, before))

    def end(self, block: object) -> None:
        """Leave a block, which need not be the one that was entered last.

        Generators can leave blocks in another order than they entered them, or in another task.
        """
        self.innermost.set(_without(block, self.innermost.get()))


def _without(ended: object, block: Block | None) -> Block | None:
    if block is None or block.block is ended:
        return None if block is None else block.outer
    return block._replace(outer=_without(ended, block.outer))


def whose(options: Mapping[str, Any], conn: Any, blocks: Blocks) -> Whose | None:
    """The tenant of a statement.

    :param options: its execution options.
    :param conn: the connection that executes it, which may be a session's with a tenant of its own.
    :param blocks: the blocks around it. A sealed one holds for sessions with a tenant of their own too.
    """
    tenant: Whose | None = options.get(TENANT_OPTION)
    if tenant is None and (of_session := conn.__dict__.get(TURN)) is not None:
        tenant = of_session.tenant
    block = blocks.innermost.get()
    if block is None:
        if tenant is None:
            tenant = blocks.single
    elif tenant is None or block.tenant is SEALED:
        tenant = block.tenant
    return SEALED if options.get(SEALED_OPTION) else tenant


def refuse_overruled(own: Mapping[str, Any], options: Mapping[str, Any], of_conn: Mapping[str, Any]) -> None:
    """Refuse a statement whose own option names another tenant than its connection's, which SQLAlchemy lets win.

    :param own: the statement's own options.
    :param options: those that it is executed with.
    :param of_conn: the connection's.
    :raises TenantMismatchError: it would run for another tenant than it names.
    """
    named, taken = own.get(TENANT_OPTION), options.get(TENANT_OPTION)
    if named is not None and named != taken and taken == of_conn.get(TENANT_OPTION):
        raise TenantMismatchError(
            f"the statement names tenant {named!r} by its own option byok_tenant, and would run for {taken!r}, which "
            "its session, connection or engine names: SQLAlchemy lets theirs go before it; give it to execute() as "
            "execution_options={'byok_tenant': …}, or use a session of that tenant",
            tenant=str(taken),
            owner=str(named),
        )


def one_tenant(tenant: Whose | None) -> str | None:
    """The tenant, for what needs a single one.

    :raises SealedError: if it runs sealed.
    :raises NoTenantError: if there are several.
    """
    if isinstance(tenant, SealedRing):
        tenant.end()
    if isinstance(tenant, Across):
        raise NoTenantError(
            f"this is done for one tenant, not {tenant!r}; do it within 'with byok.tenant(tenant)'"
        )
    return tenant


def shown(tenant: Whose | None) -> str | None:
    """What an exception carries as its tenant, which has to survive pickling."""
    return tenant if tenant is None or isinstance(tenant, str) else repr(tenant)
