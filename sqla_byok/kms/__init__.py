"""Customer keys: one module a provider, behind the protocols of :mod:`sqla_byok.kms.base`."""

from __future__ import annotations

from collections.abc import Mapping

from sqla_byok.errors import ConfigurationError
from sqla_byok.kms.aws import AwsKms
from sqla_byok.kms.aws_salts import AwsSecretsManagerSalts
from sqla_byok.kms.azure import AzureKeyVault
from sqla_byok.kms.base import Kms, KmsClient, Operator, Salts, SaltsClient, Wrapped
from sqla_byok.kms.local import LocalKms

__all__ = [
    "AwsKms",
    "AwsSecretsManagerSalts",
    "AzureKeyVault",
    "Kms",
    "KmsClient",
    "LocalKms",
    "Operator",
    "Salts",
    "SaltsClient",
    "Wrapped",
    "describe",
    "providers",
]

providers: dict[str, type[Kms]] = {each.provider: each for each in (AwsKms, AzureKeyVault, LocalKms)}
"""The built-in providers by the name that the keystore stores."""


def describe(provider: str, config: Mapping[str, str]) -> Kms:
    """The customer key that a keystore row describes. Does no I/O.

    :param provider: the provider's name, such as ``"aws"``.
    :param config: what :meth:`Kms.config` returned when the tenant was onboarded.
    :return: a value equal to the one that was onboarded.
    :raises ConfigurationError: the provider is unknown, or the configuration is not one of its own.

    Example::

        describe("local", {"path": "/etc/byok/dev.key"}) == LocalKms("/etc/byok/dev.key")
    """
    if provider not in providers:
        raise ConfigurationError(
            f"Unknown KMS provider {provider!r}; known are {', '.join(sorted(providers))}."
        )
    return providers[provider].from_config(config)
