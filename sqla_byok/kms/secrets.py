"""References to secrets: what the keystore holds in their place, and how they are resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["SecretStore", "Secrets"]


class SecretStore(Protocol):
    """A place of the operator's own for secrets, registered as ``Byok(secret_stores={"name": store})``."""

    def read(self, name: str) -> str | None:
        """The secret, or None where there is none of that name."""
        ...


class Secrets:
    """Resolves references such as ``env:BYOK_ORG42_SECRET`` under the prefixes that the operator allows."""

    def __init__(
        self,
        prefixes: Sequence[str] = (),
        stores: Mapping[str, SecretStore] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._prefixes, self._stores, self._settings = (
            tuple(prefixes),
            dict(stores or {}),
            dict(settings or {}),
        )
