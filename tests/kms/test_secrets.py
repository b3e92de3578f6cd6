"""References to secrets: what resolves, what is refused, and that no secret is shown."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from kms_server import KmsServer

from sqla_byok import SecretStore, errors
from sqla_byok.errors import (
    ByokError,
    ConfigurationError,
    CredentialInvalidError,
    KmsNoAnswerError,
    KmsUnavailableError,
    ThrottledError,
)
from sqla_byok.kms.secrets import Secrets

TENANT = "org-42"
SECRET = "vErY~s3cret-0123456789"


def refused(secrets: Secrets, reference: Any, tenant: str = TENANT) -> str:
    """The message of a refusal, by check and resolve alike; it does not repeat what was given."""
    for method in (secrets.check, secrets.resolve):
        with pytest.raises(ConfigurationError) as raised:
            method(reference, tenant)
        assert raised.value.tenant == tenant
        if isinstance(reference, str) and len(reference) > 3:
            assert reference not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


def failure(secrets: Secrets, reference: str, tenant: str = TENANT) -> errors.KmsError:
    """The error of an allowed reference that does not resolve, after checking what all of them have in common."""
    secrets.check(reference, tenant)
    with pytest.raises(errors.KmsError) as raised:
        secrets.resolve(reference, tenant)
    error = raised.value
    assert (error.tenant, error.action_by) == (tenant, "operator")
    assert error.__cause__ is None
    assert error.__context__ is None
    assert SECRET not in "".join(traceback.format_exception(error)) + repr(vars(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own
    return error


# Prefixes


def test_nothing_resolves_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the operator's environment from a customer's form: by default no reference is good."""
    monkeypatch.setenv("DATABASE_URL", SECRET)
    for secrets in (Secrets(), Secrets(["env:BYOK_"])):
        assert "secret_prefixes" in refused(secrets, "env:DATABASE_URL")
    assert "secret_prefixes" in refused(Secrets(["file:/run/secrets/byok/"]), "env:DATABASE_URL")


@pytest.mark.parametrize(
    ("prefix", "tenant", "name", "allowed"),
    [
        ("BYOK_", TENANT, "BYOK_A", True),
        ("BYOK_", TENANT, "BYOKA", False),
        ("BYOK_", TENANT, "byok_A", False),
        ("BYOK_A", TENANT, "BYOK_A", True),
        ("BYOK_{tenant}", "a", "BYOK_a", True),
        ("BYOK_{tenant}", "a", "BYOK_ab", False),  # or tenant a would have what is tenant ab's
        ("BYOK_{tenant}_", "a", "BYOK_a_X", True),
        ("BYOK_{tenant}_", "a", "BYOK_ab_X", False),
        ("BYOK_{tenant}_", "b", "BYOK_a_X", False),
        ("BYOK_{tenant}_", "a_b", "BYOK_a_b_X", False),  # or it could have what is tenant a's
        ("{tenant}_BYOK_{tenant}", "a", "a_BYOK_a", True),
        ("{tenant}_BYOK_{tenant}", "a", "b_BYOK_a", False),
    ],
)
def test_prefixes(
    monkeypatch: pytest.MonkeyPatch, prefix: str, tenant: str, name: str, allowed: bool
) -> None:
    """Protects one tenant's secret from another: {tenant} binds, also where one id begins with the other."""
    monkeypatch.setenv(name, SECRET)
    secrets = Secrets([f"env:{prefix}"])
    if allowed:
        secrets.check(f"env:{name}", tenant)
        assert secrets.resolve(f"env:{name}", tenant) == SECRET
    else:
        refused(secrets, f"env:{name}", tenant)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "env",
        "env:",
        "env:{tenant}",
        "file:",
        "file:/",
        "file:/{tenant}/",
        "file:run/secrets/",
        "file:/run/secrets",
        "file:/run/../etc/",
        "file://run/secrets/",
        "aws-sm:",
        "aws-sm:/",
        "vault:",
        "vault:byok/",
        "BYOK_",
    ],
)
def test_prefixes_that_allow_everything_are_refused(prefix: str) -> None:
    """Protects against a mistake in the operator's configuration, when the program starts."""
    with pytest.raises(ConfigurationError):
        Secrets([prefix])


def test_one_text_is_no_list_of_prefixes() -> None:
    """Protects against each letter being taken for a prefix."""
    with pytest.raises(ConfigurationError, match="list"):
        Secrets("env:BYOK_")


@pytest.mark.parametrize("name", ["env", "file", "aws-sm", "Vault", "", "a:b"])
def test_names_of_stores(name: str) -> None:
    """Protects the built-in schemes from being taken over."""
    with pytest.raises(ConfigurationError, match="secret store"):
        Secrets(stores={name: Store()})


@pytest.mark.parametrize(
    "literal",
    [
        SECRET,
        "abc:" + SECRET,
        "ENV:" + SECRET,
        ":" + SECRET,
        "env:",
        "",
        None,
        7,
        b"env:BYOK_X",
        "env:BYOK_\n",
    ],
)
def test_a_literal_is_refused_and_not_repeated(literal: Any) -> None:
    """Protects a secret that was given in place of its reference from logs and error reports."""
    assert SECRET not in refused(Secrets(["env:BYOK_"]), literal)


# env and file


@pytest.mark.parametrize(
    ("content", "secret"),
    [("s", "s"), ("s\n", "s"), ("s\r\n", "s"), ("s\n\n", "s\n"), (" s ", " s "), ("é\n", "é")],
)
def test_one_newline_is_stripped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, secret: str
) -> None:
    """Protects secrets that an editor or `echo` wrote, and no other character of them."""
    monkeypatch.setenv("BYOK_S", content)
    (tmp_path / "s").write_bytes(content.encode())
    secrets = Secrets(["env:BYOK_", f"file:{tmp_path}/"])
    assert secrets.resolve("env:BYOK_S", TENANT) == secret
    assert secrets.resolve(f"file:{tmp_path}/s", TENANT) == secret


@pytest.mark.parametrize("value", [None, "", "\n"])
def test_missing_or_empty(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """Protects from a login with an empty secret: it is the operator's turn, and the reference is named."""
    if value is not None:
        monkeypatch.setenv("BYOK_S", value)
    error = failure(Secrets(["env:BYOK_"]), "env:BYOK_S")
    assert type(error) is CredentialInvalidError
    assert "env:BYOK_S" in str(error)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of secrets beside one that is none of them."""
    folder = tmp_path / "byok"
    (folder / TENANT).mkdir(parents=True)
    (folder / TENANT / "s").write_text(SECRET)
    (folder / "org-43").mkdir()
    (folder / "org-43" / "s").write_text("another's")
    (tmp_path / "outside").write_text("root:x:0:0")
    return folder


def test_files(folder: Path) -> None:
    """Protects the plain case, and the way in which Kubernetes mounts secrets: through links inside the directory."""
    secrets = Secrets([f"file:{folder}/{{tenant}}/"])
    assert secrets.resolve(f"file:{folder}/{TENANT}/s", TENANT) == SECRET
    (folder / TENANT / "..data").mkdir()
    (folder / TENANT / "..data" / "mounted").write_text(SECRET)
    (folder / TENANT / "mounted").symlink_to("..data/mounted")
    assert secrets.resolve(f"file:{folder}/{TENANT}/mounted", TENANT) == SECRET
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    assert Secrets([f"file:{linked}/"]).resolve(f"file:{linked}/{TENANT}/s", TENANT) == SECRET


@pytest.mark.parametrize(
    "path",
    [
        "org-43/s",
        "org-42/../org-43/s",
        "org-42/../../outside",
        "org-42/./s",
        "org-42//s",
        "org-42/",
        "org-42",
        "../outside",
    ],
)
def test_traversal(folder: Path, path: str) -> None:
    """Protects every other file of the machine, and other tenants' secrets."""
    refused(Secrets([f"file:{folder}/{{tenant}}/"]), f"file:{folder}/{path}")


@pytest.mark.parametrize("tenant", ["..", ".", "../byok/org-43", "org-42/../org-43", ""])
def test_tenant_ids_that_are_paths(folder: Path, tenant: str) -> None:
    """Protects other tenants' secrets from a tenant whose id leads there."""
    secrets = Secrets([f"file:{folder}/{{tenant}}/"])
    refused(secrets, f"file:{folder}/{tenant}/s", tenant)
    refused(secrets, f"file:{folder}/{tenant}/outside", tenant)


def test_links_that_leave(folder: Path) -> None:
    """Protects every other file from a link, whether the file itself or a directory on the way."""
    secrets = Secrets([f"file:{folder}/{{tenant}}/"])
    (folder / TENANT / "link").symlink_to("../../outside")
    (folder / TENANT / "neighbour").symlink_to("../org-43")
    (folder / TENANT / "absolute").symlink_to("/etc/passwd")
    (folder / f"{TENANT}1").mkdir()
    (folder / TENANT / "longer").symlink_to(f"../{TENANT}1")
    for name in ("link", "neighbour/s", "absolute", "longer/s"):
        assert "link" in refused(secrets, f"file:{folder}/{TENANT}/{name}")


def test_what_is_no_readable_file(folder: Path) -> None:
    """Protects against waiting for a pipe, reading a disk full, and passing on what is no text."""
    secrets, place = Secrets([f"file:{folder}/"]), folder / TENANT
    os.mkfifo(place / "pipe")
    (place / "big").write_bytes(b"x" * 65_537)
    (place / "bytes").write_bytes(b"\xff\xfe")
    (place / "dangling").symlink_to("nowhere")
    for name, reason in {
        "pipe": "not a regular file",
        "big": "65,536",
        "bytes": "UTF-8",
        "absent": "FileNotFoundError",
        "dangling": "FileNotFoundError",
    }.items():
        error = failure(secrets, f"file:{place}/{name}")
        assert type(error) is CredentialInvalidError
        assert reason in str(error)
    assert type(failure(secrets, f"file:{place}")) is CredentialInvalidError
    (place / "most").write_bytes(b"x" * 65_536)
    assert len(secrets.resolve(f"file:{place}/most", TENANT)) == 65_536


# AWS Secrets Manager


def test_aws(kms_server: KmsServer, caplog: pytest.LogCaptureFixture) -> None:
    """Protects the plain case by name and by ARN, bound to the tenant; and the logs."""
    caplog.set_level(logging.DEBUG)
    kms_server.create_secret("byok/org-42", SECRET)
    kms_server.create_secret("byok/org-42", "in Paris", region="eu-west-3")
    arn = "arn:aws:secretsmanager:eu-west-3:123456789012:secret:byok/org-42"
    secrets = Secrets(
        ["aws-sm:byok/{tenant}", f"aws-sm:{arn.replace(TENANT, '{tenant}')}"], settings=kms_server.profile()
    )
    assert secrets.resolve("aws-sm:byok/org-42", TENANT) == SECRET
    assert secrets.resolve(f"aws-sm:{arn}", TENANT) == "in Paris"
    assert kms_server.calls == {"GetSecretValue": 2}
    refused(secrets, "aws-sm:byok/org-42", "org-43")
    assert SECRET not in caplog.text


AWS_RESPONSES = [
    ("ResourceNotFoundException", 400, "", CredentialInvalidError),
    ("InvalidRequestException", 400, "because it was marked for deletion.", CredentialInvalidError),
    ("AccessDeniedException", 400, "", CredentialInvalidError),
    ("DecryptionFailure", 400, "", CredentialInvalidError),
    ("ExpiredTokenException", 400, "", errors.CredentialExpiredError),
    ("UnrecognizedClientException", 400, "", CredentialInvalidError),
    ("ThrottlingException", 400, "", ThrottledError),
    ("InternalServiceError", 500, "", KmsUnavailableError),
    ("ServiceUnavailable", 503, "", KmsUnavailableError),
    ("SomethingNew", 400, "", errors.KmsRefusedError),
]


@pytest.mark.parametrize(("code", "status", "message", "expected"), AWS_RESPONSES)
def test_every_aws_error(kms_server: KmsServer, code: str, status: int, message: str, expected: type) -> None:
    """Protects the outage grace: a secret that cannot be read just now is "no answer", a missing one is a "no"."""
    secrets = Secrets(["aws-sm:byok/"], settings={**kms_server.profile(), "attempts": 1})
    kms_server.create_secret("byok/s", SECRET)
    kms_server.fail("GetSecretValue", code, status, message)
    error = failure(secrets, "aws-sm:byok/s")
    assert type(error) is expected
    assert error.retryable is isinstance(error, KmsNoAnswerError)


def test_aws_without_a_region(kms_server: KmsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the operator from guessing: a missing region is named."""
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    secrets = Secrets(["aws-sm:byok/"], settings={**kms_server.profile(), "read_timeout": 2.5625})
    assert "region" in str(failure(secrets, "aws-sm:byok/s"))


@pytest.mark.parametrize("name", ["byok/ s", "byok/s?x", "byok/" + "x" * 600, "byok/é"])
def test_aws_names(kms_server: KmsServer, name: str) -> None:
    """Protects against names that AWS cannot have, before any call."""
    assert type(failure(Secrets(["aws-sm:byok/"], settings=kms_server.profile()), f"aws-sm:{name}")) is (
        CredentialInvalidError
    )
    assert kms_server.calls == {}


# The operator's own stores


class Store:
    """A store that holds a dict, and raises what it is told to."""

    def __init__(self, **content: Any) -> None:
        self.content, self.error = content, None

    def read(self, name: str) -> str | None:
        if self.error:
            raise self.error
        found: str | None = self.content.get(name)
        return found


class WritableStore(Store):
    """The same, for a set-up page."""

    def write(self, name: str, secret: str) -> None:
        if self.error:
            raise self.error
        self.content[name] = secret


def test_a_store_of_ones_own() -> None:
    """Protects the operator's Vault, or whatever it has: read by scheme, under the prefixes like the others."""
    store: SecretStore = Store(**{"org-42/s": SECRET + "\n"})
    secrets = Secrets(["vault:{tenant}/"], {"vault": store})
    assert secrets.resolve("vault:org-42/s", TENANT) == SECRET
    assert type(failure(secrets, "vault:org-42/absent")) is CredentialInvalidError
    refused(secrets, "vault:org-42/s", "org-43")
    assert (
        type(failure(Secrets(["vault:b"], {"vault": Store(b=b"bytes")}), "vault:b")) is CredentialInvalidError
    )


class OfTheirsError(Exception):
    """An exception of the store's own client."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionError(SECRET), KmsUnavailableError),
        (TimeoutError(SECRET), KmsUnavailableError),
        (OfTheirsError(SECRET), CredentialInvalidError),
        (KeyError(SECRET), CredentialInvalidError),
        (ThrottledError("busy", tenant=TENANT), ThrottledError),
    ],
)
def test_a_stores_errors(raised: Exception, expected: type) -> None:
    """Protects the outage grace and the secret: a network error is "no answer", and no message is passed on."""
    store = WritableStore()
    store.error = raised  # type: ignore[assignment]
    secrets = Secrets(["vault:byok/"], {"vault": store})
    assert type(failure(secrets, "vault:byok/s")) is expected
    with pytest.raises(expected) as written:
        secrets.write("vault:byok/s", SECRET, TENANT)
    assert SECRET not in "".join(traceback.format_exception(written.value))


def test_write() -> None:
    """Protects a set-up page: what it wrote is what resolves, under the tenant's own prefix only."""
    store = WritableStore()
    secrets = Secrets(["vault:{tenant}/"], {"vault": store})
    secrets.write("vault:org-42/s", SECRET, TENANT)
    assert secrets.resolve("vault:org-42/s", TENANT) == SECRET
    with pytest.raises(ConfigurationError):
        secrets.write("vault:org-43/s", "x", TENANT)
    assert store.content == {"org-42/s": SECRET}


@pytest.mark.parametrize("reference", ["env:BYOK_S", "aws-sm:byok/s", "readonly:byok/s", "file:{}/s"])
def test_write_where_nothing_can_be_written(tmp_path: Path, reference: str) -> None:
    """Protects the environment and files: a set-up page gets a clear answer, without the secret in it."""
    secrets = Secrets(
        ["env:BYOK_", "aws-sm:byok/", "readonly:byok/", f"file:{tmp_path}/"], {"readonly": Store()}
    )
    with pytest.raises(ConfigurationError, match="only read") as raised:
        secrets.write(reference.format(tmp_path), SECRET, TENANT)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert "BYOK_S" not in os.environ
    assert list(tmp_path.iterdir()) == []


def test_repr_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects what a debugger or a log prints of the object: no secret and no proxy's password."""
    monkeypatch.setenv("BYOK_S", SECRET)
    secrets = Secrets(
        ["env:BYOK_"], {"vault": Store(s=SECRET)}, {"proxies": {"https": f"http://u:{SECRET}@p"}}
    )
    secrets.resolve("env:BYOK_S", TENANT)
    assert SECRET not in repr(secrets) + str(secrets)


def test_refusals_are_ours() -> None:
    """Protects callers that catch the library's base class."""
    with pytest.raises(ByokError):
        Secrets().check("env:X", TENANT)
