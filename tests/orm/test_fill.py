"""Hash columns stay in step with their sources, and no value reaches the database in the clear."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from orm.fill_forms import (
    AS_GIVEN,
    FORMS,
    REFUSED,
    Base,
    Defaulted,
    Form,
    Patient,
    check_stored,
    patient,
    plain,
    recorded,
)
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    event,
    func,
    insert,
    literal,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.exc import ObjectNotExecutableError
from sqlalchemy.orm import Session

import sqla_byok.orm.writes
from sqla_byok import Byok, EncodeError, Encrypted, UnsupportedQueryError


def run_all(byok: Byok, engine: Engine, forms: Sequence[Form]) -> None:
    Base.metadata.create_all(engine)
    failures: list[str] = []
    with recorded(engine) as sql:
        for form in forms:
            if engine.dialect.name in form.kinds:
                with byok.session("t1", engine) as session:
                    failures += form.failures(byok, session, sql)
    assert not failures, "\n".join(failures)


@AS_GIVEN
@pytest.mark.parametrize("group", FORMS)
def test_every_form_of_writing_leaves_ciphertext_and_the_right_hash(
    byok: Byok, engine: Engine, group: str
) -> None:
    """Whatever way a value takes, the stored hash is that of the stored value, and the value is ciphertext."""
    run_all(byok, engine, FORMS[group])


@AS_GIVEN
def test_what_cannot_be_kept_in_step_is_refused(byok: Byok, engine: Engine) -> None:
    """SQL expressions, lone hashes and the like are refused in the column's name before anything is written."""
    run_all(byok, engine, REFUSED)


def test_an_expression_in_a_bulk_row_does_not_reach_the_database(byok: Byok, engine: Engine) -> None:
    """SQLAlchemy takes bulk rows as values; a SQL expression among them is no value of the column's type."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        with pytest.raises(EncodeError) as refusal:
            session.execute(insert(Patient), [{"mrn": func.lower("secret-x")}])
        assert "secret" not in str(refusal.value)
        session.rollback()
        assert session.scalars(select(Patient)).all() == []


def test_two_tenants_rows_have_each_their_own_hashes(byok: Byok, engine: Engine) -> None:
    """One statement, compiled once, hashes each tenant's value with that tenant's salt."""
    Base.metadata.create_all(engine)
    statement = insert(Patient).values(email="secret-e")
    for tenant in ("t1", "t2"):
        with byok.session(tenant, engine) as session:
            session.execute(statement)
            check_stored(byok, session.connection(), tenant)
            (digest,) = session.scalars(select(patient.c.email_db_hash)).all()
            session.rollback()
        if tenant == "t1":
            first = digest
    assert first != digest


def test_a_statement_without_encrypted_columns_is_passed_on_untouched(byok: Byok, engine: Engine) -> None:
    """The statement and parameters that another listener sees are the very ones that were given."""
    Base.metadata.create_all(engine)
    seen: list[tuple[Any, Any]] = []

    def listen(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> None:
        seen.append((clause, multi or params))

    event.listen(engine, "before_execute", listen)
    given: list[tuple[Any, Any]] = [
        (plain.insert(), [{"id": 1, "note": "n"}, {"id": 2, "note": "m"}]),
        (plain.insert().values([{"id": 3}, {"id": 4}]), {}),
        (plain.update().values({plain.c.note: "o"}), {}),
        (plain.insert().from_select(["id"], select(patient.c.id)), {}),
        (update(plain.alias()).values(note="p"), {}),
    ]
    with engine.begin() as connection:
        for statement, rows in given:
            connection.execute(statement, rows)
        assert connection.execute(select(plain.c.note)).scalars().all() == ["p"] * 4
    for (statement, rows), (clause, parameters) in zip(given, seen, strict=False):
        assert clause is statement
        assert parameters == rows
        assert all(a is b for a, b in zip(parameters, rows, strict=True)) or isinstance(rows, dict)


def _more_values(clause: Any, multi: Any, params: Any) -> Any:
    values = {"email_db": literal("secret-l", String)}
    return (clause.values(values) if clause.is_dml else update(Patient).values(values)), multi, params


def _other_parameters(clause: Any, multi: Any, params: Any) -> Any:
    def changed(row: Any) -> Any:
        return {**row, "email_db": "secret-l"}

    return clause, [changed(row) for row in multi], changed(params) if params else params


def _parameters_in_place(clause: Any, multi: Any, params: Any) -> Any:
    for row in multi or [params]:
        row["email_db"] = "secret-l"
    return clause, multi, params


def _nothing(clause: Any, multi: Any, params: Any) -> Any:
    return clause, multi, params


@pytest.mark.parametrize(
    ("listener", "key", "found"),
    [
        (
            _more_values,
            "n",
            {"secret-l": 3},
        ),  # a flush gives NULL for what was not set, which goes before values()
        (_other_parameters, "email_db", {"secret-l": 4}),
        (_parameters_in_place, "email_db", {"secret-l": 4}),
        (_nothing, "email_db", {"1": 4}),
    ],
)
@pytest.mark.parametrize("where", ["engine", "connection"])
def test_what_a_listener_behind_ours_puts_into_a_statement_is_encrypted_and_hashed(
    byok: Byok, engine: Engine, listener: Any, key: str, found: dict[str, int], where: str
) -> None:
    """An application that changes statements by before_execute, after attach(), neither leaks nor loses a row."""
    Base.metadata.create_all(engine)

    def before(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> Any:
        return listener(clause, multi, params) if clause.is_dml else (clause, multi, params)

    value: Any = 1 if key == "n" else "1"
    with byok.session("t1", engine) as session:
        connection = session.connection()
        target = engine if where == "engine" else connection
        event.listen(target, "before_execute", before, retval=True)
        try:
            connection.execute(insert(patient), {key: value})
            connection.execute(insert(patient), [{key: value}, {key: value}])
            session.add(Patient(n=1) if key == "n" else Patient(email=value))
            session.flush()
        finally:
            event.remove(target, "before_execute", before)
        check_stored(byok, session.connection(), "t1")
        for email, count in found.items():
            assert len(session.scalars(select(Patient).where(Patient.email == email)).all()) == count


@AS_GIVEN
def test_a_listener_behind_ours_leaves_every_form_of_writing_as_it_is(byok: Byok, engine: Engine) -> None:
    """A statement that is looked at twice is completed once: named parameters, many rows, upserts, RETURNING."""

    def before(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> Any:
        return clause, multi, params

    event.listen(engine, "before_execute", before, retval=True)
    run_all(byok, engine, [form for forms in FORMS.values() for form in forms])


def test_a_select_that_a_listener_makes_an_update_is_completed_too(byok: Byok, engine: Engine) -> None:
    """Whatever was executed: what is sent is what passes."""
    Base.metadata.create_all(engine)

    def before(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> Any:
        return _more_values(clause, multi, params) if clause.is_select else (clause, multi, params)

    with byok.session("t1", engine) as session:
        session.add(Patient(email="secret-given"))
        session.flush()
        event.listen(engine, "before_execute", before, retval=True)
        try:
            session.connection().execute(select(patient.c.id))
        finally:
            event.remove(engine, "before_execute", before)
        check_stored(byok, session.connection(), "t1")
        assert len(session.scalars(select(Patient).where(Patient.email == "secret-l")).all()) == 1


def test_columns_appended_after_the_first_statement_are_filled(byok: Byok, engine: Engine) -> None:
    """What is remembered of a table does not outlive a change of its columns."""
    table = Table("growing", MetaData(), Column("id", Integer, primary_key=True))
    for count in range(3):
        table.create(engine)
        with engine.connect() as connection, byok.tenant("t1"):
            row = {"id": 1, **{f"c{i}": f"secret-{i}" for i in range(count)}}
            connection.execute(table.insert(), [row])
            connection.execute(table.insert().values([{**row, "id": 2}]))
            for i in range(count):
                byok._searchable.rehashed(
                    "t1", f"growing.c{i}"
                )  # the table was written before it had the column
                byok._keyrings.look_again("t1")
                found = select(table.c.id).where(table.c[f"c{i}"] == f"secret-{i}").order_by(table.c.id)
                assert connection.execute(found).scalars().all() == [1, 2]
        table.drop(engine)
        table.append_column(Column(f"c{count}", Encrypted(String(20), searchable=True)))


def test_a_column_that_becomes_encrypted_is_filled(byok: Byok, engine: Engine) -> None:
    """A table used before one of its columns was declared anew as encrypted does not go on in plaintext."""
    metadata = MetaData()
    table = Table("changing", metadata, Column("id", Integer, primary_key=True), Column("m", String(60)))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), {"id": 1, "m": None})
    table.drop(engine)
    Table("changing", metadata, Column("m", Encrypted(String(60), searchable=True)), extend_existing=True)
    engine.clear_compiled_cache()
    table.create(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(table.insert().values(id=1, m=literal("secret", String)))
        stored = connection.execute(text("SELECT m FROM changing")).scalar_one()
        assert b"secret" not in bytes(stored)
        assert connection.scalar(select(table.c.id).where(table.c.m == "secret")) == 1


def test_an_object_with_a_default_can_be_merged(byok: Byok, engine: Engine) -> None:
    """The hash that a default brought into the object does not travel without its source."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine, expire_on_commit=False) as session:
        given = Defaulted(n=1)
        session.add(given)
        session.commit()
    with byok.session("t1", engine) as session:
        merged = session.merge(given)
        merged.called = "secret-later"
        session.commit()
        assert session.scalars(select(Defaulted).where(Defaulted.called == "secret-later")).one() is merged


def test_an_expression_over_an_encrypted_column_is_no_target(byok: Byok, engine: Engine) -> None:
    """SQLAlchemy takes type_coerce(column) as what to set, and would bind the value through the other type."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(Patient(id=1, name="secret-a", mrn="secret-b"))
        session.flush()
        for column in (patient.c.name, patient.c.mrn, Patient.name):
            key: Any = type_coerce(column, String)
            for statement in (
                update(patient).values({key: "PLAIN"}),
                update(patient).ordered_values((key, "PLAIN")),
                insert(patient).values({key: "PLAIN"}),
                insert(patient).values([{key: "PLAIN"}, {key: "PLAIN"}]),
                update(Patient).values({key: "PLAIN"}),
            ):
                with pytest.raises(UnsupportedQueryError, match=f"patient.{column.key}"):
                    session.execute(statement)
        check_stored(byok, session.connection(), "t1")


def test_writing_within_a_cte_is_refused(byok: Byok, engine: Engine) -> None:
    """An INSERT or UPDATE inside another statement passes no hook that could give it its hashes."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        for writing in (
            insert(Patient).values(name=literal("secret", String)).returning(Patient.id),
            update(Patient).values(mrn="secret").returning(Patient.id),
        ):
            inner = writing.cte("inner")
            for _ in range(2):
                with pytest.raises(UnsupportedQueryError, match="within another statement"):
                    session.execute(select(inner.c.id))
        if engine.dialect.name == "postgresql":  # the others would not run it
            gone = delete(Patient).returning(Patient.id).cte("gone")
            assert session.execute(select(gone.c.id)).all() == []


def test_a_statement_compiled_beforehand_is_refused(byok: Byok, engine: Engine) -> None:
    """Nothing can be added to it any more, so its hash would be missing; 2.1 takes no compiled statement at all."""
    Base.metadata.create_all(engine)
    compiled: Any = insert(Patient).compile(engine, column_keys=["mrn"])
    with byok.tenant("t1"), engine.connect() as connection:
        with pytest.raises((UnsupportedQueryError, ObjectNotExecutableError)):
            connection.execute(compiled, {"mrn": "secret"})
        assert connection.scalars(select(patient.c.id)).all() == []


def test_a_table_that_is_gone_is_not_kept_in_memory() -> None:
    """An application that makes tables as it goes does not grow."""

    def use() -> weakref.ref[Table]:
        table = Table(
            "short_lived", MetaData(), Column("id", Integer), Column("c", Encrypted(String, searchable=True))
        )
        assert sqla_byok.orm.writes.fill(table.insert(), [{"c": "x"}]) is not None
        return weakref.ref(table)

    gone = use()
    gc.collect()
    assert gone() is None


def test_a_failed_flush_leaves_nothing_behind(byok: Byok, engine: Engine) -> None:
    """A refused object takes the whole flush with it, and the session can go on."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([Patient(mrn="secret-a"), Patient(mrn=func.lower("SECRET-B"))])
        with pytest.raises(UnsupportedQueryError):
            session.commit()
        session.rollback()
        assert session.scalars(select(Patient)).all() == []
        session.add(Patient(mrn="secret-c"))
        session.commit()
    with Session(engine.execution_options(byok_tenant="t1")) as session:
        assert session.scalars(select(Patient.mrn)).all() == ["secret-c"]
