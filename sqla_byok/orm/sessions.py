"""Keeping tenants apart in what outlives a statement: its transaction, and the session that holds its values.

A session that outlives a block still holds the objects of the block's tenant, and would write what changed in them
under the keys of whoever's turn it is then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from sqla_byok.errors import TenantMismatchError
from sqla_byok.keys.clock import Clock
from sqla_byok.keys.keyring import Keyring
from sqla_byok.orm import kept
from sqla_byok.orm.rings import SEALED, singles
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.turns import TENANT_OPTION, Blocks, Whose, shown, whose
from sqla_byok.orm.types import Encrypted

__all__ = ["meet", "of_unit"]

# -- the transaction ---------------------------------------------------------------------------------------------------


def of_unit(conn: Any, tenant: str, clock: Clock) -> Keyring | None:
    """The keyring that is kept for the connection's transaction, of a tenant that wants a KMS call for each."""
    ring = next((ring for ring in singles(kept.held(conn)) if ring.tenant == tenant), None)
    return None if ring is None or ring.lease.over(clock.boot(), clock.wall()) else ring


def meet(
    conn: Any, options: Mapping[str, Any], tenant: Whose | None, blocks: Blocks, *, reads: bool, updates: bool
) -> None:
    """Note for whom a transaction works, and refuse an UPDATE where it has worked for somebody else too.

    A statement that names its tenant itself, by its own option, may write; but what it read is that tenant's.

    :param options: the statement's.
    :param tenant: its tenant.
    :param reads: whether it reads encrypted columns.
    :param updates: whether it is an UPDATE of encrypted columns.
    :raises TenantMismatchError: it updates what may be another tenant's.
    """
    of_conn = conn.get_execution_options()
    own = options.get(TENANT_OPTION) == of_conn.get(TENANT_OPTION) or tenant == whose(of_conn, conn, blocks)
    if not (own or reads):
        return
    tenants = _met(conn)
    if tenant not in tenants:
        tenants.append(tenant)
    if own and updates and len(tenants) > 1:
        other = next(each for each in tenants if each != tenant)
        how = "began with" if other == tenants[0] else "has worked for"
        raise TenantMismatchError(
            f"this transaction {how} tenant {shown(other)!r} and would now update rows for {shown(tenant)!r}, which "
            "may be what it read before; give each tenant a session of its own, with byok.session(tenant, engine)",
            tenant=shown(tenant),
            owner=shown(other),
        )


def _met(conn: Any) -> list[Whose | None]:
    """For whom the connection's transaction has worked so far, in order; to be added to."""
    transaction = conn.get_transaction()
    known = conn.__dict__.get(kept.MET)
    if known is None or known[0] is not transaction:
        known = conn.__dict__[kept.MET] = transaction, []
    tenants: list[Whose | None] = known[1]
    return tenants


# -- the session -------------------------------------------------------------------------------------------------------


@event.listens_for(Session, "after_begin")
def _begin(session: Session, transaction: Any, connection: Any) -> None:
    """Give the connection the session's own tenant; refuse a session that still holds another tenant's values.

    It would write what changed in them under the tenant's keys. With ``expire_on_commit=True`` it holds none, nor
    after ``expunge_all()`` and ``close()``.
    """
    attachment = connection.dialect.__dict__.get(kept.ATTACHMENT)
    if attachment is None or attachment.blocks is None:
        return
    if (turn := session.info.get(kept.SESSION_TURN)) is not None:
        connection.__dict__[kept.TURN] = turn
    met: dict[Any, list[Whose | None]] = session.info.setdefault(kept.SESSION_MET, {})
    tenants, before = _met(connection), met.get(connection.engine)
    if before:
        tenant = whose(connection.get_execution_options(), connection, attachment.blocks)
        others = [each for each in before if each != tenant]
        first = next((each for each in others if each is not SEALED), None)
        if tenant is not None and tenant is not SEALED and first is not None and _holds(session, plain=True):
            raise TenantMismatchError(
                f"this session holds values of tenant {shown(first)!r} that its last commit did not expire, and would "
                f"now work for {shown(tenant)!r}; give each tenant a session of its own, or close() it in between",
                tenant=shown(tenant),
                owner=shown(first),
            )
        if others and _holds(session, plain=False):
            tenants.extend(others)  # so that nothing is updated
    met[connection.engine] = tenants


def _holds(session: Session, *, plain: bool) -> bool:
    """Whether a session has values of its tenant's encrypted columns; decrypted ones, or sealed ones too.

    Those of a column with an owner are the owner's, whoever's turn it is.
    """
    return any(
        isinstance(type_ := attribute.columns[0].type, Encrypted)
        and type_.owner is None
        and attribute.key in state.dict
        and not (plain and type(state.dict[attribute.key]) is Sealed)
        for state in session.identity_map.all_states()
        for attribute in state.mapper.column_attrs
    )
