"""Fixtures for AzureKeyVault: the double of sqla_byok.testing.azure, its settings and its secrets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from azure.identity import ClientSecretCredential

from sqla_byok.errors import CredentialInvalidError
from sqla_byok.kms import AzureKeyVault, KmsClient, Operator
from sqla_byok.kms.secrets import Secrets
from sqla_byok.testing.azure import AzureServer

CLIENT_ID = "fad7d5b3-69d6-4b48-9259-8d12124e1cf1"
VENDOR_ID = "0a0a0a0a-0000-4000-8000-0b0b0b0b0b0b"
SECRET = "SyN8Q~made-up-client-secret_.~0123456789"
VENDOR_SECRET = "Ven8Q~made-up-vendor-secret_.~0123456789"
REFERENCE = "env:BYOK_ORG42_SECRET"


class KnownSecrets(Secrets):
    """Secrets in a dictionary."""

    def __init__(self, **known: str) -> None:
        super().__init__()
        self.known = known
        self.asked: list[tuple[str, str]] = []

    def resolve(self, reference: str, tenant: str) -> str:
        self.asked.append((reference, tenant))
        if reference.removeprefix("env:") not in self.known:
            message = f"There is no secret {reference!r} for tenant {tenant!r}."
            raise CredentialInvalidError(message, tenant=tenant, action_by="operator")
        return self.known[reference.removeprefix("env:")]


class Vault:
    """The double, with an application of the customer's and one of ours, and short ways to clients of its keys."""

    def __init__(self, server: AzureServer) -> None:
        self.server = server
        self.secrets = KnownSecrets(BYOK_ORG42_SECRET=SECRET)
        self.operator = Operator(self.secrets, {"vendor-app": self.vendor_credential})
        server.add_application(CLIENT_ID, SECRET)
        server.add_application(VENDOR_ID, VENDOR_SECRET)

    def vendor_credential(self, directory: str) -> Any:
        return ClientSecretCredential(
            directory,
            VENDOR_ID,
            VENDOR_SECRET,
            authority=f"https://{self.server.authority}",
            disable_instance_discovery=True,
            connection_verify=self.server.ca_file,
            retry_total=0,
        )

    def key(self, url: str, **options: Any) -> AzureKeyVault:
        """The key at *url*, by the customer's application."""
        known = {"client_id": CLIENT_ID, "client_secret": REFERENCE} if "credential" not in options else {}
        return AzureKeyVault(url, **{"tenant_id": self.server.directory, **known, **options})

    def connect(self, url: str, *, settings: dict[str, Any] | None = None, **options: Any) -> KmsClient:
        """A client of the key at *url*; one attempt unless the test is about more."""
        given = {**self.server.profile(), "attempts": 1, **(settings or {})}
        reason = options.pop("reason", "open")
        return self.key(url, **options).connect(given, self.operator, reason=reason)


@pytest.fixture(scope="session")
def azure_server_process() -> Iterator[AzureServer]:
    """The one server of a test run; tests use :func:`azure_server`."""
    with AzureServer() as server:
        yield server


@pytest.fixture
def azure_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own Azure set-up or proxies."""
    for name in (
        "AZURE_AUTHORITY_HOST",
        "AZURE_REGIONAL_AUTHORITY_NAME",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def azure_server(azure_server_process: AzureServer, azure_environment: None) -> Iterator[AzureServer]:
    """An empty :class:`AzureServer`."""
    azure_server_process.reset()
    yield azure_server_process
    azure_server_process.reset()


@pytest.fixture
def vault(azure_server: AzureServer) -> Vault:
    """The server with two registered applications."""
    return Vault(azure_server)


@pytest.fixture
def azure_names(azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sends every name to the double, under which it may be reached as Azure; gives the names that were asked for."""
    asked: list[str] = []
    original = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host in ("localhost", "127.0.0.1"):
            return original(host, port, *args, **options)
        asked.append(host)
        return original("127.0.0.1", azure_server.port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked
