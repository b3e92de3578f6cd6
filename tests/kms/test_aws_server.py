"""The double of AWS as users' tests have it."""

from __future__ import annotations

import sys
from typing import Any

import boto3.session
import pytest
from botocore.exceptions import ClientError

from sqla_byok.errors import MissingExtraError
from sqla_byok.testing import aws
from sqla_byok.testing.aws import AwsServer


def test_without_moto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a user's first try: the extra to install is named."""
    aws._moto.cache_clear()
    monkeypatch.setitem(sys.modules, "moto.kms.models", None)
    with pytest.raises(MissingExtraError, match=r"sqla-byok\[testing\]"):
        AwsServer()


def test_a_plain_boto3_client(kms_server: AwsServer) -> None:
    """Protects a user's own code in the same test: the server is not only for us, and refuses as AWS does."""

    def client(service: str) -> Any:
        return boto3.session.Session().client(service, **kms_server.profile())

    role = kms_server.create_role("byok", "right")
    sts = client("sts")
    for external_id, arn in (("wrong", role), ("right", role + "x")):
        with pytest.raises(ClientError, match="AccessDenied"):
            sts.assume_role(RoleArn=arn, RoleSessionName="test", ExternalId=external_id)
    with pytest.raises(ClientError, match="AccessDenied"):
        sts.assume_role(RoleArn=role, RoleSessionName="test")
    sts.assume_role(RoleArn=role, RoleSessionName="test", ExternalId="right")
    secrets = client("secretsmanager")
    secrets.create_secret(Name="s", SecretString="text")
    kms_server.deny("s")
    with pytest.raises(ClientError, match="AccessDenied"):
        secrets.get_secret_value(SecretId="s")
    assert kms_server.secret("s") == "text"
    assert kms_server.calls == {"AssumeRole": 4, "CreateSecret": 1, "GetSecretValue": 1}
