"""What a job is over: the columns that are meant, the plan that the keystore keeps of it, and the work that models make
of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Table, inspect

from sqla_byok.errors import ConfigurationError, UnknownTenantError
from sqla_byok.jobs.rows import Rework, Verify, Work
from sqla_byok.orm.chosen import Chosen, chosen
from sqla_byok.orm.plain import codec_of
from sqla_byok.orm.schema import sources_of
from sqla_byok.orm.stored import StoredTable
from sqla_byok.orm.tenant_column import tenant_key
from sqla_byok.orm.types import Encrypted, SearchHash
from sqla_byok.runtime import Byok

__all__ = [
    "columns_of",
    "database_of",
    "databases_of",
    "elsewhere",
    "engine_of",
    "entry_of",
    "plan_of",
    "tables_there",
    "works_of",
]


def engine_of(byok: Byok, engine: Engine | None) -> Engine:
    """The engine that was given, or the only one that was attached.

    :raises ConfigurationError: there are several, or it is an async engine's.
    """
    if engine is not None:
        byok._require_attached(engine)
        return engine
    if len(byok.engines) != 1:
        raise ConfigurationError(
            "which database? Give the engine: several were attached to this Byok, or none"
        )
    found = byok.engines[0]
    if found.dialect.is_async:
        raise ConfigurationError(
            "a job takes a sync engine, and the one that was attached is an async engine's; make one over the same "
            "database with a sync driver, and attach it too"
        )
    return found


def columns_of(engine: Engine, what: Sequence[Any]) -> Chosen:
    """The columns that a job is over: those of tables, not of views, whose rows are those of tables.

    Where several models declare a table, it is the one that has all columns.

    :raises ConfigurationError: none has, or they declare a column in different ways; there are only views.
    """
    return _without_views(engine, _by_one_model(chosen(what)))


def _by_one_model(over: Chosen) -> Chosen:
    by_name: dict[str, list[tuple[Table, set[str]]]] = {}
    for table, keys in over.items():
        by_name.setdefault(table.fullname, []).append((table, keys))
    found: Chosen = {}
    for name, declared in by_name.items():
        widest, keys = max(declared, key=lambda each: len(each[1]))
        if not all(
            theirs <= keys and _made(each, theirs) == _made(widest, theirs) for each, theirs in declared
        ):
            raise ConfigurationError(
                f"several models declare the table {name!r}, in different ways; give the one that the job is to go by"
            )
        found[widest] = keys
    return found


def entry_of(table: Table, seals: Sequence[str], hashes: Sequence[str]) -> dict[str, Any]:
    """What a plan has of a table."""
    return {"seals": seals, "hashes": hashes, "made": _made(table, [*seals, *hashes])}


def _made(table: Table, keys: Iterable[str]) -> dict[str, str]:
    """How what stands in these columns is made: a release that does so otherwise has a job of its own."""
    made = {"": tenant_key(table) or ""}
    for key in keys:
        type_ = table.c[key].type
        if isinstance(type_, SearchHash):
            made[key] = type_.spec.digest
        elif isinstance(type_, Encrypted):
            codec = codec_of(type_.type_).name
            made[key] = f"{type_.column_id} {codec} {type_.mode} {type_.pad_to} {type_.owner}"
    return made


def plan_of(
    byok: Byok,
    engine: Engine,
    entries: Mapping[str, Any],
    tenants: Sequence[str] | None,
    *,
    opens: bool = False,
) -> dict[str, Any]:
    """What a job is over, and how; who calls it so again goes on with it.

    :param tenants: whose rows, in the order in which they are worked on; None: all.
    :param opens: whether it opens the search of what it was over.
    :raises UnknownTenantError: a tenant was never onboarded.
    """
    tenants = None if tenants is None else list(dict.fromkeys(tenants))
    for unknown in sorted({*(tenants or ())} - {*byok._keystore.tenants()}):
        raise UnknownTenantError(f"tenant {unknown!r} was never onboarded", tenant=unknown)
    return {"tables": dict(entries), "tenants": tenants, "database": database_of(engine), "opens": opens}


def database_of(engine: Engine) -> str:
    """Which database it is of, without user and password."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return f"sqlite {Path(url.database).absolute() if url.database else ''}"
    return f"{url.get_backend_name()} {url.host or url.query.get('host', '')}:{url.port or ''} {url.database}"


def elsewhere(byok: Byok, engine: Engine, tables: Iterable[Table]) -> str | None:
    """A table of these that another attached database has too."""
    for other in databases_of(byok, engine)[1:]:
        for table in tables_there(other, tables):
            return f"{table.fullname} in {database_of(other)}"
    return None


def tables_there(engine: Engine, tables: Iterable[Table]) -> list[Table]:
    """Those of some tables that a database has."""
    look = inspect(engine)
    return [table for table in tables if look.has_table(table.name, schema=table.schema)]


def databases_of(byok: Byok, engine: Engine) -> list[Engine]:
    """The engine, and one of each other database that is attached by a sync engine."""
    found = {database_of(engine): engine}
    for each in byok.engines:
        if not each.dialect.is_async:
            found.setdefault(database_of(each), each)
    return list(found.values())


def _without_views(engine: Engine, over: Chosen) -> Chosen:
    look, views = inspect(engine), set[tuple[str | None, str]]()
    for schema in {table.schema for table in over}:
        names = look.get_view_names(schema)
        if engine.dialect.name == "postgresql":
            names += look.get_materialized_view_names(schema)
        views |= {(schema, name) for name in names}
    found = {table: keys for table, keys in over.items() if (table.schema, table.name) not in views}
    if over and not found:
        raise ConfigurationError(
            f"{', '.join(table.fullname for table in over)}: a view has no rows of its own; run the job over the "
            "tables that it shows"
        )
    return found


def works_of(plan: Mapping[str, Any], tables: Iterable[Table]) -> dict[str, Work]:
    """What is done with the rows of each table of a plan."""
    declared: dict[str, list[Table]] = {}
    for each in tables:
        declared.setdefault(each.fullname, []).append(each)
    works: dict[str, Work] = {}
    for name, entry in plan["tables"].items():
        if name not in declared:
            raise ConfigurationError(
                f"the job is over the table {name!r}, which no model of this process declares"
            )
        keys = [*entry["seals"], *entry["hashes"]]
        fitting = [
            each
            for each in declared[name]
            if all(key in each.c for key in keys) and _made(each, keys) == entry["made"]
        ]
        if not fitting:
            raise ConfigurationError(
                f"the job encrypts or hashes {name!r} in another way than this release's models declare; run it with "
                "those that it was begun with, or cancel it and begin another"
            )
        table = fitting[0]
        sources = [source for key in entry["hashes"] for source in sources_of(table.c[key])]
        stored = StoredTable(table, tenant_key(table), [*entry["seals"], *entry["hashes"], *sources])
        if "verify" in entry:
            works[name] = Verify(stored, entry["verify"]["repair"], plan["opens"])
        else:
            works[name] = Rework(stored, entry["seals"], entry["hashes"])
    return works
