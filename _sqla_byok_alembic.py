"""What Alembic's entry point ``alembic.plugins`` loads in every ``alembic`` command of every project beside us.

It stands beside the package, since importing a module of the package imports all of it. Alembic up to 1.20.0 iterates
over what the entry point gives, later versions take a module: so it is a module over which one can iterate.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.operations.ops import UpgradeOps


class _Plugin(ModuleType):
    def __iter__(self) -> Iterator[ModuleType]:
        yield self

    @staticmethod
    def setup(plugin: Any) -> None:
        """Take part in autogenerate. Nothing of ours is imported until there is one."""
        from alembic.util import DispatchPriority

        plugin.add_autogenerate_comparator(_prepare, "autogenerate", priority=DispatchPriority.FIRST)
        plugin.add_autogenerate_comparator(_look_over, "autogenerate", priority=DispatchPriority.LAST)


def _prepare(context: Any, upgrade: UpgradeOps) -> Any:
    from sqla_byok.alembic import prepare

    return prepare(context)


def _look_over(context: Any, upgrade: UpgradeOps) -> Any:
    from sqla_byok.alembic import look_over

    return look_over(context, upgrade)


plugin = _Plugin(__name__)
