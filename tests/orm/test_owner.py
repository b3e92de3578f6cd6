"""Encrypted(owner=…): a column under one tenant's keys, whoever's row it is, and before anybody's turn is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, TurnableClock
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    insert,
    select,
    type_coerce,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, joinedload, mapped_column, relationship

from sqla_byok import (
    Byok,
    ConfigurationError,
    DeclarationError,
    Encrypted,
    HashSpecChangedError,
    KeyDisabledError,
    KeysExpiredError,
    LocalKms,
    NoTenantError,
    NotSearchableError,
    Sealed,
    SealedError,
    SettlingError,
    TenantMismatchError,
    UnsupportedQueryError,
    hash_index,
    search_hash,
)
from sqla_byok.normalize import casefold, email_domain

WHO = {"actor": "ada", "reason": "ticket 4711"}


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(
        Encrypted(String(90), searchable=True, normalize=casefold, owner="vendor"), unique=True
    )
    name: Mapped[str | None] = mapped_column(Encrypted(String(40), searchable=True))
    notes: Mapped[list[Note]] = relationship(order_by="Note.id")


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id"))
    text: Mapped[str | None] = mapped_column(Encrypted(String(40), owner="vendor"))


class Login(Base):
    __tablename__ = "login"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(Encrypted(String(90), searchable=True, owner="vendor"))


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted(String(40)))


T: Any = User.__table__
STORED = select(type_coerce(T.c.email, LargeBinary), type_coerce(T.c.name, LargeBinary)).order_by(T.c.id)


def fill(session: Session, number: int, tenant: str) -> None:
    session.add(
        User(
            id=number,
            email=f"Ada@{tenant}",
            name=f"{tenant} Ada",
            notes=[Note(id=number, text=f"for {tenant}")],
        )
    )
    session.commit()


@pytest.fixture
def data(byok: Byok, local_kms: LocalKms, engine: Engine) -> Engine:
    """The engine, with a user of each tenant."""
    Base.metadata.create_all(engine)
    byok.onboard("vendor", local_kms)
    for number, tenant in enumerate(("t1", "t2"), start=1):
        with byok.session(tenant, engine) as session:
            fill(session, number, tenant)
    byok.forget_keys()
    return engine


def test_it_is_found_before_the_tenant_is_known(byok: Byok, data: Engine) -> None:
    """A log-in looks its user up without a tenant, cold and warm; the tenant's own columns stay shut."""
    query = select(User.id, User.email).where(User.email == "ADA@T2")
    for _ in range(2):
        with Session(data) as session:
            assert [tuple(row) for row in session.execute(query)] == [(2, "Ada@t2")]
            assert session.scalars(
                select(User.id).where(User.email.in_(["ada@t1", "ada@t2"])).order_by(User.id)
            ).all() == [
                1,
                2,
            ]
            assert session.scalars(select(User.email).order_by(User.id)).all() == ["Ada@t1", "Ada@t2"]
            with pytest.raises(NoTenantError, match=r"user\.name"):
                session.scalars(select(User)).all()
            with pytest.raises(NoTenantError):
                session.scalars(select(User.id).where(User.email == "ada@t2", User.name == "x")).all()


def test_a_table_with_nothing_but_an_owners_column(byok: Byok, data: Engine) -> None:
    """Its hash is written in an INSERT and an UPDATE although no column of the tenant's own has one."""
    with byok.session("t1", data) as session:
        login = Login(id=1, email="ada@example.com")
        session.add(login)
        session.commit()
        login.email = "bob@example.com"
        session.commit()
    with Session(data) as session:
        for email, found in (("ada@example.com", []), ("bob@example.com", [1])):
            assert session.scalars(select(Login.id).where(Login.email == email)).all() == found


def test_the_hash_for_handwritten_sql(byok: Byok, data: Engine) -> None:
    """It is the owner's, with nobody's turn set and in another tenant's block."""
    with byok.session("t1", data) as session:
        session.add(Login(id=1, email="ada@example.com"))
        session.commit()
    with Session(data) as session:
        stored = session.scalar(select(search_hash(Login.email)))
    with byok.tenant("t2"):
        assert byok.hash(Login.email, "ada@example.com") == stored
    assert byok.hash(Login.email, "ada@example.com") == stored


def _login(normalize: Any = None) -> Any:
    class Base(DeclarativeBase):
        pass

    class Account(Base):
        __tablename__ = "ow_account"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str | None] = mapped_column(
            Encrypted(String(40), searchable=True, normalize=normalize, owner="vendor")
        )
        domain = hash_index("email", transform=email_domain)

    return Account


def test_an_index_is_the_owners_too(byok: Byok, data: Engine) -> None:
    """Whoever wrote the value finds it, and whoever else, also without a tenant."""
    account = _login()
    account.metadata.create_all(data)
    with byok.session("t1", data) as session:
        session.add_all([account(id=1, email="ada@one.org"), account(id=2, email="bob@two.org")])
        session.commit()
    with byok.session("t2", data) as session:
        session.get_one(account, 2).email = "bob@one.org"
        session.commit()
    with Session(data) as session:
        session.add(account(id=3, email="eve@one.org"))
        session.commit()
    find = select(account.id).where(account.domain == "one.org").order_by(account.id)
    for session in (Session(data), *(Session(data.execution_options(byok_tenant=t)) for t in ("t1", "t2"))):
        with session:
            assert session.scalars(find).all() == [1, 2, 3]
            stored = set(session.scalars(select(search_hash(account.domain))))
    with byok.tenant("t2"):
        assert stored == {byok.hash(account.domain, "one.org")}


def test_a_changed_specification_is_noticed(byok: Byok, data: Engine) -> None:
    """It is kept with the owner, since the hashes are the owner's."""
    account, changed = _login(), _login(casefold)
    account.metadata.create_all(data)
    with byok.session("t1", data) as session:
        session.add(account(id=1, email="Ada@one.org"))
        session.commit()
    for session in (Session(data), Session(data.execution_options(byok_tenant="t2"))):
        with session:
            with pytest.raises(HashSpecChangedError, match="re-hash") as caught:
                session.scalars(select(changed.id).where(changed.email == "ada@one.org")).all()
            assert (caught.value.tenant, caught.value.column) == ("vendor", "ow_account.email")
            assert session.scalars(select(account.id).where(account.email == "Ada@one.org")).all() == [1]
    with Session(data) as session:
        session.add(changed(id=2, email="bob@one.org"))
        with pytest.raises(SettlingError) as settling:
            session.flush()
        assert settling.value.tenant == "vendor"


def test_both_keys_in_one_statement(byok: Byok, data: Engine) -> None:
    """Flush, bulk, search and loads use the owner's keys for its columns and the tenant's for the others."""
    with byok.session("t1", data) as session:
        query = (
            select(User).where(User.email == "ada@t1", User.name == "t1 Ada").options(joinedload(User.notes))
        )
        user = session.scalars(query).unique().one()
        assert (user.email, user.name, user.notes[0].text) == ("Ada@t1", "t1 Ada", "for t1")
        user.email, user.name = "ada@new", "Cyd"
        session.flush()
        session.execute(insert(User), [{"id": 3, "email": "bob@t1", "name": "Bob"}, {"id": 4, "email": None}])
        session.execute(update(User).where(User.email == "BOB@T1").values(email="dan@t1", name="Dan"))
        session.commit()
        assert session.execute(select(User.email, User.name).where(User.email == "dan@t1")).one() == (
            "dan@t1",
            "Dan",
        )
    byok.preload(["t2"])
    with data.connect() as connection:
        keys = [
            tuple(value and byok._keyrings.owner_of(bytes(value)[:18]) for value in row)
            for row in connection.execute(STORED)
        ]
    assert keys == [("vendor", "t1"), ("vendor", "t2"), ("vendor", "t1"), (None, None)]
    with byok.session("t2", data) as session:
        assert session.scalars(select(User.email).order_by(User.id)).all()[:2] == ["ada@new", "Ada@t2"]
        with pytest.raises(TenantMismatchError):
            session.scalars(select(User)).all()


def test_it_is_written_without_a_tenant(byok: Byok, data: Engine) -> None:
    """A registration, where only the owner's columns have a value."""
    with Session(data) as session:
        session.add(User(id=9, email="new@vendor"))
        session.commit()
        session.execute(update(User).where(User.id == 9).values(email="newer@vendor"))
        session.commit()
        assert session.scalar(select(User.id).where(User.email == "newer@vendor")) == 9
        session.add(User(id=10, email="x@vendor", name="x"))
        with pytest.raises(NoTenantError, match=r"user\.name"):
            session.flush()


def test_a_session_may_keep_it_for_the_next_tenant(byok: Byok, data: Engine) -> None:
    """What was read of the owner is no other tenant's; what was read of a tenant is."""
    with Session(data, expire_on_commit=False) as session:
        login = Login(id=1, email="ada@example.com")
        session.add(login)
        session.commit()
        for number, tenant in ((1, "t1"), (2, "t2")):
            with byok.tenant(tenant):
                user = session.get_one(User, number)
                user.name = login.email = f"of {tenant}"
                session.commit()
                session.expunge(user)
        with byok.tenant("t1"):
            kept = session.get_one(User, 1)
            session.commit()
        with byok.tenant("t2"), pytest.raises(TenantMismatchError):
            session.get_one(User, 2)
        assert kept in session
    with byok.session("t2", data) as session:
        assert session.scalars(select(User.name).where(User.email == "ada@t2")).one() == "of t2"
        assert session.scalars(select(Login.email)).one() == "of t2"


def test_rows_fetched_later_are_read_as_they_were_asked_for(byok: Byok, data: Engine) -> None:
    """Results of two tenants, interleaved, each with the owner's column in it."""
    with data.connect() as one, data.connect() as two:
        with byok.tenant("t1"):
            first = one.execute(select(User.email, User.name).where(User.id == 1))
        with byok.tenant("t2"):
            second = two.execute(select(User.email, User.name).where(User.id == 2))
        assert first.all() == [("Ada@t1", "t1 Ada")]
        assert second.all() == [("Ada@t2", "t2 Ada")]
        result = one.execute(select(User.email))
        byok.forget_keys("vendor")
        with pytest.raises(KeysExpiredError):
            result.all()


def test_sealed_and_across(byok: Byok, data: Engine) -> None:
    """Sealed, the owner's keys are not used either; across, they are, for writing too."""
    with byok.sealed(**WHO), Session(data) as session:
        user = session.get_one(User, 1)
        assert (type(user.email), type(user.name)) == (Sealed, Sealed)
        with pytest.raises(SealedError):
            session.scalars(select(User.id).where(User.email == "ada@t1")).all()
        user.email = "x@x"
        with pytest.raises(SealedError):
            session.flush()
        session.rollback()
        user = session.get_one(User, 2)
        with byok.tenant("t2"):
            assert (byok.reveal(user, "email"), byok.reveal(user, "name")) == ("Ada@t2", "t2 Ada")
    with byok.across(["t1", "t2"], **WHO), Session(data) as session:
        users = session.scalars(
            select(User).where(User.email.in_(["ada@t1", "ada@t2"])).order_by(User.id)
        ).all()
        assert [(one.email, one.name) for one in users] == [("Ada@t1", "t1 Ada"), ("Ada@t2", "t2 Ada")]
        users[0].email = "across@t1"
        session.commit()
        assert session.scalar(select(User.id).where(User.email == "across@t1")) == 1


@pytest.fixture
def counted(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str
) -> Iterator[tuple[Byok, Engine, TurnableClock]]:
    """A Byok on SQLite whose KMS counts, with the owner and a tenant."""
    clock = TurnableClock()
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}")
    Base.metadata.create_all(engine)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", keystore_key=keystore_key, clock=clock)
    byok.create_keystore()
    byok.attach(engine)
    for tenant in ("vendor", "t1"):
        byok.onboard(tenant, counting_kms)
    with byok.session("t1", engine) as session:
        fill(session, 1, "t1")
    byok.forget_keys()
    counting_kms.unwraps.clear()
    yield byok, engine, clock
    byok.close()
    engine.dispose()


def test_kms_calls(counted: tuple[Byok, Engine, TurnableClock], counting_kms: CountingKms) -> None:
    """The owner is opened once, by the first statement that needs it, and by none that does not."""
    byok, engine, _ = counted
    with byok.session("t1", engine) as session:
        session.add(Plain(id=1, name="x"))
        session.commit()
        assert session.scalars(select(Plain.name)).all() == ["x"]
        assert len(counting_kms.unwraps) == 1
        for _ in range(3):
            assert session.scalars(select(User.id).where(User.email == "ada@t1")).all() == [1]
            assert session.scalars(select(Note.text)).all() == ["for t1"]
        assert len(counting_kms.unwraps) == 2


def test_a_dark_owner_stops_its_own_columns_only(
    counted: tuple[Byok, Engine, TurnableClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vendor's KMS is no single point of failure for what does not need it."""
    byok, engine, _ = counted
    with byok.session("t1", engine) as session:

        def refuse() -> None:
            raise KeyDisabledError("disabled")

        monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(refuse))
        session.add(Plain(id=1, name="x"))
        session.commit()
        assert session.scalars(select(User.name)).all() == ["t1 Ada"]
        with pytest.raises(KeyDisabledError):
            session.scalars(select(User.email)).all()


def test_the_owners_salts_can_be_rotated(counted: tuple[Byok, Engine, TurnableClock]) -> None:
    """Its searches fan out over its own salts, whatever the tenant has; the statement cache tells them apart."""
    byok, engine, _ = counted
    query = (
        select(User.id)
        .where(User.email.in_(["ada@t1", "bob@t1"]), User.name.in_(["t1 Ada", "Bob"]))
        .order_by(User.id)
    )
    with byok.session("t1", engine) as session:
        assert session.scalars(query).all() == [1]
    for rotated, ids in (("vendor", [1, 2]), ("t1", [1, 2])):
        byok.rotate_salt(rotated)
        byok.forget_keys()
        with byok.session("t1", engine) as session:
            if rotated == "vendor":
                session.add(User(id=2, email="Bob@t1", name="Bob"))
                session.commit()
            assert session.scalars(query).all() == ids
        with Session(engine) as session:
            assert session.scalars(select(User.id).where(User.email == "ada@t1")).all() == [1]


def test_grouping_by_its_hash_is_the_owners_matter(counted: tuple[Byok, Engine, TurnableClock]) -> None:
    """With several hashes for one value, or none, groups would be wrong: what counts is the owner's state."""
    byok, engine, _ = counted
    email = search_hash(User.email)
    grouped = select(func.count()).select_from(User).group_by(email)
    with byok.session("t1", engine) as session:
        session.add(User(id=2, email="Bob@t1", name="Bob"))
        session.commit()
    byok.rotate_salt("t1")
    for session in (Session(engine), Session(engine.execution_options(byok_tenant="t1"))):
        with session:
            assert session.scalars(grouped).all() == [1, 1]
    byok.rotate_salt("vendor")
    byok.forget_keys()
    with Session(engine) as session, pytest.raises(UnsupportedQueryError, match="'vendor' are being rotated"):
        session.scalars(grouped).all()
    byok._generations.retire("vendor", "search-salt", 1)
    byok.set_searchable("vendor", set())
    byok.forget_keys()
    with byok.session("t1", engine) as session, pytest.raises(NotSearchableError) as caught:
        session.scalars(grouped).all()
    assert (caught.value.tenant, caught.value.column) == ("vendor", "user.email")


def test_columns_of_different_owners_are_not_compared(byok: Byok, data: Engine) -> None:
    """Equal values have unequal hashes, also where the columns share a scope."""
    shared: Any = {"searchable": True, "salt_scope": "shared"}
    table = Table(
        "shared",
        MetaData(),
        Column("ours", Encrypted(String(9), owner="vendor", **shared)),
        Column("theirs", Encrypted(String(9), **shared)),
    )
    with byok.session("t1", data) as session, pytest.raises(UnsupportedQueryError, match="another salt"):
        session.execute(select(table).where(table.c.ours == table.c.theirs))


def test_an_open_result_ends_with_the_owners_time(counted: tuple[Byok, Engine, TurnableClock]) -> None:
    """Whoever fetches on after the deadline reads nothing of the owner's columns."""
    _, engine, clock = counted
    with Session(engine) as session:
        result = session.execute(select(Note.text))
        clock.turn(301)
        with pytest.raises(KeysExpiredError):
            result.all()


def test_what_cannot_be_declared() -> None:
    """A direct column asks the tenant's KMS; a name that no tenant can have is told at once."""
    with pytest.raises(DeclarationError, match="owner"):
        Encrypted(String, owner="vendor", mode="direct")
    with pytest.raises(ConfigurationError):
        Encrypted(String, owner="")
    assert "owner='vendor'" in repr(T.c.email.type)


async def test_under_asyncio(abyok: Byok, local_kms: LocalKms, async_engine: AsyncEngine) -> None:
    """The owner is opened without blocking, cold, by a search and by a load."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await abyok.aonboard("vendor", local_kms)
    async with abyok.asession("t1", async_engine) as session:
        session.add(User(id=1, email="Ada@t1", name="t1 Ada"))
        await session.commit()
    for _ in range(2):
        abyok.forget_keys()
        async with AsyncSession(async_engine) as session:
            assert (await session.scalars(select(User.email).where(User.email == "ada@t1"))).all() == [
                "Ada@t1"
            ]
        abyok.forget_keys()
        async with abyok.asession("t1", async_engine) as session:
            user = await session.get_one(User, 1)
            assert (user.email, user.name) == ("Ada@t1", "t1 Ada")
