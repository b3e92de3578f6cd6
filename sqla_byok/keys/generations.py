"""How a tenant's keys change over time: new generations, a new tenant key, a new wrapping.

Several processes work with a tenant's keys, and each looks only now and then whether they changed. So a new data key
or search salt goes through states, and every change is one transaction that holds if nobody else changed the tenant
meanwhile::

    pending     each process comes to know it: reads and searches with it, and does not write with it
    active      what is written; the one that was active before becomes readable
    readable    still read and searched with, until its rows are moved to the active one
    retired     not used any more; kept, in case a row was missed
    (gone)      destroyed

Between the states lies the settle time, which no lock and no transaction spans. What is stored is a whole, valid state
at any moment, so that a process may die anywhere: whoever comes next goes on from there. No time is stored. A
generation that is found pending waits the whole settle time once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqla_byok.audit import Audit, GenerationChanged
from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    KINDS,
    PENDING,
    READABLE,
    RETIRED,
    Secret,
    TenantKey,
    is_reference,
    new_key,
    new_search_salt,
)
from sqla_byok.errors import ConfigurationError, KeystoreConflictError
from sqla_byok.keys.calls import KmsCalls
from sqla_byok.keys.clock import Clock
from sqla_byok.keys.keyrings import SETTLE
from sqla_byok.keys.keystore import Keystore
from sqla_byok.keys.rows import SealedRecord, TenantRow, Wrapping
from sqla_byok.keys.salts import ExternalSalts
from sqla_byok.keys.searchable import Searchable

__all__ = ["SETTLE", "Generations"]

# Another change of the tenant at the same time, such as of its other kind, is no reason to give up at once.
_TRIES = 3

TENANT_KEY = "tenant-key"
WRAPPING = "wrapping"


class Generations(Secret):
    """Changes tenants' generations.

    Every method loads the tenant's row, makes the next one of it and stores that if the row is still the same; after
    three conflicts in a row it gives up. Each opens the tenant key anew, so that the customer's KMS has its say.

    :param keystore: where the rows are.
    :param calls: asks the tenants' KMS.
    :param salts: keeps the search salts that are kept elsewhere.
    :param clock: sleeps while a change settles.
    :param audit: hears of each change, after it was stored.
    """

    def __init__(
        self,
        keystore: Keystore,
        calls: KmsCalls,
        salts: ExternalSalts,
        clock: Clock,
        audit: Audit,
    ) -> None:
        self._keystore, self._calls, self._salts = keystore, calls, salts
        self._clock, self._audit = clock, audit

    def rotate(self, tenant: str, kind: str) -> int:
        """Make a new generation of a kind, let it settle, and write with it from then on.

        Takes :data:`SETTLE` seconds. Other processes write with the old one for at most WRITE_WITHIN seconds more:
        call :meth:`settle` before you look which rows are left under it. Where several processes rotate at once, they
        agree on one new generation.

        :param kind: ``"data-key"`` or ``"search-salt"``.
        :returns: the new generation.
        :raises KeystoreConflictError: if other processes keep changing the tenant; calling it again goes on.
        :raises KmsError: if the customer's KMS refuses or does not answer.
        """
        if kind not in KINDS:
            raise ValueError(f"a generation is of one of {', '.join(KINDS)}")
        row = self._change(tenant, lambda row: None if _pending(row, kind) else self._published(row, kind))
        fresh = _pending(row, kind)
        assert fresh is not None  # noqa: S101 - found or published just now
        self.settle()
        self._change(tenant, lambda row: self._activated(row, fresh))
        return fresh.generation

    def settle(self) -> None:
        """Wait until no process works without knowing what was stored before this call."""
        self._clock.sleep(SETTLE)

    def retire(
        self, tenant: str, kind: str, generation: int, check: Callable[[], object] = lambda: None
    ) -> None:
        """Take a readable generation out of use, once no row is left under it.

        Settles first, so that no process still writes with it. The record is kept until :meth:`destroy`; rows that
        were missed cannot be read or found from now on.

        :param check: called when it has settled; raises where a row needs it still.
        :raises ConfigurationError: if it is active or pending, or not there. A retired one stays as it is.
        """
        self.settle()
        check()
        self._change(tenant, lambda row: self._retired(row, kind, generation))

    def restore(self, tenant: str, kind: str, generation: int) -> None:
        """Make a retired generation readable again. Others take it over at their next look; settles.

        :raises ConfigurationError: if it is not there. One that is readable stays as it is.
        """
        self._change(tenant, lambda row: self._restored(row, kind, generation))
        self.settle()

    def destroy(self, tenant: str, kind: str, generation: int) -> None:
        """Delete a retired generation. What was written with it is lost; nothing to do if it is gone.

        :raises ConfigurationError: if it is not retired.
        """
        self._change(tenant, lambda row: self._destroyed(row, kind, generation))

    def rekey(self, tenant: str) -> int:
        """Make a new tenant key under the same customer keys, and seal every generation anew under it.

        Rows are not touched. Other processes open the tenant anew at their next look.

        :returns: the new generation of the tenant key.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is changed then.
        """
        return self._change(tenant, self._rekeyed).tenant_key_generation

    def rewrap(
        self, tenant: str, under: Sequence[Wrapping] | None = None, claims: Sequence[str] | None = None
    ) -> None:
        """Wrap the same tenant key again: by its customer keys' current versions, or by other customer keys.

        Rows and generations are not touched, and other processes go on with the keys they hold.

        :param under: which customer keys (provider and config); those it has unless given.
        :param claims: what belongs to this tenant only; as before unless given.
        :raises KmsError: if a KMS refuses or does not answer; nothing is changed then.
        :raises ConfigurationError: if a claim is another tenant's.
        """
        self._change(
            tenant, lambda row: self._rewrapped(row, row.wrappings if under is None else under), claims
        )

    def search(self, tenant: str, change: Callable[[Searchable], Searchable]) -> Searchable:
        """Change what of a tenant can be searched, at once. Others take it over at their next look.

        :param change: makes the new state of the stored one; called again after a conflict.
        :returns: what is stored now.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is changed then.
        """

        def make(row: TenantRow) -> TenantRow | None:
            tenant_key = self._open(row)  # first: what the manifest has not authenticated is not parsed
            text = change(Searchable.parse(row.searchable_text, tenant)).text
            return None if text == row.searchable_text else row.next(tenant_key, searchable_text=text)

        return Searchable.parse(self._change(tenant, make).searchable_text, tenant)

    # -- one change ----------------------------------------------------------------------------------------------

    def _change(
        self,
        tenant: str,
        make: Callable[[TenantRow], TenantRow | None],
        claims: Sequence[str] | None = None,
    ) -> TenantRow:
        """Store what ``make`` makes of the tenant's row. None from it: there is nothing to do.

        No secret is in this frame: ``make`` gives rows, whose keys are wrapped and sealed.
        """
        tries = 0
        while True:
            old = self._keystore.row(tenant)
            new = make(old)
            if new is None:
                return old
            try:
                self._keystore.replace(old, new, claims)
            except KeystoreConflictError:
                tries += 1
                if tries == _TRIES:
                    raise
            else:
                self._tell(old, new)
                return new

    def _tell(self, old: TenantRow, new: TenantRow) -> None:
        def tell(kind: str, generation: int, state: str) -> None:
            self._audit.tell(GenerationChanged(new.tenant, kind, generation, state, new.epoch))

        if new.tenant_key_id != old.tenant_key_id:
            tell(TENANT_KEY, new.tenant_key_generation, ACTIVE)
        elif new.wrappings != old.wrappings:
            tell(WRAPPING, new.tenant_key_generation, ACTIVE)
        before, after = _states(old), _states(new)
        for key, state in after.items():
            if before.get(key) != state:
                tell(*key, state)
        for key in before.keys() - after.keys():
            tell(*key, "destroyed")

    # -- what a row becomes; each frame here may hold a secret, none touches the database --------------------------

    def _published(self, row: TenantRow, kind: str) -> TenantRow:
        tenant_key = self._open(row)
        generation = 1 + max(record.generation for record in row.generations if record.kind == kind)
        active = next(each for each in row.generations if each.kind == kind and each.state == ACTIVE)
        elsewhere = self._salts.where(tenant_key, active)
        if elsewhere is not None:
            record_id, sealed = self._salts.store(tenant_key, generation, new_search_salt(), elsewhere)
        else:
            record_id, sealed = tenant_key.seal(
                kind, generation, new_key() if kind == DATA_KEY else new_search_salt()
            )
        fresh = SealedRecord(kind, generation, record_id, PENDING, sealed)
        return row.next(tenant_key, generations=[*row.generations, fresh])

    def _activated(self, row: TenantRow, fresh: SealedRecord) -> TenantRow | None:
        found = _find(row.generations, fresh.kind, fresh.generation)
        if found is None or found.id != fresh.id:
            raise KeystoreConflictError(
                f"the {fresh.kind} of tenant {row.tenant!r} that was to become active is not there any more: the "
                "keystore was changed or restored meanwhile; rotate again",
                tenant=row.tenant,
            )
        if found.state != PENDING:
            return None  # another process was faster
        generations = [
            record._replace(state=ACTIVE if record == found else READABLE)
            if record == found or (record.kind == fresh.kind and record.state == ACTIVE)
            else record
            for record in row.generations
        ]
        return row.next(self._open(row), generations=generations)

    def _retired(self, row: TenantRow, kind: str, generation: int) -> TenantRow | None:
        if _find(row.retired, kind, generation):
            return None
        found = _find(row.generations, kind, generation)
        if found is None or found.state != READABLE:
            state = "not there" if found is None else found.state
            raise ConfigurationError(
                f"{kind} {generation} of tenant {row.tenant!r} is {state}: only a readable generation can be retired",
                tenant=row.tenant,
            )
        return row.next(
            self._open(row),
            generations=[record for record in row.generations if record != found],
            retired=[*row.retired, found._replace(state=RETIRED)],
        )

    def _restored(self, row: TenantRow, kind: str, generation: int) -> TenantRow | None:
        if _find(row.generations, kind, generation):
            return None
        found = _find(row.retired, kind, generation)
        if found is None:
            raise ConfigurationError(
                f"{kind} {generation} of tenant {row.tenant!r} is not there: what was destroyed cannot be restored",
                tenant=row.tenant,
            )
        return row.next(
            self._open(row),
            generations=[*row.generations, found._replace(state=READABLE)],
            retired=[record for record in row.retired if record != found],
        )

    def _destroyed(self, row: TenantRow, kind: str, generation: int) -> TenantRow | None:
        live = _find(row.generations, kind, generation)
        if live is not None:
            raise ConfigurationError(
                f"{kind} {generation} of tenant {row.tenant!r} is {live.state}: only a retired generation can be "
                "destroyed",
                tenant=row.tenant,
            )
        found = _find(row.retired, kind, generation)
        if found is None:
            return None
        left = [record for record in row.retired if record != found]
        return row.next(self._open(row), retired=left)

    def _rekeyed(self, row: TenantRow) -> TenantRow:
        old = self._open(row)
        under = [self._calls.describe(wrapping) for wrapping in row.wrappings]
        new, wrappings = self._calls.new_tenant_key(
            row.tenant, row.tenant_key_generation + 1, under, "rewrap"
        )
        return row.next(
            new,
            wrappings=wrappings,
            generations=[self._resealed(record, old, new) for record in row.generations],
            retired=[self._resealed(record, old, new) for record in row.retired],
        )

    def _resealed(self, record: SealedRecord, old: TenantKey, new: TenantKey) -> SealedRecord:
        if is_reference(record.sealed):
            return self._salts.renewed(record, old, new)
        return record.resealed(old, new)

    def _rewrapped(self, row: TenantRow, under: Sequence[Wrapping]) -> TenantRow:
        payload = self._calls.unwrap(row, "rotate")
        try:
            tenant_key = row.open(payload)
            kms = [self._calls.describe(wrapping) for wrapping in under]
            wrappings = self._calls.wrap(payload, kms, row.tenant, "rewrap")
            return row.next(tenant_key, wrappings=wrappings)
        finally:
            payload = b""  # crash reports show the variables of each frame

    def _open(self, row: TenantRow) -> TenantKey:
        return row.open(self._calls.unwrap(row, "rotate"))


def _pending(row: TenantRow, kind: str) -> SealedRecord | None:
    return next((each for each in row.generations if each.kind == kind and each.state == PENDING), None)


def _find(records: Sequence[SealedRecord], kind: str, generation: int) -> SealedRecord | None:
    return next((each for each in records if (each.kind, each.generation) == (kind, generation)), None)


def _states(row: TenantRow) -> dict[tuple[str, int], str]:
    return {(each.kind, each.generation): each.state for each in (*row.generations, *row.retired)}
