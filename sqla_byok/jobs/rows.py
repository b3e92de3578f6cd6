"""What a job does with a page of rows: whose each is, what becomes of its cells, and what is told of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

from sqlalchemy import Dialect

from sqla_byok.crypto.formats import HEADER_SIZE
from sqla_byok.crypto.values import explain_foreign
from sqla_byok.errors import (
    ByokError,
    KeysExpiredError,
    KeystoreError,
    KmsError,
    TenantMismatchError,
    UnknownDataKeyError,
    UnknownTenantError,
)
from sqla_byok.keys.jobs import OUTCOMES
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.keystore import Keystore
from sqla_byok.orm.current import running
from sqla_byok.orm.stored import Change, Prepared, Processors, StoredRow, StoredTable, UnderKeys, key_id

__all__ = [
    "ALREADY",
    "CHANGED",
    "DARK",
    "FAILED",
    "OTHERS",
    "OVERTAKEN",
    "Failure",
    "Page",
    "Rework",
    "Tenants",
    "Verify",
    "Work",
    "work_over",
]

CHANGED, ALREADY, OVERTAKEN, FAILED, DARK, OTHERS = OUTCOMES


_AT_ONCE = 256  # values between two looks at the clocks
_UNKNOWN: Any = object()


class Failure(NamedTuple):
    """What could not be done with a row, or is not as it should be.

    :param table: its table.
    :param key: its primary key.
    :param column: the column id; empty where it is the whole row.
    :param reason: what is the matter; no value is in it.
    """

    table: str
    key: tuple[Any, ...]
    column: str
    reason: str


class _LeftError(Exception):
    """The row is not worked on; the outcome says why."""


class Tenants:
    """Finds whose a stored value is, by its header, and opens that tenant.

    :param keyrings: all open tenants.
    :param keystore: says whose a data key is.
    :param only: the tenants that the job works for; None: all.
    :ivar dark: those whose KMS said no, or did not answer; each is asked once by a worker.
    """

    def __init__(self, keyrings: Keyrings, keystore: Keystore, only: Collection[str] | None) -> None:
        self._keyrings, self._keystore = keyrings, keystore
        self._only = None if only is None else frozenset(only)
        self._by_id: dict[bytes, str | None] = {}
        self._unknown: set[str] = set()
        self.dark: set[str] = set()

    def ring(self, tenant: str) -> Keyring:
        """The tenant's keyring, which is current. Looks at both clocks.

        :raises UnknownTenantError: it is in no row of the keystore.
        """
        ring = None
        if tenant in self._unknown:
            raise UnknownTenantError(f"tenant {tenant!r} is not in the keystore", tenant=tenant)
        if tenant not in self.dark:
            try:
                ring = self._keyrings.get(tenant, "job")
                if self._keyrings.clock.boot() >= ring.write_until:  # it took long
                    ring = self._keyrings.get(tenant, "job")
            except KmsError:
                self.dark.add(tenant)
            except UnknownTenantError:
                self._unknown.add(tenant)
                raise
        if ring is None:
            raise _LeftError(DARK)
        if self._keyrings.clock.boot() >= ring.write_until:
            ring.outdated()
        return ring

    def of(self, blob: bytes, owner: str | None) -> Keyring | None:
        """The keyring that a value is under; None where no tenant's is known.

        :param owner: whose the column is; None: the row's tenant's.
        """
        found = key_id(blob)
        if found is None:
            return None
        if found not in self._by_id:
            self._by_id[found] = self._keystore.tenant_of(found)
        tenant = self._by_id[found]
        if tenant is None:
            return None
        if owner is None and self._only is not None and tenant not in self._only:
            raise _LeftError(OTHERS)
        return self.ring(tenant)


@dataclass(slots=True)
class Page:
    """What became of a page of rows.

    :ivar changes: what is to be stored; ``prepared``: the statements that do it.
    :ivar counts: rows by outcome, but for those that are yet to be changed, and what else was counted.
    :ivar failures: by row.
    :ivar behind, up_to: the keys between which its rows are, as those of :meth:`StoredTable.page`.
    """

    changes: list[Change] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    behind: Any = None
    up_to: Any = None

    @property
    def rows(self) -> int:
        """How many rows have their outcome."""
        return sum(self.counts.get(outcome, 0) for outcome in OUTCOMES)

    def prepare(self, table: StoredTable, dialect: Dialect) -> None:
        """Make statements of the changes, one of those of equal columns."""
        groups: dict[tuple[Any, ...], list[Change]] = {}
        for change in self.changes:
            groups.setdefault((change.held, *change.new), []).append(change)
        self.prepared = [table.prepared(dialect, changes) for changes in groups.values()]

    def count(self, what: str, number: int = 1) -> None:
        """Count rows, or what was found in them."""
        self.counts[what] = self.counts.get(what, 0) + number


class Work(Protocol):
    """What is done with a row."""

    table: StoredTable

    def row(self, row: StoredRow, keys: UnderKeys | None, page: Page) -> Change | None:
        """What is to become of a row; None: it stays.

        :param keys: None where all its values are NULL.
        :raises ByokError: it cannot be done.
        """
        ...


class Rework:
    """Seals values anew, or hashes them anew: whatever is not as it would be written now.

    :param table: with the columns that it reads.
    :param seals: the keys of the encrypted columns that are sealed anew.
    :param hashes: the keys of the hash columns that are hashed anew.
    """

    def __init__(self, table: StoredTable, seals: Sequence[str] = (), hashes: Sequence[str] = ()) -> None:
        self.table, self._seals = table, tuple(seals)
        self._sources = {key: table.sources[key] for key in hashes}
        self._opened = tuple(dict.fromkeys(source for each in self._sources.values() for source in each))

    def row(self, row: StoredRow, keys: UnderKeys | None, page: Page) -> Change | None:
        cells, new, held = row.cells, dict[str, bytes | None](), dict[str, None]()
        for key in self._seals:
            blob = cells[key]
            if blob is not None and keys is not None and (sealed := keys.resealed(key, blob)) is not blob:
                new[key] = sealed
                held[key] = None
        values: dict[str, Any] = dict.fromkeys(self._opened)
        if keys is not None:
            for key in self._opened:
                blob = cells[key]
                if blob is not None:
                    values[key] = keys.opened(key, blob)
        for key, sources in self._sources.items():
            stored, wanted = cells[key], None
            if keys is not None:
                if stored is None and all(values[source] is None for source in sources):
                    continue
                if not keys.may_hash(key):
                    raise _LeftError(DARK)  # it was so when searches were closed: its own is open still
                wanted = keys.hashed(key, values)
            if wanted != stored:
                new[key] = wanted
                held.update(dict.fromkeys((*sources, key)))
        return Change(row, tuple(held), new) if new else None


class Verify:
    """Opens every value, and compares every hash with those that its value may have.

    :param table: with the columns that it reads.
    :param repair: whether hashes are mended.
    :param all_hashed: whether each value needs its hash, also of columns that are not searched yet.
    """

    def __init__(self, table: StoredTable, repair: bool = False, all_hashed: bool = False) -> None:
        self.table, self._repair, self._all_hashed = table, repair, all_hashed

    def row(self, row: StoredRow, keys: UnderKeys | None, page: Page) -> Change | None:
        cells, new, held = row.cells, dict[str, bytes | None](), dict[str, None]()
        values: dict[str, Any] = dict.fromkeys(self.table.values)
        for key, type_ in self.table.values.items():
            blob = cells[key]
            if blob is not None and keys is not None:
                values[key] = keys.opened(key, blob)
                page.count(f"{type_.column_id} under {keys.rings[type_.owner].tenant} {_hex(blob)}")
        failures = len(page.failures)
        for key, sources in self.table.sources.items():
            stored, column = cells[key], self.table.hashes[key].column_id or ""
            if keys is not None and stored is not None and (keys.is_off(key) or not keys.may_hash(key)):
                page.count(f"{column} hashed otherwise, or off")
                continue
            wanted = self._wanted(key, keys, values, stored)
            if wanted == stored:
                continue
            if stored is None and keys is not None and not (self._all_hashed or keys.is_searched(key)):
                page.count(f"{column} not hashed yet")
                continue
            reason = "it has no hash" if stored is None else "its hash is not that of its value"
            page.failures.append(Failure(self.table.name, row.key, column, reason))
            new[key] = wanted
            held.update(dict.fromkeys((*sources, key)))
        if new and not self._repair:
            raise _LeftError(FAILED)
        del page.failures[failures:]  # they are mended
        return Change(row, tuple(held), new) if new else None

    def _wanted(
        self, key: str, keys: UnderKeys | None, values: dict[str, Any], stored: bytes | None
    ) -> bytes | None:
        """The hash that is stored if it is one that the values may have, else the one that is written now."""
        if keys is None:
            return None
        found = [keys.hashed(key, values, nth) for nth in range(1 if self._all_hashed else keys.salts(key))]
        return stored if stored in found else found[0]


def _hex(blob: bytes) -> str:
    return (key_id(blob) or b"").hex()


def work_over(rows: Sequence[StoredRow], work: Work, tenants: Tenants, processors: Processors) -> Page:
    """Do a job's work over a page of rows; what is to be stored is not stored yet."""
    page, every = Page(), max(1, _AT_ONCE // max(1, len(work.table.values)))
    with running(None):  # whoever begins, within it
        for start in range(0, len(rows), every):
            _work_over(rows[start : start + every], work, tenants, processors, page)
    return page


def _work_over(
    rows: Sequence[StoredRow], work: Work, tenants: Tenants, processors: Processors, page: Page
) -> None:
    """The same with no more rows than take next to no time: the clocks are looked at when a keyring is found."""
    values, known, begun = tuple(work.table.values), dict[Any, UnderKeys | None](), None
    for row in rows:
        failures = len(page.failures)
        try:
            cells = row.cells
            whose = (
                row.tenant,
                *[None if (cell := cells[key]) is None else cell[:HEADER_SIZE] for key in values],
            )
            keys = known.get(whose, _UNKNOWN)
            if keys is _UNKNOWN:
                keys = known[whose] = _keys_of(row, work.table, tenants, processors)
            if keys is not begun and keys is not None:
                keys.begin()
                begun = keys
            change = work.row(row, keys, page)
        except _LeftError as left:
            page.count(str(left))
        except (KmsError, KeysExpiredError) as error:
            if error.tenant is not None:
                tenants.dark.add(error.tenant)
            page.count(DARK)
        except KeystoreError:
            raise
        except ByokError as error:
            del page.failures[failures:]
            page.count(FAILED)
            column, reason = getattr(error, "column", None) or "", f"{type(error).__name__}: {error}"
            page.failures.append(Failure(work.table.name, row.key, column, reason))
        else:
            if change is None:
                page.count(ALREADY)
            else:
                page.changes.append(change)


def _keys_of(
    row: StoredRow,
    table: StoredTable,
    tenants: Tenants,
    processors: Processors,
) -> UnderKeys | None:
    """The keys that a row's values are under; None where all are NULL."""
    rings: dict[str | None, Keyring] = {}
    for key, owner in table.owners.items():
        blob = row.cells[key]
        if blob is None:
            continue
        whose = row.tenant if owner is None else owner
        ring = tenants.of(blob, owner)
        if ring is None:  # of no key that is known here; the tenant's own refuses it, and says what it is
            ring = rings.get(owner) or (None if whose is None else tenants.ring(whose))
        if ring is None:
            _refuse_unknown(table.values[key].column_id or "", blob)
        if rings.setdefault(owner, ring) is not ring or (whose is not None and ring.tenant != whose):
            column = table.values[key].column_id
            raise TenantMismatchError(
                f"{column}: it is a value of tenant {ring.tenant!r} in a row of {whose or rings[owner].tenant!r}",
                tenant=whose or rings[owner].tenant,
                column=column,
                owner=ring.tenant,
            )
    return UnderKeys(processors, rings) if rings else None


def _refuse_unknown(column: str, blob: bytes) -> NoReturn:
    explain_foreign(blob, column, None)
    raise UnknownDataKeyError(
        f"{column}: a stored value was sealed under a data key that is in no tenant's keystore row: the tenant was "
        "removed, or the keystore is another one",
        column=column,
    )
