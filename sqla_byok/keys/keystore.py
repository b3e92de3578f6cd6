"""The keystore: the SQL tables that hold tenants, their wrapped tenant keys and their sealed generations.

The tables are hostile ground: whoever can write to them must not be able to read values, redirect keys or roll
states back unnoticed. A tenant row is authenticated under the vendor's ``keystore_key`` before any of its fields is
used in an outbound call (:meth:`Keystore.load`); the generations are authenticated under the tenant key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, ID_SIZE, RETIRED, Secret, check_tenant, enc, kdf
from sqla_byok.errors import (
    ConfigurationError,
    KeystoreConflictError,
    KeystoreError,
    KeystoreRolledBackError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    TenantExistsError,
    UnknownTenantError,
)
from sqla_byok.keys.database import Database, Work
from sqla_byok.keys.rows import SealedRecord, State, TenantRow, Wrapping
from sqla_byok.kms import providers

__all__ = ["Keystore", "keystore_metadata", "name_type", "tag_column"]

WRITE_FORMAT = 1

# The most that onboarding takes. No row has more, whoever wrote it.
REVOKE_WITHIN_MS = 86_400_000
OUTAGE_GRACE_MS = 3_600_000

_CREATE_TRIES = 10  # each may lose the race for another of the tables

keystore_metadata = MetaData()
"""The keystore's tables: for ``target_metadata = [Base.metadata, keystore_metadata]`` in Alembic's ``env.py``, or for
``create_all()``. ``Byok.create_keystore()`` makes the same."""


def name_type() -> String:
    """The type of a tenant's name."""
    # Compared byte by byte: a case-insensitive collation must not take one tenant for another.
    return String(255).with_variant(
        mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


def _short(size: int) -> LargeBinary:
    # What MySQL makes of BLOB(size), by the name under which it is found there: Alembic compares them.
    return LargeBinary(size).with_variant(mysql.TINYBLOB(), "mysql", "mariadb")


def tag_column() -> Column[Any]:
    """The column of what authenticates a row under the keystore key; NULL where there is none."""
    return Column("tag", _short(32), nullable=True)


def _digest() -> LargeBinary:
    return LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")


_format = Table(
    "byok_format",
    keystore_metadata,
    Column("write_format", Integer, primary_key=True, autoincrement=False),
)

_tenant = Table(
    "byok_tenant",
    keystore_metadata,
    Column("tenant", name_type(), primary_key=True),
    Column("revoke_within_ms", BigInteger, nullable=False),
    Column("outage_grace_ms", BigInteger, nullable=False),
    Column("tenant_key_id", _short(16), nullable=False),
    Column("tenant_key_generation", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("manifest_tag", _short(32), nullable=False),
    Column("onboarded_at", DateTime(timezone=True), nullable=False),
)

_wrapping = Table(
    "byok_wrapping",
    keystore_metadata,
    Column("tenant", name_type(), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("provider", String(40), nullable=False),
    Column("config", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("kms_key_version", String(255), nullable=False),
    Column("row_tag", _short(32), nullable=True),
    ForeignKeyConstraint(["tenant"], ["byok_tenant.tenant"], ondelete="CASCADE"),
)

_generation = Table(
    "byok_generation",
    keystore_metadata,
    Column("tenant", name_type(), primary_key=True),
    Column("kind", String(20), primary_key=True),
    Column("generation", Integer, primary_key=True, autoincrement=False),
    Column("id", _short(16), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("state", String(20), nullable=False),
    ForeignKeyConstraint(["tenant"], ["byok_tenant.tenant"], ondelete="CASCADE"),
)

# How a tenant's columns are hashed, and which can be searched. One text for all, which the manifest authenticates.
_searchable = Table(
    "byok_searchable",
    keystore_metadata,
    Column("tenant", name_type(), primary_key=True),
    Column("content", Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"), nullable=False),
    ForeignKeyConstraint(["tenant"], ["byok_tenant.tenant"], ondelete="CASCADE"),
)

# What may belong to one tenant only: a customer key, a role, a secret's reference. By hash, for the index.
_claim = Table(
    "byok_claim",
    keystore_metadata,
    Column("claim", _digest(), primary_key=True),
    Column("tenant", name_type(), nullable=False),
    Column("of", String(10), nullable=False),  # "key" or "salts": a new key leaves the other
    ForeignKeyConstraint(["tenant"], ["byok_tenant.tenant"], ondelete="CASCADE"),
)


_READ = [
    column
    for table in (_tenant, _wrapping, _generation, _searchable)
    for column in table.c
    if column is not _tenant.c.onboarded_at
]


def _tenant_values(row: TenantRow) -> dict[str, Any]:
    return {
        "revoke_within_ms": row.revoke_within_ms,
        "outage_grace_ms": row.outage_grace_ms,
        "tenant_key_id": row.tenant_key_id,
        "tenant_key_generation": row.tenant_key_generation,
        "epoch": row.epoch,
        "manifest_tag": row.manifest_tag,
    }


def _claim_hash(claim: str) -> bytes:
    return hashlib.sha256(claim.encode()).digest()


def _wrapping_of(row: Mapping[Any, Any]) -> Wrapping:
    names = ("provider", "config", "wrapped", "kms_key_version", "row_tag")
    return Wrapping(*(row[_wrapping.c[name]] for name in names))


def _record_of(row: Mapping[Any, Any]) -> SealedRecord:
    return SealedRecord(
        *(row[_generation.c[name]] for name in ("kind", "generation", "id", "state", "sealed"))
    )


class Keystore(Secret):
    """Reads and writes the keystore's tables.

    :param database: where they are.
    :param key: the 32 bytes that authenticate tenant rows, held by the vendor outside the database; without it only
        providers that make no outbound call may be used.
    """

    def __init__(self, database: Database, key: bytes | None) -> None:
        self.database = database
        self._key = key
        self._seen: dict[str, State] = {}

    @property
    def authenticates(self) -> bool:
        """Whether there is a keystore key."""
        return self._key is not None

    def mac(self, label: str, *parts: str) -> bytes | None:
        """What authenticates a row that is no tenant's, under the keystore key; None where there is none.

        :param label: what the row is, so that one cannot stand for another.
        """
        return None if self._key is None else hmac.digest(self._key, enc(label, *parts), "sha256")

    def external_id(self, tenant: str) -> str:
        """The external id by which we assume the tenant's role: ours to choose, and another for each tenant.

        :returns: 32 hexadecimal digits, the same for the same tenant as long as the keystore key is.
        :raises ConfigurationError: there is no keystore key.
        """
        check_tenant(tenant)
        if self._key is None:
            raise ConfigurationError("an external id needs Byok(keystore_key=…), from which it is derived")
        return kdf(self._key, 16, "sqla-byok/1/external-id", tenant).hex()

    def create(self) -> None:
        """Create the tables that are missing, and pin the write format."""

        def work(connection: Connection) -> None:
            keystore_metadata.create_all(connection)
            if connection.scalar(select(_format.c.write_format)) is None:
                _pin_format(connection)

        for _ in range(_CREATE_TRIES - 1):
            try:
                return self.database.write(work)
            except (IntegrityError, KeystoreUnavailableError):
                continue  # another process may be creating them right now
        return self.database.write(work)

    def insert(self, row: TenantRow, claims: Sequence[str] = (), of_salts: Sequence[str] = ()) -> None:
        """Insert a new tenant; never overwrites.

        :param claims: what of its customer key belongs to this tenant only.
        :param of_salts: what of the place where its search salt is kept.
        :raises TenantExistsError: if the tenant is there already.
        :raises ConfigurationError: if a claim is another tenant's.
        """

        def work(connection: Connection) -> None:
            connection.execute(
                insert(_tenant).values(
                    tenant=row.tenant, onboarded_at=datetime.now(timezone.utc), **_tenant_values(row)
                )
            )
            self._insert_parts(connection, row, claims)
            self._claim(connection, row.tenant, of_salts, "salts")

        exists = False
        try:
            self._write(work)
        except IntegrityError:
            exists = True
        if exists:
            self.check_claims(row.tenant, (*claims, *of_salts))
            raise TenantExistsError(f"tenant {row.tenant!r} is already in the keystore", tenant=row.tenant)
        self._seen[row.tenant] = row.state  # also where one of that name was there before, and was removed

    def replace(self, old: TenantRow, new: TenantRow, claims: Sequence[str] | None = None) -> None:
        """Put a tenant's new state in the place of the one that was read, in one transaction.

        :param old: what :meth:`load` gave; nothing is written unless the keystore still has it.
        :param new: the same tenant with the next epoch.
        :param claims: what of its customer key belongs to this tenant only; as before unless given.
        :raises KeystoreConflictError: if another process has changed the tenant meanwhile.
        :raises ConfigurationError: if a claim is another tenant's.
        """
        if new.tenant != old.tenant or new.epoch != old.epoch + 1:
            raise ValueError("each change of a tenant raises its epoch by one")

        def work(connection: Connection) -> None:
            changed = connection.execute(
                update(_tenant)
                .where(
                    _tenant.c.tenant == old.tenant,
                    _tenant.c.epoch == old.epoch,
                    _tenant.c.manifest_tag == old.manifest_tag,
                )
                .values(**_tenant_values(new))
            )
            if changed.rowcount != 1:
                raise KeystoreConflictError(
                    f"tenant {old.tenant!r} was changed by another process; nothing was changed here, try again",
                    tenant=old.tenant,
                )
            for table in (_wrapping, _generation, _searchable):
                connection.execute(delete(table).where(table.c.tenant == old.tenant))
            if claims is not None:
                connection.execute(delete(_claim).where(_claim.c.tenant == old.tenant, _claim.c.of == "key"))
            self._insert_parts(connection, new, claims or ())

        claimed = False
        try:
            self._write(work)
        except IntegrityError:
            claimed = True
        if claimed:
            self.check_claims(old.tenant, claims or ())
            raise KeystoreConflictError(
                f"tenant {old.tenant!r} was changed by another process; nothing was changed here, try again",
                tenant=old.tenant,
            )
        self.saw(new)

    def _insert_parts(self, connection: Connection, row: TenantRow, claims: Sequence[str]) -> None:
        for position, wrapping in enumerate(row.wrappings):
            self.require_key(wrapping.provider)
            connection.execute(
                insert(_wrapping).values(
                    tenant=row.tenant,
                    position=position,
                    provider=wrapping.provider,
                    config=wrapping.config,
                    wrapped=wrapping.wrapped,
                    kms_key_version=wrapping.kms_key_version,
                    row_tag=None if self._key is None else row.tag(self._key, position),
                )
            )
        for record in (*row.generations, *row.retired):
            connection.execute(insert(_generation).values(tenant=row.tenant, **record._asdict()))
        self._claim(connection, row.tenant, claims, "key")
        if row.searchable_text:
            connection.execute(insert(_searchable).values(tenant=row.tenant, content=row.searchable_text))

    @staticmethod
    def _claim(connection: Connection, tenant: str, claims: Sequence[str], of: str) -> None:
        for claim in claims:
            connection.execute(insert(_claim).values(claim=_claim_hash(claim), tenant=tenant, of=of))

    def claimed(self, tenant: str, claims: Sequence[str]) -> bool:
        """Whether all of it belongs to the tenant."""
        mine = self.database.read(
            lambda connection: connection.scalars(
                select(_claim.c.claim).where(_claim.c.tenant == tenant)
            ).all()
        )
        return {_claim_hash(claim) for claim in claims} <= {bytes(claim) for claim in mine}

    def check_claims(self, tenant: str, claims: Sequence[str]) -> None:
        """Refuse what belongs to another tenant.

        :raises ConfigurationError: a claim is another tenant's.
        """
        for claim in claims:
            owner = self.database.read(
                lambda connection, claim=claim: connection.scalar(  # type: ignore[misc]
                    select(_claim.c.tenant).where(_claim.c.claim == _claim_hash(claim))
                )
            )
            if owner is not None and owner != tenant:
                raise ConfigurationError(
                    f"{claim} belongs to another tenant; each tenant needs a key, role and secret of its own",
                    tenant=tenant,
                )

    def load(self, tenant: str) -> TenantRow | None:
        """Read one tenant, in one statement, and authenticate its row.

        :returns: ``None`` if the tenant is not there.
        :raises KeystoreTamperedError: if the row or one of its wrappings does not authenticate.
        :raises KeystoreRolledBackError: if it is older than what this process has seen, or another of the same epoch.
        """
        check_tenant(tenant)
        seen = self._seen.get(tenant)  # before the read, which other threads may overtake
        rows, row = self._rows(tenant), None
        try:
            row = _tenant_row(tenant, rows)
            fits = row is None or self._authenticates(row)
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            fits = False  # SQLite stores anything in any column
        if not fits:
            raise KeystoreTamperedError(
                f"the keystore row of tenant {tenant!r} does not authenticate: it was altered, or written under "
                "another keystore key. Give Byok the right keystore_key, or restore the row from a backup; nothing of "
                "it was used",
                tenant=tenant,
            )
        if row is not None:
            _refuse_older(row, seen)
            if self._key is not None:
                self.saw(row)
        return row

    def row(self, tenant: str) -> TenantRow:
        """:meth:`load` of a tenant that has to be there.

        :raises UnknownTenantError: it is not.
        """
        row = self.load(tenant)
        if row is None:
            raise UnknownTenantError(
                f"tenant {tenant!r} is not in the keystore; onboard it first, or it was removed",
                tenant=tenant,
            )
        return row

    def saw(self, row: TenantRow) -> None:
        """Accept no older state of the tenant from now on. For rows that were authenticated."""
        seen = self._seen.get(row.tenant)
        if seen is None or seen.epoch < row.epoch:
            self._seen[row.tenant] = row.state

    def seen(self, tenant: str) -> State | None:
        """The newest state of the tenant that this process has seen."""
        return self._seen.get(tenant)

    def active_generations(self) -> dict[str, dict[str, int]]:
        """The active generation of each kind, by tenant, in one query. Not authenticated: to see what has changed."""
        columns = _generation.c.tenant, _generation.c.kind, _generation.c.generation
        rows = self.database.read(
            lambda connection: connection.execute(select(*columns).where(_generation.c.state == ACTIVE)).all()
        )
        found: dict[str, dict[str, int]] = {}
        for tenant, kind, generation in rows:
            found.setdefault(tenant, {})[kind] = generation
        return found

    def states(self, tenants: Sequence[str]) -> dict[str, State]:
        """The states of those tenants that are there, in one query. Not authenticated: to see whether to load."""
        names = set(tenants)
        rows = self.database.read(
            lambda connection: connection.execute(
                select(_tenant.c.tenant, _tenant.c.epoch, _tenant.c.manifest_tag).where(
                    _tenant.c.tenant.in_(names)
                )
            ).all()
        )
        # Compared again: databases collate.
        return {name: State(*state) for name, *state in rows if name in names}

    def configs(self) -> list[tuple[str, str, str]]:
        """Tenant, provider and config of every wrapping, not authenticated: to be shown, never to be used."""
        rows = self.database.read(
            lambda connection: connection.execute(
                select(_wrapping.c.tenant, _wrapping.c.provider, _wrapping.c.config)
            ).all()
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def searchable_texts(self) -> dict[str, str]:
        """What is kept of each tenant's searching, not authenticated: to see whom to open."""
        rows = self.database.read(
            lambda connection: connection.execute(select(_searchable.c.tenant, _searchable.c.content)).all()
        )
        return {row[0]: row[1] for row in rows}

    def tenants(self) -> list[str]:
        """The names of all tenants, sorted."""
        names = self.database.read(lambda connection: connection.scalars(select(_tenant.c.tenant)).all())
        if not all(isinstance(name, str) for name in names):  # SQLite stores anything in any column
            raise KeystoreTamperedError(
                "a tenant's name in the keystore is no text; remove or restore that row"
            )
        return sorted(names)

    def tenant_of(self, data_key_id: bytes) -> str | None:
        """Which tenant a data key belongs to, by its id; not authenticated: the tenant's keyring has it, or has not."""
        found = self.database.read(
            lambda connection: connection.scalar(
                select(_generation.c.tenant).where(
                    _generation.c.id == data_key_id, _generation.c.kind == DATA_KEY
                )
            )
        )
        return None if found is None else str(found)

    def require_key(self, provider: str) -> None:
        """Refuse a provider that makes outbound calls where tenant rows are not authenticated."""
        if self._key is None and (provider not in providers or providers[provider].outbound):
            raise ConfigurationError(
                f"a tenant with the KMS provider {provider!r} needs Byok(keystore_key=…): without it, whoever can "
                "write to the keystore could redirect the tenant's key"
            )

    def _rows(self, tenant: str) -> Sequence[Mapping[Any, Any]]:
        # Outer joins: a tenant whose wrappings or generations were taken away is damaged, not unknown.
        found = self.database.read(
            lambda connection: connection.execute(
                select(*_READ)
                .outerjoin_from(_tenant, _wrapping, _wrapping.c.tenant == _tenant.c.tenant)
                .outerjoin(_generation, _generation.c.tenant == _tenant.c.tenant)
                .outerjoin(_searchable, _searchable.c.tenant == _tenant.c.tenant)
                .where(_tenant.c.tenant == tenant)
                .order_by(_wrapping.c.position, _generation.c.kind, _generation.c.generation)
            ).all()
        )
        return [row._mapping for row in found]

    def _authenticates(self, row: TenantRow) -> bool:
        """Whether the row may be used. Each wrapping has a tag of its own."""
        if (
            not 0 <= row.revoke_within_ms <= REVOKE_WITHIN_MS
            or not 0 <= row.outage_grace_ms <= OUTAGE_GRACE_MS
            or not 0 <= row.tenant_key_generation < 1 << 32
            or not 0 <= row.epoch < 1 << 63
            or len(row.tenant_key_id) != ID_SIZE
            or not row.wrappings
            or not isinstance(row.searchable_text, str)
        ):
            return False
        for position, wrapping in enumerate(row.wrappings):
            self.require_key(wrapping.provider)
            if self._key is None:
                continue
            if wrapping.row_tag is None or not hmac.compare_digest(
                row.tag(self._key, position), wrapping.row_tag
            ):
                return False
        return True

    def _write(self, work: Work[None]) -> None:
        """Run ``work`` in a transaction of its own, if the keystore has the format that this release writes."""

        def pinned(connection: Connection) -> Sequence[int]:
            found = connection.scalars(select(_format.c.write_format)).all()
            if found == [WRITE_FORMAT]:
                work(connection)
            return found

        found = self.database.write(pinned)
        if not found:
            # A migration made the tables, which are empty.
            with suppress(IntegrityError):  # another process was faster
                self.database.write(_pin_format)
            found = self.database.write(pinned)
        if found != [WRITE_FORMAT]:
            formats = ", ".join(map(str, found))
            raise KeystoreError(
                f"the keystore is pinned to write format {formats}, this release writes format {WRITE_FORMAT}"
            )


def _pin_format(connection: Connection) -> None:
    connection.execute(insert(_format).values(write_format=WRITE_FORMAT))


def _refuse_older(row: TenantRow, seen: State | None) -> None:
    if seen is None or row.epoch > seen.epoch or row.state == seen:
        return
    found = f"at epoch {row.epoch}" if row.epoch < seen.epoch else f"in another state of epoch {row.epoch}"
    raise KeystoreRolledBackError(
        f"the keystore shows tenant {row.tenant!r} {found}, this process has seen {seen.epoch}: an old state was put "
        "back. Restore the newest one; if it is lost, restart the processes that have seen it",
        tenant=row.tenant,
    )


def _fits_its_column(column: Column[Any], value: object) -> bool:
    # None of an outer join, or where a tag may be missing. A text of the same bytes has the same tag.
    return value is None or isinstance(value, column.type.python_type)


def _tenant_row(tenant: str, rows: Sequence[Mapping[Any, Any]]) -> TenantRow | None:
    if not all(_fits_its_column(column, row[column]) for row in rows for column in _READ):
        raise TypeError
    mine = [row for row in rows if row[_tenant.c.tenant].encode() == tenant.encode()]
    if not mine:
        return None
    first = mine[0]
    wrappings = {
        r[_wrapping.c.position]: _wrapping_of(r) for r in mine if r[_wrapping.c.position] is not None
    }
    if [*wrappings] != [*range(len(wrappings))]:
        raise ValueError
    generations = {(r[_generation.c.kind], r[_generation.c.generation]): _record_of(r) for r in mine}
    records = [found for (kind, _), found in generations.items() if kind is not None]
    return TenantRow(
        tenant=tenant,
        revoke_within_ms=first[_tenant.c.revoke_within_ms],
        outage_grace_ms=first[_tenant.c.outage_grace_ms],
        tenant_key_id=first[_tenant.c.tenant_key_id],
        tenant_key_generation=first[_tenant.c.tenant_key_generation],
        epoch=first[_tenant.c.epoch],
        manifest_tag=first[_tenant.c.manifest_tag],
        wrappings=list(wrappings.values()),
        generations=[record for record in records if record.state != RETIRED],
        retired=[record for record in records if record.state == RETIRED],
        searchable_text="" if first[_searchable.c.content] is None else first[_searchable.c.content],
    )
