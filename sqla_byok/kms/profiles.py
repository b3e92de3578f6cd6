"""Profiles: how a KMS is reached. From the operator's code only, never from the keystore or a customer's form."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqla_byok.errors import ConfigurationError

__all__ = ["AZURE_VAULT_DOMAINS", "Profile"]

AZURE_VAULT_DOMAINS = (
    ".vault.azure.net",
    ".vault.azure.cn",
    ".vault.usgovcloudapi.net",
    ".managedhsm.azure.net",
    ".managedhsm.azure.cn",
    ".managedhsm.usgovcloudapi.net",
)
"""Where Key Vault and Managed HSM are, in the public and the sovereign clouds."""


@dataclass(frozen=True, repr=False)  # a proxy's URL may hold a password
class Profile:
    """The settings of one entry of ``Byok(kms_profiles={name: {…}})``. One profile serves all providers.

    :param endpoint_url: where AWS's services are, in place of AWS's own address.
    :param connect_timeout: seconds, for each attempt.
    :param read_timeout: seconds, for each attempt.
    :param attempts: how often a call is tried in all.
    :param ca_file: the path of a PEM file with the certificate authorities to trust.
    :param proxies: pairs of scheme and URL.
    :param authority: the host that issues Azure's tokens, in place of ``login.microsoftonline.com``.
    :param disable_instance_discovery: do not ask Microsoft whether the authority is one of theirs.
    :param hosts: which hosts a customer's key URL may name: ``".vault.azure.net"`` allows every name that ends so,
        ``"localhost:8443"`` that one.
    """

    endpoint_url: str | None = None
    connect_timeout: float = 1.0
    read_timeout: float = 3.0
    attempts: int = 3
    ca_file: str | None = None
    proxies: tuple[tuple[str, str], ...] | None = None
    authority: str | None = None
    disable_instance_discovery: bool = False
    hosts: tuple[str, ...] = AZURE_VAULT_DOMAINS

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Profile:
        """The profile that a mapping describes.

        :raises ConfigurationError: a setting is unknown or has the wrong type.
        """
        names = [each.name for each in fields(cls)]
        for name, value in given.items():
            if name not in names:
                raise ConfigurationError(
                    f"Unknown KMS setting {name!r}; known are {', '.join(sorted(names))}."
                )
            fits, wanted = _CHECKS[name]
            if value is not None and not fits(value):
                raise ConfigurationError(f"The KMS setting {name!r} must be {wanted}.")
        values = {name: value for name, value in given.items() if value is not None}
        if "proxies" in values:
            values["proxies"] = tuple(sorted(values["proxies"].items()))
        if "hosts" in values:
            values["hosts"] = tuple(values["hosts"])
        return cls(**values)

    def allows(self, host: str) -> bool:
        """Whether a customer's URL may name this host (in lower case, with its port where the URL has one)."""
        return any(host.endswith(each) if each.startswith(".") else host == each for each in self.hosts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_POSITIVE: tuple[Callable[[Any], bool], str] = (
    lambda v: _is_number(v) and v > 0,
    "a positive number of seconds",
)

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "endpoint_url": (
        lambda v: isinstance(v, str) and v.startswith(("http://", "https://")),
        "a http(s) URL",
    ),
    "connect_timeout": _POSITIVE,
    "read_timeout": _POSITIVE,
    "attempts": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a positive integer"),
    "ca_file": (lambda v: isinstance(v, str) and os.path.isfile(v), "the path of a file that exists"),
    "proxies": (
        lambda v: isinstance(v, Mapping) and all(isinstance(x, str) for pair in v.items() for x in pair),
        "a mapping of scheme to URL",
    ),
    "authority": (
        lambda v: isinstance(v, str) and re.fullmatch(r"(https://)?[a-z0-9.-]+(:[0-9]+)?/?", v) is not None,
        "a host name, with a port where it needs one",
    ),
    "disable_instance_discovery": (lambda v: isinstance(v, bool), "True or False"),
    "hosts": (
        lambda v: (
            isinstance(v, Sequence)
            and not isinstance(v, str)
            and all(isinstance(x, str) and len(x.strip(".")) > 0 and x == x.lower() for x in v)
        ),
        "a list of host names in lower case",
    ),
}
