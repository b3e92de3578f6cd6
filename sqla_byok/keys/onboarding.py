"""Bringing a tenant aboard, and looking after its customer key: prove, store, probe, swap credentials."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone

from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    SEARCH_SALT,
    Secret,
    TenantKey,
    is_reference,
    new_key,
    new_search_salt,
    pack_tenant_key,
    unpack_tenant_key,
)
from sqla_byok.errors import ConfigurationError, TenantExistsError, UnknownTenantError
from sqla_byok.keys.customer import CustomerKeys, stored_config
from sqla_byok.keys.keyring import Clock, SealedRecord
from sqla_byok.keys.keystore import Keystore, TenantRow, Wrapping
from sqla_byok.keys.salts import ExternalSalts
from sqla_byok.kms import Kms, Salts

__all__ = ["EXPIRY_WARNING_DAYS", "Onboarding", "Proof"]

EXPIRY_WARNING_DAYS = 30


@dataclass(frozen=True)
class Proof:
    """What :meth:`Byok.probe` found: the customer key works, now.

    :param tenant: whose key.
    :param provider: the provider's name, such as ``"aws"``.
    :param key_version: the version of the customer key that wraps the tenant key; empty where the provider keeps it to
        itself.
    :param seconds: how long one unwrap took, with the authentication before it.
    :param expires: the day on which the credential expires, where it is known.
    :param warnings: what somebody should do soon.
    """

    tenant: str
    provider: str
    key_version: str
    seconds: float
    expires: date | None = None
    warnings: tuple[str, ...] = ()


class Onboarding(Secret):
    """Writes tenants' first rows, and changes how their customer key is reached.

    :param keystore: where the rows are.
    :param customer_keys: asks the tenants' KMS.
    :param salts: keeps search salts elsewhere.
    :param default_kms: the vendor's own key, for tenants that bring none.
    :param clock: where time is read.
    """

    def __init__(
        self,
        keystore: Keystore,
        customer_keys: CustomerKeys,
        salts: ExternalSalts,
        default_kms: Kms | None,
        clock: Clock,
    ) -> None:
        self._keystore, self._customer_keys, self._salts = keystore, customer_keys, salts
        self._default_kms, self._clock = default_kms, clock

    def onboard(
        self,
        tenant: str,
        kms: Kms | None,
        revoke_within_ms: int,
        outage_grace_ms: int,
        salts: Salts | None,
    ) -> None:
        """Give a tenant its keys, wrapped by its customer key; see :meth:`Byok.onboard`."""
        kms, claims = self.bound(tenant, kms)
        of_salts = () if salts is None else salts.claims()
        wanted = kms.provider, stored_config(kms), revoke_within_ms, outage_grace_ms, salts
        if self._is_onboarded(tenant, *wanted):
            return
        self._keystore.check_claims(tenant, (*claims, *of_salts))
        try:
            self._keystore.insert(
                self._new_row(tenant, kms, revoke_within_ms, outage_grace_ms, salts), claims, of_salts
            )
        except TenantExistsError:
            # Somebody else onboarded it just now; theirs stands.
            if self._is_onboarded(tenant, *wanted):
                return
        else:
            return
        raise TenantExistsError(
            f"the keystore's database takes {tenant!r} for the same name as another tenant's, perhaps since they "
            "differ in trailing blanks only; choose another name",
            tenant=tenant,
        )

    def probe(self, tenant: str) -> Proof:
        """Ask the tenant's KMS to unwrap the stored tenant key, and measure how long it takes."""
        row = self.row(tenant)
        wrapping = row.wrappings[0]
        kms = self._customer_keys.describe(wrapping)
        started = time.perf_counter()
        unpack_tenant_key(
            self._customer_keys.unwrap(wrapping, tenant, "probe"), tenant, row.tenant_key_generation
        )
        seconds = time.perf_counter() - started
        expires = kms.expires()
        return Proof(
            tenant, kms.provider, wrapping.kms_key_version, seconds, expires, self.warnings(tenant, expires)
        )

    def update_credentials(self, tenant: str, kms: Kms) -> None:
        """Store another way to reach the same customer key, once it has proved to open the stored tenant key."""
        row = self.row(tenant)
        kms, claims = self.bound(tenant, kms)
        first = row.wrappings[0]
        known = self._customer_keys.describe(first)
        if kms.provider != known.provider or kms.claims()[:1] != known.claims()[:1]:
            raise ConfigurationError(
                f"this is another key than tenant {tenant!r} has; update_credentials() swaps the credential of the "
                "same key, rewrap() moves a tenant to another key",
                tenant=tenant,
            )
        changed = replace(first, config=stored_config(kms))
        if changed == first:
            return
        self._keystore.check_claims(tenant, claims)
        self._keystore.replace(row, self._changed(row, changed), claims)

    def _changed(self, row: TenantRow, changed: Wrapping) -> TenantRow:
        """The next row, with its first wrapping reached in another way, which proves itself."""
        payload = secret = b""
        try:
            payload = self._customer_keys.unwrap(changed, row.tenant, "update-credentials")
            secret = unpack_tenant_key(payload, row.tenant, row.tenant_key_generation)
            tenant_key = TenantKey(secret, row.tenant, row.tenant_key_generation)
        finally:
            payload = secret = b""  # crash reports show the variables of each frame
        tenant_key.check_manifest(
            row.epoch, [record.record for record in row.generations], row.manifest_tag, row.searchable
        )
        return row.next(tenant_key, wrappings=[changed, *row.wrappings[1:]])

    def row(self, tenant: str) -> TenantRow:
        """The tenant's authenticated row.

        :raises UnknownTenantError: there is none.
        """
        row = self._keystore.load(tenant)
        if row is None or not row.wrappings:
            raise UnknownTenantError(
                f"tenant {tenant!r} is not in the keystore; onboard it first", tenant=tenant
            )
        return row

    def bound(self, tenant: str, kms: Kms | None) -> tuple[Kms, Sequence[str]]:
        """The customer key as the tenant's row stores it, and what of it belongs to the tenant alone.

        :param kms: the tenant's own key; None for the vendor's default one, which many share.
        """
        own = kms is not None and kms != self._default_kms
        kms = self._default_kms if kms is None else kms
        if kms is None:
            raise ConfigurationError(
                "give the tenant's key, or Byok a default_kms for tenants that bring none", tenant=tenant
            )
        self._keystore.require_key(kms.provider)
        if self._keystore.authenticates:
            kms = kms.for_tenant(self._keystore.external_id(tenant))
        return kms, kms.claims() if own else ()

    def warnings(self, tenant: str, expires: date | None) -> tuple[str, ...]:
        """What somebody should do about a credential that expires on that day."""
        if expires is None:
            return ()
        today = datetime.fromtimestamp(self._clock.wall(), timezone.utc).date()
        days = (expires - today).days
        if days > EXPIRY_WARNING_DAYS:
            return ()
        when = (
            f"expires in {days} days, on {expires}"
            if days > 0
            else f"has expired or expires today ({expires})"
        )
        return (
            f"the credential of tenant {tenant!r} {when}; make a new one and give it to update_credentials()",
        )

    def _is_onboarded(
        self,
        tenant: str,
        provider: str,
        config: str,
        revoke_within_ms: int,
        outage_grace_ms: int,
        salts: Salts | None,
    ) -> bool:
        row = self._keystore.load(tenant)
        if row is None:
            return False
        known = [(wrapping.provider, wrapping.config) for wrapping in row.wrappings[:1]]
        times = row.revoke_within_ms, row.outage_grace_ms
        elsewhere = any(is_reference(record.sealed) for record in row.generations)
        same_salts = (
            not elsewhere if salts is None else elsewhere and self._keystore.claimed(tenant, salts.claims())
        )
        if known != [(provider, config)] or times != (revoke_within_ms, outage_grace_ms) or not same_salts:
            raise TenantExistsError(
                f"tenant {tenant!r} is onboarded already, with another key, deadline, grace or place for its salts; "
                "onboarding never overwrites. rewrap() moves it to another key, update_credentials() swaps its "
                "credential",
                tenant=tenant,
            )
        return True

    def _new_row(
        self, tenant: str, kms: Kms, revoke_within_ms: int, outage_grace_ms: int, salts: Salts | None
    ) -> TenantRow:
        """New keys for a tenant, under a customer key that has proved itself.

        Made here, so that no frame that touches the database holds a secret which a crash report could show.
        """
        secret, generation = new_key(), 1
        try:
            wrapping = self._customer_keys.wrap(
                kms, pack_tenant_key(secret, tenant, generation), tenant, "onboard"
            )
            tenant_key = TenantKey(secret, tenant, generation)
        finally:
            secret = b""
        data_key = tenant_key.seal(DATA_KEY, 1, new_key())
        salt = (
            tenant_key.seal(SEARCH_SALT, 1, new_search_salt())
            if salts is None
            else self._salts.store(tenant_key, 1, new_search_salt(), salts)
        )
        generations = [
            SealedRecord(kind, 1, record_id, ACTIVE, sealed)
            for kind, (record_id, sealed) in ((DATA_KEY, data_key), (SEARCH_SALT, salt))
        ]
        return TenantRow(
            tenant=tenant,
            revoke_within_ms=revoke_within_ms,
            outage_grace_ms=outage_grace_ms,
            tenant_key_id=tenant_key.id,
            tenant_key_generation=generation,
            epoch=1,
            manifest_tag=tenant_key.manifest_tag(1, [record.record for record in generations]),
            wrappings=[wrapping],
            generations=generations,
        )
