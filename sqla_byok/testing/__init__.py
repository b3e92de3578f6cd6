"""What users import in their own tests: a key in memory, both clouds on loopback, a suite for providers of their own.

Importing it makes the provider ``fake`` known to this process; see :class:`FakeKms`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_byok.errors import MissingExtraError
from sqla_byok.testing.byok import byok_for_tests
from sqla_byok.testing.fake import FakeKms
from sqla_byok.testing.servers import KmsServers, kms_server

if TYPE_CHECKING:
    from sqla_byok.testing.conformance import KmsConformance

__all__ = ["FakeKms", "KmsConformance", "KmsServers", "byok_for_tests", "kms_server"]


def __getattr__(name: str) -> Any:
    if name == "KmsConformance":  # needs pytest, which the rest does not
        try:
            from sqla_byok.testing.conformance import KmsConformance
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                'KmsConformance needs pytest: pip install "sqla-byok[testing]"'
            ) from error
        return KmsConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
