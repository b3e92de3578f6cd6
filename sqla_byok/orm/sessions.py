"""Keeping tenants apart in what outlives a statement: its transaction, and the session that holds its values.

A session that outlives a block still holds the objects of the block's tenant, and would write what changed in them
under the keys of whoever's turn it is then.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from sqla_byok.errors import TenantMismatchError
from sqla_byok.keys.keyring import Clock, Keyring
from sqla_byok.orm import upstream
from sqla_byok.orm.current import attachment_of
from sqla_byok.orm.rings import SEALED, AcrossRing, StatementRing
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.turns import Whose, shown, whose
from sqla_byok.orm.types import Encrypted

__all__ = ["hold", "meet", "of_unit"]

# -- the transaction ---------------------------------------------------------------------------------------------------


def hold(conn: Any, ring: StatementRing) -> None:
    """Keep the keyring of a tenant that wants a KMS call for each transaction, as long as this one lasts."""
    upstream.hold(conn, ring)


def of_unit(conn: Any, tenant: str, clock: Clock) -> Keyring | None:
    """The keyring that is kept for the connection's transaction."""
    held: StatementRing | None = upstream.held(conn)
    rings = held.rings if isinstance(held, AcrossRing) else [held]
    ring = next((ring for ring in rings if isinstance(ring, Keyring) and ring.tenant == tenant), None)
    return ring if ring is not None and ring.lease.live(clock.boot(), clock.wall()) else None


def meet(conn: Any, tenant: Whose | None, *, own: bool, reads: bool, updates: bool) -> None:
    """Note for whom a transaction works, and refuse an UPDATE where it has worked for somebody else too.

    :param own: whether the statement is for the connection's own tenant. One that names another itself may write, but
        what it read is another's.
    :param reads: whether it reads encrypted columns.
    :param updates: whether it is an UPDATE of encrypted columns.
    :raises TenantMismatchError: it updates what may be another tenant's.
    """
    if not (own or reads):
        return
    tenants = upstream.met(conn)
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


# -- the session -------------------------------------------------------------------------------------------------------


_MET = "byok_met"


@event.listens_for(Session, "after_begin")
def _check_session(session: Session, transaction: Any, connection: Any) -> None:
    """Refuse a session that still holds one tenant's values when it begins a transaction for another.

    It would write what changed in them under the other's keys. With ``expire_on_commit=True`` it holds none, nor after
    ``expunge_all()`` and ``close()``.
    """
    blocks = attachment_of(connection.dialect).blocks
    if blocks is None:
        return
    met: dict[Any, list[Whose | None]] = session.info.setdefault(_MET, {})
    tenant, tenants = whose(connection.get_execution_options(), blocks), upstream.met(connection)
    others = [each for each in met.get(connection.engine, ()) if each != tenant]
    if others:
        first = next((each for each in others if each is not SEALED), None)
        if tenant is not None and tenant is not SEALED and first is not None and _holds(session, plain=True):
            raise TenantMismatchError(
                f"this session holds values of tenant {shown(first)!r} that its last commit did not expire, and would "
                f"now work for {shown(tenant)!r}; give each tenant a session of its own, or close() it in between",
                tenant=shown(tenant),
                owner=shown(first),
            )
        if _holds(session, plain=False):
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
