"""Alembic: migrations that name nothing of this package, so that they still run when it has changed, or is gone.

Installed beside Alembic 1.18 or newer this works by itself, with the ``env.py`` that ``alembic init`` writes: Alembic
finds it by an entry point. Autogenerate then writes encrypted columns as ``sa.LargeBinary()``, their hash
columns with their indexes, and leaves the keystore's tables alone unless ``target_metadata`` has them. For earlier
versions see :func:`options`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import LargeBinary

from sqla_byok.keys.keystore import keystore_metadata
from sqla_byok.orm import upstream
from sqla_byok.orm.tenant_column import TENANT_INFO
from sqla_byok.orm.types import Encrypted, SearchHash

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps

__all__ = ["options"]

_log = logging.getLogger(__name__)

_RenderItem = Callable[[str, Any, Any], "str | Literal[False]"]
_IncludeObject = Callable[[Any, Any, Any, bool, Any], bool]


def options(
    *, render_item: _RenderItem | None = None, include_object: _IncludeObject | None = None
) -> dict[str, Any]:
    """What ``context.configure()`` is given in ``env.py`` where Alembic is older than 1.18, which finds no plugins.

    ::

        import sqla_byok.alembic

        context.configure(
            connection=connection, target_metadata=target_metadata, **sqla_byok.alembic.options()
        )

    :param render_item: your own hook, which is asked first.
    :param include_object: your own hook, which is asked first.
    :returns: the two hooks, by their names.
    """

    def render(kind: str, item: Any, context: Any) -> str | Literal[False]:
        rendered: str | Literal[False] = render_item(kind, item, context) if render_item else False
        return rendered if rendered is not False else _rendered(kind, item, context)

    def include(item: Any, name: Any, kind: Any, reflected: bool, compare_to: Any) -> bool:
        if include_object is not None and not include_object(item, name, kind, reflected, compare_to):
            return False
        return not (kind == "table" and reflected and compare_to is None and _is_keystores(name))

    return {"render_item": render, "include_object": include}


def prepare(context: AutogenContext) -> Any:
    """Before autogenerate compares: render our types, whatever ``env.py`` renders itself."""
    from alembic.util import PriorityDispatchResult

    context.opts.update(render_item=options(render_item=context.opts.get("render_item"))["render_item"])
    return PriorityDispatchResult.CONTINUE


def look_over(context: AutogenContext, upgrade: UpgradeOps) -> Any:
    """After it: leave out what would drop the keystore, and tell of columns whose rows a migration cannot encrypt."""
    from alembic.operations.ops import AlterColumnOp, CreateTableOp, ModifyTableOps
    from alembic.util import PriorityDispatchResult

    declared = {table.name for table in context.sorted_tables}
    upgrade.ops[:] = [op for op in upgrade.ops if not _drops_keystore(op, declared)]
    for table in upgrade.ops:
        if isinstance(table, CreateTableOp):  # what is ours there means nothing without the models
            table.info = {name: value for name, value in table.info.items() if name not in TENANT_INFO}
        for op in table.ops if isinstance(table, ModifyTableOps) else ():
            if isinstance(op, AlterColumnOp) and _encrypts(op):
                _log.warning(
                    "%s.%s becomes an encrypted column. The migration changes its type and not its values: where the "
                    "table has rows, they are not encrypted by it, and cannot be read afterwards. Give the encrypted "
                    "values a new column beside the old one",
                    op.table_name,
                    op.column_name,
                )
    return PriorityDispatchResult.CONTINUE


def _drops_keystore(op: Any, declared: set[Any]) -> bool:
    # All operations on a table that the metadata has not are those that drop it.
    name = getattr(op, "table_name", None)
    return name is not None and name not in declared and _is_keystores(name)


def _is_keystores(name: Any) -> bool:
    return name in keystore_metadata.tables


def _encrypts(op: Any) -> bool:
    return isinstance(op.modify_type, Encrypted) and not upstream.is_binary(op.existing_type)


def _rendered(kind: str, item: Any, context: Any) -> str | Literal[False]:
    if kind != "type" or not isinstance(item, Encrypted | SearchHash):
        return False
    dialect = context.migration_context.dialect
    stored = item.load_dialect_impl(dialect)
    prefix = context.opts.get("sqlalchemy_module_prefix") or ""
    plain = f"{prefix}{item.impl_instance if isinstance(item, SearchHash) else LargeBinary()!r}"
    if stored is item.impl_instance:
        return plain
    # Other databases know no such type, and a migration may run on them too: in tests, say.
    context.imports.add("from sqlalchemy.dialects import mysql")
    return f"{plain}.with_variant(mysql.{stored!r}, 'mysql', 'mariadb')"
