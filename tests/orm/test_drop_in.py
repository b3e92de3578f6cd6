"""On an attached engine SQLAlchemy does what it does without us: each form here runs on a plain engine and beside it.

First with a model that has nothing encrypted, and no tenant; then with an encrypted column and one. The rows are the
same, and so are the errors of SQLAlchemy and of the database.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    create_engine,
    create_mock_engine,
    delete,
    event,
    exists,
    func,
    insert,
    inspect,
    lambda_stmt,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext import baked
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
    with_loader_criteria,
)

from sqla_byok import Byok, Encrypted, UnsupportedQueryError


def _models(prefix: str, label_type: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Numbered:
        id: Mapped[int] = mapped_column(primary_key=True)

    class Author(Numbered, Base):
        __tablename__ = f"{prefix}_author"
        name: Mapped[str] = mapped_column(String(20))
        notes = relationship("Note", back_populates="author", order_by="Note.id")

    class Note(Numbered, Base):
        __tablename__ = f"{prefix}_note"
        __table_args__ = (UniqueConstraint("label"),)
        label: Mapped[str | None] = mapped_column(label_type)
        size: Mapped[int | None]
        author_id: Mapped[int | None] = mapped_column(ForeignKey(Author.id))
        author = relationship("Author", back_populates="notes")

    class Share(Base):
        __tablename__ = f"{prefix}_share"
        id: Mapped[int] = mapped_column(primary_key=True)
        note_id: Mapped[int] = mapped_column(ForeignKey(Note.id))
        reader: Mapped[str] = mapped_column(String(20))

    return SimpleNamespace(Base=Base, Numbered=Numbered, Author=Author, Note=Note, Share=Share)


PLAIN = _models("plain", String(20))
ENCRYPTED = _models("encrypted", Encrypted(String(20), searchable=True))

Form = Callable[[Session, Any], Any]
FORMS: dict[str, Form] = {}
BYSTANDERS: dict[str, Form] = {}


def form(function: Form) -> Form:
    """A form that works with encrypted columns as it does with plain ones."""
    FORMS[function.__name__] = function
    return function


def bystander(function: Form) -> Form:
    """One that needs to be the same only where nothing is encrypted."""
    BYSTANDERS[function.__name__] = function
    return function


def _labels(notes: Iterable[Any]) -> list[Any]:
    return sorted((note.id, note.label, note.size) for note in notes)


def _stored(session: Session, m: Any) -> list[Any]:
    session.expire_all()
    # By the column itself, and by a look-up that finds each of them.
    notes = session.scalars(select(m.Note)).all()
    found = [
        session.scalars(select(m.Note.id).where(m.Note.label == note.label)).all()
        for note in sorted(notes, key=lambda note: note.id)
    ]
    return [_labels(notes), found]


# -- INSERT, UPDATE and DELETE inside from_statement() ---------------------------------------------------------------


@form
def from_statement_insert(session: Session, m: Any) -> Any:
    dml = insert(m.Note).values(id=7, label="new", size=1).returning(m.Note)
    return _labels(session.scalars(select(m.Note).from_statement(dml))), _stored(session, m)


@form
def from_statement_insert_of_several_rows(session: Session, m: Any) -> Any:
    dml = insert(m.Note).values([{"id": 7, "label": "x"}, {"id": 8, "label": "y"}]).returning(m.Note)
    return _labels(session.scalars(select(m.Note).from_statement(dml))), _stored(session, m)


@form
def from_statement_insert_with_parameters(session: Session, m: Any) -> Any:
    dml = insert(m.Note).returning(m.Note)
    rows = [{"id": 7, "label": "x"}, {"id": 8, "label": "y"}]
    return _labels(session.scalars(select(m.Note).from_statement(dml), rows)), _stored(session, m)


@form
def from_statement_insert_with_named_parameters(session: Session, m: Any) -> Any:
    dml = insert(m.Note).values(id=7, label=bindparam("given")).returning(m.Note)
    got = session.scalars(select(m.Note).from_statement(dml), {"given": "new"})
    return _labels(got), _stored(session, m)


@form
def from_statement_update(session: Session, m: Any) -> Any:
    dml = update(m.Note).where(m.Note.label == "one").values(label="new").returning(m.Note)
    got = session.scalars(select(m.Note).from_statement(dml), execution_options={"populate_existing": True})
    return _labels(got), _stored(session, m)


@form
def from_statement_update_of_ordered_values(session: Session, m: Any) -> Any:
    dml = update(m.Note).where(m.Note.id == 1).ordered_values((m.Note.size, 9), (m.Note.label, "new"))
    got = session.scalars(
        select(m.Note).from_statement(dml.returning(m.Note)), execution_options={"populate_existing": True}
    )
    return _labels(got), _stored(session, m)


@form
def from_statement_delete(session: Session, m: Any) -> Any:
    session.execute(delete(m.Share))
    dml = delete(m.Note).where(m.Note.label.in_(["one", "two"])).returning(m.Note)
    return _labels(session.scalars(select(m.Note).from_statement(dml))), _stored(session, m)


@form
def from_statement_upsert(session: Session, m: Any) -> Any:
    kind = {"sqlite": sqlite, "postgresql": postgresql}.get(session.get_bind().dialect.name)
    if kind is None:
        return None
    rows = [{"id": 7, "label": "one", "size": 5}, {"id": 8, "label": "new", "size": 6}]
    dml: Any = kind.insert(m.Note).values(rows)  # type: ignore[attr-defined]
    dml = dml.on_conflict_do_update(index_elements=["label"], set_={"size": dml.excluded.size})
    got = session.scalars(
        select(m.Note).from_statement(dml.returning(m.Note)), execution_options={"populate_existing": True}
    )
    return _labels(got), _stored(session, m)


@form
def from_statement_of_columns(session: Session, m: Any) -> Any:
    dml = insert(m.Note).values(id=7, label="new").returning(m.Note.id, m.Note.label)
    return session.execute(select(m.Note.id, m.Note.label).from_statement(dml)).all()


@form
def from_statement_select(session: Session, m: Any) -> Any:
    inner = select(m.Note).where(m.Note.label != "two").order_by(m.Note.id)
    return _labels(session.scalars(select(m.Note).from_statement(inner)))


@form
def from_statement_union(session: Session, m: Any) -> Any:
    inner = select(m.Note).where(m.Note.id == 1).union_all(select(m.Note).where(m.Note.id == 3))
    return _labels(session.scalars(select(m.Note).from_statement(inner)))


@bystander
def from_statement_text(session: Session, m: Any) -> Any:
    return _labels(session.scalars(select(m.Note).from_statement(text("SELECT * FROM plain_note"))))


@form
def query_from_statement(session: Session, m: Any) -> Any:
    inner = select(m.Note).where(m.Note.label == "two")
    return _labels(session.query(m.Note).from_statement(inner).all())


# -- loader criteria, and subqueries that correlate ------------------------------------------------------------------


def _shared_with(m: Any, reader: str = "ines") -> Any:
    share = m.Share  # what a lambda names has to be a class, or a value
    return with_loader_criteria(
        m.Note,
        lambda cls: exists().where(share.note_id == cls.id, share.reader == reader),
        include_aliases=True,
    )


@form
def criteria_of_an_entity(session: Session, m: Any) -> Any:
    return _labels(session.scalars(select(m.Note).options(_shared_with(m))))


@form
def criteria_of_a_column(session: Session, m: Any) -> Any:
    return sorted(session.scalars(select(m.Note.label).options(_shared_with(m))).all())


@form
def criteria_of_an_alias(session: Session, m: Any) -> Any:
    other = aliased(m.Note)
    return _labels(session.scalars(select(other).where(other.label == "two").options(_shared_with(m))))


@form
def criteria_of_the_values(session: Session, m: Any) -> Any:
    criteria = with_loader_criteria(m.Note, lambda cls: cls.label.in_(["one", "two"]), include_aliases=True)
    subquery = exists().where(m.Note.author_id == m.Author.id)
    return (
        _labels(session.scalars(select(m.Note).options(criteria))),
        session.scalars(select(m.Author.name).where(subquery).options(criteria)).all(),
    )


@form
def criteria_in_nested_subqueries(session: Session, m: Any) -> Any:
    other = aliased(m.Note)
    inner = select(other.id).where(other.author_id == m.Note.author_id, other.label == "two")
    statement = select(m.Note).where(inner.exists()).options(_shared_with(m))
    return _labels(session.scalars(statement))


@form
def criteria_with_a_subquery_of_another(session: Session, m: Any) -> Any:
    share = m.Share
    criteria = with_loader_criteria(
        m.Note,
        lambda cls: cls.id.in_(select(share.note_id).where(share.note_id == cls.id)),
        include_aliases=True,
    )
    counted = select(func.count(m.Note.id)).where(m.Note.author_id == m.Author.id).scalar_subquery()
    return session.execute(select(m.Author.name, counted).options(criteria).order_by(m.Author.id)).all()


@form
def criteria_of_update_and_delete(session: Session, m: Any) -> Any:
    session.execute(
        update(m.Note).values(size=77).options(_shared_with(m)),
        execution_options={"synchronize_session": False},
    )
    return _stored(session, m)


@form
def criteria_through_joins(session: Session, m: Any) -> Any:
    statement = select(m.Author.name, m.Note.label).join(m.Author.notes).options(_shared_with(m))
    return sorted(map(tuple, session.execute(statement)))


@form
def criteria_of_relationships(session: Session, m: Any) -> Any:
    found = []
    shared = exists().where(m.Share.note_id == m.Note.id, m.Share.reader == "ines")
    loaders = (
        selectinload(m.Author.notes.and_(shared)),
        joinedload(m.Author.notes.and_(shared)),
        subqueryload(m.Author.notes.and_(shared)),
        selectinload(m.Author.notes.and_(m.Note.label == "two")),
        joinedload(m.Author.notes.and_(m.Note.label.in_(["one", "two"]))),
    )
    for loader in loaders:
        session.expunge_all()
        authors = session.scalars(select(m.Author).options(loader)).unique().all()
        found.append(sorted((author.name, _labels(author.notes)) for author in authors))
    return found


@form
def criteria_of_lazy_loads(session: Session, m: Any) -> Any:
    authors = session.scalars(select(m.Author).options(_shared_with(m))).all()
    return [_labels(author.notes) for author in authors]


@form
def criteria_of_subquery_loads(session: Session, m: Any) -> Any:
    criteria = with_loader_criteria(m.Numbered, lambda cls: cls.id.between(1, 2), include_aliases=True)
    found = []
    for loader in (subqueryload, selectinload, joinedload):
        session.expunge_all()
        statement = select(m.Author).options(criteria, loader(m.Author.notes))
        found.append([_labels(author.notes) for author in session.scalars(statement).unique()])
    # Where the criterion is on a column that the subquery has not
    criteria = with_loader_criteria(m.Author, lambda cls: cls.name != "bob", include_aliases=True)
    statement = select(m.Author).options(criteria, subqueryload(m.Author.notes))
    return found, [_labels(author.notes) for author in session.scalars(statement)]


@form
def correlated_and_lateral_subqueries(session: Session, m: Any) -> Any:
    other = aliased(m.Note)
    later = select(other.id).where(other.id > m.Note.id).correlate(m.Note).exists()
    found: list[Any] = [_labels(session.scalars(select(m.Note).where(later)))]
    session.execute(
        update(m.Note).where(later).values(size=5), execution_options={"synchronize_session": False}
    )
    if session.get_bind().dialect.name == "postgresql":
        inner = select(m.Note.label).where(m.Note.author_id == m.Author.id).lateral()
        found.append(
            sorted(map(tuple, session.execute(select(m.Author.name, inner.c.label).join(inner, true()))))
        )
    return found, _stored(session, m)


@form
def contains_eager_of_an_alias(session: Session, m: Any) -> Any:
    other = aliased(m.Note)
    statement = (
        select(m.Author)
        .join(m.Author.notes.of_type(other))
        .where(other.label == "two")
        .options(contains_eager(m.Author.notes.of_type(other)))
    )
    return [_labels(author.notes) for author in session.scalars(statement).unique()]


# -- lambda statements -----------------------------------------------------------------------------------------------


def _lambdas(
    session: Session,
    m: Any,
    statement: Any,
    sync: Any = "auto",
    params: Any = None,
    returning: bool = False,
) -> Any:
    notes = session.scalars(select(m.Note)).all()
    result: Any = session.execute(statement, params, execution_options={"synchronize_session": sync})
    rows = sorted(map(tuple, result)) if returning else None
    return rows, [note.__dict__.get("label") for note in notes if note in session], _stored(session, m)


@form
def lambda_updates(session: Session, m: Any) -> Any:
    note = m.Note

    def changed(old: str, new: str) -> Any:
        return lambda_stmt(lambda: update(note).where(note.label == old).values(label=new))

    found = []
    for sync in ("fetch", "evaluate", "auto", False):
        for new in ("new", "newer"):
            old = "one" if new == "new" else "new"
            found.append(_lambdas(session, m, changed(old, new), sync))
        session.rollback()
    return found


@form
def lambda_with_more_added(session: Session, m: Any) -> Any:
    note = m.Note
    old, new = "one", "new"
    statement: Any = lambda_stmt(lambda: update(note))
    statement += lambda it: it.where(note.label == old)
    statement += lambda it: it.values(label=new)
    return _lambdas(session, m, statement, "fetch")


@form
def lambda_update_of_several_rows(session: Session, m: Any) -> Any:
    note = m.Note
    statement = lambda_stmt(lambda: update(note))
    rows = [{"id": 1, "label": "x"}, {"id": 2, "label": "y"}]
    return _lambdas(session, m, statement, params=rows)


@form
def lambda_that_was_spoiled(session: Session, m: Any) -> Any:
    note = m.Note
    old, new = "one", "new"
    statement = lambda_stmt(lambda: update(note).where(note.label == old).values(label=new)).spoil()
    return _lambdas(session, m, statement, "fetch")


@form
def lambda_update_with_returning(session: Session, m: Any) -> Any:
    note = m.Note
    new = "new"
    statement = lambda_stmt(
        lambda: update(note).where(note.id < 3).values(label=new).returning(note.id, note.label)
    )
    session.execute(delete(m.Share))
    session.execute(delete(note).where(note.id == 2))
    return _lambdas(session, m, statement, "fetch", returning=True)


@form
def lambda_inserts(session: Session, m: Any) -> Any:
    note = m.Note
    new = "new"
    found = [_lambdas(session, m, lambda_stmt(lambda: insert(note).values(id=7, label=new)))]
    rows = [{"id": 8, "label": "x"}, {"id": 9, "label": "y"}]
    found.append(_lambdas(session, m, lambda_stmt(lambda: insert(note)), params=rows))
    session.connection().execute(lambda_stmt(lambda: insert(note.__table__)), [{"id": 10, "label": "z"}])
    return found, _stored(session, m)


@form
def lambda_inside_and_around_from_statement(session: Session, m: Any) -> Any:
    note = m.Note
    new = "new"
    statement: Any = lambda_stmt(
        lambda: select(note).from_statement(insert(note).values(id=7, label=new).returning(note))
    )
    return _labels(session.scalars(statement)), _stored(session, m)


@form
def lambda_deletes(session: Session, m: Any) -> Any:
    note = m.Note
    session.execute(delete(m.Share))
    old = "one"
    statement: Any = lambda_stmt(lambda: delete(note))
    statement += lambda it: it.where(note.label == old)
    return _lambdas(session, m, statement, "fetch")


@form
def lambda_selects(session: Session, m: Any) -> Any:
    note = m.Note
    found = []
    for label in ("one", "two", "one"):
        statement: Any = lambda_stmt(lambda: select(note))
        statement += lambda it: it.where(note.label == label)  # noqa: B023 - that is what is tried
        found.append(_labels(session.scalars(statement)))
    return found


# -- results ---------------------------------------------------------------------------------------------------------


@form
def ways_to_read_a_result(session: Session, m: Any) -> Any:
    connection, rows = session.connection(), select(m.Note.id, m.Note.label).order_by(m.Note.id)
    frozen = connection.execute(rows).freeze()
    kept = pickle.loads(pickle.dumps(connection.execute(rows).all()))  # noqa: S301 - its own rows
    streamed = connection.execute(rows.execution_options(stream_results=True, max_row_buffer=1))
    return (
        frozen().all(),
        frozen().all(),
        [row.label for row in kept],
        [row._mapping["label"] for row in streamed],
        [list(part) for part in connection.execute(rows.execution_options(yield_per=1)).partitions()],
        connection.execute(rows).columns("label", "id").all(),
        connection.execute(rows).mappings().all(),
        connection.execute(rows).unique(lambda row: row.id % 2).all(),
        connection.execute(rows).scalars("label").all(),
        connection.execute(rows).fetchmany(2),
        connection.execute(rows).first(),
        connection.execute(rows.where(m.Note.id < 0)).first(),
        connection.execute(rows).merge(connection.execute(rows)).all(),
        connection.execute(rows, execution_options={"compiled_cache": None}).all(),
        [
            part.label
            for part in session.scalars(select(m.Note).order_by(m.Note.id).execution_options(yield_per=1))
        ],
        session.execute(select(m.Note).order_by(m.Note.id)).freeze()().scalars().all()[0].label,
    )


@form
def queries_of_the_legacy_kind(session: Session, m: Any) -> Any:
    query = session.query(m.Note).filter(m.Note.label == "two")
    bakery = baked.bakery()
    ready = bakery(lambda session: session.query(m.Note))
    ready += lambda query: query.filter(m.Note.label == bindparam("label"))
    return (
        query.count(),
        _labels(query.all()),
        session.query(query.exists()).scalar(),
        session.query(m.Note.label).filter_by(label="one").all(),
        _labels(ready(session).params(label="one").all()),
        _labels(ready(session).params(label="two").all()),
        query.update({"label": "new"}, synchronize_session="fetch"),
        _stored(session, m),
    )


@form
def results_from_a_cache(session: Session, m: Any) -> Any:
    cache: dict[Any, Any] = {}

    def serve(state: Any) -> Any:
        if state.is_select and not state.is_relationship_load:
            if "rows" not in cache:
                cache["rows"] = state.invoke_statement().freeze()
            return cache["rows"]()
        return None

    event.listen(session, "do_orm_execute", serve)
    try:
        rows = select(m.Note).where(m.Note.label == "two")
        return [_labels(session.execute(rows).scalars()) for _ in range(2)], len(cache)
    finally:
        event.remove(session, "do_orm_execute", serve)


@form
def a_sharded_session(session: Session, m: Any) -> Any:
    session.commit()
    engine: Any = session.get_bind()
    sharded = ShardedSession(
        shards={"only": engine},
        shard_chooser=lambda *_args, **_kw: "only",
        identity_chooser=lambda *_args, **_kw: ["only"],
        execute_chooser=lambda _context: ["only"],
    )
    with sharded:
        sharded.add(m.Note(id=7, label="new"))
        sharded.flush()
        found = _labels(sharded.scalars(select(m.Note).where(m.Note.label == "new")))
        return found, sharded.get(m.Note, 1).label


# -- connections, transactions, errors -------------------------------------------------------------------------------


def _raised(action: Callable[[], Any]) -> Any:
    try:
        action()
    except SQLAlchemyError as error:
        return type(error), type(getattr(error, "orig", None))
    return None


@form
def errors_of_the_database(session: Session, m: Any) -> Any:
    def add_twice() -> None:
        with session.begin_nested():
            session.add(m.Note(id=7, label="one"))
            session.flush()

    return (
        _raised(add_twice),
        _raised(lambda: session.execute(select(m.Note).where(m.Note.id == bindparam("missing")))),
        _raised(lambda: session.get_one(m.Note, 77)),
        _raised(lambda: session.scalars(select(m.Note)).one()),
        _raised(lambda: session.execute(update(m.Note).values(nothing=1))),
        _raised(lambda: session.execute(select(m.Note).where(m.Note.id.in_(5)))),  # type: ignore[arg-type]
        _stored(session, m),
    )


@bystander
def errors_of_text(session: Session, m: Any) -> Any:
    with session.begin_nested() as nested:
        found = _raised(lambda: session.execute(text("SELECT nothing FROM nowhere")))
        nested.rollback()
    return found, session.scalar(select(func.count()).select_from(m.Note))


@form
def savepoints_and_two_phases(session: Session, m: Any) -> Any:
    with session.begin_nested() as nested:
        session.add(m.Note(id=7, label="gone"))
        session.flush()
        nested.rollback()
    with session.begin_nested():
        session.add(m.Note(id=8, label="kept"))
    session.commit()
    engine: Any = session.get_bind()
    if engine.dialect.name in ("mysql", "mariadb"):
        with engine.connect() as connection:
            phases = connection.begin_twophase()
            connection.execute(insert(m.Note).values(id=9, label="both"))
            phases.prepare()
            phases.commit()
    return _stored(session, m)


@form
def engines_views_and_options(session: Session, m: Any) -> Any:
    session.commit()
    engine: Any = session.get_bind()
    view = engine.execution_options(isolation_level="AUTOCOMMIT", logging_token="view")
    with view.connect() as connection:
        connection.execute(insert(m.Note).values(id=7, label="new"))
    with engine.begin() as connection:
        connection.execute(update(m.Note).where(m.Note.id == 7).values(label="newer"))
        rows = connection.execute(select(m.Note.label).where(m.Note.id == 7)).all()
        count = connection.scalar(select(func.count()).select_from(m.Note.__table__))
        mapped = connection.execution_options(schema_translate_map={"none": None})
        return rows, count, mapped.execute(select(m.Note.label).where(m.Note.label == "newer")).all()


@form
def listeners_of_the_applications_own(session: Session, m: Any) -> Any:
    engine, seen = session.get_bind(), list[str]()

    def before(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> Any:
        seen.append(type(clause).__name__)
        return clause.where(m.Note.id > 1) if getattr(clause, "is_select", False) else clause, multi, params

    def sent(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> Any:
        return f"{statement} -- comment", parameters

    event.listen(engine, "before_execute", before, retval=True)
    event.listen(engine, "before_cursor_execute", sent, retval=True)
    try:
        session.execute(update(m.Note).where(m.Note.id == 3).values(label="new"))
        return _labels(session.scalars(select(m.Note))), seen
    finally:
        event.remove(engine, "before_execute", before)
        event.remove(engine, "before_cursor_execute", sent)


@bystander
def what_is_no_statement_of_the_orm(session: Session, m: Any) -> Any:
    connection = session.connection()
    table: Any = m.Note.__table__
    rows = text("SELECT id, label FROM plain_note WHERE id = :id").bindparams(id=1)
    return (
        connection.exec_driver_sql("SELECT id, label FROM plain_note ORDER BY id").all(),
        connection.execute(rows).all(),
        connection.execute(rows.columns(table.c.id, table.c.label)).all(),
        connection.scalar(func.coalesce(None, 3)),
        connection.scalar(select(literal("x").label("y"))),
        connection.execute(select(text("1"))).all(),
        connection.execute(select(func.upper(table.c.label)).order_by(func.lower(table.c.label))).all(),
        connection.execute(select(table.c.label).group_by(table.c.label).order_by(table.c.label)).all(),
        connection.execute(
            insert(table).from_select(["id", "label"], select(table.c.id + 50, table.c.label + "!"))
        ).rowcount,
        connection.execute(select(table.c.id).order_by(table.c.id).limit(1)).all(),
        connection.execute(table.select().order_by(table.c.label.desc()).with_for_update(read=True)).all(),
    )


@form
def reflection_and_ddl(session: Session, m: Any) -> Any:
    session.commit()
    engine: Any = session.get_bind()
    prefix, inspector, metadata = m.Note.__tablename__.split("_")[0], inspect(engine), MetaData()
    with engine.begin() as connection:
        table = Table(m.Share.__tablename__, metadata, autoload_with=connection)
        found = connection.execute(table.select().order_by(table.c.id)).all()
        other = Table(
            f"{prefix}_other", MetaData(), *(column._copy() for column in table.c if not column.foreign_keys)
        )
        other.create(connection)
        connection.execute(insert(other).values(id=1, reader="x"))
        found += connection.execute(select(other.c.reader)).all()
        other.drop(connection)
    return found, sorted(
        name.split("_")[1] for name in inspector.get_table_names() if name.startswith(f"{prefix}_")
    )


@bystander
def reflection_of_everything(session: Session, m: Any) -> Any:
    session.commit()
    metadata = MetaData()
    metadata.reflect(session.get_bind(), only=lambda name, _: name.startswith("plain_"))
    table = metadata.tables["plain_note"]
    return sorted(metadata.tables), session.execute(select(table).order_by(table.c.id)).all()


@bystander
def reflected_tables_with_keys(session: Session, m: Any) -> Any:
    session.commit()
    metadata, engine = MetaData(), session.get_bind()

    def name_it(inspector: Any, table: Any, column: Any) -> None:
        column["key"] = f"attr_{column['name']}"

    event.listen(Table, "column_reflect", name_it)
    try:
        table = Table("plain_note", metadata, autoload_with=engine)
    finally:
        event.remove(Table, "column_reflect", name_it)
    session.execute(insert(table).values(attr_id=7, attr_label="new"))
    session.execute(update(table).where(table.c.attr_id == 7).values({table.c.attr_label: "newer"}))
    return session.execute(select(table.c.attr_label).where(table.c.attr_id == 7)).all()


@bystander
def a_mock_engine(session: Session, m: Any) -> Any:
    said: list[str] = []
    engine: Any = create_mock_engine("sqlite://", lambda sql, *_args, **_kw: said.append(str(sql.compile())))
    m.Base.metadata.create_all(engine, checkfirst=False)
    return said


# -- the comparison --------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(engine: Engine, m: Any) -> Iterator[Session]:
    m.Base.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            author = m.Author(id=1, name="ada")
            session.add_all([author, m.Author(id=2, name="bob")])
            session.add_all(
                m.Note(id=id_, label=label, size=id_, author=author)
                for id_, label in enumerate(("one", "two"), 1)
            )
            session.add(m.Note(id=3, label="three", size=3))
            session.flush()
            session.add_all(
                [m.Share(id=1, note_id=2, reader="ines"), m.Share(id=2, note_id=3, reader="ines")]
            )
            session.commit()
        with Session(engine) as session:
            yield session
    finally:
        m.Base.metadata.drop_all(engine)


def _outcome(function: Form, engine: Engine, m: Any) -> Any:
    with _seeded(engine, m) as session:
        try:
            return function(session, m)
        except SQLAlchemyError as error:
            if engine.dialect.name not in ("mysql", "mariadb"):
                raise
            return type(error)  # UPDATE has no RETURNING there


@pytest.fixture
def plain(sync_url: URL) -> Iterator[Engine]:
    engine = create_engine(sync_url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("name", [*FORMS, *BYSTANDERS])
def test_what_has_nothing_encrypted_is_as_without_us(
    name: str, engine: Engine, plain: Engine, byok: Byok
) -> None:
    """An application's other statements go on as they were, also where no tenant is set."""
    function = FORMS.get(name) or BYSTANDERS[name]
    expected = _outcome(function, plain, PLAIN)
    assert _outcome(function, engine, PLAIN) == expected


@pytest.mark.parametrize("kind", ["class", "object", "alias", "table"])
def test_a_comparison_with_what_is_no_value_is_refused_as_it_is_written(kind: str) -> None:
    """``Note.label == Note`` is a slip that SQLAlchemy tells at once, and not when the statement runs."""
    note = ENCRYPTED.Note
    wrong = {"class": note, "object": note(label="x"), "alias": aliased(note), "table": note.__table__}[kind]
    with pytest.raises(ArgumentError):
        _ = PLAIN.Note.label == wrong
    with pytest.raises(UnsupportedQueryError, match=r"label: == takes a value"):
        _ = note.label == wrong


def test_a_table_may_keep_anything_as_its_info() -> None:
    """Importing us changes nothing for a table that is not ours: SQLAlchemy takes more than dicts there."""
    table = Table("anything", MetaData(), Column("id", Integer), info="a text")  # type: ignore[arg-type]
    assert table.info == "a text"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_encrypted_gives_the_same_rows(name: str, engine: Engine, plain: Engine, byok: Byok) -> None:
    """Making a column encrypted changes no result, and no value goes in without its hash."""
    expected = _outcome(FORMS[name], plain, PLAIN)
    with byok.tenant("t1"):
        assert _outcome(FORMS[name], engine, ENCRYPTED) == expected


async def test_async_engines_are_as_without_us_too(
    async_engine: AsyncEngine, async_url: URL, abyok: Byok
) -> None:
    """The same over asyncio: nothing that the hooks do blocks or breaks what the drivers' greenlets do."""
    plain = create_async_engine(async_url)

    async def outcome(function: Form, engine: AsyncEngine, m: Any) -> Any:
        async with engine.connect() as connection:
            return await connection.run_sync(lambda _: _outcome(function, engine.sync_engine, m))

    wrong = {}
    for name, function in FORMS.items():
        expected = await outcome(function, plain, PLAIN)
        found = await outcome(function, async_engine, PLAIN)
        async with abyok.tenant("t1"):
            encrypted = await outcome(function, async_engine, ENCRYPTED)
        if not found == encrypted == expected:
            wrong[name] = expected, found, encrypted
    await plain.dispose()
    assert wrong == {}
