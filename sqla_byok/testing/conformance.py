"""What every provider must do, as tests that a provider of your own inherits."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import pytest

from sqla_byok.errors import ConfigurationError, KmsError, KmsRefusedError, WrongKeyError
from sqla_byok.kms.base import Kms, KmsClient, Operator, Wrapped, request_id

__all__ = ["KmsConformance"]

_TENANT = "org-42"
_THREADS = 16
_Error = TypeVar("_Error", bound=BaseException)


class KmsConformance:
    """The tests that a customer key of any provider passes. Inherit it in a test module and say how to make a key.

    :cvar settings: the profile that :meth:`sqla_byok.kms.base.Kms.connect` is given.
    :cvar operator: the secrets and credentials that it is given.
    :cvar binds_tenant: whether the provider itself refuses to unwrap for another tenant. Say False where its
        encryption takes no additional data; the payload then tells whose it is.
    :cvar takes_settings: whether the provider uses the profile, and so refuses a setting that it does not know.

    Set them in the class, or on ``self`` in an autouse fixture where they are known only then::

        from sqla_byok.testing import KmsConformance


        class TestTransitKms(KmsConformance):
            binds_tenant = True

            @pytest.fixture(autouse=True)
            def _vault(self, vault):
                self.vault = vault
                self.settings = {"endpoint_url": vault.url}

            def make_key(self):
                return TransitKms(self.vault.create_key())

            def disable(self, kms):
                self.vault.disable(kms.key)
    """

    settings: Mapping[str, Any] = {}
    operator: Operator = Operator()
    binds_tenant: ClassVar[bool] = True
    takes_settings: ClassVar[bool] = True

    # -- what the provider's tests supply ----------------------------------------------------------------------------

    def make_key(self) -> Kms:
        """A usable key; another one at each call."""
        raise NotImplementedError("say how to make a key of your provider")

    def disable(self, kms: Kms) -> None:
        """Take the key away as its customer would."""
        raise NotImplementedError("say how a customer of your provider disables a key")

    def secrets(self, kms: Kms) -> Sequence[str]:
        """What must not show in the description, such as a client secret; nothing unless you say so."""
        return ()

    # -- payloads ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [1, 65, 190])
    @pytest.mark.parametrize("tenant", [_TENANT, "Müller & Söhne 株式会社", "t" * 255])
    def test_round_trip(self, size: int, tenant: str) -> None:
        """What was wrapped comes back, in another client as well: of any size that we use, for any tenant's name."""
        kms, payload = self.make_key(), os.urandom(size)
        wrapped = self._connect(kms).wrap(payload, tenant=tenant)
        assert isinstance(wrapped, Wrapped)
        assert isinstance(wrapped.blob, bytes)
        assert isinstance(wrapped.key_version, str)
        assert self._connect(kms).unwrap(wrapped, tenant=tenant) == payload

    def test_the_blob_does_not_show_the_payload(self) -> None:
        """The keystore's table holds ciphertext."""
        payload = os.urandom(65)
        blob = self._connect(self.make_key()).wrap(payload, tenant=_TENANT).blob
        assert not any(shape.encode("latin-1") in blob for shape in _shapes(payload))

    def test_room_is_true(self) -> None:
        """A payload as large as ``room`` says is taken; a larger one is refused with an error of ours."""
        client = self._connect(self.make_key())
        room = client.room(client.wrap(b"x", tenant=_TENANT))
        assert room >= 190, "a tenant key needs 190 bytes"
        payload = os.urandom(room)
        assert client.unwrap(client.wrap(payload, tenant=_TENANT), tenant=_TENANT) == payload
        larger = os.urandom(room + 1)
        _check(_refused(KmsRefusedError, lambda: client.wrap(larger, tenant=_TENANT)), larger)

    def test_threads_share_a_client(self) -> None:
        """A client serves many threads at once, each with its own payload and tenant."""
        client, barrier = self._connect(self.make_key()), threading.Barrier(_THREADS, timeout=60)

        def work(number: int) -> bool:
            payload, tenant = os.urandom(65), f"org-{number}"
            barrier.wait()
            return client.unwrap(client.wrap(payload, tenant=tenant), tenant=tenant) == payload

        with ThreadPoolExecutor(_THREADS) as pool:
            assert all(pool.map(work, range(_THREADS)))

    # -- "no" --------------------------------------------------------------------------------------------------------

    def test_another_tenants_blob_is_refused(self) -> None:
        """A wrapped key that was put into another tenant's row does not open."""
        if not self.binds_tenant:
            pytest.skip("this provider's encryption takes no additional data")
        client, payload = self._connect(self.make_key()), os.urandom(65)
        wrapped = client.wrap(payload, tenant=_TENANT)
        error = _refused(WrongKeyError, lambda: client.unwrap(wrapped, tenant="org-43"))
        _check(error, payload, tenant="org-43")

    def test_another_keys_blob_is_refused(self) -> None:
        """A wrapped key opens under the key that wrapped it, not under another that we may use as well."""
        client, other, payload = (
            self._connect(self.make_key()),
            self._connect(self.make_key()),
            os.urandom(65),
        )
        version = other.wrap(payload, tenant=_TENANT).key_version
        foreign = Wrapped(client.wrap(payload, tenant=_TENANT).blob, version)
        _check(_refused(WrongKeyError, lambda: other.unwrap(foreign, tenant=_TENANT)), payload)

    @pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
    def test_a_damaged_blob_is_refused(self, damage: str) -> None:
        """A row that was altered is a typed "no"."""
        client, payload = self._connect(self.make_key()), os.urandom(65)
        blob, version = client.wrap(payload, tenant=_TENANT)
        altered = {"flipped": blob[:-1] + bytes([blob[-1] ^ 1]), "cut": blob[:-1], "empty": b""}[damage]
        error = _refused(KmsRefusedError, lambda: client.unwrap(Wrapped(altered, version), tenant=_TENANT))
        _check(error, payload)

    def test_a_disabled_key_refuses(self) -> None:
        """The customer's "no" is a typed one, for wrap and unwrap, in a client made before or after; no other key's."""
        kms, payload = self.make_key(), os.urandom(65)
        early = self._connect(kms)
        wrapped = early.wrap(payload, tenant=_TENANT)
        other = self._connect(self.make_key())
        self.disable(kms)
        for client in (early, self._connect(kms)):
            _check(_refused(KmsRefusedError, partial(client.unwrap, wrapped, tenant=_TENANT)), payload)
            _check(_refused(KmsRefusedError, partial(client.wrap, payload, tenant=_TENANT)), payload)
        assert other.wrap(payload, tenant=_TENANT)

    def test_request_id_is_this_calls(self) -> None:
        """The audit shows no earlier call's request id: each call sets it, to None where there is none."""
        kms = self.make_key()
        client, ids = self._connect(kms), []

        def note(call: Callable[[], Any]) -> Any:
            token = request_id.set("an earlier call's")
            try:
                return call()
            finally:
                ids.append(request_id.get())
                request_id.reset(token)

        wrapped = note(lambda: client.wrap(b"x", tenant=_TENANT))
        note(lambda: client.unwrap(wrapped, tenant=_TENANT))
        self.disable(kms)
        error = _refused(KmsRefusedError, lambda: note(lambda: client.unwrap(wrapped, tenant=_TENANT)))
        assert "an earlier call's" not in ids
        assert all(each is None or each for each in ids)
        assert error.request_id == ids[-1]

    # -- the description ---------------------------------------------------------------------------------------------

    def test_config_restores_an_equal_value(self) -> None:
        """What the keystore stores is text by name, survives JSON, and makes an equal key in another process."""
        kms = self.make_key()
        config = kms.config()
        assert isinstance(kms.provider, str)
        assert 1 <= len(kms.provider) <= 40, "the keystore's column takes 40 characters"
        assert all(isinstance(text, str) for pair in config.items() for text in pair)
        twin = type(kms).from_config(json.loads(json.dumps(config)))
        assert twin == kms
        assert hash(twin) == hash(kms)
        assert twin.config() == config
        assert kms != self.make_key()

    def test_a_foreign_config_is_refused(self) -> None:
        """A keystore row that was altered by hand is no key of ours: nothing missing, nothing more, texts only."""
        kms = self.make_key()
        config: dict[str, Any] = kms.config()
        foreign = [
            {},
            {**config, "endpoint_url": "https://127.0.0.1"},
            *({**config, name: 7} for name in config),
        ]
        for each in foreign:
            _refused(ConfigurationError, partial(type(kms).from_config, each))

    def test_the_description_is_frozen(self) -> None:
        """A key is a value: nobody changes it under the tenants that have it."""
        kms: Any = self.make_key()
        names = [field.name for field in fields(kms)] if is_dataclass(kms) else list(vars(kms))
        for name in {*names, "profile"}:
            with pytest.raises(AttributeError):
                setattr(kms, name, "other")

    def test_the_description_shows_no_secret(self) -> None:
        """Neither the keystore nor a log of the description tells a secret."""
        kms = self.make_key()
        shown = (
            json.dumps(kms.config()) + repr(kms) + str(kms) + repr(self._connect(kms)) + repr(kms.claims())
        )
        assert not any(secret in shown for secret in self.secrets(kms))

    def test_connecting_makes_no_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client costs nothing until it is used, and a key that is gone stops no process from starting."""
        kms = self.make_key()
        self.disable(kms)
        attempts: list[object] = []

        def attempt(*arguments: object, **_: object) -> NoReturn:
            attempts.append(arguments)
            raise OSError("this test allows no connection")

        for owner, name in (
            (socket, "getaddrinfo"),
            (socket, "create_connection"),
            (socket.socket, "connect"),
            (socket.socket, "connect_ex"),
        ):
            monkeypatch.setattr(owner, name, attempt)
        self._connect(kms)
        assert attempts == []

    def test_an_unknown_setting_is_refused(self) -> None:
        """A typing error in the operator's profile does not leave a default in force unseen."""
        if not self.takes_settings:
            pytest.skip("this provider uses no settings")
        kms, settings = self.make_key(), {**self.settings, "raed_timeout": 2.0}
        _refused(ConfigurationError, lambda: kms.connect(settings, self.operator))

    # -- what others may see -----------------------------------------------------------------------------------------

    def test_logs_show_no_payload(self, caplog: pytest.LogCaptureFixture) -> None:
        """With every logger at DEBUG, no log holds a tenant key or a secret: not the SDK's either."""
        kms, payload = self.make_key(), os.urandom(65)
        with _everything_logged(caplog):
            client = self._connect(kms)
            wrapped = client.wrap(payload, tenant=_TENANT)
            client.unwrap(wrapped, tenant=_TENANT)
            self.disable(kms)
            _refused(KmsRefusedError, lambda: client.wrap(payload, tenant=_TENANT))
        logged = caplog.text + "".join(repr(vars(record)) for record in caplog.records)
        assert not any(shape in logged for shape in _shapes(payload))
        assert not any(secret in logged for secret in self.secrets(kms))

    def _connect(self, kms: Kms) -> KmsClient:
        return kms.connect(self.settings, self.operator)


def _refused(kind: type[_Error], call: Callable[[], object]) -> _Error:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def _check(error: KmsError, payload: bytes, tenant: str = _TENANT) -> None:
    """An error says whose key it is, survives a task queue, and takes nothing along that shows the payload."""
    assert error.tenant == tenant
    assert error.action_by in ("customer", "operator")
    assert error.__cause__ is None
    assert error.__context__ is None, (
        "raise it outside the except block: the SDK's exception shows the request"
    )
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(twin), twin.args, vars(twin)) == (type(error), error.args, vars(error))
    assert str(error)
    assert not any(shape in f"{error} {error!r} {vars(error)}" for shape in _shapes(payload))


def _shapes(payload: bytes) -> list[str]:
    """How bytes show in text: as they are, as a literal, in hex, and in base64, also from within longer data."""
    shapes = [payload.decode("latin-1"), repr(payload)[2:-1], payload.hex(), payload.hex().upper()]
    for start in range(3):
        whole = payload[start : start + (len(payload) - start) // 3 * 3]
        shapes += [base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode()]
    return shapes


@contextmanager
def _everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    levels = [(logger, logger.level) for logger in loggers]
    with caplog.at_level(logging.DEBUG):
        for logger, _ in levels:
            logger.setLevel(logging.NOTSET)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
