"""A whole Byok in one line of a user's conftest."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from sqla_byok.kms import Kms
from sqla_byok.runtime import Byok
from sqla_byok.testing.fake import FakeKms

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["byok_for_tests"]


def byok_for_tests(
    engine: Engine | AsyncEngine, tenant: str = "t", *, kms: Kms | None = None, **options: Any
) -> Byok:
    """A Byok that is ready: its keystore in memory, the engine attached, one tenant aboard and in charge.

    Every statement on the engine that names no other tenant is *tenant*'s, so that tests written before there was
    encryption go on. The tables are yours to create. An :class:`~sqlalchemy.ext.asyncio.AsyncEngine` needs no running
    event loop here.

    An engine belongs to one Byok for its life: let the two have the same fixture scope. Close the Byok when the
    engine's time is over.

    :param engine: sync or async.
    :param tenant: the tenant to onboard.
    :param kms: its customer key; a new :class:`FakeKms` unless given.
    :param options: what :class:`~sqla_byok.Byok` takes, such as ``revoke_within``.
    :raises ConfigurationError: if the engine is attached to another Byok, or an option cannot be used.

    Example::

        @pytest.fixture
        def byok(engine):
            with contextlib.closing(byok_for_tests(engine)) as byok:
                yield byok
    """
    options = {"keystore": "sqlite://", "single_tenant": tenant, **options}
    byok = Byok(**options)
    try:
        byok.create_keystore()
        byok.attach(engine)
        byok.onboard(tenant, kms or FakeKms(f"fake-{secrets.token_hex(4)}"))
    except BaseException:
        byok.close()
        raise
    return byok
