"""What models and the keystore disagree about, for all tenants, before a first write finds out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Table

from sqla_byok.errors import HashSpecChangedError
from sqla_byok.keys.searchable import OFF, ON, HashSpec, Searchable
from sqla_byok.orm.chosen import Chosen
from sqla_byok.orm.namesakes import protected_in
from sqla_byok.orm.schema import is_unique
from sqla_byok.orm.types import SearchHash
from sqla_byok.orm.writes import made_known

__all__ = ["CHANGED", "Finding", "findings", "specs_of"]

UNHASHED, CHANGED, UNIQUE, DROPPED = "unhashed", "changed", "unique", "dropped"


class Finding(NamedTuple):
    """One thing that models and the keystore disagree about.

    :ivar tenant: the tenant.
    :ivar column: the column id.
    :ivar kind: ``"unhashed"``: rows have no hash yet, or the search was closed; ``"changed"``: the model hashes it
        otherwise than its stored hashes; ``"unique"``: likewise, and it is unique; ``"dropped"``: the tenant is
        searched by it, and the model hashes it no more.
    :ivar run: what to do.
    """

    tenant: str
    column: str
    kind: str
    run: str


_RUN = {
    UNHASHED: "byok rehash {column}",
    CHANGED: "byok check --prepare before you deploy, and byok rehash {column} when no other release runs any more",
    UNIQUE: "declare a second index, hash_index(…, unique=True) under another name, re-hash that, and drop this one",
    DROPPED: "declare it as it was, or leave it out of byok.set_searchable() for the tenant",
}


def findings(texts: Mapping[str, str], over: Chosen) -> Iterator[Finding]:
    """What the models and the keystore disagree about.

    :param texts: what is kept of each tenant's searching.
    :param over: the models' columns.
    """
    for tenant, text in sorted(texts.items()):
        now = Searchable.parse(text, tenant)
        for table, keys in over.items():
            for column, kind in _of_table(now, tenant, table, keys):
                yield Finding(tenant, column, kind, _RUN[kind].format(column=column))


def specs_of(table: Table) -> list[HashSpec]:
    """How the hashes of a table's columns are made."""
    return [column.type.spec for column in table.c if isinstance(column.type, SearchHash)]


def _of_table(now: Searchable, tenant: str, table: Table, keys: Collection[str]) -> Iterator[tuple[str, str]]:
    owners: tuple[str | None, ...] = (None, tenant)
    if _only_owns(now, tenant, table):
        owners = (tenant,)
    for column in table.c:
        type_ = column.type
        if isinstance(type_, SearchHash) and column.key in keys and type_.owner in owners:
            kind = _of_column(now, type_.spec, is_unique(column))
            if kind is not None:
                yield type_.spec.column, kind
    whole = all(column.key in keys for column in protected_in(table))
    for owner, written in made_known(table).items() if whole else ():
        if owner in (None, tenant):
            try:
                now.check_write(tenant, written)
            except HashSpecChangedError as error:
                yield error.column or "", DROPPED


def _only_owns(now: Searchable, tenant: str, table: Table) -> bool:
    """Whether the table was noted for a tenant since it owns columns in the rows of others, and has none of its own."""
    ours: list[Any] = [column.type for column in protected_in(table)]
    own = [type_.spec.column for type_ in ours if isinstance(type_, SearchHash) and type_.owner is None]
    return any(type_.owner == tenant for type_ in ours) and now.specs.keys().isdisjoint(own)


def _of_column(now: Searchable, spec: HashSpec, unique: bool) -> str | None:
    known, state = now.specs.get(spec.column), now.state(spec.column)
    if spec.table not in now.tables or state == OFF:
        return None
    if known is None:
        return UNHASHED
    if known == spec.digest:
        return None if state == ON else UNHASHED
    if unique:
        return UNIQUE
    return UNHASHED if now.is_mixed(spec.column) else CHANGED
