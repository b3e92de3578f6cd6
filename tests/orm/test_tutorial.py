"""No false alarm over encrypted models: SQLAlchemy's tutorial queries, and sqladmin's and FastAPI's usual pages."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict
from sqladmin import Admin, ModelView
from sqlalchemy import (
    Engine,
    ForeignKey,
    String,
    and_,
    case,
    create_engine,
    delete,
    desc,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    column_property,
    contains_eager,
    joinedload,
    load_only,
    mapped_column,
    query_expression,
    raiseload,
    relationship,
    selectinload,
    sessionmaker,
    subqueryload,
    with_expression,
    with_polymorphic,
)
from sqlalchemy.pool import StaticPool

from sqla_byok import Byok, Encrypted, UnsupportedQueryError

# The documentation's own sample data.
USERS = [("spongebob", "Spongebob Squarepants"), ("sandy", "Sandy Cheeks"), ("patrick", "Patrick Star")]
ADDRESSES = [
    (1, "spongebob@sqlalchemy.org"),
    (2, "sandy@sqlalchemy.org"),
    (2, "sandy@squirrelpower.org"),
]


def _models(prefix: str, text_: Callable[[int], Any]) -> tuple[Any, Any, Any, Any]:
    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = f"{prefix}user_account"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10), default="user")
        name: Mapped[str] = mapped_column(text_(30))
        fullname: Mapped[str | None] = mapped_column(text_(60))
        addresses: Mapped[list["Address"]] = relationship(back_populates="user", cascade="all, delete-orphan")
        shown: Mapped[str | None] = query_expression()
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}  # noqa: RUF012

    class Manager(User):
        __tablename__ = f"{prefix}manager"
        id: Mapped[int] = mapped_column(ForeignKey(User.id), primary_key=True)
        badge: Mapped[str | None] = mapped_column(text_(30))
        __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012

    class Address(Base):
        __tablename__ = f"{prefix}address"
        id: Mapped[int] = mapped_column(primary_key=True)
        email_address: Mapped[str] = mapped_column(text_(60))
        user_id: Mapped[int | None] = mapped_column(ForeignKey(User.id))
        user: Mapped[User | None] = relationship(back_populates="addresses")

    User.address_count = column_property(
        select(func.count(Address.id))
        .where(Address.user_id == User.id)
        .correlate_except(Address)
        .scalar_subquery()
    )
    return Base, User, Manager, Address


ENCRYPTED = _models("tut_", lambda size: Encrypted(String(size), searchable=True))
PLAIN = _models("tut_plain_", lambda size: String(size))

Tutorial = Callable[[Session, Any, Any, Any], Any]


def _fill(session: Session, models: tuple[Any, ...]) -> None:
    _, user, manager, address = models
    for number, (name, fullname) in enumerate(USERS, 1):
        session.add(user(id=number, name=name, fullname=fullname))
    session.add(manager(id=4, name="krabs", fullname=None, badge="M-1"))
    session.flush()
    session.execute(
        insert(address),
        [{"id": i, "user_id": of, "email_address": it} for i, (of, it) in enumerate(ADDRESSES, 1)],
    )
    session.commit()


def _subquery_of_counts(session: Session, user: Any, address: Any) -> Any:
    counts = (
        select(address.user_id, func.count(address.id).label("count")).group_by(address.user_id).subquery()
    )
    joined = (
        select(user.name, counts.c.count).outerjoin(counts, user.id == counts.c.user_id).order_by(user.id)
    )
    return session.execute(joined).all()


def _cte_of_entities(session: Session, user: Any, address: Any) -> Any:
    chosen = aliased(address, select(address).where(address.id != 2).cte())
    found = (
        select(user, chosen).join_from(user, chosen, user.id == chosen.user_id).order_by(user.id, chosen.id)
    )
    return [(one.name, other.email_address) for one, other in session.execute(found)]


def _union_of_entities(session: Session, user: Any, _: Any) -> Any:
    both = union_all(select(user).where(user.name == "sandy"), select(user).where(user.name == "spongebob"))
    as_entities = aliased(user, both.subquery())
    from_union = session.scalars(select(as_entities).order_by(as_entities.id)).all()
    stated = session.scalars(select(user).from_statement(both)).all()
    return [one.name for one in from_union], sorted(one.name for one in stated)


def _two_aliases(session: Session, user: Any, address: Any) -> Any:
    one, other = aliased(address), aliased(address)
    found = (
        select(user.name)
        .join_from(user, one)
        .where(one.email_address == "sandy@sqlalchemy.org")
        .join_from(user, other)
        .where(other.email_address == "sandy@squirrelpower.org")
    )
    return session.scalars(found).all()


def _writes(session: Session, user: Any, address: Any) -> Any:
    session.execute(update(user).where(user.name == "patrick").values(fullname="Patrick the Star"))
    sandy = session.scalars(select(user).filter_by(name="sandy")).one()
    sandy.fullname = "Sandy Squirrel"
    sandy.addresses.append(address(id=9, email_address="sandy@new.org"))
    session.flush()
    session.execute(delete(address).where(address.email_address.in_(["sandy@squirrelpower.org"])))
    session.delete(session.get_one(user, 1))
    session.flush()
    left = session.execute(select(user.name, user.fullname).order_by(user.id)).all()
    return left, session.scalars(select(address.email_address).order_by(address.id)).all()


TUTORIAL: dict[str, Tutorial] = {
    "select an entity": lambda s, u, m, a: [one.name for one in s.scalars(select(u).order_by(u.id))],
    "select columns": lambda s, u, m, a: s.execute(select(u.name, u.fullname).order_by(u.id)).all(),
    "select entity and column": lambda s, u, m, a: [
        (name, it.email_address)
        for name, it in s.execute(select(u.name, a).where(u.id == a.user_id).order_by(a.id))
    ],
    "a labelled column": lambda s, u, m, a: s.execute(select(u.name.label("username")).order_by(u.id)).all(),
    "text and literal columns": lambda s, u, m, a: (
        s.execute(select(text("'some phrase'"), literal_column("'p'").label("p"), u.name).order_by(u.id)).all()
    ),
    "where, several": lambda s, u, m, a: s.scalars(
        select(a.id).where(u.name == "sandy").where(a.user_id == u.id).order_by(a.id)
    ).all(),
    "and_, or_": lambda s, u, m, a: s.scalars(
        select(a.email_address).where(
            and_(or_(u.name == "sandy", u.name == "patrick"), a.user_id == u.id)
        ).order_by(a.id)
    ).all(),
    "filter_by": lambda s, u, m, a: s.scalars(
        select(u.id).filter_by(name="spongebob", fullname="Spongebob Squarepants")
    ).all(),
    "join_from": lambda s, u, m, a: s.execute(select(u.name, a.email_address).join_from(u, a).order_by(a.id)).all(),
    "join": lambda s, u, m, a: s.execute(select(u.name, a.email_address).join(u.addresses).order_by(a.id)).all(),
    "an outer join": lambda s, u, m, a: s.execute(
        select(u.name, a.email_address).outerjoin(u.addresses).order_by(u.id, a.id)
    ).all(),
    "count": lambda s, u, m, a: s.scalar(select(func.count("*")).select_from(u)),
    "order by a plain column, descending": lambda s, u, m, a: s.scalars(select(u.name).order_by(u.id.desc())).all(),
    "group by and having": lambda s, u, m, a: s.execute(
        select(u.id, func.count(a.id).label("count")).join(a).group_by(u.id).having(func.count(a.id) > 1)
    ).all(),
    "order by a label": lambda s, u, m, a: s.execute(
        select(a.user_id, func.count(a.id).label("n")).group_by(a.user_id).order_by("user_id", desc("n"))
    ).all(),
    "aliases": lambda s, u, m, a: (
        (lambda one, two: s.execute(
            select(one.name, two.name).join_from(one, two, one.id > two.id).order_by(one.id, two.id)
        ).all())(aliased(u), aliased(u))
    ),
    "two aliases of one table": lambda s, u, m, a: _two_aliases(s, u, a),
    "a subquery of counts": lambda s, u, m, a: _subquery_of_counts(s, u, a),
    "a CTE of entities": lambda s, u, m, a: _cte_of_entities(s, u, a),
    "a scalar subquery": lambda s, u, m, a: s.execute(
        select(
            u.name, select(func.count(a.id)).where(u.id == a.user_id).scalar_subquery().label("address_count")
        ).order_by(u.id)
    ).all(),
    "a union of entities": lambda s, u, m, a: _union_of_entities(s, u, a),
    "exists": lambda s, u, m, a: s.scalars(
        select(u.name).where(
            select(func.count(a.id)).where(u.id == a.user_id).group_by(a.user_id).having(func.count(a.id) > 1).exists()
        )
    ).all(),
    "not exists": lambda s, u, m, a: s.scalars(
        select(u.name).where(~exists(a.id).where(u.id == a.user_id)).order_by(u.id)
    ).all(),
    "any, has": lambda s, u, m, a: (
        s.scalars(select(u.name).where(u.addresses.any(a.email_address == "sandy@sqlalchemy.org"))).all(),
        s.scalars(select(a.id).where(a.user.has(u.name == "sandy")).order_by(a.id)).all(),
        s.scalars(select(u.name).where(~u.addresses.any()).order_by(u.id)).all(),
    ),
    "relationship comparison": lambda s, u, m, a: (
        s.scalars(select(a.id).where(a.user == s.get(u, 2)).order_by(a.id)).all(),
        s.scalars(select(u.id).where(u.addresses.contains(s.get(a, 1)))).all(),
    ),
    "windows": lambda s, u, m, a: s.execute(
        select(
            func.row_number().over(partition_by=u.id, order_by=a.id), u.name, func.count().over(order_by=u.id)
        ).join_from(u, a).order_by(a.id)
    ).all(),
    "filter": lambda s, u, m, a: s.execute(
        select(func.count(a.id).filter(u.name == "sandy")).select_from(u).join(u.addresses)
    ).all(),
    "case": lambda s, u, m, a: s.execute(
        select(case((u.name == "sandy", "squirrel"), else_="other")).order_by(u.id)
    ).all(),
    "selectinload": lambda s, u, m, a: [
        [it.email_address for it in one.addresses]
        for one in s.scalars(select(u).options(selectinload(u.addresses)).order_by(u.id))
    ],
    "joinedload": lambda s, u, m, a: [
        it.user.name for it in s.scalars(select(a).options(joinedload(a.user, innerjoin=True)).order_by(a.id))
    ],
    "joinedload of a collection": lambda s, u, m, a: [
        len(one.addresses)
        for one in s.scalars(select(u).options(joinedload(u.addresses)).order_by(u.id).limit(3)).unique()
    ],
    "subqueryload": lambda s, u, m, a: [
        len(one.addresses) for one in s.scalars(select(u).options(subqueryload(u.addresses)).order_by(u.id))
    ],
    "contains_eager": lambda s, u, m, a: [
        it.user.fullname
        for it in s.scalars(
            select(a).join(a.user).where(u.name == "sandy").options(contains_eager(a.user)).order_by(a.id)
        )
    ],
    "lazy loads": lambda s, u, m, a: [
        [it.user.name for it in one.addresses] for one in s.scalars(select(u).order_by(u.id))
    ],
    "raiseload and load_only": lambda s, u, m, a: [
        one.name for one in s.scalars(select(u).options(raiseload(u.addresses), load_only(u.name)).order_by(u.id))
    ],
    "with_expression": lambda s, u, m, a: [
        one.shown for one in s.scalars(select(u).options(with_expression(u.shown, u.fullname)).order_by(u.id))
    ],
    "column_property": lambda s, u, m, a: [one.address_count for one in s.scalars(select(u).order_by(u.id))],
    "with_polymorphic": lambda s, u, m, a: (
        (lambda every: [
            getattr(one, "badge", one.name)
            for one in s.scalars(select(every).order_by(every.id))
        ])(with_polymorphic(u, [m]))
    ),
    "a subclass": lambda s, u, m, a: [one.badge for one in s.scalars(select(m).where(m.badge == "M-1"))],
    "distinct of a subclass": lambda s, u, m, a: [one.badge for one in s.scalars(select(m).distinct())],
    "distinct of a join": lambda s, u, m, a: [
        one.name for one in s.scalars(select(u).join(u.addresses).distinct().order_by(u.id))
    ],
    "legacy queries": lambda s, u, m, a: (
        s.query(u).filter(u.name == "sandy").count(),
        s.query(u.name).order_by(u.id).limit(2).all(),
        s.query(s.query(u).filter_by(name="sandy").exists()).scalar(),
        [one.name for one in s.query(u).join(u.addresses).filter(a.id == 1)],
        s.query(u).filter(u.name.in_(["sandy"])).update({"fullname": "S"}),
    ),
    "writes": lambda s, u, m, a: _writes(s, u, a),
}  # fmt: skip


def _run(session: Session, name: str, models: tuple[Any, ...]) -> Any:
    _, user, manager, address = models
    result = TUTORIAL[name](session, user, manager, address)
    session.rollback()
    session.expunge_all()
    return result


def _known_to(engine: Engine) -> list[str]:
    """MariaDB has no FILTER."""
    return [name for name in TUTORIAL if name != "filter" or engine.dialect.name not in ("mysql", "mariadb")]


def test_tutorial_queries(engine: Engine, byok: Byok) -> None:
    """Every query of the tutorial runs, and gives over encrypted models what it gives over plaintext."""
    with byok.session("t1", engine) as session:
        for models in (ENCRYPTED, PLAIN):
            models[0].metadata.create_all(engine)
            _fill(session, models)
        wrong = {}
        for name in _known_to(engine):
            try:
                mine, theirs = (_run(session, name, models) for models in (ENCRYPTED, PLAIN))
            except Exception as error:
                session.rollback()
                mine, theirs = repr(error), None
            if mine != theirs or not mine:
                wrong[name] = mine, theirs
    assert wrong == {}


async def test_tutorial_queries_from_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """The same over AsyncSession."""
    wrong = {}
    async with abyok.asession("t1", async_engine) as session:
        for models in (ENCRYPTED, PLAIN):
            async with async_engine.begin() as connection:
                await connection.run_sync(models[0].metadata.create_all)
            await session.run_sync(_fill, models)
        for name in _known_to(async_engine.sync_engine):
            mine, theirs = [await session.run_sync(_run, name, models) for models in (ENCRYPTED, PLAIN)]
            if mine != theirs or not mine:
                wrong[name] = mine, theirs
    assert wrong == {}


# -- applications ----------------------------------------------------------------------------------------------------


class AppBase(DeclarativeBase):
    pass


class Patient(AppBase):
    __tablename__ = "app_patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    ward: Mapped[str] = mapped_column(String(20))
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)
    name: Mapped[str] = mapped_column(Encrypted(String(60)))


@pytest.fixture
def app_engine(tmp_path: Any, local_kms: Any) -> Iterator[tuple[Engine, Byok]]:
    """An engine that the threads of a test client share, and its Byok."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", single_tenant="t1")
    byok.create_keystore()
    byok.attach(engine, raw_sql="refuse")
    byok.onboard("t1", local_kms)
    AppBase.metadata.create_all(engine)
    yield engine, byok
    byok.close()
    engine.dispose()


class PatientIn(BaseModel):
    ward: str
    mrn: str
    name: str


class PatientOut(PatientIn):
    model_config = ConfigDict(from_attributes=True)
    id: int


def test_fastapi_pages(app_engine: tuple[Engine, Byok]) -> None:
    """Create, list with pages, filter, detail, edit and delete, as FastAPI's own SQL tutorial writes them."""
    engine, byok = app_engine
    app = FastAPI()

    def db() -> Iterator[Session]:
        with byok.session("t1", engine) as session:
            yield session

    def found(session: Session, number: int) -> Patient:
        patient = session.get(Patient, number)
        if patient is None:
            raise HTTPException(404)
        return patient

    @app.post("/patients", response_model=PatientOut)
    def create(given: PatientIn, session: Session = Depends(db)) -> Any:  # noqa: B008 - FastAPI's way
        patient = Patient(**given.model_dump())
        session.add(patient)
        session.commit()
        session.refresh(patient)
        return patient

    @app.get("/patients", response_model=list[PatientOut])
    def listed(
        offset: int = 0,
        limit: int = 2,
        mrn: str | None = None,
        session: Session = Depends(db),  # noqa: B008
    ) -> Any:
        wanted = select(Patient).order_by(Patient.id).offset(offset).limit(limit)
        return session.scalars(wanted if mrn is None else wanted.where(Patient.mrn == mrn)).all()

    @app.get("/patients/{number}", response_model=PatientOut)
    def detail(number: int, session: Session = Depends(db)) -> Any:  # noqa: B008
        return found(session, number)

    @app.put("/patients/{number}", response_model=PatientOut)
    def edit(number: int, given: PatientIn, session: Session = Depends(db)) -> Any:  # noqa: B008
        patient = found(session, number)
        for key, value in given.model_dump().items():
            setattr(patient, key, value)
        session.commit()
        return patient

    @app.delete("/patients/{number}")
    def remove(number: int, session: Session = Depends(db)) -> None:  # noqa: B008
        session.delete(found(session, number))
        session.commit()

    with TestClient(app) as client:
        for mrn in ("A-1", "A-2", "A-3"):
            made = client.post("/patients", json={"ward": "w", "mrn": mrn, "name": f"name of {mrn}"})
            assert made.json()["mrn"] == mrn
        assert [one["mrn"] for one in client.get("/patients").json()] == ["A-1", "A-2"]
        assert [one["mrn"] for one in client.get("/patients?offset=2").json()] == ["A-3"]
        assert [one["id"] for one in client.get("/patients?mrn=A-2").json()] == [2]
        assert client.get("/patients/3").json()["name"] == "name of A-3"
        assert client.put("/patients/3", json={"ward": "x", "mrn": "B-3", "name": "n"}).json()["mrn"] == "B-3"
        assert [one["id"] for one in client.get("/patients?mrn=B-3").json()] == [3]
        assert client.get("/patients?mrn=A-3").json() == []
        assert client.delete("/patients/1").status_code == 200
        assert client.get("/patients/1").status_code == 404


class PatientView(ModelView, model=Patient):
    """What an administrator sees."""

    column_list = ["id", "ward", "mrn", "name"]  # noqa: RUF012 - sqladmin's declaration
    column_sortable_list = ["id", "ward", "mrn"]  # noqa: RUF012
    column_default_sort = ("id", True)
    column_searchable_list = ["mrn"]  # noqa: RUF012
    form_columns = ["ward", "mrn", "name"]  # noqa: RUF012
    page_size = 2

    def search_query(self, stmt: Any, term: str) -> Any:
        """By equality, since LIKE cannot work."""
        return stmt.filter(Patient.mrn == term)


def test_sqladmin_pages(app_engine: tuple[Engine, Byok]) -> None:
    """The list with pages, order and search, the detail, and the forms for create, edit and delete."""
    engine, _ = app_engine
    app = FastAPI()
    admin = Admin(app, session_maker=sessionmaker(engine))
    admin.add_view(PatientView)
    page = "/admin/patient"
    with TestClient(app) as client:
        for mrn in ("A-1", "A-2", "A-3"):
            form = {"ward": "w", "mrn": mrn, "name": f"name-of-{mrn}"}
            assert client.get(f"{page}/create").status_code == 200
            assert client.post(f"{page}/create", data=form, follow_redirects=False).status_code == 302
        first = client.get(f"{page}/list").text
        assert "name-of-A-3" in first
        assert "name-of-A-1" not in first
        assert "name-of-A-1" in client.get(f"{page}/list?page=2").text
        assert "name-of-A-1" in client.get(f"{page}/list?sortBy=id&sort=asc").text
        by_mrn = client.get(f"{page}/list?search=A-2").text
        assert "name-of-A-2" in by_mrn
        assert "name-of-A-3" not in by_mrn
        assert "name-of-A-2" in client.get(f"{page}/details/2").text
        assert "name-of-A-2" in client.get(f"{page}/edit/2").text
        form = {"ward": "x", "mrn": "B-2", "name": "new-name"}
        assert client.post(f"{page}/edit/2", data=form, follow_redirects=False).status_code == 302
        assert "new-name" in client.get(f"{page}/list?search=B-2").text
        assert client.delete(f"{page}/delete?pks=1").status_code == 200
        assert client.get(f"{page}/details/1").status_code == 404
        with pytest.raises(UnsupportedQueryError, match=r"app_patient\.mrn"):
            client.get(f"{page}/list?sortBy=mrn&sort=asc")
    with Session(engine) as session:
        assert session.scalars(select(Patient.mrn).order_by(Patient.id)).all() == ["B-2", "A-3"]
