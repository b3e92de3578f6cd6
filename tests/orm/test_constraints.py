"""Constraints and indexes that name an encrypted column: those that move to its hash, those that are refused."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    Computed,
    Engine,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    String,
    Table,
    Text,
    TypeDecorator,
    Unicode,
    UniqueConstraint,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.dialects.postgresql import ARRAY, ExcludeConstraint
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, declared_attr, mapped_column
from sqlalchemy.schema import CreateIndex

from sqla_byok import Byok, Encrypted, hash_index
from sqla_byok.errors import DeclarationError, UnsupportedQueryError
from sqla_byok.normalize import casefold


def searchable(**options: Any) -> Encrypted[str]:
    return Encrypted(String(20), searchable=True, **options)


def patient(*columns: Any, metadata: MetaData | None = None, **options: Any) -> Table:
    return Table(
        "patient",
        metadata or MetaData(),
        Column("id", Integer, primary_key=True),
        Column("org", String(20)),
        *columns,
        **options,
    )


def over(table: Any) -> tuple[list[list[str]], list[tuple[list[str], bool]]]:
    """The columns of each unique constraint, and of each index with whether it is unique."""
    unique = [[c.name for c in k.columns] for k in table.constraints if isinstance(k, UniqueConstraint)]
    indexes = [([c.name for c in index.columns], bool(index.unique)) for index in table.indexes]
    return sorted(unique), sorted(indexes)


PLAIN = (["mrn_hash"], False)


def _two(*more: Any, convention: dict[str, str] | None = None) -> Table:
    metadata = MetaData(naming_convention=convention) if convention else MetaData()
    return patient(Column("mrn", searchable()), Column("tax", searchable()), *more, metadata=metadata)


def _beside(index: Callable[[Table], Index]) -> Callable[..., Table]:
    def made(**options: Any) -> Table:
        table = _two(**options)
        index(table)
        return table

    return made


SAME_NAME: dict[str, Callable[..., Table]] = {
    "by names": lambda **options: _two(Index(None, "mrn", "tax"), **options),
    "unique": lambda **options: _two(Index(None, "mrn", "tax", unique=True), **options),
    "with a plain column": lambda **options: _two(Index(None, "mrn", "org"), **options),
    "alone": lambda **options: _two(Index(None, "mrn"), **options),
    "by columns": _beside(lambda table: Index(None, table.c.mrn, table.c.tax)),
    "by the hash columns": _beside(lambda table: Index(None, table.c.mrn_hash, table.c.tax_hash)),
    "behind a plain column": lambda **options: _two(Index(None, "org", "mrn"), **options),
    "with a name": lambda **options: _two(Index("by_both", "mrn", "tax"), **options),
}


@pytest.mark.parametrize(
    "convention", [None, {"ix": "ix_%(table_name)s_%(column_0_name)s"}, {"ix": "%(column_0_label)s"}]
)
@pytest.mark.parametrize("case", SAME_NAME)
def test_an_index_without_a_name_takes_the_place_of_the_hash_columns(
    byok: Byok, engine: Engine, case: str, convention: Any
) -> None:
    """SQLAlchemy gives both one name; a copy of the table is made in the same way, and the search has an index."""
    table = SAME_NAME[case](convention=convention)
    for each in (table, table.to_metadata(MetaData())):
        each.metadata.create_all(engine)
        found = inspect(engine).get_indexes(each.name)
        assert sorted(str(one["name"]) for one in found) == sorted(str(index.name) for index in each.indexes)
        first = [next(iter(index.columns)).name for index in each.indexes]
        assert {"mrn_hash", "tax_hash"} <= set(first)
        with byok.session("t1", engine) as session:
            session.execute(insert(each), [{"mrn": "a", "tax": "b"}])
            assert session.scalars(select(each.c.id).where(each.c.mrn == "a", each.c.tax == "b")).all() == [1]
        each.metadata.drop_all(engine)
    by_convention = _two(convention=convention).indexes
    named = {"behind a plain column": 1, "with a name": 1}.get(case, 0)
    assert len(table.indexes) == len(by_convention) + named


def test_an_index_of_some_rows_does_not_serve_the_search() -> None:
    """It cannot take the place: it needs a name."""
    for columns in (["mrn", "tax"], ["mrn"]):
        for option in ({"postgresql_where": text("org = 'x'")}, {"sqlite_where": text("org = 'x'")}):
            with pytest.raises(DeclarationError, match="give it one"):
                _two(Index(None, *columns, **option))
    assert len(_two(Index("some", "mrn", "tax", postgresql_where=text("org = 'x'"))).indexes) == 3


# -- what moves ------------------------------------------------------------------------------------------------------


def by_object_before() -> Table:
    column = Column("mrn", searchable())
    constraint = UniqueConstraint(column)
    table = patient(column)
    assert constraint.table is table
    return table


def by_object_of_two_columns() -> Table:
    org, mrn = Column("ward", String(20)), Column("mrn", searchable())
    return patient(mrn, org, UniqueConstraint(mrn, org))


def by_object_before_its_type() -> Table:
    column: Column[Any] = Column("mrn")
    UniqueConstraint(column)
    column._set_type(searchable())  # as Declarative does with a type that comes from the annotation
    return patient(column)


def by_object_after() -> Table:
    table = patient(Column("mrn", searchable()))
    UniqueConstraint(table.c.org, table.c.mrn)
    return table


def appended() -> Table:
    table = patient(Column("mrn", searchable()))
    table.append_constraint(UniqueConstraint("mrn", "org"))
    return table


def index_after() -> Table:
    table = patient(Column("mrn", searchable()))
    index = Index("by_mrn", table.c.mrn, table.c.org)
    assert str(CreateIndex(index)) == "CREATE INDEX by_mrn ON patient (mrn_hash, org)"
    return table


def index_beside_an_expression() -> Table:
    table = patient(Column("mrn", searchable()))
    index = Index("by_mrn", func.lower(table.c.org), table.c.mrn, unique=True)
    assert str(CreateIndex(index)) == "CREATE UNIQUE INDEX by_mrn ON patient (lower(org), mrn_hash)"
    return table


@pytest.mark.parametrize(
    ("declare", "unique", "indexes"),
    [
        (lambda: patient(Column("mrn", searchable())), [], [PLAIN]),
        (lambda: patient(Column("mrn", searchable(), index=True)), [], [PLAIN]),
        (lambda: patient(Column("mrn", searchable(), unique=True)), [["mrn_hash"]], []),
        (lambda: patient(Column("mrn", searchable(), unique=True, index=True)), [], [(["mrn_hash"], True)]),
        (
            lambda: patient(Column("mrn", searchable()), UniqueConstraint("org", "mrn")),
            [["org", "mrn_hash"]],
            [PLAIN],
        ),
        (
            lambda: patient(Column("mrn", searchable(), key="m"), UniqueConstraint("m")),
            [["mrn_hash"]],
            [PLAIN],
        ),
        (lambda: patient(Column("mrn", searchable()), Index("i", "mrn")), [], [PLAIN, PLAIN]),
        (
            lambda: patient(Column("mrn", searchable()), UniqueConstraint("org", "mrn_hash")),
            [["org", "mrn_hash"]],
            [PLAIN],
        ),
        (by_object_before, [["mrn_hash"]], [PLAIN]),
        (by_object_of_two_columns, [["mrn_hash", "ward"]], [PLAIN]),
        (by_object_before_its_type, [["mrn_hash"]], [PLAIN]),
        (by_object_after, [["org", "mrn_hash"]], [PLAIN]),
        (appended, [["mrn_hash", "org"]], [PLAIN]),
        (index_after, [], [PLAIN, (["mrn_hash", "org"], False)]),
        (index_beside_an_expression, [], [PLAIN, (["org", "mrn_hash"], True)]),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_constraint_of_a_table_moves_to_the_hash(
    declare: Callable[[], Table], unique: list[list[str]], indexes: list[tuple[list[str], bool]]
) -> None:
    """However it names the searchable column, a unique constraint or index ends up on the hash column."""
    assert over(declare()) == (unique, sorted(indexes))


def test_constraint_of_a_class_moves_to_the_hash() -> None:
    """So it does in __table_args__, dataclasses, mixins, and for indexes made from a class's attributes."""

    class Base(DeclarativeBase):
        pass

    class HasMrn:
        mrn: Mapped[str] = mapped_column(searchable(), unique=True)

        @declared_attr
        def email(self) -> Mapped[str]:
            return mapped_column(searchable(), unique=True, index=True)

    class InArgs(Base):
        __tablename__ = "in_args"
        __table_args__ = (UniqueConstraint("org", "mrn", name="one"), Index("two", "mrn", "org"))
        id: Mapped[int] = mapped_column(primary_key=True)
        org: Mapped[str]
        mrn: Mapped[str] = mapped_column(searchable())

    class OfObjects(Base):
        __tablename__ = "of_objects"
        id: Mapped[int] = mapped_column(primary_key=True)
        org: Mapped[str] = mapped_column()
        mrn: Mapped[str] = mapped_column(searchable())
        __table_args__ = (UniqueConstraint(org, mrn),)

    class Mixed(HasMrn, Base):
        __tablename__ = "mixed"
        id: Mapped[int] = mapped_column(primary_key=True)

    class MixedToo(HasMrn, Base):
        __tablename__ = "mixed_too"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Data(MappedAsDataclass, Base):
        __tablename__ = "data"
        __table_args__ = (UniqueConstraint("code", "org"),)
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        code: Mapped[str] = mapped_column(searchable(), unique=True)
        org: Mapped[str]

    Index("of_attributes", InArgs.org, InArgs.mrn)

    assert over(InArgs.__table__) == (
        [["org", "mrn_hash"]],
        [PLAIN, (["mrn_hash", "org"], False), (["org", "mrn_hash"], False)],
    )
    assert over(OfObjects.__table__) == ([["org", "mrn_hash"]], [PLAIN])
    for table in (Mixed.__table__, MixedToo.__table__):
        assert over(table) == ([["mrn_hash"]], [(["email_hash"], True)])
    assert over(Data.__table__) == ([["code_hash"], ["code_hash", "org"]], [])


def test_database_enforces_uniqueness_through_the_hash(byok: Byok, engine: Engine) -> None:
    """Equal values of one tenant collide in each database; NULLs, other tenants' equal values and others do not."""
    table = patient(
        Column("mrn", searchable(), unique=True),
        Column("email", searchable(), unique=True, index=True),
        Column("phone", searchable()),
        UniqueConstraint("org", "phone"),
    )
    table.metadata.create_all(engine)

    def save(tenant: str, **values: str | None) -> None:
        with byok.tenant(tenant), engine.begin() as connection:
            connection.execute(insert(table).values(**values))

    save("t1", mrn="A-1", email="a@x.org", org="bern", phone="1")
    save("t1", mrn=None, email=None, org="bern", phone=None)
    save("t1", mrn=None, email=None, org="bern", phone=None)
    save("t1", mrn="A-2", email="b@x.org", org="genf", phone="1")
    save("t2", mrn="A-1", email="a@x.org", org="bern", phone="1")
    for duplicate in (
        {"mrn": "A-1"},
        {"email": "b@x.org"},
        {"org": "genf", "phone": "1"},
    ):
        with pytest.raises(IntegrityError) as raised:
            save("t1", **duplicate)
        assert not any(value in str(raised.value) for value in ("A-1", "b@x.org"))
    with pytest.raises(IntegrityError), byok.tenant("t1"), engine.begin() as connection:
        connection.execute(update(table).where(table.c.mrn == "A-2").values(mrn="A-1"))

    with byok.tenant("t1"), engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(table)) == 5
        assert connection.scalars(select(table.c.org).where(table.c.mrn == "A-2")).all() == ["genf"]


def test_normalized_values_collide(byok: Byok, engine: Engine) -> None:
    """What a search regards as equal is a duplicate too."""
    table = patient(Column("email", searchable(normalize=str.casefold), unique=True))
    table.metadata.create_all(engine)

    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(email="Ada@x.org"))
        session.commit()
        with pytest.raises(IntegrityError):
            session.execute(insert(table).values(email="ADA@x.org"))
        session.rollback()
        assert session.scalars(select(table.c.email)).all() == ["Ada@x.org"]


# -- what is refused -------------------------------------------------------------------------------------------------


class Collated(TypeDecorator[str]):
    impl = String(20, collation="NOCASE")
    cache_ok = True


class CIText(Text):
    """As packages for PostgreSQL's citext have it."""


class IgnoresCase(TypeDecorator[str]):
    impl = String(20)
    cache_ok = True

    class comparator_factory(TypeDecorator.Comparator[str]):  # noqa: N801 - SQLAlchemy's name
        def __eq__(self, other: Any) -> Any:
            return func.lower(self.expr) == func.lower(other)


class Geometry(String):
    """The database makes something else of its values, as PostGIS does."""

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.ST_GeomFromText(bindvalue)


class Shown(TypeDecorator[str]):
    impl = String(20)
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return func.upper(column)


class AroundShown(TypeDecorator[str]):
    impl = Shown
    cache_ok = True


class Trimmed(String):
    """Converts by a processor, and not by a TypeDecorator's method."""

    def bind_processor(self, dialect: Any) -> Any:
        return str.strip


class Inside(TypeDecorator[str]):
    impl = Encrypted(String(20))
    cache_ok = True


def encrypted(*args: Any, type_: Any = None, **options: Any) -> Callable[[], Table]:
    return lambda: patient(Column("mrn", type_ or searchable(), *args, **options))


def beside(*items: Any, type_: Any = None) -> Callable[[], Table]:
    return lambda: patient(Column("mrn", type_ or searchable()), *(item() for item in items))


def then(change: Callable[[Table], Any], *items: Any) -> Callable[[], Any]:
    return lambda: change(patient(Column("mrn", searchable()), *items))


def encrypted_in(**options: Any) -> Callable[[], Table]:
    return lambda: patient(Column("mrn", searchable()), **options)


NOT_SEARCHABLE = Encrypted(String(20))

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "primary key": (encrypted(primary_key=True), "a primary key"),
    "PrimaryKeyConstraint": (
        lambda: Table("patient", MetaData(), Column("mrn", searchable()), PrimaryKeyConstraint("mrn")),
        "PrimaryKeyConstraint",
    ),
    "PrimaryKeyConstraint, object": (
        lambda: (lambda c: Table("patient", MetaData(), c, PrimaryKeyConstraint(c)))(
            Column("mrn", searchable())
        ),
        "PrimaryKeyConstraint",
    ),
    "foreign key": (encrypted(ForeignKey("person.mrn")), "a foreign key"),
    "ForeignKeyConstraint": (
        beside(lambda: ForeignKeyConstraint(["mrn"], ["person.mrn"])),
        "ForeignKeyConstraint",
    ),
    "server_default": (encrypted(server_default="x"), "server_default"),
    "server_default, fetched": (encrypted(server_default=FetchedValue()), "server_default"),
    "server_onupdate": (encrypted(server_onupdate=FetchedValue()), "server_onupdate"),
    "computed": (encrypted(Computed("org")), "a computed or identity column"),
    "identity": (encrypted(Identity(), type_=Encrypted(Integer)), "a computed or identity column"),
    "SQL default": (encrypted(default=func.now()), "a default that is a SQL expression"),
    "SQL default, select": (
        encrypted(default=select(func.max(text("1"))).scalar_subquery()),
        "a default that is a SQL expression",
    ),
    "sequence": (encrypted(Sequence("numbers")), "a default that is a SQL expression"),
    "SQL onupdate": (encrypted(onupdate=func.now()), "an onupdate that is a SQL expression"),
    "unique": (encrypted(type_=NOT_SEARCHABLE, unique=True), "unique=True without searchable=True"),
    "index": (encrypted(type_=NOT_SEARCHABLE, index=True), "index=True without searchable=True"),
    "UniqueConstraint": (
        beside(lambda: UniqueConstraint("org", "mrn"), type_=NOT_SEARCHABLE),
        "UniqueConstraint",
    ),
    "Index": (beside(lambda: Index("i", "mrn"), type_=NOT_SEARCHABLE), "Index"),
    "functional index": (then(lambda t: Index("i", func.lower(t.c.mrn))), "Index"),
    "functional index, text": (beside(lambda: Index("i", text("lower(mrn)"))), "Index"),
    "CHECK of the column": (encrypted(CheckConstraint("length(mrn) > 3")), "CheckConstraint"),
    "CHECK of another column": (
        beside(lambda: Column("size", Integer, CheckConstraint("size > length(mrn)"))),
        "CheckConstraint",
    ),
    "CHECK of the table": (beside(lambda: CheckConstraint("length(mrn) > 3")), "CheckConstraint"),
    "CHECK in capitals": (beside(lambda: CheckConstraint("LENGTH(MRN) > 3")), "CheckConstraint"),
    "CHECK before the column": (
        lambda: patient(CheckConstraint("length(mrn) > 3"), Column("mrn", searchable())),
        "CheckConstraint",
    ),
    "CHECK of another column before": (
        lambda: patient(
            Column("size", Integer, CheckConstraint("size > length(mrn)")), Column("mrn", searchable())
        ),
        "CheckConstraint",
    ),
    "CHECK before a late column": (
        lambda: patient(CheckConstraint("length(mrn) > 3")).append_column(Column("mrn", searchable())),
        "CheckConstraint",
    ),
    "CHECK of objects": (then(lambda t: CheckConstraint(func.length(t.c.mrn) > 3)), "CheckConstraint"),
    "CHECK of objects, appended": (
        then(lambda t: t.append_constraint(CheckConstraint(t.c.mrn == "x"))),
        "CheckConstraint",
    ),
    "CHECK, quoted": (
        lambda: patient(Column("first name", searchable()), CheckConstraint('"first name" <> org')),
        "CheckConstraint",
    ),
    "ExcludeConstraint": (beside(lambda: ExcludeConstraint(("mrn", "="))), "ExcludeConstraint"),
    "ExcludeConstraint, object": (
        then(lambda t: t.append_constraint(ExcludeConstraint((t.c.mrn, "=")))),
        "ExcludeConstraint",
    ),
    "ExcludeConstraint, expression": (
        then(lambda t: t.append_constraint(ExcludeConstraint((func.lower(t.c.mrn), "=")))),
        "ExcludeConstraint",
    ),
    "ExcludeConstraint, text": (
        beside(lambda: ExcludeConstraint((text("lower(mrn)"), "="))),
        "ExcludeConstraint",
    ),
    "ExcludeConstraint, WHERE": (
        beside(lambda: ExcludeConstraint(("org", "="), where=text("mrn > 'A'"))),
        "ExcludeConstraint",
    ),
    "ExcludeConstraint before the column": (
        lambda: patient(ExcludeConstraint((text("lower(mrn)"), "=")), Column("mrn", searchable())),
        "ExcludeConstraint",
    ),
    "predicate of an index": (
        beside(lambda: Index("i", "org", postgresql_where=text("mrn <> 'x'"))),
        "Index",
    ),
    "predicate of an index, sqlite": (
        beside(lambda: Index("i", "org", sqlite_where=text('"MRN" > 3'))),
        "Index",
    ),
    "predicate of an index, object": (
        then(lambda t: Index("i", t.c.org, postgresql_where=t.c.mrn == "x")),
        "Index",
    ),
    "predicate of an index on the column": (
        then(lambda t: Index("i", t.c.mrn, unique=True, sqlite_where=func.length(t.c.mrn) > 3)),
        "Index",
    ),
    "predicate of an index before the column": (
        lambda: patient(Index("i", "org", postgresql_where=text("mrn = 'x'")), Column("mrn", searchable())),
        "Index",
    ),
    "predicate of an index before a late column": (
        lambda: patient(Index("i", "org", mssql_where=text("[mrn] = 'x'"))).append_column(
            Column("mrn", searchable())
        ),
        "Index",
    ),
    "functional index before the column": (
        lambda: patient(Index("i", text("lower(mrn)")), Column("mrn", searchable())),
        "Index",
    ),
    "functional index of a column that is not searchable": (
        beside(lambda: Index("i", func.lower(text("mrn"))), type_=Encrypted(String(20))),
        "Index",
    ),
    "operator class": (
        then(lambda t: Index("i", t.c.mrn, postgresql_ops={"mrn": "text_pattern_ops"})),
        "Index",
    ),
    "prefix of an index": (beside(lambda: Index("i", "mrn", mysql_length={"mrn": 10})), "Index"),
    "prefix of every column of an index": (beside(lambda: Index("i", "mrn", mariadb_length=10)), "Index"),
    "prefix in text": (beside(lambda: Index("i", text("mrn(10)"))), "Index"),
    "full text": (beside(lambda: Index("i", "mrn", mysql_prefix="FULLTEXT")), "Index"),
    "computed from it": (
        beside(lambda: Column("size", Integer, Computed("length(mrn)"))),
        "Computed",
    ),
    "computed from it, persisted": (
        beside(lambda: Column("upper", String, Computed("upper(`mrn`)", persisted=True))),
        "Computed",
    ),
    "computed from it, before": (
        lambda: patient(Column("size", Integer, Computed("length(mrn)")), Column("mrn", searchable())),
        "Computed",
    ),
    "computed from it, late": (
        then(lambda t: t.append_column(Column("size", Integer, Computed(func.length(t.c.mrn))))),
        "Computed",
    ),
    "default of another column": (
        beside(lambda: Column("upper", String, server_default=text("(upper(mrn))"))),
        "DefaultClause",
    ),
    "default of another column, before": (
        lambda: patient(
            Column("upper", String, server_default=func.upper(text("mrn"))), Column("mrn", searchable())
        ),
        "DefaultClause",
    ),
    "SQL default of another column": (
        beside(lambda: Column("upper", String, default=func.upper(text("mrn")))),
        "ColumnElementColumnDefault",
    ),
    "SQL onupdate of another column": (
        then(lambda t: t.append_column(Column("copy", String, onupdate=func.upper(t.c.mrn)))),
        "ColumnElementColumnDefault",
    ),
    "partition key": (encrypted_in(postgresql_partition_by="LIST (mrn)"), "PartitionKey"),
    "partition key, MySQL": (encrypted_in(mysql_partition_by="KEY(`mrn`)"), "PartitionKey"),
    "a collation": (lambda: Encrypted(String(collation="NOCASE"), searchable=True), "'NOCASE'"),
    "a collation that may ignore something": (
        lambda: Encrypted(Unicode(9, collation="de_DE"), searchable=True),
        "normalize=",
    ),
    "a collation of a dialect's type": (
        lambda: Encrypted(mysql.VARCHAR(9, collation="utf8mb4_general_ci"), searchable=True),
        "normalize=",
    ),
    "a collation of CHAR": (
        lambda: Encrypted(mysql.CHAR(9, collation="latin1_swedish_ci"), searchable=True),
        "normalize=",
    ),
    "a collation within a type": (lambda: Encrypted(Collated, searchable=True), "normalize="),
    "a collation of a variant": (
        lambda: Encrypted(
            String(9).with_variant(mysql.VARCHAR(9, collation="utf8_bin_ci"), "mysql"), searchable=True
        ),
        "normalize=",
    ),
    "CITEXT": (lambda: Encrypted(postgresql.CITEXT(), searchable=True), "ignores case"),
    "CIText of a package": (lambda: Encrypted(CIText, searchable=True), "ignores case"),
    "a comparator": (lambda: Encrypted(IgnoresCase, searchable=True), "its own comparator"),
    "bind_expression": (lambda: Encrypted(Geometry), "bind_expression"),
    "column_expression": (lambda: Encrypted(Shown), "column_expression"),
    "column_expression within a type": (lambda: Encrypted(AroundShown), "column_expression"),
    "a processor": (lambda: Encrypted(Trimmed), "processors of its own"),
    "a set": (lambda: Encrypted(mysql.SET("a", "b")), "cannot wrap SET"),
    "a variant of another kind": (
        lambda: Encrypted(String(9).with_variant(Integer(), "sqlite")),
        "takes other values",
    ),
    "with_variant": (lambda: searchable().with_variant(String(20), "sqlite"), "with_variant"),
    "a variant": (encrypted(type_=String(20).with_variant(searchable(), "sqlite")), "as a variant"),
    "inside a type": (encrypted(type_=Inside()), "Encrypted inside Inside"),
    "inside an array": (encrypted(type_=ARRAY(Encrypted(String))), "Encrypted inside ARRAY"),
    "one id for two columns": (
        lambda: patient(Column("a", searchable(column_id="p.m")), Column("b", searchable(column_id="p.m"))),
        "two encrypted columns have the id 'p.m'",
    ),
    "an id that another column has": (
        lambda: patient(Column("a", searchable()), Column("b", searchable(column_id="patient.a"))),
        "two encrypted columns have the id 'patient.a'",
    ),
    "a dot in a column": (lambda: patient(Column("a.b", searchable())), "has a dot in its name"),
    "a dot in a table": (
        lambda: Table("a.b", MetaData(), Column("c", searchable())),
        "has a dot in its name",
    ),
    "a dot in a schema": (lambda: patient(Column("c", searchable()), schema="a.b"), "has a dot in its name"),
    "a column with the name of the hash": (
        lambda: patient(Column("mrn_hash", String), Column("mrn", searchable())),
        "has a column 'mrn_hash' of its own",
    ),
    "no type": (lambda: Encrypted("text"), "cannot wrap str"),  # type: ignore[arg-type]
    "an array": (lambda: Encrypted(ARRAY(Integer)), "cannot wrap ARRAY"),
    "Encrypted": (lambda: Encrypted(Encrypted(String)), "cannot wrap Encrypted"),
    "searchable JSON": (lambda: Encrypted(JSON, searchable=True), "cannot be searchable"),
    "hash without searchable": (lambda: Encrypted(String, hash="hmac-sha256"), "need searchable=True"),
    "scope without searchable": (lambda: Encrypted(String, salt_scope="x"), "need searchable=True"),
    "normalize without searchable": (
        lambda: Encrypted(String, normalize=str.casefold),
        "need searchable=True",
    ),
    "an unknown hash": (lambda: searchable(hash="md5"), "hash takes one of"),
    "hmac with the tenant's salt": (
        lambda: searchable(hash="hmac-sha256", salt_scope="tenant"),
        "goes with hash='sha256' only",
    ),
    "an empty scope": (lambda: searchable(salt_scope=""), "salt_scope takes a name"),
    "pad_to of one": (lambda: Encrypted(String, pad_to=1), "pad_to takes"),
    "pad_to too large": (lambda: Encrypted(String, pad_to=65_537), "pad_to takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_hold_on_ciphertext_is_refused_at_declaration(case: str) -> None:
    """Each of these would silently not hold, or write plaintext; declaring it raises, with the reason."""
    declare, reason = REFUSED[case]
    with pytest.raises(DeclarationError) as raised:
        declare()
    assert reason in str(raised.value)


def test_refusals_hold_in_classes() -> None:
    """A class statement raises as a Table does, and the error names the column."""

    def column(**options: Any) -> None:
        class Base(DeclarativeBase):
            pass

        class Patient(Base):
            __tablename__ = "patient"
            id: Mapped[int] = mapped_column(primary_key=True)
            mrn: Mapped[str] = mapped_column(searchable(), **options)

    for options in ({"primary_key": True}, {"server_default": "x"}, {"insert_default": func.now()}):
        with pytest.raises(DeclarationError) as raised:
            column(**options)
        assert raised.value.column == "patient.mrn"

    def checked() -> None:
        class Base(DeclarativeBase):
            pass

        class Visit(Base):
            __tablename__ = "visit"
            __table_args__ = (CheckConstraint("length(mrn) > 3"),)
            id: Mapped[int] = mapped_column(primary_key=True)
            mrn: Mapped[str] = mapped_column(searchable())

    with pytest.raises(DeclarationError, match=r"visit\.mrn: CheckConstraint"):
        checked()


def test_sorted_index_is_refused() -> None:
    """An index in descending order sorts ciphertext: the operator refuses before there is an index."""
    table = patient(Column("mrn", searchable()))
    with pytest.raises(UnsupportedQueryError, match=r"patient\.mrn: desc"):
        Index("by_mrn", table.c.mrn.desc())
    assert over(table) == ([], [PLAIN])


@pytest.mark.parametrize("target_first", [True, False])
@pytest.mark.parametrize("typed", [True, False])
def test_foreign_key_to_an_encrypted_column_is_refused(target_first: bool, typed: bool) -> None:
    """Whichever table is declared first, and whether or not the referring column takes its type from the other."""
    metadata = MetaData()
    steps = [
        lambda: patient(Column("mrn", searchable(), unique=True), metadata=metadata),
        lambda: Table(
            "visit",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("mrn", *([String] if typed else []), ForeignKey("patient.mrn")),
        ),
    ]
    first, second = steps if target_first else reversed(steps)
    first()
    with pytest.raises(DeclarationError, match=r"patient\.mrn: ForeignKey cannot hold"):
        second()


def test_foreign_key_object_to_an_encrypted_column_is_refused() -> None:
    """Nor can a foreign key be made from the column object or by a constraint over several columns."""
    table = patient(Column("mrn", searchable()), UniqueConstraint("org", "mrn"))
    visit = [Column("org", String), Column("mrn", String)]
    with pytest.raises(DeclarationError, match=r"patient\.mrn: ForeignKey cannot hold"):
        Table(
            "visit",
            table.metadata,
            *visit,
            ForeignKeyConstraint(["org", "mrn"], ["patient.org", "patient.mrn"]),
        )
    with pytest.raises(DeclarationError, match=r"patient\.mrn: ForeignKey cannot hold"):
        Table("other", table.metadata, Column("mrn", ForeignKey(table.c.mrn)))


# -- what is not refused ---------------------------------------------------------------------------------------------


def test_constraints_on_other_columns_stay_as_they_are(byok: Byok, engine: Engine) -> None:
    """Names in literals, parts of words and the hash column itself are no reason to refuse; the database agrees."""
    metadata = MetaData()
    person = Table("person", metadata, Column("id", Integer, primary_key=True))
    table = patient(
        Column("mrn", searchable()),
        Column("mrn_kind", String(20), unique=True, index=True),
        Column("person_id", ForeignKey(person.c.id)),
        CheckConstraint("org IN ('mrn', 'it''s mrn')"),
        CheckConstraint("mrn_kind <> 'x'", name="kind"),
        CheckConstraint("mrn_hash IS NOT NULL OR org = 'mrn'", name="given"),
        metadata=metadata,
    )
    by_kind = Index("by_kind", func.lower(table.c.mrn_kind))
    by_kind.ddl_if(callable_=lambda *_, dialect, **__: dialect.name in ("sqlite", "postgresql"))
    assert over(table)[1] == [PLAIN, (["mrn_kind"], False), (["mrn_kind"], True)]

    metadata.create_all(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(person).values(id=1))
        connection.execute(insert(table).values(org="mrn", mrn=None, mrn_kind="a", person_id=1))
    for values in (
        {"org": "x", "mrn": "A-1"},
        {"org": "mrn", "mrn_kind": "x"},
        {"org": "it's mrn", "mrn": None},
    ):
        with pytest.raises(DatabaseError), byok.tenant("t1"), engine.begin() as connection:
            connection.execute(insert(table).values(**values))
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(table)) == 1
    assert "patient" in inspect(engine).get_table_names()


@pytest.mark.parametrize(
    "inner",
    [
        String(9, collation="NOCASE"),
        postgresql.CITEXT(),
        mysql.VARCHAR(9, collation="utf8mb4_general_ci"),
        Collated(),
        IgnoresCase(),
        CIText(),
    ],
)
def test_a_type_that_compares_otherwise_may_be_stored(inner: Any) -> None:
    """It is only the search that has another rule: without one, with a normalizer, or by a hash_index it may stand."""
    patient(Column("mrn", Encrypted(inner)))
    patient(Column("mrn", Encrypted(inner, searchable=True, normalize=casefold), unique=True))

    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(primary_key=True)
        nick: Mapped[str] = mapped_column(Encrypted(inner))
        by_nick = hash_index("nick", transform=casefold)


@pytest.mark.parametrize(
    "inner",
    [
        String(9, collation="C"),
        mysql.VARCHAR(9, collation="utf8mb4_bin"),
        mysql.VARCHAR(9, binary=True),
        String(9, collation="BINARY"),
        Unicode(9),
    ],
)
def test_a_type_that_compares_exactly_is_searchable_as_it_is(inner: Any) -> None:
    """Hashes are exact too."""
    patient(Column("mrn", Encrypted(inner, searchable=True), unique=True))


def test_what_the_database_may_evaluate_stays(byok: Byok, engine: Engine) -> None:
    """NULL tests are right on ciphertext; other columns, functions of the name and covering columns are no reason."""
    table = patient(
        Column("mrn", searchable(), unique=True),
        Column("length", Encrypted(Integer)),
        Column("size", Integer, Computed("length(org)", persisted=True)),
        Column("kind", String(9), server_default=text("'mrn'"), onupdate=func.lower("MRN")),
        Column("mode", String(9), server_default="mrn"),
        CheckConstraint("mrn IS NOT NULL OR org IS NULL", name="given"),
        CheckConstraint("""org <> '"mrn" > 3'""", name="text"),
        Index(
            "partial",
            "mrn",
            postgresql_where=text('"mrn" is not null'),
            sqlite_where=text("patient.mrn IS NOT NULL"),
        ),
    )
    Index("of_objects", table.c.org, postgresql_where=table.c.mrn.is_not(None), postgresql_include=["mrn"])
    table.append_constraint(CheckConstraint(table.c.mrn.is_(None) | (table.c.org != "x"), name="objects"))
    assert over(table)[1].count((["mrn_hash"], False)) == 1
    copy = table.to_metadata(MetaData())
    for one in (table, copy):
        one.create(engine)
        with byok.tenant("t1"), engine.begin() as connection:
            connection.execute(insert(one).values(org="bern", mrn="A-1", length=3))
            assert connection.execute(select(one.c.mrn, one.c.size)).all() == [("A-1", 4)]
        with pytest.raises(DatabaseError), byok.tenant("t1"), engine.begin() as connection:
            connection.execute(insert(one).values(org="bern", mrn=None))
        one.drop(engine)


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("how", ["column", "constraint"])
def test_what_sqlite_does_on_conflict_moves_along(byok: Byok, engine: Engine, how: str) -> None:
    """unique=True moves to the hash with what was said of its conflicts, however it was said."""
    if how == "column":
        table = patient(Column("mrn", searchable(), unique=True, sqlite_on_conflict_unique="IGNORE"))
    else:
        table = patient(
            Column("mrn", searchable()), UniqueConstraint("mrn", "org", sqlite_on_conflict="IGNORE")
        )
    table.create(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        for _ in range(2):
            connection.execute(insert(table).values(org="bern", mrn="A-1"))
        assert connection.scalars(select(table.c.mrn)).all() == ["A-1"]


@pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
def test_nulls_that_are_not_distinct_move_along(byok: Byok, engine: Engine) -> None:
    """NULL has no hash, so two of them collide there as they would in plaintext."""
    with engine.connect() as connection:
        if connection.dialect.server_version_info < (15,):  # type: ignore[operator]
            pytest.skip("PostgreSQL before 15 has no NULLS NOT DISTINCT")
    table = patient(Column("mrn", searchable()), UniqueConstraint("mrn", postgresql_nulls_not_distinct=True))
    table.create(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(table).values(mrn=None))
        with pytest.raises(IntegrityError):
            connection.execute(insert(table).values(mrn=None))


def test_refusals_hold_in_mixins_and_classes() -> None:
    """A mixin's computed column and __table_args__ meet the encrypted column of the class, and the reverse."""

    class Base(DeclarativeBase):
        pass

    class Sized:
        size: Mapped[int] = mapped_column(Computed("length(mrn)"))

    class Coded:
        mrn: Mapped[str] = mapped_column(searchable())

    def first() -> None:
        class Visit(Sized, Base):
            __tablename__ = "visit"
            id: Mapped[int] = mapped_column(primary_key=True)
            mrn: Mapped[str] = mapped_column(searchable())

    def second() -> None:
        class Stay(Coded, Base):
            __tablename__ = "stay"
            id: Mapped[int] = mapped_column(primary_key=True)
            size: Mapped[int] = mapped_column(Computed("length(mrn)"))

    def third() -> None:
        class Bed(Coded, Base):
            __tablename__ = "bed"
            __table_args__ = (Index("by_id", "id", sqlite_where=text("mrn > 'x'")),)
            id: Mapped[int] = mapped_column(primary_key=True)

    def fourth() -> None:
        class Ward(Coded, Base):
            __tablename__ = "ward"
            id: Mapped[int] = mapped_column(primary_key=True)

        Index("late", Ward.id, postgresql_where=Ward.mrn == "x")

    for declare in (first, second, third, fourth):
        with pytest.raises(DeclarationError, match=r"\.mrn: (Computed|Index) cannot hold"):
            declare()


def test_explicit_id_may_be_shared_between_tables_only() -> None:
    """Concrete inheritance needs one id in several tables; within a table, or with a derived id, it is refused."""
    metadata = MetaData()
    for name in ("a", "b"):
        Table(name, metadata, Column("mrn", searchable(column_id="person.mrn")))
    with pytest.raises(DeclarationError, match=r"the id 'person\.mrn'"):
        metadata.tables["a"].append_column(Column("other", searchable(column_id="person.mrn")))
    with pytest.raises(DeclarationError, match=r"the id 'person\.mrn'"):
        Table("person", metadata, Column("mrn", searchable()))


def test_id_that_nobody_has_any_more_is_free() -> None:
    """A renamed table may keep its old ids in a process that has declared the old one before; so may a column."""
    metadata = MetaData()
    metadata.remove(Table("client", metadata, Column("mrn", searchable())))
    table = patient(Column("mrn", searchable(column_id="client.mrn")), metadata=metadata)
    assert table.c.mrn_hash.type.source.column_id == "client.mrn"

    patient(Column("mrn", searchable()), metadata=metadata, extend_existing=True)
    table.append_column(Column("old", searchable(column_id="client.mrn")))
    assert table.c.old_hash.type.source.column_id == "client.mrn"
    assert table.c.mrn_hash.type.source.column_id == "patient.mrn"
