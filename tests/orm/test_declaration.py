"""Declaring encrypted columns in every style: the hash column that comes with them, and how it is mapped."""

import importlib.util
import inspect as pyinspect
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from sqlalchemy import (
    BINARY,
    JSON,
    Column,
    ColumnDefault,
    Computed,
    DefaultClause,
    Engine,
    Enum,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    UniqueConstraint,
    distinct,
    event,
    func,
    insert,
    inspect,
    join,
    literal,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.automap import automap_base
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    configure_mappers,
    declared_attr,
    deferred,
    mapped_column,
    registry,
)
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable
from sqlalchemy.sql import quoted_name

from sqla_byok import Byok, Encrypted, search_hash
from sqla_byok.errors import DeclarationError, NotSearchableError, TamperedError, UnsupportedQueryError
from sqla_byok.normalize import named
from sqla_byok.orm.schema import IndexOf, add_index
from sqla_byok.orm.types import Digest, SearchHash

on_sqlite = pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)

TYPED_MODEL = Path(__file__).parents[1] / "typing" / "model.py"


class Code(Encrypted[str]):
    """A type of an application's own."""

    cache_ok = True

    def __init__(self) -> None:
        super().__init__(String(8), searchable=True)


def searchable(**options: Any) -> Encrypted[str]:
    return Encrypted(String(20), searchable=True, **options)


@named("first-of", version=1)
def first_of(*values: str) -> str:
    return "/".join(values)


def with_id(*columns: Any, name: str = "patient", metadata: MetaData | None = None, **options: Any) -> Table:
    return Table(name, metadata or MetaData(), Column("id", Integer, primary_key=True), *columns, **options)


def indexes(table: Table) -> dict[str | None, tuple[list[str], bool | None]]:
    """Name, columns, uniqueness."""
    return {index.name: ([column.name for column in index.columns], index.unique) for index in table.indexes}


def uniques(table: Table) -> list[list[str]]:
    return sorted(c.columns.keys() for c in table.constraints if isinstance(c, UniqueConstraint))


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """The SQL that reaches the driver meanwhile."""
    seen: list[str] = []

    def listen(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: Any) -> None:
        seen.append(" ".join(statement.split()))

    event.listen(engine, "before_cursor_execute", listen)
    yield seen
    event.remove(engine, "before_cursor_execute", listen)


# -- what searchable=True does, and nothing else ---------------------------------------------------------------------


def test_only_searchable_makes_a_hash_column() -> None:
    """An encrypted column has a sibling when it was declared searchable, directly behind it, and never otherwise."""
    table = with_id(
        Column("name", Encrypted(String)),
        Column("mrn", searchable()),
        Column("email", searchable(), nullable=False),
        Column("city", String),
    )

    assert table.c.keys() == ["id", "name", "mrn", "mrn_hash", "email", "email_hash", "city"]
    assert indexes(table) == {
        "ix_patient_mrn_hash": (["mrn_hash"], False),
        "ix_patient_email_hash": (["email_hash"], False),
    }
    assert uniques(table) == []
    assert table.c.mrn_hash.nullable
    assert table.c.email_hash.nullable, "a normalizer may give no hash"
    assert [c.name for c in table.c if isinstance(c.type, SearchHash)] == ["mrn_hash", "email_hash"]


@pytest.mark.parametrize(
    ("dialect", "source", "hashed"),
    [
        (sqlite.dialect(), "mrn BLOB", "mrn_hash BLOB"),
        (postgresql.dialect(), "mrn BYTEA", "mrn_hash BYTEA"),
        (mysql.dialect(), "mrn BLOB", "mrn_hash BINARY(32)"),
    ],
    ids=["sqlite", "postgresql", "mariadb"],
)
def test_column_types_in_ddl(dialect: Any, source: str, hashed: str) -> None:
    """The hash column can be indexed whole, on MariaDB too, where a BLOB cannot."""
    table = with_id(Column("mrn", searchable()))

    assert str(CreateColumn(table.c.mrn).compile(dialect=dialect)) == source
    assert str(CreateColumn(table.c.mrn_hash).compile(dialect=dialect)) == hashed


def test_database_has_the_hash_column_and_its_index(engine: Engine) -> None:
    """CREATE TABLE really makes the column and the index on each database."""
    table = with_id(Column("mrn", searchable()), Column("ssn", searchable(), unique=True))
    table.create(engine)

    found = inspect(engine)
    assert [c["name"] for c in found.get_columns("patient")] == ["id", "mrn", "mrn_hash", "ssn", "ssn_hash"]
    unique = {tuple(u["column_names"]) for u in found.get_unique_constraints("patient")}
    indexed = {tuple(i["column_names"]) for i in found.get_indexes("patient")}
    assert unique == {("ssn_hash",)}
    assert ("mrn_hash",) in indexed


# -- every way to declare a model ------------------------------------------------------------------------------------

SHARED = Encrypted(String(20), searchable=True)
Mrn = Annotated[str, mapped_column(Encrypted(String(20), searchable=True))]
Email = Annotated[str | None, mapped_column(Encrypted(String(20), searchable=True))]
Phi = Annotated[str, 20]


def declarative() -> Any:
    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column(searchable())
        email: Mapped[str | None] = mapped_column(searchable())

    return Patient


def annotated() -> Any:
    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[Mrn]
        email: Mapped[Email]

    class Visitor(Base):
        __tablename__ = "visitor"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[Mrn]

    assert Visitor.__table__.c.mrn.type.column_id == "visitor.mrn"
    return Patient


def annotation_map() -> Any:
    class Base(DeclarativeBase):
        type_annotation_map = {Phi: Encrypted(String(20), searchable=True)}  # noqa: RUF012

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[Phi]
        email: Mapped[Phi | None] = mapped_column()

    return Patient


def module_constant() -> Any:
    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column(SHARED)
        email: Mapped[str | None] = mapped_column(SHARED)

    assert SHARED.column_id is None
    return Patient


def mixins() -> Any:
    class Base(DeclarativeBase):
        pass

    class HasMrn:
        mrn: Mapped[str] = mapped_column(searchable(), sort_order=1)

    class HasEmail:
        @declared_attr
        def email(self) -> Mapped[str | None]:
            return mapped_column(searchable(), sort_order=2)

    class Visitor(HasEmail, HasMrn, Base):
        __tablename__ = "visitor"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Patient(HasEmail, HasMrn, Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert Visitor.__table__.c.mrn.type.column_id == "visitor.mrn"
    assert Visitor.__table__.c.email_hash.type.source.column_id == "visitor.email"
    return Patient


def abstract_base() -> Any:
    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __abstract__ = True
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column(searchable())

    class Visitor(Person):
        __tablename__ = "visitor"

    class Patient(Person):
        __tablename__ = "patient"
        email: Mapped[str | None] = mapped_column(searchable(), sort_order=1)

    assert Visitor.__table__.c.mrn.type.column_id == "visitor.mrn"
    return Patient


def dataclass() -> Any:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        mrn: Mapped[str] = mapped_column(searchable())
        email: Mapped[str | None] = mapped_column(searchable(), default=None)

    return Patient


def imperative() -> Any:
    class Patient:
        def __init__(self, **values: Any) -> None:
            for name, value in values.items():
                setattr(self, name, value)

    mapper_registry = registry()
    table = with_id(
        Column("mrn", searchable()), Column("email", searchable()), metadata=mapper_registry.metadata
    )
    mapper_registry.map_imperatively(Patient, table)
    return Patient


def imperative_table() -> Any:
    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __table__ = with_id(
            Column("mrn", searchable()), Column("email", searchable()), metadata=Base.metadata
        )

    return Patient


STYLES = [
    declarative,
    annotated,
    annotation_map,
    module_constant,
    mixins,
    abstract_base,
    dataclass,
    imperative,
    imperative_table,
]


@pytest.mark.parametrize("style", STYLES)
@on_sqlite
def test_every_style_of_declaration(style: Callable[[], Any], byok: Byok, engine: Engine) -> None:
    """However a model is declared: the same columns and ids; it saves, loads without its hashes, and is found."""
    entity = style()
    table = inspect(entity).local_table
    assert table.c.keys() == ["id", "mrn", "mrn_hash", "email", "email_hash"]
    assert indexes(table) == {
        "ix_patient_mrn_hash": (["mrn_hash"], False),
        "ix_patient_email_hash": (["email_hash"], False),
    }
    assert (table.c.mrn.type.column_id, table.c.email.type.column_id) == ("patient.mrn", "patient.email")
    assert table.c.mrn_hash.type.source is table.c.mrn.type
    assert set(inspect(entity).attrs.keys()) == {"id", "mrn", "email"}

    table.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([entity(mrn="A-1", email="a@x.org"), entity(mrn="A-2", email=None)])
        session.commit()
    with byok.session("t1", engine) as session, statements(engine) as sql:
        found = session.scalars(select(entity).where(entity.mrn == "A-1")).all()
        assert [(p.id, p.mrn, p.email) for p in found] == [(1, "A-1", "a@x.org")]
        assert session.scalars(select(entity.id).where(entity.email == "a@x.org")).all() == [1]
    assert sql == [
        "SELECT patient.id, patient.mrn, patient.email FROM patient WHERE patient.mrn_hash = ?",
        "SELECT patient.id FROM patient WHERE patient.email_hash = ?",
    ]
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT length(mrn_hash), length(email_hash) FROM patient")).all()
    assert rows == [(32, 32), (32, None)]


def test_core_table_without_any_mapping(byok: Byok, engine: Engine) -> None:
    """A plain Table is enough: rows are written and found through Core on each database."""
    table = with_id(Column("mrn", searchable(), unique=True), Column("name", Encrypted(String(20))))
    table.metadata.create_all(engine)

    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(table), [{"mrn": "A-1", "name": "Ada"}, {"mrn": "A-2", "name": "Bob"}])
        found = connection.execute(select(table.c.id, table.c.name).where(table.c.mrn == "A-2")).all()
        assert found == [(2, "Bob")]
        stored = connection.execute(select(type_coerce(table.c.mrn, LargeBinary))).scalars().all()
    assert [len(value) for value in stored] == [49, 49]


@on_sqlite
def test_typed_model_runs(byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the type checkers read is one that works."""
    spec = importlib.util.spec_from_file_location("typed_model", TYPED_MODEL)
    assert spec is not None
    assert spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "typed_model", model)  # where SQLAlchemy looks annotations up
    spec.loader.exec_module(model)

    model.Base.metadata.create_all(engine)
    model.registered.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        assert model.save_and_find(session) == ["Ada"]


# -- the mapped class ------------------------------------------------------------------------------------------------


def test_entity_is_loaded_without_its_hash(byok: Byok, engine: Engine) -> None:
    """Neither a query, a refresh nor a lazy load of an entity fetches the hash; search_hash() does."""
    patient = declarative()
    patient.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(patient(mrn="A-1"))
        session.commit()
        with statements(engine) as sql:
            found = session.get(patient, 1)
            session.refresh(found)
            session.expire(found)
            assert found.mrn == "A-1"
            assert len(sql) == 3
            assert not [statement for statement in sql if "hash" in statement]
            digest = session.scalar(select(search_hash(patient.mrn)))
            assert len(sql) == 4
            assert "patient.mrn_hash" in sql[3]
    assert (type(digest), len(digest)) == (Digest, 32)


def test_dataclass_hides_the_hash() -> None:
    """A dataclass neither takes nor shows the hash, and compares without it."""
    patient = dataclass()

    assert list(pyinspect.signature(patient).parameters) == ["mrn", "email"]
    ada = patient(mrn="A-1")
    assert repr(ada).endswith("Patient(id=None, mrn='A-1', email=None)")
    assert ada == patient(mrn="A-1")


@on_sqlite
def test_an_attribute_with_another_name_than_its_column(byok: Byok, engine: Engine) -> None:
    """An attribute, key or property with another name: the hash is named after the column, and works."""

    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column("record_number", searchable())
        email: Mapped[str] = mapped_column("mail", searchable(), key="e_mail")

    class Visitor(Base):
        __table__ = with_id(
            Column("record_number", searchable()),
            Column("mail", searchable(), key="e_mail"),
            name="visitor",
            metadata=Base.metadata,
        )
        mrn = __table__.c.record_number
        email = deferred(__table__.c.e_mail)

    class Imperative:
        pass

    table = with_id(Column("record_number", searchable()), name="imperative", metadata=Base.metadata)
    Base.registry.map_imperatively(Imperative, table, properties={"code": table.c.record_number})

    assert set(inspect(Patient).attrs.keys()) == {"id", "mrn", "email"}
    assert set(inspect(Visitor).attrs.keys()) == {"id", "mrn", "email"}
    assert set(inspect(Imperative).attrs.keys()) == {"id", "code"}
    assert Patient.__table__.c.keys() == [
        "id",
        "record_number",
        "record_number_hash",
        "e_mail",
        "e_mail_hash",
    ]
    assert [c.name for c in Patient.__table__.c][3:] == ["mail", "mail_hash"]
    assert Patient.__table__.c.e_mail.type.column_id == "patient.mail"

    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        for entity in (Patient, Visitor):
            session.add(entity(mrn="A-1", email="a@x.org"))
            session.flush()
            assert session.scalars(select(entity.mrn).where(entity.email == "a@x.org")).all() == ["A-1"]
            assert session.scalars(select(entity.email).where(entity.mrn == "A-1")).all() == ["a@x.org"]
        imperative = Imperative()
        imperative.code = "C-1"  # type: ignore[attr-defined]
        session.add(imperative)
        session.flush()
        assert session.scalars(select(Imperative).where(table.c.record_number == "C-1")).all() == [imperative]
        assert session.scalars(select(Imperative).filter_by(code="C-1")).all() == [imperative]


def test_mappers_that_choose_their_columns() -> None:
    """column_prefix, include_properties and exclude_properties: subqueries have the hash where they have its source."""

    def attributes(**options: Any) -> tuple[set[str], set[str]]:
        mapper_registry = registry()
        table = with_id(
            Column("mrn", searchable()), Column("city", String), metadata=mapper_registry.metadata
        )
        mapper = mapper_registry.map_imperatively(type("Patient", (), {}), table, **options)
        configure_mappers()
        return set(mapper.attrs.keys()), set(select(mapper.class_).subquery().c.keys())

    everything = {"id", "mrn", "mrn_hash", "city"}
    assert attributes() == ({"id", "mrn", "city"}, everything)
    assert attributes(column_prefix="_") == ({"_id", "_mrn", "_city"}, everything)
    assert attributes(exclude_properties=["mrn"]) == ({"id", "city"}, {"id", "city"})
    assert attributes(exclude_properties=["city"]) == ({"id", "mrn"}, {"id", "mrn", "mrn_hash"})
    assert attributes(include_properties=["id", "mrn"]) == ({"id", "mrn"}, {"id", "mrn", "mrn_hash"})
    assert attributes(include_properties=["id"]) == ({"id"}, {"id"})


@on_sqlite
def test_class_mapped_to_something_else_than_a_table(byok: Byok, engine: Engine) -> None:
    """A class over a join, a subquery or an alias does not fetch hashes either, and searches with them."""

    class Base(DeclarativeBase):
        pass

    patient = with_id(Column("mrn", searchable()), metadata=Base.metadata)
    visit = with_id(Column("code", searchable()), name="visit", metadata=Base.metadata)

    class Joined(Base):
        __table__ = join(patient, visit, patient.c.id == visit.c.id)
        id = column_property(patient.c.id, visit.c.id)

    class Derived(Base):
        __table__ = select(patient).subquery("derived")
        __mapper_args__ = {"primary_key": [__table__.c.id]}  # noqa: RUF012

    class Aliased(Base):
        __table__ = patient.alias("other")
        __mapper_args__ = {"primary_key": [__table__.c.id]}  # noqa: RUF012

    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(patient), [{"mrn": "A-1"}, {"mrn": "A-2"}])
        session.execute(insert(visit), [{"code": "V-1"}, {"code": "V-2"}])
        with statements(engine) as sql:
            both = session.scalars(select(Joined).where(Joined.mrn == "A-2", Joined.code == "V-2")).one()
            derived = session.scalars(select(Derived).where(Derived.mrn == "A-2")).one()
            other = session.scalars(select(Aliased).where(Aliased.mrn == "A-2")).one()
        assert (both.mrn, both.code, derived.mrn, other.mrn) == ("A-2", "V-2", "A-2", "A-2")
    fetched = [statement.split(" FROM ")[0] for statement in sql]
    assert fetched == [
        "SELECT patient.id, visit.id AS id_1, patient.mrn, visit.code",
        "SELECT derived.id, derived.mrn",
        "SELECT other.id, other.mrn",
    ]


# -- Python-side defaults --------------------------------------------------------------------------------------------


def test_hash_follows_python_side_defaults(byok: Byok, engine: Engine) -> None:
    """A value that a default or onupdate of the source gives is hashed as one that was given."""
    numbers = iter(["D-1", "D-2", "D-3"])
    table = with_id(
        Column("mrn", searchable(), default=lambda: next(numbers)),
        Column("status", searchable(), default="new", onupdate="changed"),
        Column("city", String(20)),
    )
    table.metadata.create_all(engine)

    def ids(session: Session, condition: Any) -> list[int]:
        return list(session.scalars(select(table.c.id).where(condition).order_by(table.c.id)))

    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"city": "Bern"}, {"city": "Genf"}])
        session.execute(insert(table).values(city="Chur"))
        session.execute(insert(table).values(city="Lugano", mrn="G-1"))
        assert ids(session, table.c.mrn == "D-2") == [2]
        assert ids(session, table.c.mrn.in_(["D-1", "D-3", "G-1"])) == [1, 3, 4]
        assert ids(session, table.c.status == "new") == [1, 2, 3, 4]
        session.execute(table.update().where(table.c.mrn == "D-3").values(city="Davos"))
        assert ids(session, table.c.status == "changed") == [3]
        assert ids(session, table.c.status == "new") == [1, 2, 4]


def _late(table: Table) -> None:
    """Change defaults after the table was made."""
    numbers = iter([f"D-{number}" for number in range(1, 9)])
    table.c.mrn.default = ColumnDefault(lambda: next(numbers))
    table.c.status.default = ColumnDefault("new")
    table.c.tax.default = None


@pytest.mark.parametrize("way", ["Core", "rows", "multi-VALUES", "ORM", "a copy"])
def test_hash_follows_defaults_that_are_given_later(byok: Byok, engine: Engine, way: str) -> None:
    """A default that is assigned, or taken away, when the table is made: the row is found by what it gave."""
    table = with_id(
        Column("mrn", searchable()),
        Column("status", searchable()),
        Column("tax", searchable(), default="none"),
        Column("city", String(20)),
    )

    add_index(table, IndexOf("both", ("mrn", "status"), first_of), unique=False)
    table.metadata.create_all(engine)
    _late(table)
    if way == "a copy":
        table = table.to_metadata(MetaData())
    with byok.session("t1", engine) as session:
        if way == "rows":
            session.execute(insert(table), [{"city": "Bern"}, {"city": "Genf"}])
        elif way == "multi-VALUES":
            session.execute(insert(table).values([{"city": "Bern"}, {"city": "Genf"}]))
        elif way == "ORM":
            mapped = type("Patient", (), {})
            registry().map_imperatively(mapped, table)
            session.add_all([mapped(), mapped()])
            session.flush()
        else:
            session.execute(insert(table).values(city="Bern"))
            session.execute(insert(table).values(city="Genf"))
        rows = session.execute(select(table.c.mrn, table.c.status, table.c.tax).order_by(table.c.id)).all()
        assert rows == [("D-1", "new", None), ("D-2", "new", None)]
        found = select(table.c.id).order_by(table.c.id)
        assert session.scalars(found.where(table.c.mrn == "D-2")).all() == [2]
        assert session.scalars(found.where(table.c.status == "new")).all() == [1, 2]
        both = table.c.both_hash
        assert session.scalar(select(func.count(distinct(both)))) == 2
        update = table.update().where(table.c.id == 1)
        if way != "a copy":
            with pytest.raises(UnsupportedQueryError, match="only some"):
                session.execute(update.values(mrn="x"))
        session.execute(update.values(city="Chur", mrn="x", status="y"))
        assert session.scalars(found.where(table.c.status == "y")).all() == [1]


def test_late_onupdate_reaches_the_hash(byok: Byok, engine: Engine) -> None:
    """One that is assigned when the table is made; where several columns are hashed together it is refused."""
    table = with_id(Column("mrn", searchable()), Column("city", String(20)))
    table.metadata.create_all(engine)
    table.c.mrn.onupdate = ColumnDefault("changed", for_update=True)
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(mrn="a", city="Bern"))
        session.execute(table.update().values(city="Genf"))
        assert session.scalars(select(table.c.mrn).where(table.c.mrn == "changed")).all() == ["changed"]
    add_index(
        both := with_id(Column("a", searchable()), Column("b", searchable())),
        IndexOf("ab", ("a", "b"), first_of),
        False,
    )
    both.c.a.onupdate = ColumnDefault("changed", for_update=True)
    with byok.session("t1", engine) as session, pytest.raises(UnsupportedQueryError, match="onupdate"):
        session.execute(both.update().values(id=2))


@pytest.mark.parametrize("late", [literal("S3CRET"), text("'S3CRET'"), func.lower("S3CRET"), Sequence("s")])
def test_late_sql_defaults_are_refused(byok: Byok, engine: Engine, late: Any) -> None:
    """What is refused where a column is declared is refused when it would be sent, too."""
    table = with_id(
        Column("mrn", searchable()), Column("name", Encrypted(String(20))), Column("city", String(20))
    )
    table.metadata.create_all(engine)
    for column in (table.c.mrn, table.c.name):
        made = late if isinstance(late, Sequence) else ColumnDefault(late)
        with byok.session("t1", engine) as session:
            column.default = made
            for statement in (
                insert(table).values(city="x"),
                insert(table),
                table.insert().values([{"city": "x"}]),
            ):
                with statements(engine) as sent, pytest.raises(UnsupportedQueryError, match="SQL expression"):
                    session.execute(statement)
                assert sent == []
            column.default, column.onupdate = None, made
            with statements(engine) as sent, pytest.raises(UnsupportedQueryError, match="SQL expression"):
                session.execute(table.update().values(city="x"))
            assert sent == []
            column.onupdate = None


@pytest.mark.parametrize("late", ["server_default", "server_onupdate", "computed", "identity"])
@pytest.mark.parametrize("name", ["mrn", "name", "mrn_hash"])
def test_late_server_defaults_are_refused_in_ddl(byok: Byok, engine: Engine, late: str, name: str) -> None:
    """Assigned when the table is made, a value would stand in CREATE TABLE in the clear."""
    given = {"computed": Computed("'S3CRET'"), "identity": Identity()}.get(late, DefaultClause("S3CRET"))
    table = with_id(Column("mrn", searchable()), Column("name", Encrypted(String(20))))
    setattr(table.c[name], late, given)
    if name == "mrn_hash" and late != "server_default":
        pytest.skip("nothing that is rendered; try server_default")
    with statements(engine) as sent:
        for create in (
            lambda: table.metadata.create_all(engine),
            lambda: str(CreateTable(table)),
            lambda: str(CreateColumn(table.c[name]).compile(dialect=engine.dialect)),
        ):
            with pytest.raises(DeclarationError, match=r"patient\.") as raised:
                create()
            assert "S3CRET" not in str(raised.value)
    assert not [one for one in sent if "CREATE" in one]


# -- names, schemas, copies ------------------------------------------------------------------------------------------


def test_quoted_and_mixed_case_names(byok: Byok, engine: Engine) -> None:
    """Names that need quotes, on each database, and a name whose quoting is switched off or on by hand."""
    table = with_id(Column("Ärztin Nr", searchable()), Column("select", searchable()), name="Mixed Case")
    table.metadata.create_all(engine)
    assert table.c.keys() == ["id", "Ärztin Nr", "Ärztin Nr_hash", "select", "select_hash"]
    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"Ärztin Nr": "A-1", "select": "x"}])
        assert session.scalars(select(table.c["select"]).where(table.c["Ärztin Nr"] == "A-1")).all() == ["x"]

    by_hand = with_id(
        Column(quoted_name("SSN", quote=False), searchable()), Column("tax", searchable(), quote=True)
    )
    ddl = str(CreateTable(by_hand).compile(dialect=postgresql.dialect()))
    assert "SSN_hash BYTEA" in ddl
    assert '"SSN_hash"' not in ddl
    assert '"tax_hash" BYTEA' in ddl


@pytest.mark.parametrize("sync_url", ["sqlite", "postgresql"], indirect=True)
def test_table_in_a_schema(byok: Byok, engine: Engine, tmp_path: Path) -> None:
    """The schema is part of the column id: equal tables in two schemas do not open each other's values."""
    if engine.dialect.name == "sqlite":
        event.listen(
            engine, "connect", lambda c, _: c.execute(f"ATTACH '{tmp_path / 'clinic.db'}' AS clinic")
        )
        engine.dispose()
    else:
        with engine.begin() as connection:
            connection.execute(text("CREATE SCHEMA clinic"))
    metadata = MetaData()
    plain = with_id(Column("mrn", searchable()), metadata=metadata)
    clinic = with_id(Column("mrn", searchable()), metadata=metadata, schema="clinic")
    metadata.create_all(engine)
    assert (plain.c.mrn.type.column_id, clinic.c.mrn.type.column_id) == ("patient.mrn", "clinic.patient.mrn")

    with byok.session("t1", engine) as session:
        session.execute(insert(clinic), [{"mrn": "A-1"}])
        assert session.execute(select(clinic).where(clinic.c.mrn == "A-1")).one()[:2] == (1, "A-1")
        session.execute(text("INSERT INTO patient SELECT * FROM clinic.patient"))
        with pytest.raises(NotSearchableError):
            session.scalars(select(plain.c.id).where(plain.c.mrn == "A-1")).all()
        with pytest.raises(TamperedError):
            session.scalars(select(plain.c.mrn)).all()


@pytest.mark.parametrize(
    ("options", "column_id"),
    [
        ({}, "patient.mrn"),
        ({"name": "archive"}, "archive.mrn"),
        ({"name": "archive", "schema": "old"}, "old.archive.mrn"),
    ],
)
def test_copied_table_is_complete_and_has_ids_of_its_own(options: dict[str, str], column_id: str) -> None:
    """to_metadata copies the hash columns with their indexes and constraints, once; ids follow the new table."""
    table = with_id(
        Column("org", String),
        Column("mrn", searchable(), unique=True),
        Column("email", searchable(), index=True),
        Column("tax", searchable(column_id="person.tax"), default="none"),
        UniqueConstraint("org", "email"),
        Index("by_org", "org", "tax"),
    )
    copy = table.to_metadata(MetaData(), **options)

    assert copy.c.keys() == table.c.keys()
    assert uniques(copy) == uniques(table) == [["mrn_hash"], ["org", "email_hash"]]
    assert sorted(indexes(copy).values()) == sorted(indexes(table).values())
    assert copy.c.mrn.type.column_id == column_id
    assert copy.c.mrn_hash.type.source.column_id == column_id
    assert copy.c.tax.type.column_id == "person.tax"
    assert copy.c.tax_hash.default is not None
    assert table.c.mrn_hash.type.source.column_id == "patient.mrn", "the original is what it was"


@on_sqlite
def test_rows_of_a_copied_table(byok: Byok, engine: Engine) -> None:
    """A copy under another name reads its own rows, and not the ciphertext of the original."""
    table = with_id(Column("mrn", searchable()))
    copy = table.to_metadata(table.metadata, name="archive")
    table.metadata.create_all(engine)

    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"mrn": "A-1"}])
        session.execute(insert(copy), [{"mrn": "A-1"}])
        assert session.execute(select(copy.c.id, copy.c.mrn).where(copy.c.mrn == "A-1")).all() == [(1, "A-1")]
        session.execute(text("UPDATE archive SET mrn = (SELECT mrn FROM patient)"))
        with pytest.raises(TamperedError):
            session.scalars(select(copy.c.mrn)).all()


def test_type_of_one_column_used_for_another() -> None:
    """A type taken from a declared column is a fresh declaration elsewhere, also in a table that exists already."""
    table = with_id(Column("mrn", searchable()))
    other = with_id(Column("code", table.c.mrn.type), name="visit")
    other.append_column(Column("late", table.c.mrn.type))

    assert other.c.keys() == ["id", "code", "code_hash", "late", "late_hash"]
    assert other.c.late.type.column_id == "visit.late"
    assert other.c.late_hash.type.source.column_id == "visit.late"
    assert table.c.mrn.type.column_id == "patient.mrn"


def test_declared_column_id_stays() -> None:
    """column_id is for renamed columns: it is used as given, for the value and for the hash."""
    table = with_id(Column("number", searchable(column_id="person.mrn")), name="client")

    assert table.c.number.type.column_id == "person.mrn"
    assert table.c.number_hash.type.source.scope.name == "person.mrn"


def test_pickled_metadata() -> None:
    """MetaData survives pickling with its encrypted columns, as SQLAlchemy promises for plain ones."""
    table = with_id(Column("mrn", searchable(normalize=str.casefold), unique=True))
    loaded = pickle.loads(pickle.dumps(table.metadata)).tables["patient"]  # noqa: S301

    assert loaded.c.keys() == ["id", "mrn", "mrn_hash"]
    assert repr(loaded.c.mrn.type) == repr(table.c.mrn.type)
    assert loaded.c.mrn_hash.type.source is loaded.c.mrn.type


def test_metadata_is_pickled_after_it_was_used(byok: Byok, engine: Engine) -> None:
    """What statements have made of its types by then does not get in the way, of hash columns neither."""
    table = with_id(Column("mrn", searchable()), Column("flags", Encrypted(JSON)))
    table.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"mrn": "A-1", "flags": {"a": 1}}])
        assert session.scalars(select(table.c.id).where(table.c.mrn == "A-1")).all() == [1]
        loaded = pickle.loads(pickle.dumps(table.metadata)).tables["patient"]  # noqa: S301
        found = select(loaded.c.flags).where(loaded.c.mrn == "A-1")
        assert session.scalars(found).all() == [{"a": 1}]


@pytest.mark.parametrize(
    "method",
    ["process_bind_param", "process_result_value", "bind_expression", "column_expression", "bind_processor"],
)
def test_a_subclass_that_converts_values_is_refused(method: str) -> None:
    """What it does would be passed over or run on ciphertext, and values be stored that nobody can read."""
    with pytest.raises(DeclarationError, match=rf"{method}\(\).*TypeDecorator"):
        type("Lowered", (Encrypted,), {method: lambda *_: None, "cache_ok": True})


def test_a_subclass_may_give_options() -> None:
    """A subclass that only declares what it wraps is an Encrypted like any other, and can be pickled and copied."""
    table = with_id(Column("mrn", Code()))
    copied = pickle.loads(pickle.dumps(table.to_metadata(MetaData()).metadata)).tables["patient"]  # noqa: S301
    assert isinstance(copied.c.mrn.type, Code)
    assert copied.c.keys() == ["id", "mrn", "mrn_hash"]


def test_types_that_differ_in_one_option_share_no_statement() -> None:
    """Two types of one column id have one key in the cache only where they make the same of a value."""
    inside = [
        String(20), String(20).with_variant(String(5), "sqlite"), String(20).with_variant(String(6), "sqlite"),
        String(21), Enum("a", "b"), Enum("a", "c"), JSON(), JSON(none_as_null=True),
    ]  # fmt: skip
    types = [Encrypted(each, column_id="x.y") for each in inside]
    options: list[dict[str, Any]] = [
        {}, {"hash": "hmac-sha256"}, {"salt_scope": "s"}, {"normalize": str.casefold}, {"pad_to": 16}, {"owner": "o"},
    ]  # fmt: skip
    types += [Encrypted(String(20), searchable=True, column_id="x.y", **each) for each in options]
    assert len({each._static_cache_key for each in types}) == len(types)
    hashes = [each.hash_type for each in types if each.searchable]
    assert len({each._static_cache_key for each in hashes}) == len(hashes)


def test_extend_existing_keeps_one_hash_column() -> None:
    """Declaring a table's column again replaces the source and keeps one sibling, with what is asked of it now."""
    metadata = MetaData()
    with_id(Column("mrn", searchable()), Column("city", String), metadata=metadata)
    extended = Table(
        "patient", metadata, Column("mrn", searchable(hash="hmac-sha256"), unique=True), extend_existing=True
    )

    assert sorted(extended.c.keys()) == ["city", "id", "mrn", "mrn_hash"]
    assert uniques(extended) == [["mrn_hash"]]
    assert extended.c.mrn_hash.type.source.hash == "hmac-sha256"
    again = Table("patient", metadata, Column("mrn", searchable(), unique=True), extend_existing=True)
    assert uniques(again) == [["mrn_hash"]]
    assert again.c.mrn_hash.type.source.hash == "sha256"


def test_naming_convention_names_the_hash_column() -> None:
    """Generated names are those of the column that the index or constraint is really on."""
    convention = {
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
    table = with_id(
        Column("mrn", searchable(), unique=True),
        Column("email", searchable()),
        metadata=MetaData(naming_convention=convention),
    )
    ddl = str(CreateTable(table).compile(dialect=postgresql.dialect()))

    assert "CONSTRAINT uq_patient_mrn_hash UNIQUE (mrn_hash)" in ddl
    assert [str(CreateIndex(index)) for index in table.indexes] == [
        "CREATE INDEX ix_patient_email_hash ON patient (email_hash)"
    ]


# -- reflection ------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(byok: Byok, engine: Engine) -> Engine:
    """A database that has the table and one row already."""
    table = with_id(
        Column("mrn", searchable(), unique=True), Column("email", searchable()), Column("city", String(20))
    )
    table.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"mrn": "A-1", "email": "a@x.org", "city": "Bern"}])
        session.commit()
    return engine


def test_reflected_table_with_an_override(byok: Byok, filled: Engine) -> None:
    """Reflection finds the hash column as bytes; declaring the source makes it the hash column again."""
    table = Table(
        "patient",
        MetaData(),
        Column("mrn", searchable(), unique=True),
        Column("email", searchable()),
        autoload_with=filled,
    )

    assert sorted(table.c.keys()) == ["city", "email", "email_hash", "id", "mrn", "mrn_hash"]
    assert isinstance(table.c.mrn_hash.type, SearchHash)
    over = [c for c in (*table.constraints, *table.indexes) if c.columns.keys() == ["mrn_hash"]]
    assert {getattr(c, "unique", True) for c in over} == {True}, "no second, plain index"
    assert [i.columns.keys() for i in table.indexes if "email_hash" in i.columns] == [["email_hash"]]
    copy = table.to_metadata(MetaData())
    assert (indexes(copy), uniques(copy)) == (indexes(table), uniques(table)), "nor in a copy of it"
    with byok.session("t1", filled) as session:
        found = session.execute(select(table.c.city, table.c.mrn).where(table.c.mrn == "A-1")).all()
        assert found == [("Bern", "A-1")]


@pytest.mark.parametrize("way", ["extended", "copied", "pickled"])
def test_a_hash_column_reflected_before_its_source_is_declared(byok: Byok, filled: Engine, way: str) -> None:
    """What was read from the database is taken for the hashes later too, also in a copy of the table."""
    metadata = MetaData()
    table = Table("patient", metadata, autoload_with=filled)
    if way == "copied":
        metadata = MetaData()
        table.to_metadata(metadata)
    elif way == "pickled":
        metadata = pickle.loads(pickle.dumps(metadata))  # noqa: S301 - our own
    table = Table("patient", metadata, Column("mrn", searchable(), unique=True), extend_existing=True)

    assert isinstance(table.c.mrn_hash.type, SearchHash)
    with byok.session("t1", filled) as session:
        assert session.scalars(select(table.c.city).where(table.c.mrn == "A-1")).all() == ["Bern"]


@pytest.mark.parametrize("way", ["table", "metadata", "columns"])
def test_reflecting_a_declared_table_leaves_it_encrypted(byok: Byok, filled: Engine, way: str) -> None:
    """Reading a table from the database over its declaration changes neither what is encrypted nor what is searched."""
    metadata = MetaData()
    declared = [Column("mrn", searchable(), key="number", unique=True), Column("email", searchable())]
    table = Table("patient", metadata, Column("id", Integer, primary_key=True), *declared)
    if way == "metadata":
        metadata.reflect(filled, extend_existing=True)
    else:
        chosen = {"include_columns": ["id", "mrn", "email", "city"]} if way == "columns" else {}
        Table("patient", metadata, autoload_with=filled, extend_existing=True, **chosen)

    assert isinstance(table.c.number.type, Encrypted)
    assert isinstance(table.c.email.type, Encrypted)
    assert isinstance(table.c.number_hash.type, SearchHash)
    with byok.session("t1", filled) as session:
        assert session.scalars(select(table.c.city).where(table.c.number == "A-1")).all() == ["Bern"]
        session.execute(insert(table), [{"number": "A-2", "email": "b@x.org", "city": "Genf"}])
        assert session.scalars(select(table.c.city).where(table.c.email == "b@x.org")).all() == ["Genf"]
        assert session.scalars(select(table.c.city).where(table.c.number == "A-2")).all() == ["Genf"]


def test_a_type_that_is_given_while_reflecting(byok: Byok, filled: Engine) -> None:
    """An application may say in column_reflect what is encrypted; a hash column that is read later is taken for it."""
    metadata = MetaData()

    @event.listens_for(metadata, "column_reflect")
    def encrypted(inspector: Any, table: Table, given: Any) -> None:
        given["key"] = f"{given['name']}_"
        if given["name"] in ("mrn", "email"):
            given["type"] = searchable()
        elif given["name"].endswith("_hash"):
            del given["key"]

    table = Table("patient", metadata, autoload_with=filled)
    with byok.session("t1", filled) as session:
        session.execute(insert(table), [{"mrn_": "A-2", "email_": "b@x.org", "city_": "Genf"}])
        for email in ("a@x.org", "b@x.org"):
            assert len(session.scalars(select(table.c.mrn_).where(table.c.email_ == email)).all()) == 1


def test_reflected_hash_column_follows_defaults(byok: Byok, filled: Engine) -> None:
    """A default that is declared for a reflected column, or taken away again, reaches its hash."""
    metadata = MetaData()
    override = Column("mrn", searchable(), default="D-1", onupdate="U-1")
    table = Table("patient", metadata, override, autoload_with=filled)
    with byok.session("t1", filled) as session:
        session.execute(insert(table), [{"city": "Genf"}])
        assert session.scalars(select(table.c.city).where(table.c.mrn == "D-1")).all() == ["Genf"]
        session.execute(table.update().where(table.c.mrn == "D-1").values(city="Chur"))
        assert session.scalars(select(table.c.city).where(table.c.mrn == "U-1")).all() == ["Chur"]

        filled.clear_compiled_cache()
        Table("patient", metadata, Column("mrn", searchable()), extend_existing=True)
        session.execute(insert(table), [{"city": "Davos"}])
        session.execute(table.update().where(table.c.city == "Davos").values(city="Lugano"))
        assert session.scalars(select(table.c.city).where(table.c.mrn.is_(None))).all() == ["Lugano"]


def test_automap(byok: Byok, filled: Engine) -> None:
    """An automapped class may declare its encrypted columns and leave the rest to reflection."""
    base = automap_base()

    class Patient(base):  # type: ignore[valid-type, misc]
        __tablename__ = "patient"
        mrn: Mapped[str] = mapped_column(searchable())
        email: Mapped[str] = mapped_column(searchable())

    base.prepare(autoload_with=filled)
    with byok.session("t1", filled) as session, statements(filled) as sql:
        found = session.scalars(select(Patient).where(Patient.email == "a@x.org")).one()
        assert (found.mrn, found.city) == ("A-1", "Bern")
        session.add(Patient(mrn="A-2", email="b@x.org", city="Genf"))
        session.flush()
        assert session.scalar(select(Patient.city).where(Patient.mrn == "A-2")) == "Genf"
    assert "hash" not in sql[0].split(" FROM ")[0]


def test_deferred_reflection(byok: Byok, filled: Engine) -> None:
    """So may a class that is reflected later."""

    class Base(DeferredReflection, DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column(searchable())
        email: Mapped[str] = mapped_column(searchable())

    Base.prepare(filled)
    with byok.session("t1", filled) as session, statements(filled) as sql:
        found = session.scalars(select(Patient).where(Patient.mrn == "A-1")).one()
        assert (found.email, found.city) == ("a@x.org", "Bern")  # type: ignore[attr-defined]
    assert len(sql) == 1
    assert "hash" not in sql[0].split(" FROM ")[0]


def test_table_reflected_without_declaring_anything_holds_bytes(filled: Engine) -> None:
    """A table that was only reflected is plain bytes: nothing is decrypted that nobody declared."""
    table = Table("patient", MetaData(), autoload_with=filled)
    with filled.connect() as connection:
        assert connection.scalar(select(func.length(table.c.mrn))) == 49
        assert connection.scalar(select(table.c.mrn))[0] == 0xB1


# -- names that are taken --------------------------------------------------------------------------------------------


def test_an_encrypted_column_is_not_replaced_by_a_plain_one() -> None:
    """What declares a column again without encryption would write its values in the clear, and is refused."""
    table = with_id(Column("mrn", searchable()), Column("name", Encrypted(String(20))))
    for name in ("mrn", "name"):
        for again in (Column(name, String(20)), Column(name, LargeBinary), Column("other", String, key=name)):
            with pytest.raises(DeclarationError, match=rf"patient\.{name}: .* encrypted already"):
                Table("patient", table.metadata, again, extend_existing=True)
        with pytest.raises(DeclarationError, match="encrypted already"):
            table.append_column(Column(name, String(20)), replace_existing=True)

    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "patient"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column(searchable())

    with pytest.raises(DeclarationError, match="encrypted already"):
        Patient.mrn = mapped_column(String(20))  # type: ignore[assignment]
    with pytest.raises(DeclarationError, match="mrn_hash"):
        Patient.mrn_hash = mapped_column(LargeBinary)  # type: ignore[attr-defined]
    Table(
        "patient", Base.metadata, Column("mrn", searchable()), Column("city", String(9)), extend_existing=True
    )


@pytest.mark.parametrize(
    "type_", [String(20), LargeBinary(), LargeBinary(32), BINARY(32), Integer(), searchable()], ids=repr
)
def test_own_column_with_the_name_of_the_hash_is_refused(type_: Any) -> None:
    """A column of the user's own that has the sibling's name is not taken over, whatever its type is."""
    with pytest.raises(DeclarationError, match=r"patient\.mrn: the table has a column 'mrn_hash' of its own"):
        with_id(Column("mrn_hash", type_), Column("mrn", searchable()))
    for own in (
        lambda: Column("mrn_hash", type_),
        lambda: Column("mrn_hash", type_, key="digest"),
        lambda: Column("digest", type_, key="mrn_hash"),
    ):
        with pytest.raises(DeclarationError, match="mrn_hash"):
            with_id(own(), Column("mrn", searchable()))
        with pytest.raises(DeclarationError, match="mrn_hash"):
            with_id(Column("mrn", searchable()), own())
        table = with_id(Column("mrn", searchable()))
        with pytest.raises(DeclarationError, match="mrn_hash"):
            table.append_column(own(), replace_existing=True)
        with pytest.raises(DeclarationError, match="mrn_hash"):
            Table("patient", table.metadata, own(), extend_existing=True)
        assert isinstance(table.c.mrn_hash.type, SearchHash)
    metadata = MetaData()
    with_id(Column("mrn_hash", type_), metadata=metadata)
    with pytest.raises(DeclarationError, match="mrn_hash"):
        Table("patient", metadata, Column("mrn", searchable()), extend_existing=True)


@pytest.mark.parametrize("own", ["MRN_hash", "mrn_HASH", "Mrn_Hash"])
def test_names_that_differ_in_case_are_one(own: str) -> None:
    """SQLite and MariaDB would refuse the table, or keep hashes in a column of the application's own."""
    for columns in (
        lambda: (Column(own, String(20)), Column("mrn", searchable())),
        lambda: (Column("mrn", searchable()), Column(own, String(20))),
        lambda: (
            Column("other", String(20), key="x"),
            Column(own, LargeBinary, key="y"),
            Column("mrn", searchable()),
        ),
    ):
        with pytest.raises(
            DeclarationError, match=r"patient\.mrn: the table has a column 'mrn_hash' of its own"
        ):
            with_id(*columns())
    table = with_id(Column("mrn", searchable()), Column("FIRST_hash", String(20)))
    with pytest.raises(DeclarationError, match="give it another name="):
        add_index(table, IndexOf("first", ("mrn",), first_of), unique=False)


def test_a_name_that_is_too_long_for_its_hash_column_raises_in_ddl(byok: Byok, engine: Engine) -> None:
    """Typed, before the database refuses or cuts it; the longest name that it takes works."""
    longest = {"sqlite": 90, "postgresql": 62}.get(engine.dialect.name, 59)
    table = with_id(Column("m" * longest, searchable()))
    table.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"m" * longest: "A-1"}])
        assert session.scalars(select(table.c.id).where(table.c["m" * longest] == "A-1")).all() == [1]
    table.metadata.drop_all(engine)
    table = with_id(Column("m" * (longest + 1), searchable()))
    if engine.dialect.name == "sqlite":
        table.metadata.create_all(engine)
        return
    with pytest.raises(DeclarationError, match="too long"):
        table.metadata.create_all(engine)
