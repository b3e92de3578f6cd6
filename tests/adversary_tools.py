"""What the tests of a hostile keystore need: customers on both clouds, somebody in the keystore, a watch on calls."""

from __future__ import annotations

import copy
import os
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from azure.identity import ClientSecretCredential
from keys_tools import TurnableClock
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert, select, text

from sqla_byok import (
    AwsSecretsManagerSalts,
    AzureKeyVault,
    Byok,
    ByokError,
    Encrypted,
    keystore_metadata,
)
from sqla_byok.testing.servers import KmsServers

VENDOR_ID, VENDOR_SECRET = "0a0a0a0a-0000-4000-8000-0b0b0b0b0b0b", "Ven8Q~made-up-vendor-secret_.~0123456789"

# One tenant for each way to reach a customer key, and a second one of the same kind to take rows from.
KINDS = ("role", "vault", "app", "salts")
TABLES = tuple(keystore_metadata.tables)

State = dict[str, list[tuple[Any, ...]]]

_metadata = MetaData()
person = Table(
    "person",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(String(20), searchable=True)),
)


class Deployment:
    """A keystore with customers on both clouds, and somebody who may write to it.

    :ivar servers: the doubles of both clouds.
    :ivar connects: every address that a socket was connected to since :meth:`quiet`.
    """

    def __init__(self, servers: KmsServers, folder: Path) -> None:
        self.servers, self.folder, self.clock = servers, folder, TurnableClock()
        self.connects: list[Any] = []
        self.url = f"sqlite:///{folder / 'keystore.db'}"
        self.hand = create_engine(self.url)
        self.data = create_engine(f"sqlite:///{folder / 'data.db'}")
        _metadata.create_all(self.data)
        servers.azure.add_application(VENDOR_ID, VENDOR_SECRET)
        self.byok = self.process()
        self.byok.create_keystore()
        self.byok.attach(self.data)
        for kind in KINDS:
            for tenant in (kind, f"{kind}-2"):
                self.onboard(tenant, kind)
        self._drop_constraints()
        for kind in KINDS:
            self.write(kind, "A-1")
        self.whole = self.state()

    def onboard(self, tenant: str, kind: str) -> None:
        servers, salts, kms = self.servers, None, None
        if kind == "vault":
            kms = servers.azure_key()
        elif kind == "app":
            kms = AzureKeyVault(
                servers.azure.create_key(), tenant_id=servers.azure.directory, credential="vendor-app"
            )
        else:
            kms = servers.aws_key(role=kind == "role")
            if kind == "role":
                kms = type(kms)(kms.key_arn, role_arn=kms.role_arn)
        if kind == "salts":
            salts = AwsSecretsManagerSalts(f"byok/{tenant}/salt", region=kms.region)
        self.byok.onboard(tenant, kms, salts=salts)

    def process(self, **options: Any) -> Byok:
        """Another process's Byok."""
        return Byok(
            self.url,
            clock=self.clock,
            credentials={"vendor-app": self._credential},
            **{**self.servers.options, **options},
        )

    def _credential(self, directory: str) -> ClientSecretCredential:
        return ClientSecretCredential(
            directory,
            VENDOR_ID,
            VENDOR_SECRET,
            authority=f"https://{self.servers.azure.authority}",
            disable_instance_discovery=True,
            connection_verify=self.servers.azure.ca_file,
            retry_total=0,
        )

    # -- what an application does --------------------------------------------------------------------------------

    def write(self, tenant: str, mrn: str) -> None:
        with self.data.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(person), [{"mrn": mrn}])

    def found(self, tenant: str, mrn: str) -> int:
        with self.data.execution_options(byok_tenant=tenant).connect() as connection:
            return len(connection.scalars(select(person.c.mrn).where(person.c.mrn == mrn)).all())

    def read(self, tenant: str) -> list[str]:
        with self.data.execution_options(byok_tenant=tenant).connect() as connection:
            return list(connection.scalars(select(person.c.mrn)))

    def stored(self) -> list[Any]:
        with self.data.connect() as connection:
            return list(connection.exec_driver_sql("SELECT * FROM person"))

    # -- what the adversary does ---------------------------------------------------------------------------------

    def _drop_constraints(self) -> None:
        # Neither types nor keys nor NOT NULL stand in the way of somebody who may alter the tables.
        with self.hand.begin() as connection:
            for name in TABLES:
                columns = ", ".join(keystore_metadata.tables[name].c.keys())
                connection.execute(text(f"ALTER TABLE {name} RENAME TO old_{name}"))
                connection.execute(text(f"CREATE TABLE {name} ({columns})"))
                connection.execute(text(f"INSERT INTO {name} SELECT {columns} FROM old_{name}"))
            for name in reversed(TABLES):
                connection.execute(text(f"DROP TABLE old_{name}"))

    def run(self, statement: str, *values: Any) -> None:
        """Execute SQL in the keystore."""
        with self.hand.begin() as connection:
            connection.exec_driver_sql(statement, values)

    def get(self, statement: str, *values: Any) -> Any:
        with self.hand.connect() as connection:
            return connection.exec_driver_sql(statement, values).scalar_one()

    def state(self, *names: str) -> State:
        with self.hand.connect() as connection:
            return {
                name: [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")]
                for name in names or TABLES
            }

    def put(self, state: State) -> None:
        with self.hand.begin() as connection:
            for name, rows in state.items():
                connection.exec_driver_sql(f"DELETE FROM {name}")
                for row in rows:
                    marks = ", ".join("?" * len(row))
                    connection.exec_driver_sql(f"INSERT INTO {name} VALUES ({marks})", row)

    # -- who was called ------------------------------------------------------------------------------------------

    def quiet(self) -> None:
        """Forget the calls so far."""
        self.servers.aws.calls.clear()
        self.servers.azure.calls.clear()
        self.connects.clear()

    @property
    def calls(self) -> set[str]:
        """What was asked of either cloud, and "connect" where a connection was made to anywhere."""
        asked = {name.lower() for name in (*self.servers.aws.calls, *self.servers.azure.calls)}
        return asked | ({"connect"} if self.connects else set())

    def refused(self, error: ByokError, tenant: str) -> None:
        """What holds for every refusal: it says whose it is, and tells no secret."""
        assert error.tenant == tenant
        shown = "".join(traceback.format_exception(error)) + repr(copy.copy(error).__dict__)
        secrets = [
            VENDOR_SECRET,
            *(value for name, value in os.environ.items() if name.startswith("BYOK_TEST_")),
        ]
        assert secrets[1:]
        assert not [each for each in secrets if each in shown]

    def close(self) -> None:
        self.byok.close()
        self.hand.dispose()
        self.data.dispose()


@contextmanager
def watching(deployment: Deployment) -> Iterator[None]:
    """Note every connection that a socket of this process makes, whoever makes it."""
    with pytest.MonkeyPatch.context() as patch:
        connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

        def noted(self: socket.socket, address: Any) -> None:
            deployment.connects.append(address)
            connect(self, address)

        def noted_ex(self: socket.socket, address: Any) -> int:
            deployment.connects.append(address)
            return connect_ex(self, address)

        patch.setattr(socket.socket, "connect", noted)
        patch.setattr(socket.socket, "connect_ex", noted_ex)
        yield


def other_values(value: Any) -> Sequence[Any]:
    """What somebody could write in the place of a value: other contents, sizes and types."""
    return [other for other in _values_beside(value) if (type(other), other) != (type(value), value)]


def _values_beside(value: Any) -> Sequence[Any]:
    if isinstance(value, bytes):
        flipped = [value[:n] + bytes([value[n] ^ 1]) + value[n + 1 :] for n in (0, len(value) - 1)]
        text = [value.decode()] if value.isascii() else [value.decode("latin-1")]
        return [
            *flipped,
            value[:-1],
            value + b"\0",
            b"",
            bytes(len(value)),
            bytes(1 << 20),
            *text,
            "x",
            None,
            7,
            1.5,
        ]
    if isinstance(value, int):
        return [
            value + 1,
            value - 1,
            -1,
            -(1 << 63),
            (1 << 63) - 1,
            1 << 32,
            1e300,
            str(value),
            b"x",
            "",
            None,
        ]
    assert isinstance(value, str)
    return [
        "x",
        "",
        value + " ",
        value + "\0",
        value.upper() + "É",
        "x" * 100_000,
        value.encode(),
        b"\xff",
        7,
        None,
    ]
