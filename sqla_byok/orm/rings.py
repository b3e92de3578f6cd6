"""What stands in the place of one tenant's keyring: several tenants' by name, or nobody's.

A statement and its processors work with one keyring a tenant. Two things stand in the place of one here:
:data:`SEALED`, which has no keys, so that encrypted values are read as :class:`~sqla_byok.orm.sealed.Sealed`; and
:class:`AcrossRing`, which opens the rows of several tenants and writes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from sqla_byok.crypto.formats import Secret
from sqla_byok.crypto.values import Opener
from sqla_byok.errors import NoTenantError, SealedError
from sqla_byok.keys.keyring import Keyring

__all__ = ["SEALED", "Across", "AcrossRing", "SealedRing", "StatementRing", "singles"]


# -- nobody's keys ---------------------------------------------------------------------------------------------------


class _NoSalts(Mapping[Any, bytes]):
    """Stands where the salts of a search would be."""

    def __getitem__(self, key: Any) -> NoReturn:
        SEALED.search()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


class SealedRing:
    """The keyring of a statement that runs sealed, and what stands for its tenant."""

    __slots__ = ()

    tenant = "nobody (sealed)"

    cleared = one_unit = False

    @property
    def lease(self) -> SealedRing:
        """What is nobody's lasts for ever."""
        return self

    write_until = inf
    openers: Mapping[bytes, Opener] = MappingProxyType({})
    off = searchable = None
    salts: Mapping[Any, bytes] = _NoSalts()
    live_salts: Sequence[Mapping[Any, bytes]] = (salts,)

    def search(self) -> NoReturn:
        """Refuse a search."""
        _refuse("search an encrypted column: there are no search salts")

    def end(self) -> NoReturn:
        """Refuse what needs keys."""
        _refuse("encrypt, decrypt or hash a value")

    expired = outdated = end

    @property
    def write(self) -> NoReturn:
        _refuse(
            "write a new value to an encrypted column; only sealed values that were read can be written back"
        )

    def __repr__(self) -> str:
        return self.tenant


def _refuse(what: str) -> NoReturn:
    raise SealedError(
        f"this runs sealed, without any tenant's keys, and cannot {what}; do it in byok.session(tenant, engine)"
    )


SEALED = SealedRing()
"""Both the tenant and the keyring of a statement that runs sealed."""


# -- several tenants -------------------------------------------------------------------------------------------------


class Across(NamedTuple):
    """Several tenants as the tenant of a statement.

    :param names: sorted, each once.
    """

    names: tuple[str, ...]

    def __repr__(self) -> str:
        return "across " + ", ".join(map(repr, self.names))


class _Openers(Mapping[bytes, Opener]):
    """The data keys of several keyrings. It holds none of them: what is cleared there is gone here."""

    __slots__ = ("_rings",)

    def __init__(self, rings: Sequence[Keyring]) -> None:
        self._rings = {header: ring for ring in rings for header in ring.openers}

    def __getitem__(self, header: bytes) -> Opener:
        return self._rings[header].openers[header]

    def __iter__(self) -> Iterator[bytes]:
        return (header for header, ring in self._rings.items() if header in ring.openers)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class AcrossRing(Secret):
    """The keyrings of several tenants, for one statement: it opens the values of each under that tenant's keys.

    :ivar rings: one for each tenant, in the order of their names.
    :ivar tenant: all of them, for messages.
    """

    __slots__ = ("openers", "rings", "tenant")

    off = searchable = None

    def __init__(self, tenant: Across, rings: Sequence[Keyring]) -> None:
        self.tenant, self.rings, self.openers = repr(tenant), rings, _Openers(rings)

    @property
    def live_salts(self) -> Sequence[Mapping[Any, bytes]]:
        """What a look-up has to try: the live salts of each tenant."""
        return [salts for ring in self.rings for salts in ring.live_salts]

    @property
    def salts(self) -> Mapping[Any, bytes]:
        """The first of them."""
        return self.rings[0].salts

    @property
    def write(self) -> NoReturn:
        """Nobody's: which tenant a new value belongs to is not known."""
        raise NoTenantError(
            f"a value cannot be encrypted {self.tenant}: whose would it be? Name one tenant, with byok.tenant(tenant) "
            "within the block or with the execution option byok_tenant"
        )

    @property
    def lease(self) -> AcrossRing:
        """It ends with the first of its tenants' leases."""
        return self

    @property
    def one_unit(self) -> bool:
        """Whether any of the tenants wants a KMS call for each unit of work."""
        return any(ring.lease.one_unit for ring in self.rings)

    @property
    def cleared(self) -> bool:
        """Whether the keys of any of the tenants were taken away."""
        return any(ring.cleared for ring in self.rings)

    @property
    def write_until(self) -> float:
        """Until when a search is sure to know the salts of all of them."""
        return min(ring.write_until for ring in self.rings)

    def outdated(self) -> NoReturn:
        """Raise the error of the keyring that nobody looked after for longest."""
        min(self.rings, key=lambda ring: ring.write_until).outdated()

    def expired(self) -> NoReturn:
        """Raise the error of a cleared keyring."""
        next((ring for ring in self.rings if ring.cleared), self.rings[0]).expired()


StatementRing = Keyring | AcrossRing | SealedRing
"""The keys that a statement works with for one tenant, for several or for nobody."""


def singles(ring: StatementRing | None) -> Sequence[Keyring]:
    """The keyrings of single tenants in it: one, several or none."""
    if isinstance(ring, Keyring):
        return (ring,)
    return ring.rings if isinstance(ring, AcrossRing) else ()
