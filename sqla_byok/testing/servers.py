"""Both clouds on loopback, for the SDKs to talk to unchanged."""

from __future__ import annotations

import base64
import os
import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from unittest import mock

from sqla_byok.errors import ConfigurationError
from sqla_byok.kms import AwsKms, Kms
from sqla_byok.kms.base import Operator
from sqla_byok.kms.secrets import Secrets

if TYPE_CHECKING:
    from typing_extensions import Self

    from sqla_byok.kms.azure import AzureKeyVault
    from sqla_byok.testing.aws import AwsServer
    from sqla_byok.testing.azure import AzureServer

__all__ = ["KmsServers", "kms_server"]

_KEYSTORE_KEY = "BYOK_TEST_KEYSTORE_KEY"
_SECRET = "BYOK_TEST_SECRET_"  # noqa: S105 - the start of a variable's name

# Everything that boto3 takes from the machine's own set-up starts so.
_AWS = "AWS_"


class _Customer(NamedTuple):
    """What the customer of one key can do: each way to say no, and how to take it back."""

    revoke: Mapping[str, Callable[[], None]]
    restore: Callable[[], None]


class KmsServers:
    """AWS (KMS, STS, Secrets Manager) and Azure (Key Vault, the token endpoint) on 127.0.0.1.

    Use :func:`kms_server`, or the fixture ``byok_kms_server``, which starts them once in a test run.

    :ivar aws: the double of AWS, with its counts, faults and delays.
    :ivar azure: the double of Azure, likewise.
    :cvar ways: how the customer of each kind of :meth:`key` can say no, as :meth:`revoke` takes it.
    :raises MissingExtraError: moto is not installed; it comes with the extra ``testing``.
    """

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "aws": ("disable", "delete", "deny"),
            "aws-role": ("disable", "delete", "deny", "deny-role", "distrust-role", "delete-role"),
            "azure": ("disable", "delete", "deny", "delete-secret", "expire-secret", "delete-application"),
        }
    )

    def __init__(self) -> None:
        from sqla_byok.testing.aws import AwsServer
        from sqla_byok.testing.azure import AzureServer

        self.aws: AwsServer = AwsServer()
        self.azure: AzureServer = AzureServer()
        self._customers: dict[Kms, _Customer] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as started:
            started.enter_context(self.aws)
            started.enter_context(self.azure)
            self._exit = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # -- for a Byok --------------------------------------------------------------------------------------------------

    @property
    def profiles(self) -> dict[str, dict[str, Any]]:
        """For ``Byok(kms_profiles=…)``: one profile, ``default``, that leads both clouds' clients here."""
        return {"default": {**self.aws.profile(), **self.azure.profile()}}

    @property
    def secret_prefixes(self) -> tuple[str, ...]:
        """For ``Byok(secret_prefixes=…)``: where the secrets of :meth:`azure_key` are."""
        return (f"env:{_SECRET}",)

    @property
    def options(self) -> dict[str, Any]:
        """All that a Byok needs, with a keystore key: ``byok_for_tests(engine, kms=kms, **servers.options)``."""
        return {
            "kms_profiles": self.profiles,
            "secret_prefixes": self.secret_prefixes,
            "keystore_key": f"env:{_KEYSTORE_KEY}",
        }

    @property
    def operator(self) -> Operator:
        """For a client without a Byok: ``kms.connect(servers.profiles["default"], servers.operator)``."""
        return Operator(Secrets(self.secret_prefixes))

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Dummy credentials, and nothing of the machine's own AWS set-up or proxies, until the block ends."""
        with mock.patch.dict(os.environ):
            for name in [name for name in os.environ if name.startswith(_AWS)]:
                del os.environ[name]
            os.environ.update(
                self.aws.environment(),
                AWS_CONFIG_FILE=os.devnull,
                AWS_SHARED_CREDENTIALS_FILE=os.devnull,
                NO_PROXY="127.0.0.1,localhost",
                no_proxy="127.0.0.1,localhost",
            )
            os.environ[_KEYSTORE_KEY] = base64.b64encode(os.urandom(32)).decode()
            yield

    # -- customers ---------------------------------------------------------------------------------------------------

    def key(self, kind: str) -> Kms:
        """A customer's new key: a test that is parametrised by :attr:`ways` is written once for all.

        :param kind: ``"aws"``, ``"aws-role"`` or ``"azure"``.
        :raises ConfigurationError: there is no such kind.
        """
        if kind not in self.ways:
            raise ConfigurationError(f"{kind!r} is no kind of key; there are {', '.join(self.ways)}.")
        return self.azure_key() if kind == "azure" else self.aws_key(role=kind == "aws-role")

    def aws_key(self, *, role: bool = False, **options: Any) -> AwsKms:
        """A customer's new key in AWS KMS.

        :param role: reach it through a new role of the customer's, which alone may use it.
        :param options: what else :class:`~sqla_byok.AwsKms` takes.
        """
        role_arn = self.aws.create_role(f"byok-{secrets.token_hex(4)}") if role else ""
        arn = self.aws.create_key(principal=role_arn or None)
        kms = AwsKms(arn, **({"role_arn": role_arn} if role else {}), **options)
        ways = {
            "disable": lambda: self.aws.disable(arn),
            "delete": lambda: self.aws.schedule_deletion(arn),
            "deny": lambda: self.aws.deny(arn),
            "deny-role": lambda: self.aws.deny_role(role_arn),
            "distrust-role": lambda: self.aws.distrust_role(role_arn),
            "delete-role": lambda: self.aws.delete_role(role_arn),
        }

        def restore() -> None:
            self.aws.enable(arn)  # which cancels a deletion as well
            self.aws.allow(arn)
            if role:
                self.aws.allow(role_arn)
                self.aws.create_role(role_arn.rpartition("/")[2])

        self._add("aws-role" if role else "aws", kms, ways, restore)
        return kms

    def azure_key(self, *, size: int = 2048, **options: Any) -> AzureKeyVault:
        """A customer's new key in Azure Key Vault, with an application of its own whose secret is in the environment.

        :param size: 2048, 3072 or 4096 bits.
        :param options: what :class:`~sqla_byok.AzureKeyVault` takes beside the key and the application, such as
            ``operations``.
        """
        from sqla_byok.kms.azure import AzureKeyVault

        url, client_id, secret = (
            self.azure.create_key(size=size),
            str(uuid.uuid4()),
            secrets.token_urlsafe(24),
        )
        self.azure.add_application(client_id, secret)
        variable = f"{_SECRET}{secrets.token_hex(4).upper()}"
        os.environ[variable] = secret
        kms = AzureKeyVault(
            url,
            tenant_id=self.azure.directory,
            client_id=client_id,
            client_secret=f"env:{variable}",
            **options,
        )

        def restore() -> None:
            self.azure.enable(url)
            self.azure.recover(url)
            self.azure.allow(url)
            self.azure.add_application(client_id, secret)

        ways = {
            "disable": lambda: self.azure.disable(url),
            "delete": lambda: self.azure.delete(url),
            "deny": lambda: self.azure.deny(url),
            "delete-secret": lambda: self.azure.delete_secret(client_id),
            "expire-secret": lambda: self.azure.expire_secret(client_id),
            "delete-application": lambda: self.azure.delete_application(client_id),
        }
        self._add("azure", kms, ways, restore)
        return kms

    def revoke(self, kms: Kms, how: str = "disable") -> None:
        """Let the customer say no.

        :param kms: a key that was made here.
        :param how: one of :attr:`ways` of its kind.
        :raises ConfigurationError: the key is not from here, or its kind knows no such way.
        """
        ways = self._customer(kms).revoke
        if how not in ways:
            raise ConfigurationError(f"{how!r} is no way to revoke this key; its ways are {', '.join(ways)}.")
        ways[how]()

    def restore(self, kms: Kms) -> None:
        """Let the customer take back whatever :meth:`revoke` did.

        :raises ConfigurationError: the key is not from here.
        """
        self._customer(kms).restore()

    def reset(self) -> None:
        """Forget all keys, applications, counts, faults and delays."""
        self._customers.clear()
        self.aws.reset()
        self.azure.reset()

    def _add(
        self, kind: str, kms: Kms, ways: Mapping[str, Callable[[], None]], restore: Callable[[], None]
    ) -> None:
        self._customers[kms] = _Customer({way: ways[way] for way in self.ways[kind]}, restore)

    def _customer(self, kms: Kms) -> _Customer:
        customer = self._customers.get(kms)
        if customer is None:
            raise ConfigurationError("This key was not made by these servers.")
        return customer


@contextmanager
def kms_server() -> Iterator[KmsServers]:
    """AWS KMS and Azure Key Vault on loopback, for boto3 and the Azure SDK to talk to unchanged.

    They enforce what a test of revocation needs (the key's state, permissions, secrets that are gone), count calls and
    inject faults. While the block runs, dummy AWS credentials and a keystore key are in the environment; afterwards
    the environment is as it was.

    :return: the servers, started.
    :raises MissingExtraError: moto is not installed; it comes with the extra ``testing``.

    Example::

        with kms_server() as servers:
            kms = servers.azure_key()
            byok = byok_for_tests(engine, kms=kms, **servers.options)
            servers.revoke(kms, "delete-secret")
            byok.forget_keys()
            with pytest.raises(CredentialInvalidError), byok.tenant("t"):
                ...
    """
    with KmsServers() as servers, servers.environment():
        yield servers
