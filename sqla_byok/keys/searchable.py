"""Which of a tenant's columns can be searched, and how their search hashes are made: what the keystore keeps of it.

A model declares how a column is hashed. If it changes that, hashes that are stored already are of no use, and a search
would miss rows without a word. So a tenant's first write to a table notes the table and its columns' specifications
(:class:`HashSpec`) in the keystore. Where a model has another specification, or a column becomes searchable when its
table was written already, the column is not searched until its rows were hashed anew.

A model declares what *may* be searched, too. What *is*, each tenant may say for itself::

    on         hashes are written, and searched
    pending    hashes are written, and not searched: rows may have none
    mixed      likewise, by releases of any specification, each writing its own hash or none
    hashing    likewise, by one specification only: a job makes these hashes
    off        NULL is written in place of a hash, and nothing is searched

No process may search by hashes while another one writes rows without them, and each looks at the keystore only now and
then. So a column never goes straight from off to on, nor back, nor from on to mixed. In between it is pending, for at
least :data:`~sqla_byok.keys.keyrings.SETTLE` seconds: then every process knows.

A column is on again when a job has hashed its rows. While the job runs a release that does not make these hashes may no
longer write, or it would add rows behind the job's back.

The whole of it is one text per tenant, which the manifest authenticates together with the generations: under the tenant
key, at one epoch. So nobody who can write to the keystore can change it, or put an old one back.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

from sqla_byok.errors import (
    ConfigurationError,
    HashSpecChangedError,
    KeystoreConflictError,
    KeystoreTamperedError,
    NotSearchableError,
    SettlingError,
)

__all__ = [
    "NOTHING",
    "OFF",
    "ON",
    "PENDING",
    "HashSpec",
    "Searchable",
    "SearchableColumns",
    "Written",
    "refuse_unseen",
]

ON, PENDING, OFF = "on", "pending", "off"
_MIXED, _HASHING = "mixed", "hashing"
_NOT_SEARCHED = (PENDING, _MIXED, _HASHING)

_DIGEST_DIGITS = 32
_PAST_KEPT = 8
_ALWAYS_STORED = 3


class HashSpec(NamedTuple):
    """How one column's search hashes are made.

    :param column: the column id.
    :param digest: 32 hexadecimal digits, which stand for all of it: two columns or releases whose digests are equal
        give equal values equal hashes.
    :param table: the table that has the column.
    :param sources: of an index, the ids of the columns that it follows.
    :param owner: whose keys the column takes; None: those of the rows' tenants.
    """

    column: str
    digest: str
    table: str
    sources: tuple[str, ...] = ()
    owner: str | None = None

    @classmethod
    def of(
        cls, column: str, table: str, *parts: Any, sources: Iterable[str] = (), owner: str | None = None
    ) -> HashSpec:
        """The specification with these parts, each of them text, a number, None or a list of such."""
        text = json.dumps(["sqla-byok/1/hash-spec", *parts], separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]
        return cls(column, digest, table, tuple(sources), owner)


@dataclass(slots=True)
class Written:
    """What a write to a table makes known.

    :param table: the table.
    :param specs: how its hashes are made, by column id.
    :param columns: the ids of its encrypted columns.
    :param unique: which of those that it hashes are unique.
    """

    table: str
    specs: Mapping[str, HashSpec]
    columns: frozenset[str] = frozenset()
    unique: frozenset[str] = frozenset()


NOTHING = Written("", {})


def _last(digests: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(digests))[-_PAST_KEPT:]


class _Column(NamedTuple):
    """What is known of one column.

    :param spec: the digest of its specification; empty as long as no row was written.
    :param sources: of an index, the ids of the columns that it follows.
    :param mark: of a pending one that is to become mixed, what tells this time from any other; of one that a job
        hashes, the job.
    :param past: the specifications that re-hashes have replaced: releases that have them are to have ended.
    :param tried: those for which its search was closed, until a re-hash; of all but its own the same holds then.
    """

    spec: str
    state: str
    sources: tuple[str, ...] = ()
    mark: str = ""
    past: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        spec: str,
        state: str,
        sources: Iterable[str],
        mark: str = "",
        past: Iterable[str] = (),
        tried: Iterable[str] = (),
    ) -> _Column:
        """One of its parts as they are stored."""
        return cls(spec, state, tuple(sources), mark, tuple(past), tuple(tried))

    def stored(self) -> tuple[Any, ...]:
        """The parts that are stored, those at the end only where they say something."""
        parts: tuple[Any, ...] = self
        while len(parts) > _ALWAYS_STORED and not parts[-1]:
            parts = parts[:-1]
        return parts

    def hashing(self, spec: HashSpec, job: str) -> _Column:
        """Hashed by a specification from now on, and for a job."""
        replaced = _last(
            each for each in (*self.past, self.spec, *self.tried) if each not in ("", spec.digest)
        )
        return _Column(spec.digest, _HASHING, spec.sources, job, replaced)

    def off(self) -> _Column:
        """Neither hashed nor searched."""
        return self._replace(state=OFF, mark="")

    def changing(self, spec: HashSpec, settled: Callable[[str], bool]) -> _Column:
        """Pending, for another specification, and mixed once that has settled."""
        if self.state != PENDING or not self.mark:
            tried = _last((*self.tried, spec.digest))
            return self._replace(state=PENDING, mark=secrets.token_hex(4), tried=tried)
        return self._replace(state=_MIXED, mark="") if settled(self.mark) else self

    def not_searched(self) -> _Column:
        """Pending; where it is mixed already it stays so, and where a job makes its hashes, which may still end."""
        return self if self.state in _NOT_SEARCHED else self._replace(state=PENDING, mark="")


class Searchable:
    """What a tenant's keystore row says of searching. It never changes; tenants with the same text share one.

    :param columns: what is known of columns, by their ids.
    :param others: the state of all other columns, :data:`ON` or :data:`OFF`.
    :param tables: those that have been written to.
    :ivar specs: the noted specifications' digests, by column id.
    :ivar off: tells of a column id whether NULL is to be written; None where that holds for none.
    """

    def __init__(self, columns: Mapping[str, _Column], others: str = ON, tables: Iterable[str] = ()) -> None:
        self._columns = dict(columns)
        self._others = others
        self.tables = frozenset(tables)
        self.specs = {name: column.spec for name, column in self._columns.items() if column.spec}
        restricted = others == OFF or any(column.state == OFF for column in self._columns.values())
        self.off: Callable[[str], bool] | None = self._is_off if restricted else None
        self._all_on = not restricted and all(column.state == ON for column in self._columns.values())

    @classmethod
    def parse(cls, text: str, tenant: str) -> Searchable:
        """Read what :attr:`text` gave, and the manifest has authenticated.

        :raises KeystoreTamperedError: it is no such text: a newer release wrote it.
        """
        found = _parsed.get(text)
        if found is None:
            try:
                found = cls._read(text)
            except (AttributeError, KeyError, TypeError, ValueError):
                found = None
        if found is None:
            raise KeystoreTamperedError(
                f"what the keystore holds of the searchable columns of tenant {tenant!r} is not in a format of this "
                "release; a newer one wrote it",
                tenant=tenant,
            )
        return _parsed.setdefault(text, found)

    @classmethod
    def _read(cls, text: str) -> Searchable:
        if not text:
            return cls({})
        stored = json.loads(text)
        columns = {name: _Column.read(*parts) for name, parts in stored["columns"].items()}
        states = {*(column.state for column in columns.values())}
        if not (states <= {ON, *_NOT_SEARCHED, OFF} and stored["others"] in (ON, OFF)):
            raise ValueError("a state is unknown")
        return cls(columns, stored["others"], stored["tables"])

    @cached_property
    def text(self) -> str:
        """The canonical text; empty where there is nothing to say."""
        if not self._columns and not self.tables and self._others == ON:
            return ""
        columns = {name: column.stored() for name, column in self._columns.items()}
        stored = {"columns": columns, "others": self._others, "tables": sorted(self.tables)}
        return json.dumps(stored, sort_keys=True, separators=(",", ":"))

    def state(self, column: str) -> str:
        """:data:`ON`, :data:`PENDING` or :data:`OFF`."""
        found = self._columns.get(column)
        if found is None:
            return self._others
        return PENDING if found.state in _NOT_SEARCHED else found.state

    def mark(self, column: str) -> str:
        """Of a column whose search is being closed for another specification, what tells this time; else empty."""
        found = self._columns.get(column)
        return found.mark if found is not None and found.state == PENDING else ""

    def is_mixed(self, column: str) -> bool:
        """Whether releases of any specification write it, and nobody searches it."""
        found = self._columns.get(column)
        return found is not None and found.state == _MIXED

    def job(self, column: str) -> str:
        """The job that makes a column's hashes just now; empty where there is none."""
        found = self._columns.get(column)
        return found.mark if found is not None and found.state == _HASHING else ""

    def _is_off(self, column: str) -> bool:
        return self.state(column) == OFF

    # -- asked before each statement --------------------------------------------------------------------------------

    def knows(self, written: Written) -> bool:
        """Whether nothing of a write is new, or changes what can be searched."""
        if written.table not in self.tables:
            return False
        return all(
            name in self.specs and not self._is_changed(name, spec, written)
            for name, spec in written.specs.items()
        )

    def _is_changed(self, name: str, spec: HashSpec, written: Written) -> bool:
        """Whether a write hashes a column otherwise than before, so that it has to be closed for searching.

        Not so by a release that was to have ended, which is refused, nor of a unique column.
        """
        column, ended = self._columns[name], (*self._columns[name].past, self._columns[name].spec)
        return spec.digest not in ended and column.state in (ON, PENDING) and name not in written.unique

    def knows_all(self, searched: Iterable[HashSpec]) -> bool:
        """Whether each of these columns was ever hashed. Where not, another process may have written the first row."""
        return all(spec.column in self.specs for spec in searched)

    def check_write(self, tenant: str, written: Written) -> None:
        """Refuse to write columns without the hashes by which the tenant can be searched.

        :raises HashSpecChangedError: the model has such a column, and does not hash it, or has not an index of it.
        """
        for name, column in self._columns.items():
            if (
                column.state in (ON, _HASHING)
                and column.spec
                and name not in written.specs
                and not written.columns.isdisjoint((name, *column.sources))
            ):
                raise HashSpecChangedError(
                    f"{name}: another release searches by its hashes, or makes them just now, and this model would "
                    "leave them out: searches would miss rows. Declare it as it was, or leave it out of "
                    f"byok.set_searchable() for tenant {tenant!r} first",
                    tenant=tenant,
                    column=name,
                )

    def check(self, tenant: str, hashed: Iterable[HashSpec], searched: Iterable[HashSpec]) -> None:
        """Refuse a statement whose hashes are made in another way than the stored ones, or cannot be searched.

        :param hashed: of the values that it hashes.
        :param searched: of the columns whose hashes it compares.
        :raises HashSpecChangedError: the model has changed how a column is hashed.
        :raises NotSearchableError: the tenant has not enabled the search of a column, or its rows are yet to be hashed.
        """
        specs = self.specs
        for spec in hashed:
            if specs.get(spec.column, spec.digest) != spec.digest:
                self._check_changed(tenant, spec)
        for spec in searched:
            if specs.get(spec.column, spec.digest) != spec.digest and self.state(spec.column) == ON:
                self._refuse_changed(tenant, spec.column)
            if not self._all_on and self.state(spec.column) != ON:
                self._refuse_search(tenant, spec.column)
            if spec.column not in specs and spec.table in self.tables:
                self._refuse_unhashed(tenant, spec.column)

    def _check_changed(self, tenant: str, spec: HashSpec) -> None:
        """Let a write pass that hashes a column otherwise than before, once nobody searches it any more."""
        column, known = spec.column, self._columns[spec.column]
        if known.state == PENDING and spec.digest not in known.past:
            raise SettlingError(
                f"{column}: the model hashes it otherwise than before, so the search of tenant {tenant!r} by it is "
                "being closed, which takes 21 seconds in which every process learns of it; write again then. Run "
                "'byok check --prepare' before you deploy, and no write has to wait",
                tenant=tenant,
                column=column,
            )
        if known.state not in (_MIXED, OFF):
            self._refuse_changed(tenant, column)

    def _refuse_changed(self, tenant: str, column: str) -> NoReturn:
        why = (
            "they are made anew just now, by another release" if self._columns[column].state == _HASHING else
            "a search would miss rows, and a unique index would keep nothing apart"
        )  # fmt: skip
        raise HashSpecChangedError(
            f"{column}: the stored search hashes of tenant {tenant!r} were made in another way than the model declares "
            "(another hash, type, normalizer, transform or salt_scope, or another version of one), and "
            f"{why}: declare the column as it was, or re-hash it with 'byok rehash' (sqla_byok.jobs.rehash)",
            tenant=tenant,
            column=column,
        )

    def _refuse_search(self, tenant: str, column: str) -> None:
        if self.state(column) == PENDING:
            self._refuse_unhashed(tenant, column)
        raise NotSearchableError(
            f"{column}: tenant {tenant!r} cannot be searched by it: its search is not enabled; enable it with "
            "byok.set_searchable(), then re-hash it with 'byok rehash' (sqla_byok.jobs.rehash)",
            tenant=tenant,
            column=column,
        )

    def _refuse_unhashed(self, tenant: str, column: str) -> NoReturn:
        raise NotSearchableError(
            f"{column}: tenant {tenant!r} cannot be searched by it yet: rows that were there before have no hash, or "
            "one that was made in another way; re-hash it with 'byok rehash' (sqla_byok.jobs.rehash). 'byok jobs list' "
            "shows how far that is",
            tenant=tenant,
            column=column,
        )

    # -- what it becomes -------------------------------------------------------------------------------------------

    def noted(
        self, written: Written, settled: Callable[[str, str], bool] = lambda *_: False, *, late: bool = False
    ) -> Searchable:
        """After a write. A column that is new to a table which was written before is pending: rows lack its hash.

        :param settled: tells of a column that is hashed in another way than before, and of its mark, whether every
            process knows that it is not searched any more. Then it is open to writers of any specification.
        :param late: whether there are rows in the table, though it was never noted.
        """
        if self.knows(written) or written is NOTHING:
            return self
        late = late or written.table in self.tables
        found = {
            name: self._columns[name].changing(spec, partial(settled, name))
            for name, spec in written.specs.items()
            if name in self.specs and self._is_changed(name, spec, written)
        }
        found |= {
            name: _Column(
                spec.digest, PENDING if late and self.state(name) == ON else self.state(name), spec.sources
            )
            for name, spec in written.specs.items()
            if name not in self.specs
        }
        return Searchable({**self._columns, **found}, self._others, self.tables | {written.table})

    def closed_but(self, enabled: frozenset[str] | None, but: frozenset[str] = frozenset()) -> Searchable:
        """With these columns enabled, and of the others those pending that have hashes.

        :param enabled: None: all but those in ``but``, and also those that no model declares yet.
        """
        if enabled is None:
            # What is not listed was never written, so there is no row without a hash.
            listed = {name: self._enabled(name) for name in self._columns if name not in but}
            return self._with({**listed, **{name: self._disabled(name) for name in but}}, ON)
        listed = {name: self._disabled(name) for name in self._columns}
        return self._with({**listed, **{name: self._enabled(name) for name in enabled}}, OFF)

    def closing(self, enabled: frozenset[str] | None, but: frozenset[str] = frozenset()) -> frozenset[str]:
        """What :meth:`closed_but` left pending, which is to be off."""
        return frozenset(
            name
            for name, column in self._columns.items()
            if column.state in _NOT_SEARCHED and (name in but if enabled is None else name not in enabled)
        )

    def _disabled(self, name: str) -> _Column:
        column = self._columns.get(name, _Column("", OFF))
        return column.not_searched() if column.spec and column.state != OFF else column.off()

    def closed(self, columns: frozenset[str]) -> Searchable:
        """With these columns, which were pending for the settle time, off."""
        found = {name: self._columns[name] for name in columns}
        if any(column.state == ON for column in found.values()):
            raise KeystoreConflictError(
                "columns that were being disabled were enabled meanwhile, by another call; nothing more was changed: "
                "call set_searchable() again"
            )
        return self._with({name: column.off() for name, column in found.items()})

    def _enabled(self, name: str) -> _Column:
        column = self._columns.get(name, _Column("", self._others))
        if column.state != OFF:
            return column
        return column._replace(state=PENDING if column.spec else ON)  # without one, no row was written

    def not_searched(self, column: str) -> Searchable:
        """With a column pending, whose rows are to be hashed anew."""
        if self.state(column) == OFF:
            raise ConfigurationError(
                f"{column}: its search is not enabled; enable it with byok.set_searchable() first",
                column=column,
            )
        known = self._columns.get(column, _Column("", ON))
        return self._with({column: known.not_searched()})

    def closing_for(self, spec: HashSpec) -> Searchable:
        """With a column pending whose stored hashes were made otherwise."""
        known = self._columns[spec.column]
        if known.spec == spec.digest or known.state not in (ON, PENDING, _HASHING):
            return self
        return self._with({spec.column: known.changing(spec, lambda _: False)})

    def mixed(self, column: str) -> Searchable:
        """With a column open to writers of any specification, which was pending for the settle time."""
        known = self._columns[column]
        return (
            self._with({column: known._replace(state=_MIXED, mark="", past=())})
            if known.state == PENDING
            else self
        )

    def rehashing(self, spec: HashSpec, job: str = "") -> Searchable:
        """With a column hashed by this specification from now on, which was pending for the settle time.

        :param job: the one that makes the hashes.
        """
        now = self.not_searched(spec.column)
        return now._with({spec.column: now._columns[spec.column].hashing(spec, job)})

    def is_hashing(self, spec: HashSpec, job: str) -> bool:
        """Whether a job makes the hashes of a column by this specification, and nobody has closed it anew since."""
        found = self._columns.get(spec.column)
        return found is not None and (found.state, found.spec, found.mark) == (_HASHING, spec.digest, job)

    def may_hash(self, spec: HashSpec) -> bool:
        """Whether a job may write hashes of this specification: nobody searches by, or makes, others."""
        found = self._columns.get(spec.column)
        return found is None or found.state == OFF or found.spec in ("", spec.digest)

    def without(self, job: str) -> Searchable:
        """With the columns pending whose hashes a job was making that is not to end."""
        mine = {
            name: each for name, each in self._columns.items() if each.state == _HASHING and each.mark == job
        }
        return self._with({name: each._replace(state=PENDING, mark="") for name, each in mine.items()})

    def rehashed(self, column: str) -> Searchable:
        """With a pending column that can be searched from now on."""
        state = self.state(column)
        if state == OFF:
            raise ConfigurationError(
                f"{column}: its search was disabled meanwhile; enable it and re-hash anew", column=column
            )
        return (
            self if state == ON else self._with({column: self._columns[column]._replace(state=ON, mark="")})
        )

    def _with(self, columns: Mapping[str, _Column], others: str | None = None) -> Searchable:
        return Searchable({**self._columns, **columns}, others or self._others, self.tables)


def refuse_unseen(tenant: str, column: str) -> NoReturn:
    """Refuse the first write to a unique column whose rows from before have no hash that its index could see."""
    raise NotSearchableError(
        f"{column}: rows of tenant {tenant!r} were in the table before the keystore knew of it, and its unique index "
        "does not see their values: a value could get in twice. Re-hash it with 'byok rehash' (sqla_byok.jobs.rehash) "
        "first; where the table, its schema or the column was renamed, declare the columns with column_id= and the old "
        "names",
        tenant=tenant,
        column=column,
    )


# Most tenants of a process have the same text; a tenant's share of the memory is a reference.
_parsed: WeakValueDictionary[str, Searchable] = WeakValueDictionary()


class SearchableColumns:
    """Changes which of a tenant's columns can be searched.

    Each step is one transaction in the keystore, under an epoch of its own. This process and all others take it over
    at their next look, within seconds. Whoever dies between two steps leaves columns pending: calling it again goes on.

    :param change: stores what a function makes of a tenant's :class:`Searchable`, and gives what is stored then.
    :param settle: waits until no process works without knowing what was stored before.
    """

    def __init__(
        self,
        change: Callable[[str, Callable[[Searchable], Searchable]], Searchable],
        settle: Callable[[], None],
    ) -> None:
        self._change, self._settle = change, settle

    def set(self, tenant: str, columns: Iterable[str] | None, but: Iterable[str] = ()) -> None:
        """Enable these columns and disable all others; None enables all, but for those in ``but``.

        Takes the settle time where a column is disabled that has hashes.

        :raises KeystoreConflictError: one that was being disabled was enabled meanwhile.
        """
        enabled = None if columns is None else frozenset(columns)
        disabled = frozenset(but)
        closing = self._change(tenant, lambda now: now.closed_but(enabled, disabled)).closing(
            enabled, disabled
        )
        if closing:
            self._settle()
            self._change(tenant, lambda now: now.closed(closing))

    def rehashing(self, tenant: str, spec: HashSpec) -> None:
        """Begin to hash a column anew: its new specification holds for what is written from now on.

        Takes the settle time. Processes whose model has the old specification, or none, are refused afterwards, those
        with the new one write. The job has to wait for the settle time once more before it reads its first row.

        :raises ConfigurationError: the column is disabled.
        """
        self._change(tenant, lambda now: now.not_searched(spec.column))
        self._settle()
        self._change(tenant, lambda now: now.rehashing(spec))

    def rehashed(self, tenant: str, column: str) -> None:
        """End it: every row has the hash that the specification asks for, so the column can be searched.

        Nothing to do where it can be already.

        :raises ConfigurationError: the column is disabled.
        """
        self._change(tenant, lambda now: now.rehashed(column))

    def state(self, tenant: str, column: str) -> str:
        """``"on"``, ``"pending"`` or ``"off"``, as the keystore has it now."""
        return self._change(tenant, lambda now: now).state(column)
