"""What a re-hash has to do with the search of its columns: closed before it begins, open when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from sqla_byok.errors import ConfigurationError, KmsError, UnknownTenantError
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.searchable import NOTHING, OFF, ON, HashSpec, Searchable
from sqla_byok.orm.schema import is_unique
from sqla_byok.orm.stored import StoredTable
from sqla_byok.runtime import Byok

__all__ = ["Hashed", "Searching", "give_up", "hashed_note"]


class Hashed(NamedTuple):
    """One hash column of a job.

    :param table: the name of its table.
    :param spec: how it is hashed.
    :param owner: whose it is; None: the rows' tenants'.
    :param unique: whether no two rows may have the same hash.
    """

    table: str
    spec: HashSpec
    owner: str | None
    unique: bool

    @classmethod
    def in_table(cls, table: StoredTable, keys: Iterable[str]) -> list[Hashed]:
        """Those with these keys."""
        return [
            cls(table.name, type_.spec, type_.owner, is_unique(table.columns[key]))
            for key, type_ in table.hashes.items()
            if key in keys
        ]


def hashed_note(column: str) -> str:
    """Under which name it is kept by which salt all rows of a column are hashed."""
    return f"hashed {column}"


class Searching:
    """The columns of a job, for all tenants that it works for.

    :param byok: opens them.
    :param columns: what is hashed.
    :param tenants: the tenants; None: all that have written to the tables.
    """

    def __init__(self, byok: Byok, columns: Sequence[Hashed], tenants: Sequence[str] | None) -> None:
        self._byok, self._columns, self._given = byok, columns, tenants

    def check(self) -> None:
        """Refuse what cannot be hashed anew, before anything is closed.

        :raises ConfigurationError: a unique column is hashed in another way than its stored hashes.
        """
        for tenant in self._tenants():
            ring = self._ring(tenant)
            if ring is not None:
                for each in self._of(tenant):
                    self._needs_nothing(ring.searchable, each, "")

    def close(self, job: str) -> bool:
        """Close the search of what is not hashed as the models say, and let nobody write it in another way.

        :param job: for which; whoever closes it for something else ends that.
        :returns: whether anything was changed, and has settled. The tenants whose KMS says no are left.
        """
        if not self._change(job, lambda now, spec: now.not_searched(spec.column)):
            return False
        self._byok._generations.settle()
        self._change(job, lambda now, spec: now.rehashing(spec, job))
        self._byok._generations.settle()
        return True

    def is_closed(self, job: str) -> bool:
        """Whether all is as :meth:`close` left it."""
        rings = {tenant: self._ring(tenant) for tenant in self._tenants()}
        return all(
            self._needs_nothing(ring.searchable, each, job)
            for tenant, ring in rings.items()
            if ring is not None
            for each in self._of(tenant)
        )

    def open(self, is_done: Callable[[str, Hashed], bool], salts: Mapping[str, int], job: str) -> None:
        """Open the search of what was hashed, and keep by which salt it was.

        :param is_done: tells of a tenant and a column whether all its rows were.
        :param salts: by which salt each tenant hashed when the first row was read: each is by that or a newer one.
        """
        for tenant in self._tenants():
            ring, mine = self._ring(tenant), self._of(tenant)
            # Several tables may have one column, as a renamed one and its copy do.
            left = {each.spec.column for each in mine if not is_done(tenant, each)}
            for each in mine:
                if ring is None or tenant not in salts or each.spec.column in left:
                    continue
                if ring.searchable.state(each.spec.column) == OFF:
                    continue
                ring = self._byok._keyrings.revise(ring, _once(_opened_by(job), each.spec))
                if _is_searched(ring.searchable, each.spec):  # else it was closed anew, for another release
                    content = {"salt": salts[tenant], "job": job}
                    self._byok._jobs.note(tenant, hashed_note(each.spec.column), content)

    def _change(self, job: str, change: Callable[[Searchable, HashSpec], Searchable]) -> bool:
        """Change what is not open as the models say; whether there was any."""
        found = False
        for tenant in self._tenants():
            ring = self._ring(tenant)
            if ring is None:
                continue
            for each in self._of(tenant):
                if self._needs_nothing(ring.searchable, each, job):
                    continue
                found = True
                ring = self._byok._keyrings.revise(ring, _once(change, each.spec))
        return found

    def _needs_nothing(self, now: Searchable, each: Hashed, job: str) -> bool:
        """Whether nothing has to be closed: it is hashed as the model says, is being so, never was, or is off."""
        column, known = each.spec.column, now.specs.get(each.spec.column)
        if now.state(column) == OFF or each.table not in now.tables:
            return True
        if known is not None and known != each.spec.digest and each.unique:
            raise ConfigurationError(
                f"{column}: it is unique and hashed in another way than its stored hashes were. While hashes of both "
                "kinds stand in one index it keeps nothing apart, so it is not hashed anew in its place: declare a "
                "second index, hash_index(…, unique=True) under another name, re-hash that, and drop this one",
                column=column,
            )
        return now.is_hashing(each.spec, job) or (known is not None and _is_searched(now, each.spec))

    def _of(self, tenant: str) -> list[Hashed]:
        # An owner's columns are hashed for the rows of all, or not at all.
        whole = self._given is None
        return [each for each in self._columns if each.owner is None or (whole and each.owner == tenant)]

    def _tenants(self) -> list[str]:
        owners = {each.owner for each in self._columns if each.owner is not None}
        if self._given is not None:
            return list(dict.fromkeys(self._given))
        tables = {each.table for each in self._columns}
        texts = self._byok._keystore.searchable_texts()
        return [
            tenant
            for tenant in self._byok._keystore.tenants()
            if tenant in owners
            or not tables.isdisjoint(Searchable.parse(texts.get(tenant, ""), tenant).tables)
        ]

    def _ring(self, tenant: str) -> Keyring | None:
        """The tenant's keyring, as the keystore has it now; None where its KMS says no."""
        keyrings = self._byok._keyrings
        try:
            return keyrings.note(keyrings.get(tenant, "job"), NOTHING)
        except (KmsError, UnknownTenantError):
            return None


def give_up(byok: Byok, job: str) -> None:
    """Leave the columns pending whose hashes a job was making; a release that was to have ended stays refused."""
    for tenant, text in byok._keystore.searchable_texts().items():
        if job in text:
            with suppress(KmsError):
                ring = byok._keyrings.get(tenant, "job")
                byok._keyrings.revise(ring, lambda now: now.without(job))


def _once(
    change: Callable[[Searchable, HashSpec], Searchable], spec: HashSpec
) -> Callable[[Searchable], Searchable]:
    return lambda now: change(now, spec)


def _opened_by(job: str) -> Callable[[Searchable, HashSpec], Searchable]:
    return lambda now, spec: now.rehashed(spec.column) if now.is_hashing(spec, job) else now


def _is_searched(now: Searchable, spec: HashSpec) -> bool:
    """Whether hashes are found as the model makes them. A column that nobody has written has none to miss."""
    known = now.specs.get(spec.column)
    return known is None or (known == spec.digest and now.state(spec.column) == ON)
