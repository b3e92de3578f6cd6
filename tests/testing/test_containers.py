"""The same suite against others' servers: LocalStack and Lowkey Vault, in containers, where a Docker engine answers.

Nothing requires them: ``--require-all`` does not either, since machines without Docker have the doubles.
"""

from __future__ import annotations

import gc
import os
import secrets
import ssl
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sqla_byok.kms import AwsKms, Kms
from sqla_byok.kms.base import Operator
from sqla_byok.testing import KmsConformance

LOCALSTACK_IMAGE = "localstack/localstack:4.4.0"
LOWKEY_VAULT_IMAGE = "nagyesta/lowkey-vault:7.0.9-ubi10-minimal"
REGION = "eu-central-1"


def why_not() -> str:
    """What keeps containers from being started here, or nothing."""
    failure = ""
    # testcontainers and docker warn of their own deprecations while they are imported and used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import docker
            import testcontainers  # noqa: F401 - whether it is there

            docker.from_env(timeout=5).ping()
        except ImportError as error:
            failure = f"{error}; install the dependency group 'test'"
        except docker.errors.DockerException as error:
            failure = (
                f"no Docker engine answers ({' '.join(str(error).split())}); start Docker to run these tests"
            )
        gc.collect()  # the client's unclosed sockets, while their warnings are ignored
    return failure


if found := why_not():
    pytest.skip(found, allow_module_level=True)


def start(image: str, port: int, ready: str, environment: dict[str, str]) -> Any:
    """A running container."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        container = DockerContainer(image).with_exposed_ports(port)
        for name, value in environment.items():
            container.with_env(name, value)
        return container.waiting_for(LogMessageWaitStrategy(ready).with_startup_timeout(120)).start()


@pytest.fixture(scope="session")
def localstack() -> Iterator[str]:
    """LocalStack's endpoint."""
    container = start(LOCALSTACK_IMAGE, 4566, r"Ready\.", {"SERVICES": "kms"})
    yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(4566)}"
    container.stop()


class TestAwsKmsOnLocalStack(KmsConformance):
    """A key in LocalStack's AWS KMS."""

    @pytest.fixture(autouse=True)
    def _server(self, localstack: str, aws_environment: None) -> None:
        import boto3

        self.aws = boto3.client("kms", region_name=REGION, endpoint_url=localstack)
        self.settings = {"endpoint_url": localstack}

    def make_key(self) -> Kms:
        return AwsKms(self.aws.create_key()["KeyMetadata"]["Arn"])

    def disable(self, kms: Any) -> None:
        self.aws.disable_key(KeyId=kms.key_arn)


class Vault(NamedTuple):
    """Where Lowkey Vault is, and the certificate that it shows."""

    url: str
    ca_file: str


@pytest.fixture(scope="session")
def lowkey_vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """Lowkey Vault, under whatever port it got."""
    arguments = {"LOWKEY_ARGS": "--LOWKEY_VAULT_RELAXED_PORTS=true"}
    container = start(LOWKEY_VAULT_IMAGE, 8443, "Started LowkeyVaultApp", arguments)
    port = int(container.get_exposed_port(8443))
    ca_file = Path(tmp_path_factory.mktemp("lowkey-vault") / "ca.pem")
    ca_file.write_text(ssl.get_server_certificate(("localhost", port)))
    yield Vault(f"https://localhost:{port}", str(ca_file))
    container.stop()


class AnyToken:
    """A credential of the Azure SDK's kind: Lowkey Vault asks for a token and takes any."""

    def get_token(self, *scopes: str, **options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken(secrets.token_hex(16), int(time.time()) + 3600)

    def get_token_info(self, *scopes: str, options: Any = None) -> Any:
        from azure.core.credentials import AccessTokenInfo

        return AccessTokenInfo(secrets.token_hex(16), int(time.time()) + 3600)


class TestAzureKeyVaultOnLowkeyVault(KmsConformance):
    """A key in Lowkey Vault."""

    binds_tenant = False  # RSA-OAEP of a vault takes no label

    @pytest.fixture(autouse=True)
    def _server(self, lowkey_vault: Vault) -> None:
        from azure.keyvault.keys import KeyClient

        self.vault = lowkey_vault
        self.keys = KeyClient(
            lowkey_vault.url,
            AnyToken(),
            connection_verify=lowkey_vault.ca_file,
            verify_challenge_resource=False,
        )
        self.settings = {
            "ca_file": lowkey_vault.ca_file,
            "hosts": [lowkey_vault.url.removeprefix("https://")],
        }
        self.operator = Operator(credentials={"any": lambda directory: AnyToken()})

    def make_key(self) -> Kms:
        from sqla_byok.kms.azure import AzureKeyVault

        name = f"key-{os.urandom(4).hex()}"
        self.keys.create_rsa_key(name, size=2048)
        return AzureKeyVault(
            vault_url=self.vault.url, key_name=name, tenant_id=str(uuid.uuid4()), credential="any"
        )

    def disable(self, kms: Any) -> None:
        self.keys.update_key_properties(kms.key_name, enabled=False)
