"""AwsKms with a role in the customer's account: real boto3 over HTTP to the double of AWS."""

from __future__ import annotations

import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3.session
import pytest
from botocore.exceptions import NoCredentialsError
from kms_server import KmsServer

from sqla_byok import errors
from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
    CredentialInvalidError,
    KeyDisabledError,
    KmsError,
    KmsUnavailableError,
    ThrottledError,
    WrongKeyError,
)
from sqla_byok.kms import AwsKms, KmsClient, Wrapped, describe
from sqla_byok.kms.base import request_id

TENANT = "org-42"
EXTERNAL_ID = "byok-0123456789abcdef"
PAYLOAD = bytes(range(100, 165))
SOME_BLOB = Wrapped(b"blob")
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ROLE = "arn:aws:iam::111122223333:role/partners/byok"
CUSTOMER, OPERATOR = "customer", "operator"


class Customer:
    """A customer's account: a role that wants the external id, and a key that only the role may use."""

    def __init__(self, server: KmsServer, name: str = TENANT, external_id: str = EXTERNAL_ID) -> None:
        self.server, self.name, self.external_id = server, name, external_id
        self.role = server.create_role(f"byok-{name}", external_id)
        self.key = server.create_key(principal=self.role)

    def kms(self, external_id: str | None = None) -> AwsKms:
        """The key as the keystore would have it."""
        return AwsKms(self.key, role_arn=self.role).for_tenant(external_id or self.external_id)

    def connect(self, external_id: str | None = None, *, reason: str = "open", **settings: Any) -> KmsClient:
        """A client for one purpose; one attempt unless the test is about more."""
        return self.kms(external_id).connect(
            {**self.server.profile(), "attempts": 1, **settings}, reason=reason
        )


@pytest.fixture
def customer(kms_server: KmsServer) -> Customer:
    """A customer that did all right."""
    return Customer(kms_server)


def failure(client: KmsClient, wrapped: Wrapped = SOME_BLOB) -> KmsError:
    """The error of one unwrap, after checking what all of them have in common."""
    with pytest.raises(KmsError) as raised:
        client.unwrap(wrapped, tenant=TENANT)
    error = raised.value
    assert error.tenant == TENANT
    assert repr(TENANT) in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert request_id.get() == error.request_id
    return error


# The calls


def test_round_trip(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the purpose of it all, at one call each and one session for both."""
    client = customer.connect()
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert kms_server.calls == {"AssumeRole": 1, "Encrypt": 1, "Decrypt": 1}


def test_the_key_alone_would_not_let_us_in(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the double: the round trip above works because the role signed, not because anybody may."""
    client = AwsKms(customer.key).connect({**kms_server.profile(), "attempts": 1})
    assert type(failure(client)) is AccessDeniedError


def test_requests_on_the_wire(customer: Customer, kms_server: KmsServer) -> None:
    """Protects what the customer's log shows: who, why and for whom; and the pin and context of the call itself."""
    customer.connect(reason="refresh").wrap(PAYLOAD, tenant=TENANT)
    (assume, assumed), (encrypt, encrypted) = kms_server.requests
    assert (assume, encrypt) == ("AssumeRole", "Encrypt")
    assert {name: assumed[name] for name in assumed if name not in ("Action", "Version")} == {
        "RoleArn": customer.role,
        "RoleSessionName": "sqla-byok-refresh-org-42",
        "ExternalId": EXTERNAL_ID,
        "DurationSeconds": "900",
    }
    assert encrypted["KeyId"] == customer.key
    assert encrypted["EncryptionContext"]["sqla-byok:tenant"] == TENANT


@pytest.mark.parametrize(
    ("tenant", "name"),
    [
        ("org-42", "sqla-byok-open-org-42"),
        ("Zoë & Söhne / 東京", "sqla-byok-open-Zo----S-hne-----"),
        ("x" * 255, "sqla-byok-open-" + "x" * 49),
    ],
)
def test_session_names(customer: Customer, kms_server: KmsServer, tenant: str, name: str) -> None:
    """Protects tenants with any name: STS takes 64 of few characters."""
    customer.connect().wrap(PAYLOAD, tenant=tenant)
    assert kms_server.requests[0][1]["RoleSessionName"] == name


def test_a_session_is_of_one_tenant(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the customer's log from calls under another tenant's session name."""
    client = customer.connect()
    for tenant in ("a", "b"):
        client.wrap(PAYLOAD, tenant=tenant)
    names = [body["RoleSessionName"] for operation, body in kms_server.requests if operation == "AssumeRole"]
    assert names == ["sqla-byok-open-a", "sqla-byok-open-b"]


def test_other_key_is_the_wrong_key(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the pin: a blob under another key that the role may use does not open."""
    other = AwsKms(kms_server.create_key(), role_arn=customer.role).for_tenant(EXTERNAL_ID)
    wrapped = other.connect(kms_server.profile()).wrap(PAYLOAD, tenant=TENANT)
    assert type(failure(customer.connect(), wrapped)) is WrongKeyError


def test_request_ids_are_told(customer: Customer) -> None:
    """Protects the audit: each call's request id is at hand for a search in the customer's CloudTrail."""
    client = customer.connect()
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    first = request_id.get()
    client.unwrap(wrapped, tenant=TENANT)
    assert first
    assert request_id.get() not in ("", None, first)
    failure(client)  # compares them
    customer.server.fail("Decrypt", "DisabledException")
    assert failure(client).request_id == "00000000-0000-0000-0000-000000000000"


# The customer says no


def test_wrong_external_id(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the customer from the confused deputy, and tells what the trust policy must demand."""
    error = failure(customer.connect("byok-another"))
    assert type(error) is AccessDeniedError
    assert error.action_by == CUSTOMER
    assert customer.role in str(error)
    assert "'byok-another'" in str(error)
    assert kms_server.calls == {"AssumeRole": 1}


def test_missing_external_id_is_refused_before_any_call(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the customer: without an external id of ours no role is assumed."""
    with pytest.raises(ConfigurationError, match="external id"):
        AwsKms(customer.key, role_arn=customer.role).connect(kms_server.profile())
    assert kms_server.calls == {}


def test_a_deleted_role_bites_at_the_next_opening(customer: Customer) -> None:
    """Protects revocation by deleting the role: no session outlives its client."""
    wrapped = customer.connect().wrap(PAYLOAD, tenant=TENANT)
    customer.server.delete_role(customer.role)
    error = failure(customer.connect(), wrapped)
    assert type(error) is AccessDeniedError
    assert error.action_by == CUSTOMER
    customer.server.create_role(f"byok-{TENANT}", EXTERNAL_ID)
    assert customer.connect().unwrap(wrapped, tenant=TENANT) == PAYLOAD


def test_a_role_deleted_meanwhile_is_the_customers_no(customer: Customer) -> None:
    """Protects the operator from blame: AWS calls the token invalid, but it is the role's and not ours."""
    client = customer.connect()
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    customer.server.delete_role(customer.role)
    error = failure(client, wrapped)
    assert type(error) is AccessDeniedError
    assert error.action_by == CUSTOMER


def test_revoked_sessions_and_permissions(customer: Customer) -> None:
    """Protects the other ways to say no: sessions revoked, the role's permission taken, the key disabled."""
    client = customer.connect()
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    customer.server.revoke_sessions(customer.role)
    assert failure(client, wrapped).action_by == CUSTOMER
    assert customer.connect().unwrap(wrapped, tenant=TENANT) == PAYLOAD
    customer.server.deny_role(customer.role)
    error = failure(customer.connect(), wrapped)
    assert type(error) is AccessDeniedError
    assert error.action_by == CUSTOMER
    customer.server.allow(customer.role)
    customer.server.disable(customer.key)
    assert type(failure(customer.connect(), wrapped)) is KeyDisabledError


# How long a session lasts


def test_each_client_has_a_session_of_its_own(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the time to deny: a refresh asks STS again."""
    for reason in ("open", "refresh"):
        customer.connect(reason=reason).wrap(PAYLOAD, tenant=TENANT)
    assert kms_server.calls["AssumeRole"] == 2


def test_a_long_lived_client_renews_its_session(
    customer: Customer, kms_server: KmsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects long work with one client: a session of 15 minutes is used for 14."""
    now = [1000.0]
    monkeypatch.setattr("sqla_byok.kms.aws.monotonic", lambda: now[0])
    client = customer.connect()
    for at, sessions in ((0, 1), (839, 1), (840, 2), (1679, 2), (1681, 3)):
        now[0] = 1000.0 + at
        client.wrap(PAYLOAD, tenant=TENANT)
        assert kms_server.calls["AssumeRole"] == sessions


def test_an_expired_session_is_not_used_again(customer: Customer, kms_server: KmsServer) -> None:
    """Protects against a clock that stood still, as on a suspended machine."""
    client = customer.connect()
    client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.fail("Encrypt", "ExpiredTokenException")
    with pytest.raises(CredentialExpiredError) as raised:
        client.wrap(PAYLOAD, tenant=TENANT)
    assert raised.value.action_by == OPERATOR
    client.wrap(PAYLOAD, tenant=TENANT)
    assert kms_server.calls["AssumeRole"] == 2


def test_one_session_for_a_clients_threads(customer: Customer, kms_server: KmsServer) -> None:
    """Protects the STS quota: calls of a batch that begin together share one session."""
    client, start = customer.connect(), threading.Barrier(8)

    def work(_: int) -> Wrapped:
        start.wait()
        return client.wrap(PAYLOAD, tenant=TENANT)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(work, range(8)))) == 8
    assert kms_server.calls == {"AssumeRole": 1, "Encrypt": 8}


# Who signs


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The boto3 clients that are made during the test, each service's one; a second is an error."""
    made: dict[str, Any] = {}
    original = boto3.session.Session.client

    def client(self: Any, service: str, *args: Any, **options: Any) -> Any:
        assert service not in made
        made[service] = original(self, service, *args, **options)
        return made[service]

    monkeypatch.setattr(boto3.session.Session, "client", client)
    return made


def test_no_tenant_signs_as_another(kms_server: KmsServer, made: dict[str, Any]) -> None:
    """Protects isolation and memory: eight tenants' threads share one KMS client and never each other's credentials."""
    customers = [Customer(kms_server, f"t{n}", f"external-{n}") for n in range(8)]
    start = threading.Barrier(len(customers))
    settings = {"read_timeout": 2.515625}  # nobody else's, so that the clients are made here

    def work(customer: Customer) -> bool:
        start.wait()
        for _ in range(10):
            client = customer.connect(**settings)
            wrapped = client.wrap(PAYLOAD, tenant=customer.name)
            assert client.unwrap(wrapped, tenant=customer.name) == PAYLOAD
        return True

    with ThreadPoolExecutor(len(customers)) as pool:
        assert all(pool.map(work, customers))
    assert set(made) == {"kms", "sts"}
    assert kms_server.calls == {"AssumeRole": 80, "Encrypt": 80, "Decrypt": 80}


def test_roles_and_our_own_principal_share_a_region(customer: Customer, kms_server: KmsServer) -> None:
    """Protects tenants without a role: their calls are signed by us, before and after a role's on the same thread."""
    profile = {**kms_server.profile(), "attempts": 1}
    own = AwsKms(kms_server.create_key()).connect(profile)
    wrapped = own.wrap(PAYLOAD, tenant="own")
    customer.connect().wrap(PAYLOAD, tenant=TENANT)
    kms_server.deny_role(customer.role)
    assert own.unwrap(wrapped, tenant="own") == PAYLOAD


def test_the_roles_client_has_no_credentials_of_ours(
    customer: Customer, kms_server: KmsServer, made: dict[str, Any]
) -> None:
    """Protects against a call that would be signed by us for want of a session: it is not sent at all."""
    customer.connect(read_timeout=2.546875).wrap(PAYLOAD, tenant=TENANT)
    before = kms_server.calls.copy()
    with pytest.raises(NoCredentialsError):
        made["kms"].decrypt(KeyId=customer.key, CiphertextBlob=b"blob")
    assert kms_server.calls == before


@pytest.mark.parametrize(
    ("partition", "region", "host"),
    [
        ("aws", "eu-central-1", "sts.eu-central-1.amazonaws.com"),
        ("aws", "us-east-1", "sts.us-east-1.amazonaws.com"),
        ("aws-cn", "cn-north-1", "sts.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_sts_of_the_keys_region(
    aws_environment: None, monkeypatch: pytest.MonkeyPatch, partition: str, region: str, host: str
) -> None:
    """Protects from the global STS endpoint: it is one point of failure, and denied where regions are restricted."""
    asked = []

    def resolve(name: str, *args: Any, **options: Any) -> Any:
        asked.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    kms = AwsKms(
        ARN.replace("eu-central-1", region).replace("arn:aws:", f"arn:{partition}:"),
        role_arn=ROLE.replace("arn:aws:", f"arn:{partition}:"),
    ).for_tenant(EXTERNAL_ID)
    assert type(failure(kms.connect({"attempts": 1}))) is KmsUnavailableError
    assert set(asked) == {host}


# STS errors

STS_RESPONSES = [
    (
        "AccessDenied",
        403,
        "User: x is not authorized to perform: sts:AssumeRole",
        AccessDeniedError,
        CUSTOMER,
    ),
    ("AccessDenied", 403, "because no identity-based policy allows it", AccessDeniedError, OPERATOR),
    ("AccessDenied", 403, "explicit deny in a service control policy", AccessDeniedError, OPERATOR),
    ("AccessDenied", 403, "because no VPC endpoint policy allows it", AccessDeniedError, OPERATOR),
    ("RegionDisabledException", 403, "", errors.KmsRefusedError, CUSTOMER),
    ("ValidationError", 400, "", errors.KmsRefusedError, OPERATOR),
    ("ExpiredToken", 400, "", CredentialExpiredError, OPERATOR),
    ("ExpiredTokenException", 400, "", CredentialExpiredError, OPERATOR),
    ("RequestExpired", 400, "", CredentialExpiredError, OPERATOR),
    ("InvalidClientTokenId", 403, "", CredentialInvalidError, OPERATOR),
    ("SignatureDoesNotMatch", 403, "", CredentialInvalidError, OPERATOR),
    ("Throttling", 400, "", ThrottledError, OPERATOR),
    ("ThrottlingException", 400, "", ThrottledError, OPERATOR),
    ("SomethingNew", 429, "", ThrottledError, OPERATOR),
    ("InternalFailure", 500, "", KmsUnavailableError, OPERATOR),
    ("ServiceUnavailable", 503, "", KmsUnavailableError, OPERATOR),
    ("SomethingNew", 400, "", errors.KmsRefusedError, OPERATOR),
]


@pytest.mark.parametrize(("code", "status", "message", "expected", "action_by"), STS_RESPONSES)
def test_every_sts_error(
    customer: Customer,
    kms_server: KmsServer,
    code: str,
    status: int,
    message: str,
    expected: type,
    action_by: str,
) -> None:
    """Protects the line between "no" and "no answer", and who must act, for the call that opens the role."""
    kms_server.fail("AssumeRole", code, status, message)
    error = failure(customer.connect())
    assert type(error) is expected
    assert error.action_by == action_by
    assert error.retryable is isinstance(error, errors.KmsNoAnswerError)
    assert error.request_id == "00000000-0000-0000-0000-000000000000"
    assert code in str(error)
    assert EXTERNAL_ID in str(error)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert kms_server.calls == {"AssumeRole": 1}


KMS_RESPONSES = [
    ("AccessDeniedException", "no identity-based policy allows it", AccessDeniedError, CUSTOMER),
    ("AccessDeniedException", "no resource-based policy allows it", AccessDeniedError, CUSTOMER),
    ("AccessDeniedException", "explicit deny in a service control policy", AccessDeniedError, CUSTOMER),
    ("AccessDeniedException", "no VPC endpoint policy allows it", AccessDeniedError, OPERATOR),
    ("UnrecognizedClientException", "", AccessDeniedError, CUSTOMER),
    ("InvalidClientTokenId", "", AccessDeniedError, CUSTOMER),
    ("ExpiredTokenException", "", CredentialExpiredError, OPERATOR),
    ("DisabledException", "is disabled.", KeyDisabledError, CUSTOMER),
    ("KMSInvalidStateException", "is pending deletion.", errors.KeyDeletedError, CUSTOMER),
    ("ThrottlingException", "", ThrottledError, OPERATOR),
]


@pytest.mark.parametrize(("code", "message", "expected", "action_by"), KMS_RESPONSES)
def test_kms_errors_of_a_roles_session(
    customer: Customer, kms_server: KmsServer, code: str, message: str, expected: type, action_by: str
) -> None:
    """Protects who is asked to act: the caller's policies and tokens are the customer's here."""
    kms_server.fail("Decrypt", code, message=message)
    error = failure(customer.connect())
    assert type(error) is expected
    assert error.action_by == action_by
    assert customer.role in str(error)


def test_a_role_of_our_own_that_fails_is_ours(
    customer: Customer, kms_server: KmsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Protects the customer from blame: botocore assumes our own role first, and that error looks the same."""
    config = tmp_path / "config"
    config.write_text(
        "[profile vendor]\nrole_arn = arn:aws:iam::111122223333:role/vendor\nsource_profile = base\n"
        "[profile base]\naws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "vendor")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", kms_server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    error = failure(customer.connect(read_timeout=2.53125))
    assert type(error) is CredentialInvalidError
    assert error.action_by == OPERATOR
    assert [body["RoleArn"] for _, body in kms_server.requests] == ["arn:aws:iam::111122223333:role/vendor"]


@pytest.mark.parametrize(
    ("operation", "code", "status"),
    [
        ("AssumeRole", "Throttling", 400),
        ("AssumeRole", "InternalFailure", 500),
        ("Decrypt", "ThrottlingException", 400),
    ],
)
def test_retries_are_bounded(
    customer: Customer, kms_server: KmsServer, operation: str, code: str, status: int
) -> None:
    """Protects both sides: throttling and faults are ridden out, and never more than `attempts` calls are made."""
    wrapped = customer.connect().wrap(PAYLOAD, tenant=TENANT)
    kms_server.calls.clear()
    kms_server.fail(operation, code, status)
    assert customer.connect(attempts=2).unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert kms_server.calls[operation] == 2
    kms_server.fail(operation, code, status, times=9)
    assert isinstance(failure(customer.connect(attempts=2), wrapped), errors.KmsNoAnswerError)
    assert kms_server.calls[operation] == 4


# The description


def test_describe_restores_an_equal_value() -> None:
    """Protects the keystore round trip, with and without a role, and the rows from before there were roles."""
    kms = AwsKms(ARN, role_arn=ROLE, profile="europe").for_tenant(EXTERNAL_ID)
    assert kms.config() == {"key": ARN, "profile": "europe", "role": ROLE, "external_id": EXTERNAL_ID}
    assert describe("aws", kms.config()) == kms
    assert hash(describe("aws", kms.config())) == hash(kms)
    assert describe("aws", {"key": ARN, "profile": "default"}) == AwsKms(ARN)
    assert AwsKms(ARN).for_tenant(EXTERNAL_ID) == AwsKms(ARN)


def test_claims() -> None:
    """Protects a customer's key and role from being taken by a second tenant, through another region as well."""
    assert AwsKms(ARN).claims() == (f"aws:{ARN}",)
    assert AwsKms(ARN, role_arn=ROLE).claims() == (f"aws:{ARN}", f"aws-role:{ROLE}")
    replicas = [
        AwsKms(f"arn:aws:kms:{region}:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab").claims()
        for region in ("us-east-1", "eu-west-1")
    ]
    assert replicas[0] == replicas[1]


def test_the_external_id_is_ours() -> None:
    """Protects from the confused deputy: a customer that chooses its external id could choose another's."""
    kms = AwsKms(ARN, role_arn=ROLE, external_id="chosen")
    with pytest.raises(ConfigurationError, match=EXTERNAL_ID):
        kms.for_tenant(EXTERNAL_ID)
    assert kms.for_tenant("chosen") == kms


@pytest.mark.parametrize(
    ("role", "external_id"),
    [
        ("", EXTERNAL_ID),
        ("byok", EXTERNAL_ID),
        ("arn:aws:iam::111122223333:user/byok", EXTERNAL_ID),
        ("arn:aws:iam::1111:role/byok", EXTERNAL_ID),
        ("arn:aws:iam::111122223333:role/", EXTERNAL_ID),
        ("arn:aws:iam::111122223333:role/by ok", EXTERNAL_ID),
        ("arn:aws-cn:iam::111122223333:role/byok", EXTERNAL_ID),
        (ROLE, "x"),
        (ROLE, "a b"),
        (ROLE, "x" * 1225),
        (ROLE, None),
        (None, EXTERNAL_ID),
    ],
)
def test_bad_roles_are_refused(role: Any, external_id: Any) -> None:
    """Protects against a role that AWS would not know, and an external id that would be sent to nobody."""
    with pytest.raises(ConfigurationError):
        AwsKms(ARN, role_arn=role, external_id=external_id)


@pytest.mark.parametrize(
    "config",
    [
        {"key": ARN, "profile": "default", "role": ROLE},
        {"key": ARN, "profile": "default", "external_id": EXTERNAL_ID},
        {"key": ARN, "profile": "default", "role": None, "external_id": ""},
        {"key": ARN, "profile": "default", "role": ROLE, "external_id": None},
        {
            "key": ARN,
            "profile": "default",
            "role": ROLE,
            "external_id": EXTERNAL_ID,
            "endpoint_url": "http://x",
        },
    ],
)
def test_stored_configurations_are_strict(config: Any) -> None:
    """Protects against a row that was written by somebody else: nothing is left out, added or defaulted."""
    with pytest.raises(ConfigurationError):
        AwsKms.from_config(config)
