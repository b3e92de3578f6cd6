"""The undocumented SQLAlchemy names that we lean on.

A new SQLAlchemy that renames one or gives it another meaning fails here first, and the test's name says which of our
modules has to change.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    BINARY,
    Column,
    CursorResult,
    Engine,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    column,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    lambda_stmt,
    literal,
    or_,
    select,
    text,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import SADeprecationWarning
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, Session, aliased, mapped_column
from sqlalchemy.orm.evaluator import UnevaluatableError, _EvaluatorCompiler
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.base import CompileState
from sqlalchemy.sql.elements import BinaryExpression
from sqlalchemy.types import TypeDecorator

from sqla_byok.orm import upstream


class Base(DeclarativeBase):
    pass


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    name: Mapped[str | None] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Dog(Animal):
    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    breed: Mapped[str | None] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


animal: Table = Animal.__table__  # type: ignore[assignment]
dog: Table = Dog.__table__  # type: ignore[assignment]
table = Table(
    "t", MetaData(), Column("id", Integer, primary_key=True), Column("a", String), Column("b", String)
)


@pytest.fixture
def memory() -> Iterator[Engine]:
    """A database in memory; what is asked here is asked of SQLAlchemy, not of a database."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    table.create(engine)
    yield engine
    engine.dispose()


def sql_of(statement: Any, dialect: Any = None) -> str:
    return " ".join(str(statement.compile(dialect=dialect)).split())


def bound(items: list[upstream.Item]) -> list[tuple[Any, Any]]:
    return [(key, value.value) for key, value in items]


# -- upstream.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", [table.insert(), table.update()])
def test_values_are_read_and_replaced(statement: Any) -> None:
    """`_values`: what .values() was given, as keys and binds; a changed copy leaves the statement alone."""
    assert upstream.values(statement) == []
    given = statement.values({"a": "x", table.c.b: "y"})
    assert bound(upstream.values(given)) == [("a", "x"), (table.c.b, "y")]
    new = upstream.with_values(given, [("b", literal("z"))])
    assert bound(upstream.values(new)) == [("b", "z")]
    assert list(new.compile().params.values()) == ["z"]
    assert bound(upstream.values(given)) == [("a", "x"), (table.c.b, "y")]


def test_ordered_values_keep_their_order() -> None:
    """`_ordered_values` on 2.0, `_values` on 2.1."""
    given = table.update().ordered_values(("b", "y"), ("a", "x"))
    assert bound(upstream.values(given)) == [("b", "y"), ("a", "x")]
    new = upstream.with_values(given, [*upstream.values(given), (table.c.id, literal(1))])
    assert sql_of(new) == "UPDATE t SET b=:b, a=:a, id=:id"
    assert sql_of(given) == "UPDATE t SET b=:b, a=:a"


def test_multi_values_are_read_and_replaced() -> None:
    """`_multi_values`: one group of rows for each call of .values([...])."""
    assert not upstream.multi_values(table.insert())
    assert not upstream.multi_values(table.update())
    given = table.insert().values([{"a": "x"}, {"a": "y"}])
    assert [list(group) for group in upstream.multi_values(given)] == [[{"a": "x"}, {"a": "y"}]]
    new = upstream.with_multi_values(given, [[{"a": "x", "b": "z"}]])
    assert sql_of(new) == "INSERT INTO t (a, b) VALUES (:a_m0, :b_m0)"
    assert [list(group) for group in upstream.multi_values(given)] == [[{"a": "x"}, {"a": "y"}]]


def test_positional_values_become_a_mapping_and_positional_rows_do_not() -> None:
    """.values((1, "x")) is told by key; .values([(1, "x")]) stays positional, and fill refuses it."""
    assert bound(upstream.values(table.insert().values((1, "x")))) == [("id", 1), ("a", "x")]
    ((row,),) = upstream.multi_values(table.insert().values([(1, "x")]))
    assert isinstance(row, tuple)


def test_a_named_parameter_is_told_from_a_value() -> None:
    """`BindParameter.unique`, `.required`, `.callable` and `.effective_value`."""
    ((_, plain),) = upstream.values(table.update().values(a="x"))
    assert (plain.unique, plain.required, plain.callable, plain.effective_value) == (True, False, None, "x")
    assert type(plain.type).__name__ == "NullType"
    named, default = bindparam("m"), bindparam("m", "x")
    assert (named.unique, named.required) == (False, True)
    assert (default.unique, default.required, default.value) == (False, False, "x")
    assert bindparam("m", callable_=lambda: "x").effective_value == "x"


def test_a_value_keeps_its_columns_name_when_it_is_bound_anew() -> None:
    """A unique bind of our own is named after its column, so that executemany parameters still go before it."""
    new = upstream.with_values(table.insert().values(a="x"), [("a", bindparam(None, "y", unique=True))])
    assert new.compile().params == {"a": "y"}


def test_insert_from_select_names_its_columns() -> None:
    """`_select_names`."""
    assert list(
        upstream.select_names(table.insert().from_select(["a", table.c.b], select(table.c.a, table.c.b)))
    ) == [
        "a",
        "b",
    ]
    assert not upstream.select_names(table.insert().values(a="x"))
    assert not upstream.select_names(table.update())


@pytest.mark.parametrize("module", [sqlite, postgresql])
def test_conflict_clauses_are_read_and_replaced(module: Any) -> None:
    """`_post_values_clause`, `inferred_target_elements` and `update_values_to_set`."""
    assert not upstream.conflicts(module.insert(table))
    assert not upstream.conflicts(table.insert())
    assert not upstream.conflicts(table.update())
    statement = module.insert(table).values(a="x")
    given = statement.on_conflict_do_update(
        index_elements=["a"], set_={"a": statement.excluded.a, table.c.b: "y"}
    )
    (conflict,) = upstream.conflicts(given)
    assert list(upstream.conflict_elements(conflict)) == ["a"]
    assert [key for key, _ in upstream.conflict_values(conflict)] == ["a", table.c.b]
    new = upstream.with_conflicts(given, [upstream.with_target(conflict, [table.c.b], [("b", literal("z"))])])
    dialect = module.dialect(paramstyle="named")
    assert "ON CONFLICT (b) DO UPDATE SET b = :param_1" in sql_of(new, dialect)
    assert "ON CONFLICT (a) DO UPDATE SET a = excluded.a, b = " in sql_of(given, dialect)
    (nothing,) = upstream.conflicts(statement.on_conflict_do_nothing())
    assert not upstream.conflict_elements(nothing)
    assert upstream.conflict_values(nothing) == []


def test_several_conflict_clauses_are_read_and_replaced() -> None:
    """`ElementList.clauses`, which SQLite has on 2.1."""
    statement = sqlite.insert(table).values(a="x")
    if not hasattr(statement, "ext"):
        pytest.skip("SQLAlchemy 2.0 takes one ON CONFLICT clause; run this on 2.1")
    given = statement.on_conflict_do_nothing(index_elements=["a"]).on_conflict_do_update(
        index_elements=["b"], set_={"b": "y"}
    )
    first, second = upstream.conflicts(given)
    new = upstream.with_conflicts(given, [first, upstream.with_target(second, ["id"], [("a", literal("z"))])])
    assert "ON CONFLICT (a) DO NOTHING ON CONFLICT (id) DO UPDATE SET a = ?" in sql_of(new, sqlite.dialect())
    assert "ON CONFLICT (b) DO UPDATE SET b = ?" in sql_of(given, sqlite.dialect())


def test_duplicate_key_clauses_are_read_and_replaced() -> None:
    """`OnDuplicateClause.update`."""
    statement = mysql.insert(table).values(a="x")
    given = statement.on_duplicate_key_update([("b", "y"), ("a", statement.inserted.a)])
    (conflict,) = upstream.conflicts(given)
    assert not upstream.conflict_elements(conflict)
    assert [key for key, _ in upstream.conflict_values(conflict)] == ["b", "a"]
    items = [*upstream.conflict_values(conflict), ("id", literal(1))]
    new = upstream.with_conflicts(given, [upstream.with_target(conflict, [], items)])
    assert sql_of(new, mysql.dialect()).endswith("ON DUPLICATE KEY UPDATE b = %s, a = VALUES(a), id = %s")
    assert sql_of(given, mysql.dialect()).endswith("ON DUPLICATE KEY UPDATE b = %s, a = VALUES(a)")


def test_a_lambda_statement_is_resolved_with_its_present_values() -> None:
    """`_is_lambda_element` and `_resolved`."""

    def build(value: str) -> Any:
        return lambda_stmt(lambda: update(Animal).values(name=value))

    for value in ("x", "y"):
        statement = build(value)
        assert statement.is_dml
        assert bound(upstream.values(upstream.resolved(statement)))[0][1] == value
    plain = table.insert()
    assert upstream.resolved(plain) is plain


def test_an_annotated_table_equals_its_table() -> None:
    """`_deannotate`, and that both have one hash: what is remembered of a table is found for its annotated self."""
    annotated = insert(Animal).table
    assert annotated is not animal
    assert isinstance(annotated, Table)
    assert upstream.plain_table(annotated) is animal
    assert upstream.plain_table(animal) is animal
    assert {animal: 1}[annotated] == 1
    assert animal == annotated
    assert (animal != annotated) is False


def test_bulk_statements_of_joined_inheritance_name_the_table_they_go_to(memory: Engine) -> None:
    """`_annotations`: the ORM sends one statement to each table, and says so there only."""
    seen: list[tuple[str, bool, Any]] = []

    @event.listens_for(memory, "before_execute")
    def listen(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> None:
        if clause.is_dml:
            target, one_of_several = upstream.target(clause)
            seen.append((target.name, one_of_several, sorted((multi or [params])[0])))

    with Session(memory) as session:
        session.execute(insert(Dog), [{"name": "a", "breed": "b"}])
        session.execute(update(Dog), [{"id": 1, "name": "c", "breed": "d"}])
        session.execute(insert(Animal).values(name="a", kind="animal"))
        session.connection().execute(animal.update(), {"name": "e"})
    assert seen == [
        ("animal", True, ["kind", "name"]),
        ("dog", True, ["breed", "id", "kind"]),
        ("animal", True, ["animal_id", "name"]),
        ("dog", True, ["breed", "dog_id"]),
        ("animal", False, []),
        ("animal", False, ["name"]),
    ]


# -- schema.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: UniqueConstraint("a", name="c"), lambda: Index("i", "a")])
def test_a_constraints_columns_can_be_replaced_before_it_is_attached(make: Callable[[], Any]) -> None:
    """`_pending_colargs`, and `expressions` of an Index: schema.py moves unique and index to the hash column."""
    constraint = make()

    @event.listens_for(constraint, "before_parent_attach")
    def move(constraint: Any, parent: Any) -> None:
        assert constraint._pending_colargs == ["a"]
        constraint._pending_colargs[0] = parent.c.b
        if isinstance(constraint, Index):
            constraint.expressions[0] = parent.c.b  # type: ignore[index]

    of = Table("c", MetaData(), Column("a", String), Column("b", String), constraint)
    assert list(constraint.columns) == [of.c.b]
    ddl = CreateIndex(constraint) if isinstance(constraint, Index) else CreateTable(of)
    assert "(b)" in sql_of(ddl)


def test_columns_are_left_out_of_a_mapping_and_shown_in_subqueries() -> None:
    """`exclude_properties` and `persist_selectable` in instrument_class, `_iterate_polymorphic_properties` after it."""

    class Other(DeclarativeBase):
        pass

    def left_out(mapper: Any) -> list[Any]:
        return [column for column in mapper.persist_selectable.c if column.key == "b"]

    @event.listens_for(Mapper, "instrument_class")
    def leave_out(mapper: Any, cls: Any) -> None:
        if mapper.local_table.name in ("thing", "part"):
            mapper.exclude_properties = {*(mapper.exclude_properties or ()), *left_out(mapper)}
            upstream.show_in_subqueries(mapper, left_out)

    class Thing(Other):
        __table__ = Table(
            "thing", Other.metadata, Column("id", Integer, primary_key=True), Column("b", String)
        )

    class Part(Thing):
        __tablename__ = "part"
        id: Mapped[int] = mapped_column(ForeignKey("thing.id"), primary_key=True)

    event.remove(Mapper, "instrument_class", leave_out)
    assert Thing.__mapper__.attrs.keys() == Part.__mapper__.attrs.keys() == ["id"]
    assert sql_of(select(Thing)) == "SELECT thing.id FROM thing"
    assert select(Thing).subquery().c.keys() == ["id", "b"]
    assert sql_of(select(select(Part).subquery())).startswith("SELECT anon_1.id, anon_1.id_1, anon_1.b FROM")
    inner = "(SELECT thing.id AS id, thing.b AS b FROM thing) AS anon_1"
    for _ in range(2):
        assert sql_of(select(select(Thing).subquery())) == f"SELECT anon_1.id, anon_1.b FROM {inner}"
    assert sql_of(select(aliased(Thing, select(Thing).subquery()))) == f"SELECT anon_1.id FROM {inner}"


def test_a_mapper_tells_its_columns_and_properties() -> None:
    """`_init_properties` in instrument_class, `_columntoproperty` and `inherits` of a mapped class."""

    class Other(DeclarativeBase):
        pass

    class Thing(Other):
        __table__ = Table("thing", MetaData(), Column("id", Integer, primary_key=True), Column("b", String))
        other = __table__.c.b

    assert list(Thing.__mapper__._init_properties) == ["other"]
    assert Animal.__mapper__._columntoproperty[animal.c.name].key == "name"
    assert animal.c.name in Animal.__mapper__._columntoproperty
    assert Dog.__mapper__.inherits is Animal.__mapper__


def test_a_column_can_stand_for_an_entity() -> None:
    """`_annotations` and `_propagate_attrs`: one that is not mapped brings the criteria of its class."""

    class Other(DeclarativeBase):
        pass

    class Thing(Other):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "thing"}  # noqa: RUF012

    class Part(Thing):
        __mapper_args__ = {"polymorphic_identity": "part"}  # noqa: RUF012

    Thing.__table__.append_column(Column("b", String))  # type: ignore[attr-defined]
    column = upstream.of_entity(Thing.__table__.c.b, Part.id.__clause_element__())
    assert sql_of(select(column)).startswith("SELECT thing.b FROM thing WHERE thing.kind IN")


# -- comparator.py ---------------------------------------------------------------------------------------------------


def test_a_bind_can_be_copied_under_its_name_and_under_a_new_one() -> None:
    """`BindParameter._clone`, with `maintain_key` and without."""
    bind = bindparam(None, "x", unique=True)
    assert bind._clone(maintain_key=True).key == bind.key
    assert bind._clone().key != bind.key
    copied = bind._clone(maintain_key=True)
    copied.type = LargeBinary()
    assert not isinstance(bind.type, LargeBinary)


def test_a_column_keeps_what_it_is_annotated_with() -> None:
    """`_annotations` and `_annotate`."""
    column = select(Animal.name).selected_columns[0]
    assert "parentmapper" in column._annotations
    assert animal.c.name._annotate({"x": 1})._annotations["x"] == 1


def test_the_orm_evaluates_only_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_EvaluatorCompiler.visit_binary`: what is refused there is left to the database."""
    monkeypatch.setattr(_EvaluatorCompiler, "visit_binary", _EvaluatorCompiler.visit_binary)
    upstream.evaluate_only(lambda binary: binary.left.key != "name")
    assert _EvaluatorCompiler(Animal).process(Animal.id == 1)(Animal(id=1)) is True
    with pytest.raises(UnevaluatableError):
        _EvaluatorCompiler(Animal).process(Animal.id == 1, Animal.name == "x")


def test_a_comparison_is_negated_by_a_method_of_its_own() -> None:
    """`BinaryExpression._negate`, which our comparison overrides."""
    comparison = animal.c.name == "x"
    assert isinstance(comparison, BinaryExpression)
    assert sql_of(comparison._negate()) == "animal.name != :name_1"

    class Ours(BinaryExpression[bool]):
        inherit_cache = True

        def _negate(self) -> Any:
            return literal(1)

    ours = Ours(comparison.left, comparison.right, comparison.operator)
    assert sql_of(~ours) == ":param_1"


def test_a_select_tells_of_distinct_on_and_group_by() -> None:
    """`_distinct_on` and `_group_by_clauses`."""
    plain = select(animal.c.name)
    assert not plain._distinct_on
    assert not plain._group_by_clauses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SADeprecationWarning)  # 2.1 has another way to write it
        assert plain.distinct(animal.c.id)._distinct_on
    assert plain.group_by(animal.c.id)._group_by_clauses


def test_columns_of_a_subquery_tell_where_they_come_from() -> None:
    """`proxy_set` and `base_columns`."""
    inner = animal.alias("x")
    column = select(inner.c.name).subquery().c.name
    assert column.base_columns == {animal.c.name}
    assert {proxied.table for proxied in column.proxy_set} >= {animal, inner}


# -- statements.py and types.py --------------------------------------------------------------------------------------


def test_all_rows_of_a_result_pass_its_cursor_strategy(memory: Engine) -> None:
    """`CursorResult.cursor_strategy` and `_soft_closed`: fetches.py stands before every fetch."""
    with memory.connect() as connection:
        connection.execute(table.insert(), [{"a": str(i)} for i in range(6)])
        result = connection.execute(select(table.c.a).order_by(table.c.id))
        assert isinstance(result, CursorResult)
        assert not result._soft_closed
        calls: list[str] = []

        class Strategy:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def __getattr__(self, name: str) -> Any:
                calls.append(name)
                return getattr(self.inner, name)

        result.cursor_strategy = Strategy(result.cursor_strategy)  # type: ignore[assignment]
        assert result.fetchone() == ("0",)
        assert result.fetchmany(2) == [("1",), ("2",)]
        assert next(result.partitions(1)) == [("3",)]
        assert result.all() == [("4",), ("5",)]
        assert (
            {"fetchone", "fetchmany", "fetchall", "soft_close"}
            >= set(calls)
            >= {"fetchone", "fetchmany", "fetchall"}
        )
        assert result._soft_closed


def test_a_compiled_statement_lists_its_ctes(memory: Engine) -> None:
    """`SQLCompiler.ctes`: None where there are none, else a mapping of CTEs with their `element`."""
    seen: list[Any] = []

    @event.listens_for(memory, "before_cursor_execute")
    def listen(conn: Any, cursor: Any, sql: Any, parameters: Any, context: Any, many: bool) -> None:
        seen.append(context.compiled.ctes)

    cte = select(table.c.a).cte()
    with memory.connect() as connection:
        for _ in range(2):  # the second time from the cache of compiled statements
            connection.execute(select(table.c.a))
            connection.execute(select(cte.c.a))
    assert [ctes and [found.element.is_dml for found in ctes] for ctes in seen] == [None, [False]] * 2


def test_rows_are_logged_under_a_known_message(memory: Engine) -> None:
    """ "Row %r" and the logger's name: statements.py hides decrypted rows in the log."""
    records: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    engine = create_engine("sqlite://", logging_name="here")
    logger, handler = logging.getLogger(engine.logger.name), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    engine.echo = "debug"
    try:
        with engine.connect() as connection:
            connection.execute(select(literal("x"))).all()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        engine.dispose()
    assert any(str(record.msg).endswith("Row %r") for record in records)


def test_a_types_cache_key_is_found_under_a_known_name() -> None:
    """`_static_cache_key`, which types.py replaces."""

    class Ours(TypeDecorator[str]):
        impl = String
        cache_ok = True

        def __init__(self, a: int) -> None:
            super().__init__()
            self.a = a

    assert Ours(1)._static_cache_key == Ours(1)._static_cache_key
    assert Ours(1)._static_cache_key != Ours(2)._static_cache_key
    assert String(5)._static_cache_key != String(6)._static_cache_key


def test_a_dialect_keeps_its_json_functions_under_known_names() -> None:
    """`_json_serializer` and `_json_deserializer`."""
    dialect = create_engine("sqlite://", json_serializer=str, json_deserializer=repr).dialect
    assert (dialect._json_serializer, dialect._json_deserializer) == (str, repr)  # type: ignore[attr-defined]


def test_the_types_of_a_statements_result_are_known() -> None:
    """By them it is told whether rows have to be decrypted."""
    types = String(), Integer()
    statement = select(Column("a", types[0]), Column("b", types[1]))
    assert tuple(upstream.result_types(statement.compile())) == types


class Recorded(upstream.Steps):
    """Steps that note which of them were taken."""

    taken: list[str]

    @classmethod
    def of_text(cls, *args: Any) -> Any:
        cls.taken.append("of_text")
        return super().of_text(*args)

    @classmethod
    def of_ddl(cls, *args: Any) -> Any:
        cls.taken.append("of_ddl")
        return super().of_ddl(*args)

    @classmethod
    def of_compiled(cls, *args: Any, **kwargs: Any) -> Any:
        cls.taken.append("of_compiled")
        made = super().of_compiled(*args, **kwargs)
        assert made.parameters  # bound by now
        return made

    def about_to_be_sent(self) -> None:
        assert self.root_connection.in_transaction()
        self.taken.append("about_to_be_sent")
        super().about_to_be_sent()

    def processor_of(self, *args: Any) -> Any:
        self.taken.append("processor_of")
        return super().processor_of(*args)

    def result_of(self) -> Any:
        result = super().result_of()
        self.taken.append("result_of")
        return result


def test_an_execution_takes_the_steps_of_ours() -> None:
    """statements.py stands on them: each is taken, in this order, on views and open connections too."""
    engine = create_engine("sqlite://")
    view, taken = engine.execution_options(x=1), list[str]()
    with view.connect() as connection:
        upstream.step_in(engine, Recorded, taken=taken)
        executed = ["of_compiled", "about_to_be_sent", "processor_of", "result_of"]
        for known in ([], ["processor_of"]):  # SQLAlchemy keeps processors with the compiled statement
            assert connection.execute(select(literal("x"))).all() == [("x",)]
            assert taken == [step for step in executed if step not in known]
            taken.clear()
        connection.execute(CreateTable(Table("made", MetaData(), Column("id", Integer))))
        connection.exec_driver_sql("SELECT 1").all()
        assert taken == [
            *("of_ddl", "about_to_be_sent", "result_of"),
            *("of_text", *executed[1:2]),
            *taken[5:],
        ]
        assert taken[-1] == "result_of"
    engine.dispose()


def test_the_metadata_of_a_result_is_made_anew() -> None:
    """`_cached_metadata`: a statement that was read before the engine was attached asks for its processors again."""
    engine, statement, cache = (
        create_engine("sqlite://"),
        select(bindparam("x", type_=Integer)),
        dict[Any, Any](),
    )
    with engine.connect().execution_options(compiled_cache=cache) as connection:
        connection.execute(statement, {"x": 1})
        (compiled,) = cache.values()
        first = compiled._cached_metadata
        connection.execute(statement, {"x": 2})
        assert compiled._cached_metadata is first is not None
        upstream.forget_metadata(compiled)
        assert connection.execute(statement, {"x": 3}).scalar() == 3
        assert compiled._cached_metadata not in (first, None)
    engine.dispose()


def test_a_statement_can_be_compiled_anew_as_sqlalchemy_does_it() -> None:
    """`_compile_w_cache` and what an execution is told of it: rotated salts have a statement compiled once more."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        statement = select(bindparam("x", type_=Integer))
        first = upstream.compiled_anew(connection, {}, statement, [{"x": 1}])
        again = upstream.compiled_anew(connection, {}, statement, [{"x": 2}])
        assert again.compiled is first.compiled
        assert [bind.key for bind in again.extracted] == ["x"]
        context = engine.dialect.execution_ctx_cls._init_compiled(  # type: ignore[attr-defined]
            engine.dialect, connection, connection.connection, {}, *again[:-1], **again.more
        )
        assert list(context.parameters[0]) == [2]
        assert not upstream.reads_early(context)
        context.cursor.close()
    engine.dispose()


def test_a_compiled_statement_tells_of_its_parts(engine: Engine) -> None:
    """guard.py: what `parts` and `executed` read, with the ORM's own joins and ORDER BY in it, also of a subquery."""
    statement = select(Dog).where(Dog.name == "x").order_by(Dog.id, "name").group_by(Dog.id)
    statement = statement.distinct().limit(1).prefix_with("/*+ */")
    compiled: Any = statement.compile(engine)
    for select_ in (upstream.executed(compiled), statement):
        parts = upstream.parts(select_, upstream.Enclosing(compiled))
        assert {column.table.name for column in parts.columns} == {"animal", "dog"}
        assert [str(source) for source in parts.froms] == ["animal JOIN dog ON animal.id = dog.id"]
        assert parts.distinct
        assert not parts.distinct_on
        assert len(parts.criteria) == len(parts.group_by) == 1
        assert [upstream.named_in_order_by(element) for element in parts.order_by] == [None, "name"]
        assert len(parts.others) == 2
    labelled = Animal.name.label("x")
    (reference,) = upstream.parts(select(labelled).order_by(labelled), upstream.Enclosing(compiled)).order_by
    assert upstream.referred(reference).element.name == "name"


def test_a_string_names_what_sqlalchemy_puts_in_its_place() -> None:
    """guard.py: `_label_resolve_dict` over a join, where both tables have an `id`, and in a UNION."""
    compiled: Any = select(1).compile()
    statement = select(Animal.id, Animal.name.label("x")).join(Dog.__table__)
    named = upstream.parts(statement, upstream.Enclosing(compiled)).named
    for name, sql, alike in (
        ("id", "dog.id", 2),
        ("x", "x", 0),
        ("name", "animal.name", 1),
        ("animal_id", "animal.id", 0),
    ):
        meant = named(name).meant[0]
        assert (meant.name if name == "x" else str(meant)) == sql
        assert str(statement.order_by(name)).endswith(f" ORDER BY {sql}")
        assert len(named(name).alike) == alike
    assert named("no") == ([], [])
    first, second = select(Animal.id, Animal.name.label("x")), select(Animal.id, Animal.name)
    lists = [list(part.selected_columns) for part in (first, second)]
    assert upstream.named_in_compound(lists, "x") == ([lists[0][1]], [])
    assert upstream.named_in_compound(lists, "name") == upstream.named_in_compound([], "x") == ([], [])


def test_what_the_guard_reads_of_other_statements() -> None:
    """guard.py: `ordering`, `restated`, `rows_of_values`, `criteria`, `returning`, `conflict_criteria`, and more."""
    animal: Any = Animal.__table__
    twice = union_all(select(animal.c.id), select(animal.alias("other").c.id)).subquery()
    assert [column.table.description for column in upstream.proxied(twice.c.id)] == ["animal", "other"]
    assert not upstream.proxied(animal.c.id)
    part = select(animal.c.id.label("one").label("x"))
    assert upstream.proxied(part.subquery().c.x) == [animal.c.id]
    assert len(upstream.proxied(union_all(part, part).subquery().c.x)) == 2
    assert upstream.row_of(animal.table_valued()) is animal
    assert upstream.row_of(animal.c.id) is None
    assert upstream.text_of(text("SELECT 1")) == "SELECT 1"
    assert upstream.text_of(animal.c.id) is upstream.text_of(select(1)) is None
    assert upstream.selected_by(CreateTable(animal).compile()) is None
    both = select(animal.c.id).union(select(animal.c.id)).order_by("id")
    assert [upstream.named_in_order_by(element) for element in upstream.ordering(both)[0]] == ["id"]
    first = select(animal.c.id).cte(recursive=True)
    assert upstream.restated(first.union(select(first.c.id))) is first
    assert upstream.restated(animal) is None
    given = values(animal.c.id, animal.c.name, name="v").data([(1, "a"), (2, "b")])
    assert list(upstream.rows_of_values(given)) == [1, "a", 2, "b"]
    changed = update(animal).where(animal.c.id == 1).returning(animal.c.name)
    assert len(upstream.criteria(changed)) == 1
    assert list(upstream.returning(changed)) == [animal.c.name]
    assert upstream.criteria(insert(animal)) == ()
    upsert = postgresql.insert(animal).on_conflict_do_update(
        index_elements=["id"], index_where=animal.c.id > 1, set_={"name": "x"}, where=animal.c.id > 2
    )
    (conflict,) = upstream.conflicts(upsert)
    assert len(upstream.conflict_criteria(conflict)) == 2


def test_a_where_can_be_narrowed_whatever_stands_in_it() -> None:
    """A criterion holds beside an OR in a text, in UPDATE, DELETE and both kinds of upsert."""
    id_, or_text = table.c.id, text("a OR b")
    for dml in (table.delete(), table.update().values(a="x")):
        assert str(upstream.with_criterion(dml, id_ == 1)).split("WHERE")[1] == " t.id = :id_1"
        narrowed = upstream.with_criterion(dml.where(or_text).where(table.c.b == "y"), id_ == 1)
        assert str(narrowed).split("WHERE")[1] == " (a OR b AND t.b = :b_1) AND t.id = :id_1"
    for module in (postgresql, sqlite):
        upsert = module.insert(table).values(id=1)
        upsert = upsert.on_conflict_do_update(index_elements=["id"], set_={"a": "x"}, where=or_text)
        held = upstream.with_conflicts(
            upsert, [upstream.held_to(one, id_, id_ == 1, operator.eq) for one in upstream.conflicts(upsert)]
        )
        assert (
            str(held.compile(dialect=module.dialect())).split("WHERE")[1].startswith(" (a OR b) AND t.id = ")
        )
    replaced = mysql.insert(table).values(id=1).on_duplicate_key_update(a="x", b=table.c.a)
    held = upstream.with_conflicts(
        replaced, [upstream.held_to(one, id_, id_ == 1, operator.eq) for one in upstream.conflicts(replaced)]
    )
    assert str(held.compile(dialect=mysql.dialect())).split("UPDATE ")[1] == (
        "a = CASE WHEN (t.id = VALUES(id)) THEN %s ELSE t.a END, "
        "b = CASE WHEN (t.id = VALUES(id)) THEN t.a ELSE t.b END"
    )


def test_dml_is_found_within_a_statement(memory: Engine) -> None:
    """In a CTE wherever it stands, also one that is nested; not the statement itself, nor where there is none."""
    gone = table.delete().returning(table.c.id)
    within = [
        select(gone.cte()),
        select(select(gone.cte(nesting=True)).subquery()),
        select(literal(1)).add_cte(gone.cte()),
        table.insert().from_select(["id"], select(gone.cte())),
        select(Animal).from_statement(select(animal).add_cte(gone.cte())),
    ]
    for statement in within:
        compiled = statement.compile(dialect=postgresql.dialect())
        assert list(upstream.dml_within(compiled)) == [gone]
    for statement in (gone, select(table), select(Animal).from_statement(insert(Animal).returning(Animal))):
        compiled = statement.compile(dialect=postgresql.dialect())
        assert list(upstream.dml_within(compiled)) == []


def test_prefixes_of_a_dialect_are_told() -> None:
    """OR REPLACE for one dialect is none on another."""
    statement = table.insert().prefix_with("OR IGNORE").prefix_with("OR REPLACE", dialect="sqlite")
    assert upstream.prefixes(statement, "sqlite") == ["OR IGNORE", "OR REPLACE"]
    assert upstream.prefixes(statement, "postgresql") == ["OR IGNORE"]


def test_expressions_of_an_exclusion_and_variants_of_a_type_are_told() -> None:
    """They stand under names that SQLAlchemy does not document."""
    expression, where = func.lower(text("a")), text("b > 1")
    found = upstream.excluded(postgresql.ExcludeConstraint((expression, "="), ("b", "="), where=where))
    assert [str(one) for one in found] == ["lower(a)", "b > 1"]
    assert upstream.excluded(UniqueConstraint("a")) == []
    variant = String(5)
    assert upstream.variants(String(3).with_variant(variant, "sqlite")) == {"sqlite": variant}
    assert upstream.variants(String(3)) == {}


@pytest.mark.parametrize("type_", [LargeBinary(), BINARY(2), mysql.TINYBLOB(), postgresql.BYTEA()], ids=repr)
def test_types_of_bytes_have_one_class(type_: Any) -> None:
    """guard.py, schema.py and plain.py: of any dialect, as a database's columns are reflected."""
    assert upstream.is_binary(type_)
    assert not upstream.is_binary(String(2))


def test_what_the_guard_reads_of_what_is_written_and_returned(memory: Engine) -> None:
    """guard.py: `written`, `returned`, `targets`, `beside`, `hints`, `made_by` and `has_rows`."""
    animal: Any = Animal.__table__
    compiled = insert(animal).compile(memory, column_keys=["name"])
    assert upstream.written(insert(animal), compiled) == {"name"}
    assert upstream.written(insert(animal), insert(animal).compile(memory)) == set(animal.c.keys())
    assert upstream.written(insert(animal).values(name="x"), insert(animal).compile(memory)) == set()
    two = [column.key for column in animal.c][:2]
    assert upstream.written(insert(animal).values([(1, "x")]), compiled) == {*two, "name"}
    copied = insert(animal).from_select(["name"], select(animal.c.name))
    assert upstream.written(copied, insert(animal).compile(memory, column_keys=[])) == {"name"}

    seen: list[Any] = []
    event.listen(memory, "before_cursor_execute", lambda *args: seen.append(args[4].compiled))
    with Session(memory) as session:
        session.execute(insert(Animal).returning(func.lower(Animal.name)), [{"name": "x"}, {"name": "y"}])
        session.execute(select(Animal.id))
    bulk, selected = seen
    assert "lower" in {getattr(column, "name", None) for column in upstream.returned(bulk)}
    assert [table.name for table in upstream.targets(bulk)] == [animal.name]
    assert not upstream.returned(selected)
    assert not upstream.targets(selected)

    hinted = (
        select(animal.c.id)
        .prefix_with(text("a"))
        .suffix_with(text("b"))
        .with_hint(animal, "USE INDEX (mrn)")
        .with_statement_hint("c")
        .with_statement_hint("d", "oracle")
    )
    assert [upstream.text_of(one) for one in upstream.beside(hinted.limit(None))] == ["a", "b"]
    assert [hint.split() for hint in upstream.hints(hinted, selected)] == [["USE"], ["c"]]
    assert upstream.hints(update(animal).with_hint("e"), selected) == ["e"]
    few = animal.tablesample(func.bernoulli(1), seed=text("2"))
    assert len(upstream.made_by(few)) == 2
    assert upstream.made_by(animal) == []
    given = values(animal.c.id, name="v").data([(1,)])
    assert upstream.has_rows(given)
    assert upstream.has_rows(given.scalar_values())
    assert list(upstream.rows_of_values(given.scalar_values())) == [1]
    assert not upstream.has_rows(animal)


def test_names_that_sqlalchemy_makes_up_and_cases_that_count(memory: Engine) -> None:
    """guard.py, namesakes.py: `is_made_up`, `tables_of`, `columns_of` and `case_counts`."""
    animal: Any = Animal.__table__
    assert [upstream.is_made_up(one.name) for one in (animal, animal.alias(), animal.alias("a"))] == [
        False,
        True,
        False,
    ]
    assert upstream.tables_of(func.lower(animal.c.name)) == {animal}
    assert upstream.columns_of(func.lower(animal.c.name)) == [animal.c.name]
    assert upstream.columns_of(animal.c.name == "x") == []
    counts = [upstream.case_counts(module.dialect()) for module in (postgresql, sqlite, mysql)]
    assert counts == [(True, True), (False, False), (True, False)]


def test_a_statement_inside_others_can_be_taken_out_and_changed() -> None:
    """statements.py: `inside` and `instead`, through lambdas and FromStatement, with the ORM's notes on the lambda."""
    dml = insert(Animal).returning(Animal)
    for whole in (
        dml,
        select(Animal).from_statement(dml),
        lambda_stmt(lambda: select(Animal).from_statement(dml)),
        lambda_stmt(lambda: dml).spoil(),
        lambda_stmt(lambda: dml)._annotate({"synchronize_session": "fetch"}),
    ):
        inner = upstream.inside(whole)
        assert inner.is_insert
        changed = upstream.instead(whole, inner.values(name="x"))
        assert [column.key for column, _ in upstream.values(upstream.inside(changed))] == ["name"]
        assert changed._annotations.get("synchronize_session") == whole._annotations.get(
            "synchronize_session"
        )
        assert type(changed.compile().statement) is type(changed)
        assert upstream.values(inner) == []


def test_a_subquery_correlates_with_what_is_around_it() -> None:
    """guard.py: `Enclosing` has the FROM of a SELECT as the compiler has it, of subqueries in a FROM too."""
    compiled: Any = select(1).compile()
    outer = select(Animal.id)
    inner = select(Dog.__table__.c.id).where(Dog.__table__.c.id == Animal.__table__.c.id)
    enclosing = upstream.Enclosing(compiled)
    whole = upstream.parts(outer, enclosing)
    enclosing.enter(outer, whole.froms, whole.state)
    for in_from, froms in ((None, 1), (inner.subquery(), 2), (inner.lateral(), 1)):
        assert len(upstream.parts(inner, enclosing, in_from).froms) == froms
    enclosing.enter(inner, None)  # a UNION within it
    assert len(upstream.parts(inner, enclosing).froms) == 1
    enclosing.leave()
    enclosing.leave()
    assert len(upstream.parts(inner, enclosing).froms) == 2


def test_what_a_default_gives_has_a_parameter_of_its_own() -> None:
    """`insert_prefetch`, `update_prefetch` and their parameters' names: tenant_column.py checks what is in them."""
    made = Table(
        "made", MetaData(), Column("id", Integer), Column("org", String, default=str, onupdate=str, key="o")
    )
    rows: Any = insert(made).values([{"id": 1}, {"id": 2, "o": "x"}, {"id": 3}]).compile()
    assert upstream.prefetched(rows) == [(made.c.o, "o"), (made.c.o, "o_m2")]
    assert set(rows.params) >= {"o", "o_m2"}
    assert upstream.prefetched(update(made).values(id=1).compile()) == [(made.c.o, "o")]
    assert upstream.prefetched(select(made).compile()) == []


def test_a_parameter_that_is_named_like_a_value_of_the_statement_is_told() -> None:
    """`binds` and `_is_crud`: SQLAlchemy would send it in the value's place, past what was checked."""
    made = Table("made", MetaData(), Column("id", Integer), Column("org", String))
    rows = insert(made).values([{"id": 1, "org": "x"}, {"id": 2, "org": "x"}]).compile()
    one = insert(made).values(id=1, org=bindparam("o")).compile()
    where = update(made).where(made.c.id == 1).values(org="x").compile()
    for compiled, named, free in (
        (rows, ["id_m0", "org_m1"], ["o"]),
        (one, [], ["id", "org", "o"]),
        (where, ["id_1"], ["org", "o"]),
    ):
        assert [name for name in (*named, *free) if upstream.replacing(compiled, [name])] == named


def test_a_default_sees_its_row_inside_from_statement_too(memory: Engine) -> None:
    """`compile_state` and `get_current_parameters(isolate_multiinsert_groups=)`."""

    class Local(DeclarativeBase):
        pass

    class Row(Local):
        __tablename__ = "row"
        id: Mapped[int] = mapped_column(primary_key=True)
        copy: Mapped[int] = mapped_column(default=lambda context: upstream.row_parameters(context)["id"])

    Local.metadata.create_all(memory)
    with Session(memory) as session:
        session.execute(insert(Row.__table__).values([{"id": 1}, {"id": 2}]))
        added = insert(Row).values(id=3).returning(Row)
        assert session.scalars(select(Row).from_statement(added)).one().copy == 3
        assert session.scalars(select(Row.copy).order_by(Row.id)).all() == [1, 2, 3]


def test_the_orm_shows_its_dml_before_it_synchronizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CompileState.plugins`: what is put into an UPDATE or DELETE there is evaluated, sent, and taken out again."""
    monkeypatch.setattr(CompileState, "plugins", dict(CompileState.plugins))
    seen: list[Any] = []

    def hold(session: Any, statement: Any, entity: Any, options: Any, binds: Any) -> Any:
        seen.append((entity, dict(options).get("marked")))
        return upstream.with_criterion(
            statement, upstream.Evaluated(Animal.name == "x", or_(column("name") == "x", column("id") == 0))
        )

    upstream.before_synchronizing(hold)
    engine = create_engine("sqlite://")
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda c, cursor, text, *_: sent.append(text))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        both = [Animal(id=id_, name=name) for id_, name in ((1, "x"), (2, "y"))]
        session.add_all(both)
        session.flush()
        session.execute(update(Animal).values(name="z"), execution_options={"marked": 1})
        assert [one.name for one in both] == ["z", "y"]
        assert sent[-1].endswith("WHERE (name = ? OR id = ?)")
        session.execute(update(Animal), [{"id": 1, "name": "x"}])  # by key: nothing to put in
        session.execute(update(Animal.__table__).values(name="x"))
        session.execute(delete(Animal).where(Animal.id > 1))
        assert sent[-1].endswith("WHERE (animal.id > ?) AND (name = ? OR id = ?)")
        session.scalars(select(Animal)).all()
    engine.dispose()
    assert seen == [(inspect(Animal), 1), (inspect(Animal), None)]
    held = hold(None, update(Animal).where(Animal.id == 1), None, {}, {})
    bare = upstream.without_evaluated(held)
    assert str(bare).endswith("WHERE (animal.id = :id_1)")
    assert upstream.without_evaluated(bare) is bare
    assert str(upstream.with_criterion(bare, Animal.id == 2)).endswith(
        "WHERE (animal.id = :id_1) AND animal.id = :id_2"
    )
    keys = [
        upstream.Evaluated(column("a") == 1, column(name) == 1)._generate_cache_key().key  # type: ignore[union-attr]
        for name in ("b", "b", "c")
    ]
    assert keys[0] == keys[1] != keys[2]
