"""What a compiled statement needs of tenants' keys: asked once, and kept with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqla_byok.keys.searchable import HashSpec, Searchable, Written
from sqla_byok.orm import kept, tenant_column, upstream
from sqla_byok.orm.guard import Guard
from sqla_byok.orm.tenant_column import TenantRows
from sqla_byok.orm.types import Encrypted, SearchHash
from sqla_byok.orm.writes import embedded, written

__all__ = ["Need", "Needs", "needs_of"]

_NONE: frozenset[HashSpec] = frozenset()


@dataclass(slots=True)
class Need:
    """What a statement needs of one tenant's keys: its own tenant's, or those of the owner of single columns.

    :ivar column: the id of a column that needs them, for messages.
    :ivar binds: it encrypts or hashes values.
    :ivar reads: it decrypts values.
    :ivar salts: by how many live search salts it was compiled to compare; 0 where it compares no search hashes.
    :ivar hashed: how the hashes are made that it only writes.
    :ivar searched: how those are made that it compares, or by which an upsert finds its conflicts.
    :ivar grouped: how those are made that it tells apart in another way, as GROUP BY does.
    :ivar written: what it makes known of each table that it writes to.
    :ivar hashes: whether the keystore has a say in it: it writes, compares or groups by hashes.
    :ivar current: whether it needs the keys that are current: it writes or searches.
    :ivar allowed_by: what last allowed all that it does with hashes; most tenants share one.
    """

    column: str | None = None
    binds: bool = False
    reads: bool = False
    salts: int = 0
    hashed: frozenset[HashSpec] = _NONE
    searched: frozenset[HashSpec] = _NONE
    grouped: frozenset[HashSpec] = _NONE
    written: Sequence[Written] = ()
    hashes: bool = False
    current: bool = False
    allowed_by: Searchable | object = kept.UNASKED


class Needs(NamedTuple):
    """All that concerns us of a compiled statement.

    :param refusal: message and column, where it is not to run.
    :param of: what it needs, by whose keys: None for the statement's own tenant's.
    :param sends: it has the customer's KMS encrypt values.
    :param conflict: the hash column by which an upsert finds its conflicts.
    :param tenant_rows: what it does with rows that belong to tenants.
    """

    refusal: tuple[str, str | None] | None
    of: Mapping[str | None, Need]
    sends: bool = False
    conflict: Any = None
    tenant_rows: TenantRows | None = None


def needs_of(compiled: Any, guard: Guard) -> Needs | None:
    """What a compiled statement needs; None where nothing of it concerns us."""
    verdict = guard.judge(compiled)
    refusal, rows = embedded(compiled) or verdict.refusal, tenant_column.rows_of(compiled)
    of = _needs_of_owners(compiled)
    for owner, grouped in verdict.grouped.items():
        of.setdefault(owner, Need()).grouped = grouped
    for need in of.values():
        need.current = bool(need.binds or need.salts or need.grouped)
        need.hashes = need.current or bool(need.searched)
    if refusal is None and rows is None and not of:
        return None
    return Needs(
        refusal,
        of,
        sends=any(isinstance(type_, Encrypted) and type_.mode == "direct" for type_ in _bound(compiled)),
        conflict=next(iter(_conflict_types(compiled, untargeted=True)), None),
        tenant_rows=rows,
    )


def _needs_of_owners(compiled: Any) -> dict[str | None, Need]:
    of: dict[str | None, Need] = {}
    hashed: dict[str | None, set[HashSpec]] = {}
    for type_ in _bound(compiled):
        need = of.setdefault(type_.owner, Need())
        need.binds, need.column = True, need.column or type_.column_id
        if isinstance(type_, SearchHash) and type_.column_id:
            hashed.setdefault(type_.owner, set()).add(type_.spec)
    for type_ in upstream.result_types(compiled):
        if isinstance(type_, Encrypted):
            need = of.setdefault(type_.owner, Need())
            need.reads, need.column = True, need.column or type_.column_id
    searched = _searched(compiled)
    for owner, live in kept.compared(compiled).items():
        of.setdefault(owner, Need()).salts = live
    known = (
        written(compiled.statement)
        if getattr(compiled, "isinsert", False) or getattr(compiled, "isupdate", False)
        else ()
    )
    for owner, need in of.items():
        need.searched = searched.get(owner, _NONE)
        need.hashed = frozenset(hashed.get(owner, ())) - need.searched
        need.written = [each[owner] for each in known if owner in each] if need.binds else ()
    return of


def _bound(compiled: Any) -> Iterable[Encrypted[Any] | SearchHash]:
    """The types of ours that its parameters are bound by."""
    types = (bind.type for bind in getattr(compiled, "binds", {}).values())
    return [type_ for type_ in types if isinstance(type_, Encrypted | SearchHash)]


def _searched(compiled: Any) -> dict[str | None, frozenset[HashSpec]]:
    """Of columns that are compared, and of those by which an upsert finds its conflicts; by the columns' owners."""
    found = kept.searched(compiled)
    for type_ in _conflict_types(compiled):
        found[type_.owner] = found.get(type_.owner, _NONE) | {type_.spec}
    return found


def _conflict_types(compiled: Any, *, untargeted: bool = False) -> list[SearchHash]:
    """The types of the hash columns by which an upsert finds its conflicts.

    :param untargeted: also those by which it may find some where it names none.
    """
    if not getattr(compiled, "isinsert", False):
        return []
    statement = upstream.inside(compiled.statement)
    table, _ = upstream.target(statement)
    return [
        column.type
        for conflict in upstream.conflicts(statement)
        for column in upstream.conflict_columns(table, conflict, untargeted=untargeted)
        if isinstance(column.type, SearchHash)
    ]
