"""Fixtures for the loopback double of AWS, :class:`sqla_byok.testing.aws.AwsServer`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sqla_byok.testing.aws import REGION, AwsServer

__all__ = ["REGION", "KmsServer"]

KmsServer = AwsServer


@pytest.fixture(scope="session")
def kms_server_process() -> Iterator[AwsServer]:
    """The one server of a test run; tests use :func:`kms_server`."""
    with AwsServer() as server:
        yield server


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dummy AWS credentials, and nothing of the machine's own AWS set-up or proxies."""
    for name in (
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_REGION",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_KMS",
        "AWS_ENDPOINT_URL_STS",
        "AWS_ENDPOINT_URL_SECRETS_MANAGER",
        "AWS_CA_BUNDLE",
        "AWS_ROLE_ARN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in AwsServer.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def kms_server(kms_server_process: AwsServer, aws_environment: None) -> Iterator[AwsServer]:
    """An empty :class:`AwsServer`, with dummy credentials in the environment."""
    kms_server_process.reset()
    yield kms_server_process
    kms_server_process.reset()
