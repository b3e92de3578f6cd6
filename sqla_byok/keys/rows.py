"""A tenant as the keystore's rows have it: what is stored, the one check before it is used, and its next state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqla_byok.crypto.formats import Record, TenantKey, row_tag, unpack_tenant_key
from sqla_byok.errors import KeystoreTamperedError

__all__ = ["SealedRecord", "State", "TenantRow", "Wrapping"]


class State(NamedTuple):
    """Which of a tenant's states it is. The tag tells two of the same epoch apart, as a restored backup leads to."""

    epoch: int
    manifest_tag: bytes


class SealedRecord(NamedTuple):
    """A generation of a data key or search salt, as the keystore holds it."""

    kind: str
    generation: int
    id: bytes
    state: str
    sealed: bytes

    def resealed(self, old: TenantKey, new: TenantKey) -> SealedRecord:
        """The same secret under another tenant key."""
        _, sealed = new.seal(
            self.kind, self.generation, old.open(self.kind, self.generation, self.id, self.sealed)
        )
        return self._replace(sealed=sealed)


@dataclass(frozen=True)
class Wrapping:
    """One wrapping of a tenant key: which customer key, under which provider, and the wrapped bytes."""

    provider: str
    config: str
    wrapped: bytes
    kms_key_version: str
    row_tag: bytes | None = None


@dataclass(frozen=True)
class TenantRow:
    """All that the keystore holds of one tenant.

    :param generations: the live ones, which the manifest lists.
    :param retired: those that no process reads or writes with any more, kept until they are destroyed. The manifest
        does not list them: a state that is changed from or to "retired" by hand breaks its tag.
    :param searchable_text: how its columns are hashed and which can be searched, as
        :attr:`Searchable.text` has it.
    """

    tenant: str
    revoke_within_ms: int
    outage_grace_ms: int
    wrappings: Sequence[Wrapping]
    generations: Sequence[SealedRecord]
    retired: Sequence[SealedRecord] = ()
    searchable_text: str = ""
    tenant_key_id: bytes = b""
    tenant_key_generation: int = 0
    epoch: int = 0
    manifest_tag: bytes = b""

    def open(self, payload: bytes) -> TenantKey:
        """The tenant key that a KMS unwrapped, once it has proved to be that of this row.

        :param payload: what the KMS gave.
        :raises WrongKeyError: it is the key of another tenant or generation, or none.
        :raises KeystoreTamperedError: as :meth:`check` says.
        """
        secret = b""
        try:
            secret = unpack_tenant_key(payload, self.tenant, self.tenant_key_generation)
            tenant_key = TenantKey(secret, self.tenant, self.tenant_key_generation)
        finally:
            payload = secret = b""  # crash reports show the variables of each frame
        self.check(tenant_key)
        return tenant_key

    def check(self, tenant_key: TenantKey) -> None:
        """Refuse a row that is not under this tenant key, before anything of it is opened or read.

        :raises KeystoreTamperedError: the row names another tenant key, or its generations or what it says of
            searching are not those that the manifest authenticates.
        """
        if tenant_key.id != self.tenant_key_id:
            raise KeystoreTamperedError(
                f"the tenant key of {self.tenant!r} is not the one its keystore row names", tenant=self.tenant
            )
        tenant_key.check_manifest(
            self.epoch, _listed(self.generations), self.manifest_tag, self.searchable_text
        )

    def next(self, tenant_key: TenantKey, **changes: Any) -> TenantRow:
        """The tenant's next state, one epoch on; a tenant's first follows the one that has only the fields without
        a default.

        :param tenant_key: the tenant key, which authenticates the list of generations.
        :param changes: the fields that change.
        """
        new = replace(
            self,
            tenant_key_id=tenant_key.id,
            tenant_key_generation=tenant_key.generation,
            epoch=self.epoch + 1,
            **changes,
        )
        tag = tenant_key.manifest_tag(new.epoch, _listed(new.generations), new.searchable_text)
        return replace(new, manifest_tag=tag)

    @property
    def state(self) -> State:
        """Which of the tenant's states it is."""
        return State(self.epoch, self.manifest_tag)

    def tag(self, key: bytes, position: int) -> bytes:
        """The tag that authenticates this tenant's row with the wrapping at one position."""
        wrapping = self.wrappings[position]
        return row_tag(
            key,
            tenant=self.tenant,
            provider=wrapping.provider,
            config=wrapping.config.encode(),
            wrapped=wrapping.wrapped,
            kms_key_version=wrapping.kms_key_version,
            revoke_within_ms=self.revoke_within_ms,
            outage_grace_ms=self.outage_grace_ms,
            tk_id=self.tenant_key_id,
            tk_generation=self.tenant_key_generation,
            epoch=self.epoch,
            manifest_tag=self.manifest_tag,
            position=position,
            count=len(self.wrappings),
        )


def _listed(generations: Iterable[SealedRecord]) -> list[Record]:
    """What the manifest says of them."""
    return [Record(*each[:4]) for each in generations]
