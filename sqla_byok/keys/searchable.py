"""Which of a tenant's columns can be searched, and how their search hashes are made: what the keystore keeps of it.

A model declares how a column is hashed. If it changes that, hashes that are stored already are of no use, and a search
would miss rows without a word. So the first write of a column notes its specification (:class:`HashSpec`) in the
keystore, and a model with another one is refused from then on, until the rows were hashed anew.

A model declares what *may* be searched, too. What *is*, each tenant may say for itself::

    on         hashes are written, and searched
    pending    hashes are written, and not searched: rows from before have none, or one of another specification
    off        NULL is written in place of a hash, and nothing is searched

From off it never goes straight to on: a job hashes the rows in between, which may begin
:data:`~sqla_byok.keys.generations.SETTLE` seconds after the column became pending. Until then a process that has not
looked at the keystore since may still write what it did before.

The whole of it is one text per tenant, which the manifest authenticates together with the generations: under the tenant
key, at one epoch. So nobody who can write to the keystore can change it, or put an old one back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from sqla_byok.errors import (
    ConfigurationError,
    HashSpecChangedError,
    KeystoreTamperedError,
    NotSearchableError,
)

__all__ = ["OFF", "ON", "PENDING", "HashSpec", "Searchable", "SearchableColumns"]

ON, PENDING, OFF = "on", "pending", "off"

_DIGEST_DIGITS = 32


class HashSpec(NamedTuple):
    """How one column's search hashes are made.

    :param column: the column id.
    :param digest: 32 hexadecimal digits, which stand for all of it: two columns or releases whose digests are equal
        give equal values equal hashes.
    """

    column: str
    digest: str

    @classmethod
    def of(cls, column: str, *parts: Any) -> HashSpec:
        """The specification with these parts, each of them text, a number, None or a list of such."""
        text = json.dumps(["sqla-byok/1/hash-spec", *parts], separators=(",", ":"))
        return cls(column, hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS])


class _Column(NamedTuple):
    """What is known of one column.

    :param spec: the digest of its specification; empty as long as no row was written.
    """

    spec: str
    state: str


class Searchable:
    """What a tenant's keystore row says of searching. It never changes; tenants with the same text share one.

    :param columns: what is known of columns, by their ids.
    :param others: the state of all other columns, :data:`ON` or :data:`OFF`.
    :ivar specs: the recorded specifications' digests, by column id.
    :ivar off: tells of a column id whether NULL is to be written; None where that holds for none.
    """

    def __init__(self, columns: Mapping[str, _Column], others: str = ON) -> None:
        self._columns = dict(columns)
        self._others = others
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
        columns = {name: _Column(*each) for name, each in stored["columns"].items()}
        states = {stored["others"], *(column.state for column in columns.values())}
        if not states <= {ON, PENDING, OFF}:
            raise ValueError("a state is unknown")
        return cls(columns, stored["others"])

    @cached_property
    def text(self) -> str:
        """The canonical text; empty where there is nothing to say."""
        if not self._columns and self._others == ON:
            return ""
        stored = {"columns": self._columns, "others": self._others}
        return json.dumps(stored, sort_keys=True, separators=(",", ":"))

    def state(self, column: str) -> str:
        """:data:`ON`, :data:`PENDING` or :data:`OFF`."""
        found = self._columns.get(column)
        return self._others if found is None else found.state

    def _is_off(self, column: str) -> bool:
        return self.state(column) == OFF

    # -- asked before each statement that binds hashes -----------------------------------------------------------

    def check(self, tenant: str, hashed: Iterable[HashSpec], searched: Iterable[HashSpec]) -> None:
        """Refuse a statement whose hashes are made in another way than the stored ones, or cannot be searched.

        :param hashed: of the values that it hashes.
        :param searched: of the columns whose hashes it compares.
        :raises HashSpecChangedError: the model has changed how a column is hashed.
        :raises NotSearchableError: the tenant has not enabled the search of a column, or its rows are yet to be hashed.
        """
        specs = self.specs
        for column, digest in hashed:
            if specs.get(column, digest) != digest:
                self._refuse_changed(tenant, column)
        for column, digest in searched:
            if specs.get(column, digest) != digest:
                self._refuse_changed(tenant, column)
            if not self._all_on and self.state(column) != ON:
                self._refuse_search(tenant, column)

    def _refuse_changed(self, tenant: str, column: str) -> None:
        raise HashSpecChangedError(
            f"{column}: the stored search hashes of tenant {tenant!r} were made in another way than the model declares "
            "(another hash, type, normalizer, transform or salt_scope, or another version of one): re-hash the column, "
            "or declare it as it was. Until then nothing is written to it nor searched, since rows would be missed",
            tenant=tenant,
            column=column,
        )

    def _refuse_search(self, tenant: str, column: str) -> None:
        if self.state(column) == PENDING:
            reason = "its rows have not been hashed yet; run the re-hash of the column first"
        else:
            reason = (
                "its search is not enabled; enable it with byok.set_searchable(), then re-hash the column"
            )
        raise NotSearchableError(
            f"{column}: tenant {tenant!r} cannot be searched by it: {reason}", tenant=tenant, column=column
        )

    # -- what it becomes -------------------------------------------------------------------------------------------

    def recorded(self, specs: Mapping[str, str]) -> Searchable:
        """With these specifications, where a column has none yet."""
        missing = {name: spec for name, spec in specs.items() if name not in self.specs}
        if not missing:
            return self
        found = {name: _Column(spec, self.state(name)) for name, spec in missing.items()}
        return Searchable({**self._columns, **found}, self._others)

    def limited_to(self, columns: Iterable[str] | None) -> Searchable:
        """With these columns enabled and no others; None: all of them."""
        if columns is None:
            # What is not listed was never written, so there is no row without a hash.
            return Searchable({name: self._enabled(name) for name in self._columns})
        enabled = set(columns)
        listed = {name: column._replace(state=OFF) for name, column in self._columns.items()}
        return Searchable({**listed, **{name: self._enabled(name) for name in enabled}}, OFF)

    def _enabled(self, name: str) -> _Column:
        column = self._columns.get(name, _Column("", self._others))
        return column._replace(state=PENDING) if column.state == OFF else column

    def rehashing(self, spec: HashSpec) -> Searchable:
        """With a column that is hashed by this specification from now on, and not searched for the time being."""
        if self.state(spec.column) == OFF:
            raise ConfigurationError(
                f"{spec.column}: its search is not enabled; enable it with byok.set_searchable() first",
                column=spec.column,
            )
        return self._with(spec.column, _Column(spec.digest, PENDING))

    def rehashed(self, column: str) -> Searchable:
        """With a pending column that can be searched from now on."""
        state = self.state(column)
        if state == OFF:
            raise ConfigurationError(
                f"{column}: its search was disabled meanwhile; enable it and re-hash anew", column=column
            )
        return self if state == ON else self._with(column, self._columns[column]._replace(state=ON))

    def _with(self, name: str, column: _Column) -> Searchable:
        return Searchable({**self._columns, name: column}, self._others)


# Most tenants of a process have the same text; a tenant's share of the memory is a reference.
_parsed: WeakValueDictionary[str, Searchable] = WeakValueDictionary()


class SearchableColumns:
    """Changes which of a tenant's columns can be searched.

    Each change is one transaction in the keystore, under an epoch of its own. This process and all others take it over
    at their next look, within seconds; see :data:`~sqla_byok.keys.generations.SETTLE`.

    :param change: stores what a function makes of a tenant's :class:`Searchable`, and gives what is stored then.
    """

    def __init__(self, change: Callable[[str, Callable[[Searchable], Searchable]], Searchable]) -> None:
        self._change = change

    def set(self, tenant: str, columns: Iterable[str] | None) -> None:
        """Enable these columns and disable all others; None enables all. What was disabled becomes pending."""
        enabled = None if columns is None else frozenset(columns)
        self._change(tenant, lambda now: now.limited_to(enabled))

    def rehashing(self, tenant: str, spec: HashSpec) -> None:
        """Begin to hash a column anew: its new specification holds for what is written from now on.

        Processes whose model has the old one are refused, those with the new one write. The job has to wait for the
        settle time before it reads its first row.

        :raises ConfigurationError: the column is disabled.
        """
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
