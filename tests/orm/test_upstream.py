"""The undocumented SQLAlchemy names that we lean on.

A new SQLAlchemy that renames one or gives it another meaning fails here first, and the test's name says which of our
modules has to change.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
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
    create_engine,
    event,
    insert,
    lambda_stmt,
    literal,
    select,
    text,
    union_all,
    update,
    values,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import SADeprecationWarning
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, Session, deferred, mapped_column
from sqlalchemy.schema import CreateIndex, CreateTable
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


def test_a_property_can_be_added_before_a_class_is_mapped() -> None:
    """`Mapper._init_properties` in instrument_class, and `_columntoproperty` of a mapped class."""

    class Other(DeclarativeBase):
        pass

    @event.listens_for(Mapper, "instrument_class")
    def add(mapper: Any, cls: Any) -> None:
        if cls.__name__ == "Thing":
            mapper._init_properties.setdefault("late", deferred(mapper.local_table.c.b))

    class Thing(Other):
        __table__ = Table(
            "thing", Other.metadata, Column("id", Integer, primary_key=True), Column("b", String)
        )

    event.remove(Mapper, "instrument_class", add)
    assert sql_of(select(Thing)) == "SELECT thing.id FROM thing"
    assert Animal.__mapper__._columntoproperty[animal.c.name].key == "name"
    assert animal.c.name in Animal.__mapper__._columntoproperty
    assert Dog.__mapper__.inherits is Animal.__mapper__


# -- comparator.py ---------------------------------------------------------------------------------------------------


def test_a_bind_can_be_copied_under_its_name_and_under_a_new_one() -> None:
    """`BindParameter._clone`, with `maintain_key` and without."""
    bind = bindparam(None, "x", unique=True)
    assert bind._clone(maintain_key=True).key == bind.key
    assert bind._clone().key != bind.key
    copied = bind._clone(maintain_key=True)
    copied.type = LargeBinary()
    assert not isinstance(bind.type, LargeBinary)


def test_an_annotation_can_be_taken_off_a_column() -> None:
    """`_annotations`, `_annotate` and `_deannotate(values=, clone=)`."""
    column = select(Animal.name).selected_columns[0]
    assert "parentmapper" in column._annotations
    bare = column._deannotate(values=("parentmapper",), clone=True)
    assert "parentmapper" not in bare._annotations
    assert "parententity" in bare._annotations
    assert animal.c.name._annotate({"x": 1})._annotations["x"] == 1


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


# -- hooks.py and types.py -------------------------------------------------------------------------------------------


def test_all_rows_of_a_result_pass_its_cursor_strategy(memory: Engine) -> None:
    """`CursorResult.cursor_strategy` and `_soft_closed`: hooks.py stands before every fetch."""
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
    """ "Row %r" and the logger's name: hooks.py hides decrypted rows in the log."""
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
    """By them the hooks tell whether rows have to be decrypted; what was found stays with the compiled statement."""
    types, asked = (String(), Integer()), []
    statement = select(Column("a", types[0]), Column("b", types[1]))
    compiled = statement.compile()
    assert tuple(upstream.result_types(compiled)) == types
    for _ in range(2):
        assert upstream.known(compiled, lambda it: asked.append(it) or "found") == "found"
    assert asked == [compiled]


def test_a_compiled_statement_tells_of_its_parts(engine: Engine) -> None:
    """guard.py: what `parts` and `executed` read, with the ORM's own joins and ORDER BY in it, also of a subquery."""
    statement = select(Dog).where(Dog.name == "x").order_by(Dog.id, "name").group_by(Dog.id)
    statement = statement.distinct().limit(1).prefix_with("/*+ */")
    compiled: Any = statement.compile(engine)
    for select_ in (upstream.executed(compiled), statement):
        parts = upstream.parts(select_, upstream.Around(compiled))
        assert {column.table.name for column in parts.columns} == {"animal", "dog"}
        assert [str(source) for source in parts.froms] == ["animal JOIN dog ON animal.id = dog.id"]
        assert parts.distinct
        assert not parts.distinct_on
        assert len(parts.criteria) == len(parts.group_by) == 1
        assert [upstream.named_in_order_by(element) for element in parts.order_by] == [None, "name"]
        assert len(parts.others) == 2
    labelled = Animal.name.label("x")
    (reference,) = upstream.parts(select(labelled).order_by(labelled), upstream.Around(compiled)).order_by
    assert upstream.referred(reference).element.name == "name"


def test_a_string_names_what_sqlalchemy_puts_in_its_place() -> None:
    """guard.py: `_label_resolve_dict` over a join, where both tables have an `id`, and in a UNION."""
    compiled: Any = select(1).compile()
    statement = select(Animal.id, Animal.name.label("x")).join(Dog.__table__)
    named = upstream.parts(statement, upstream.Around(compiled)).named
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


def test_a_statement_inside_others_can_be_taken_out_and_changed() -> None:
    """hooks.py: `inside` and `instead`, through lambdas and FromStatement, keeping what the ORM noted on the lambda."""
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
    """guard.py: `Around` has the FROM of a SELECT as the compiler has it, of subqueries in a FROM and lateral ones."""
    compiled: Any = select(1).compile()
    outer = select(Animal.id)
    inner = select(Dog.__table__.c.id).where(Dog.__table__.c.id == Animal.__table__.c.id)
    around = upstream.Around(compiled)
    whole = upstream.parts(outer, around)
    around.enter(outer, whole.froms, whole.state)
    for in_from, froms in ((None, 1), (inner.subquery(), 2), (inner.lateral(), 1)):
        assert len(upstream.parts(inner, around, in_from).froms) == froms
    around.enter(inner, None)  # a UNION within it
    assert len(upstream.parts(inner, around).froms) == 1
    around.leave()
    around.leave()
    assert len(upstream.parts(inner, around).froms) == 2
