"""Each way to search an encrypted column finds what it finds in plaintext, by one look-up on the hash column."""

from __future__ import annotations

import hashlib
import hmac
from datetime import date
from decimal import Decimal
from enum import Enum as PythonEnum
from typing import Any
from uuid import UUID

import pytest
from orm.search_forms import (
    ENCRYPTED,
    FORMS,
    PLAIN,
    Form,
    Models,
    ciphertext_compared,
    ids,
    rows,
    selected,
    statements,
)
from sqlalchemy import (
    Boolean,
    Column,
    Date,
    Engine,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Uuid,
    delete,
    event,
    insert,
    lambda_stmt,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, load_only, mapped_column

from sqla_byok import Byok, Encrypted, search_hash
from sqla_byok.kms import Kms
from sqla_byok.normalize import casefold

Person, Visit = ENCRYPTED.Person, ENCRYPTED.Visit


def create(engine: Engine, *models: Models) -> None:
    for each in models or (ENCRYPTED,):
        each.Base.metadata.create_all(engine)


def _run(session: Session, style: str, form: Form, models: Models) -> list[int]:
    start = select if style == "select" else session.query
    built = form.build(models, start)
    found = session.scalars(built).all() if style == "select" else built.all()
    return ids([row[0] if hasattr(row, "_mapping") else row for row in found])


@pytest.mark.parametrize("style", ["select", "query"])
def test_each_form_finds_what_its_plaintext_twin_finds(engine: Engine, byok: Byok, style: str) -> None:
    """Equality, NULL logic, joins and subqueries are right on all databases, by the hash, in one statement."""
    create(engine, ENCRYPTED, PLAIN)
    wrong: dict[str, object] = {}
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.flush()
        for name, form in FORMS.items():
            sent: list[str] = []
            try:
                with statements(engine) as sent:
                    found = _run(session, style, form, ENCRYPTED)
                    expected = _run(session, style, form, PLAIN)
                assert found == expected == form.found
                sql, plain_sql = sent
                assert ciphertext_compared(sql) is None
                assert (ciphertext_compared(plain_sql) is not None) is form.hashed, (
                    "the check does not see this form"
                )
                assert ("_hash" in sql.removeprefix(selected(sql))) is form.hashed
                assert "_hash" not in selected(sql)
            except Exception as error:
                wrong[name] = error, sent
    assert wrong == {}


def test_a_look_up_is_one_parameter_on_the_hash_column(engine: Engine, byok: Byok) -> None:
    """The SQL of the two common forms, letter for letter."""
    columns = "SELECT person.id, person.mrn, person.nick, person.note FROM person WHERE "
    assert (
        " ".join(str(select(Person).where(Person.mrn == "A-1")).split())
        == f"{columns}person.mrn_hash = :mrn_1"
    )
    assert " ".join(str(select(Person).where(Person.mrn.in_(["A-1"]))).split()) == (
        f"{columns}person.mrn_hash IN (__[POSTCOMPILE_mrn_1])"
    )


def test_case_counts_on_every_database(engine: Engine, byok: Byok) -> None:
    """A search without a normalizer is exact, also where the database's collation ignores case."""
    create(engine)
    with byok.session("t1", engine) as session:
        session.add(Person(id=1, mrn="A-1"))
        session.flush()
        assert session.scalars(select(Person).where(Person.mrn == "a-1")).all() == []
        assert ids(session.scalars(select(Person).where(Person.mrn != "a-1")).all()) == [1]


def test_an_update_by_a_hash_column_leaves_no_object_stale(engine: Engine, byok: Byok) -> None:
    """A hash is no value that Python could compare, so the rows are asked for."""
    create(engine)
    with byok.session("t1", engine) as session:
        session.add(Person(id=1, mrn="A-1", nick="ada", note="first"))
        session.commit()
        person = session.get_one(Person, 1)
        for note, criterion in (
            ("==", search_hash(Person.nick) == "ada"),
            ("in", search_hash(Person.nick).in_(["ada"])),
        ):
            session.execute(update(Person).where(criterion).values(note=note))
            assert person.note == note


def test_a_typed_value_is_hashed_for_a_hash_column(engine: Engine, byok: Byok) -> None:
    """Whatever type the value was given, it is not sent in the clear."""
    create(engine)
    sent: list[Any] = []
    event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[3]))
    with byok.session("t1", engine) as session:
        session.scalars(select(Person).where(search_hash(Person.nick) == literal("ada", String))).all()
    assert len(sent) == 1
    assert "ada" not in repr(sent)


def test_a_comparison_can_be_selected(engine: Engine, byok: Byok) -> None:
    """As a result column it gives True, False and None, as in plaintext."""
    create(engine, ENCRYPTED, PLAIN)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.flush()
        answers = [
            session.execute(
                select(m.Person.nick == "ada", (m.Person.nick != "ada").label("other")).order_by(m.Person.id)
            ).all()
            for m in (ENCRYPTED, PLAIN)
        ]
        assert answers[0] == answers[1] == [(True, False), (None, None), (False, True), (True, False)]


def test_legacy_union_all_filters_within_the_union(engine: Engine, byok: Byok) -> None:
    """Query.union_all().filter() looks the hash up in the union, not in the table beside it."""
    create(engine, ENCRYPTED, PLAIN)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.flush()
        for m in (ENCRYPTED, PLAIN):
            first = session.query(m.Person).filter(m.Person.mrn == "A-1")
            both = first.union_all(session.query(m.Person).filter(m.Person.mrn == "B-2"))
            with statements(engine) as sent:
                assert ids(both.filter(m.Person.mrn == "B-2").all()) == [2]
            assert len(sent) == 1
            assert sent[0].count(" FROM ") == 3, "the table was joined to the union"
        assert ids(
            session.query(Person).filter(Person.mrn.in_(session.query(Visit.mrn).filter_by(code="y"))).all()
        ) == [2]
        assert session.query(Person).filter_by(nick="ada").count() == 2
        assert session.query(session.query(Person).filter_by(nick="ada").exists()).scalar() is True


def test_entities_load_refresh_and_merge_without_the_hash(engine: Engine, byok: Byok) -> None:
    """get, refresh, expire, load_only and merge work on the plaintext attribute and never fetch the hash."""
    create(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()
        with statements(engine) as sent:
            person = session.get_one(Person, 1)
            session.refresh(person)
            session.refresh(person, ["mrn"])
            session.expire(person, ["nick"])
            assert (person.mrn, person.nick) == ("A-1", "ada")
            (slim,) = session.scalars(
                select(Person).options(load_only(Person.note)).where(Person.mrn == "B-2")
            )
            assert slim.mrn == "B-2"
        assert not any("_hash" in selected(sql) for sql in sent)
        session.merge(Person(id=1, mrn="A-9"))
        session.flush()
        assert ids(session.scalars(select(Person).where(Person.mrn.in_(["A-1", "A-9"]))).all()) == [1]
        assert session.scalars(select(Person.mrn).where(Person.mrn == "A-9")).all() == ["A-9"]
        assert session.scalars(select(Person).where(Person.mrn == "A-1")).all() == []


def test_from_statement_takes_a_search_and_text(engine: Engine, byok: Byok) -> None:
    """from_statement() with a search of ours and with textual SQL gives decrypted entities."""
    create(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        by_hash = select(Person).where(Person.mrn == "B-2")
        assert session.scalars(select(Person).from_statement(by_hash)).one().mrn == "B-2"
        textual = text("SELECT id, mrn, nick, note FROM person WHERE id = 2").columns(
            Person.id, Person.mrn, Person.nick, Person.note
        )
        assert session.scalars(select(Person).from_statement(textual)).one().mrn == "B-2"


def test_lambda_statements_follow_their_variables(engine: Engine, byok: Byok) -> None:
    """A lambda statement is analysed once; each later value is hashed anew."""
    create(engine)

    def find(session: Session, value: str, values: list[str]) -> list[int]:
        statement = lambda_stmt(lambda: select(Person))
        statement += lambda it: it.where(Person.mrn == value)
        statement += lambda it: it.where(Person.mrn.in_(values))
        return ids(session.scalars(statement).all())

    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        assert [find(session, value, ["A-1", "B-2", "C-3"]) for value in ("A-1", "B-2", "D-4")] == [
            [1],
            [2],
            [],
        ]
        assert find(session, "A-1", ["B-2", "A-1"]) == [1]


# -- UPDATE and DELETE -----------------------------------------------------------------------------------------------


class _Mail(ENCRYPTED.Base):
    __tablename__ = "mail"
    id = mapped_column(Integer, primary_key=True)
    address = mapped_column(Encrypted(String(60), searchable=True, normalize=casefold))
    note = mapped_column(String(20))


@pytest.mark.parametrize("mode", ["auto", "evaluate", "fetch", False])
def test_update_and_delete_by_a_search_keep_the_session_right(engine: Engine, byok: Byok, mode: Any) -> None:
    """With criteria on an encrypted column, each synchronize_session mode does what it does on plaintext."""
    create(engine, ENCRYPTED, PLAIN)
    seen = []
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.commit()
        for m in (ENCRYPTED, PLAIN):
            people = session.scalars(select(m.Person).order_by(m.Person.id)).all()
            where = m.Person.nick == "ada"
            option = {"synchronize_session": mode}
            session.execute(update(m.Person).where(where).values(note="hit"), execution_options=option)
            in_memory = [person.__dict__.get("note", "expired") for person in people]
            stored = list(session.scalars(select(m.Person.note).order_by(m.Person.id)))
            session.execute(delete(m.Visit).where(m.Visit.code == "x"), execution_options=option)
            session.execute(
                delete(m.Person).where(m.Person.mrn.in_(["C-3", "D-4"])), execution_options=option
            )
            here = [person in session for person in people]
            left = list(session.scalars(select(m.Person.mrn).order_by(m.Person.id)))
            seen.append((in_memory, stored, here, left))
    assert seen[0] == seen[1]
    assert seen[0][1] == ["hit", "second", "A-1", "hit"]
    assert seen[0][3] == ["A-1", "B-2"]
    if mode:
        assert seen[0][2] == [True, True, False, False]


@pytest.mark.parametrize("mode", ["auto", "fetch"])
def test_a_normalized_search_leaves_no_stale_object(engine: Engine, byok: Byok, mode: Any) -> None:
    """The ORM does not evaluate in Python what is equal only after normalizing."""
    create(engine)
    option = {"synchronize_session": mode}
    with byok.session("t1", engine) as session:
        mail = _Mail(id=1, address="Ada@Example.org", note="old")
        session.add(mail)
        session.commit()
        assert (mail.address, mail.note) == ("Ada@Example.org", "old")
        hit = _Mail.address == "ADA@example.ORG"
        session.execute(update(_Mail).where(hit).values(note="hit"), execution_options=option)
        assert mail.note == "hit"
        session.execute(delete(_Mail).where(~(_Mail.address != "ada@EXAMPLE.org")), execution_options=option)
        assert mail not in session


def test_a_normalized_search_cannot_be_evaluated_in_python(engine: Engine, byok: Byok) -> None:
    """synchronize_session="evaluate" is refused loudly where Python would compare un-normalized text."""
    statement = update(_Mail).where(_Mail.address == "a").values(note="hit")
    with byok.session("t1", engine) as session, pytest.raises(InvalidRequestError, match="evaluate"):
        session.execute(statement, execution_options={"synchronize_session": "evaluate"})


def test_returning_gives_plaintext(engine: Engine, byok: Byok) -> None:
    """INSERT, UPDATE and DELETE … RETURNING of entities and columns, with a search as criterion."""
    create(engine)
    dialect = engine.dialect
    with byok.session("t1", engine) as session:
        if dialect.insert_returning:
            statement = insert(Person).returning(Person, sort_by_parameter_order=True)
            with statements(engine) as sent:
                found = session.scalars(statement, [{"id": 1, "mrn": "A-1"}, {"id": 2, "mrn": "B-2"}]).all()
            assert [person.mrn for person in found] == ["A-1", "B-2"]
            assert all("_hash" not in sql.partition("RETURNING")[2] for sql in sent)
        else:
            session.execute(insert(Person), [{"id": 1, "mrn": "A-1"}, {"id": 2, "mrn": "B-2"}])
        if dialect.update_returning:
            changed = (
                update(Person).where(Person.mrn == "A-1").values(note="n").returning(Person.mrn, Person.note)
            )
            assert session.execute(changed).all() == [("A-1", "n")]
        if dialect.delete_returning:
            assert session.scalars(delete(Person).where(Person.mrn == "B-2").returning(Person.mrn)).all() == [
                "B-2"
            ]


# -- which hash ------------------------------------------------------------------------------------------------------

_hashed = Table(
    "hashed",
    MetaData(),
    Column("id", Integer, primary_key=True),
    *(
        Column(
            f"{algorithm[:4]}_{name}",
            Encrypted(String(20), searchable=True, hash=algorithm, salt_scope=scope),
        )
        for algorithm in ("sha256", "hmac-sha256")
        for name, scope in [
            ("own", None),
            ("other", None),
            ("shared", "people"),
            ("same", "people"),
            ("tenant", "tenant"),
        ]
        if not (algorithm == "hmac-sha256" and scope == "tenant")
    ),
)


def _fields(*fields: str | bytes) -> bytes:
    """Length-prefixed fields, as the format joins them."""
    data = [field.encode() if isinstance(field, str) else field for field in fields]
    return b"".join(len(field).to_bytes(4, "big") + field for field in data)


def _expected_hash(search_salt: bytes, tenant: str, type_: Any, column_id: str, value: str) -> bytes:
    """The search hash as format 1 defines it, with the standard library alone."""
    if type_.salt_scope == "tenant":
        salt = search_salt
    else:
        scope = ("column", column_id) if type_.salt_scope is None else ("scope", type_.salt_scope)
        info = _fields("sqla-byok/1/column-salt", tenant, type_.hash, *scope)
        number = int.from_bytes(hmac.new(search_salt, info, hashlib.sha512).digest()[:48], "big")
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
        digits = []
        for _ in range(32):
            number, digit = divmod(number, 62)
            digits.append(letters[digit])
        salt = "".join(reversed(digits)).encode()
    if type_.hash == "sha256":
        return hashlib.sha256(value.encode() + salt).digest()
    return hmac.new(salt, value.encode(), hashlib.sha256).digest()


def test_hashes_in_the_database_are_the_documented_ones(engine: Engine, byok: Byok) -> None:
    """Each algorithm and salt scope stores what an independent computation gives; only one scope shares hashes."""
    _hashed.metadata.create_all(engine)
    sources = [column for column in _hashed.c if isinstance(column.type, Encrypted)]
    value = "Zoë-1"
    stored: dict[tuple[str, str], bytes] = {}
    for number, tenant in enumerate(("t1", "t2"), start=1):
        with byok.tenant(tenant), engine.begin() as connection:
            connection.execute(insert(_hashed).values(id=number, **{column.key: value for column in sources}))
            raw = connection.execute(text(f"SELECT * FROM hashed WHERE id = {number}")).mappings().one()
            salt = byok._keyrings.get(tenant).salts._search_salt
        for column in sources:
            stored[tenant, column.key] = bytes(raw[f"{column.key}_hash"])
            expected = _expected_hash(salt, tenant, column.type, f"hashed.{column.key}", value)
            assert stored[tenant, column.key] == expected, column.key
            with byok.tenant(tenant), engine.connect() as connection:
                assert connection.scalars(select(_hashed.c.id).where(column == value)).all() == [number]
    for tenant in ("t1", "t2"):
        assert stored[tenant, "sha2_shared"] == stored[tenant, "sha2_same"]
        assert stored[tenant, "hmac_shared"] == stored[tenant, "hmac_same"]
    assert len(set(stored.values())) == len(stored) - 4, "only the columns of one scope share a hash"


def test_tenants_share_a_compiled_statement_and_find_their_own(engine: Engine, byok: Byok) -> None:
    """One cache key for all tenants and values; each finds only its rows, by hashes of its own."""
    create(engine)
    compiled, parameters = [], []
    sql = select(Person.note).where(Person.mrn == "A-1")
    assert sql._generate_cache_key() == select(Person.note).where(Person.mrn == "B-2")._generate_cache_key()

    def listen(conn: Any, cursor: Any, statement: str, params: Any, context: Any, many: bool) -> None:
        compiled.append(context.compiled)
        parameters.append(str(params))

    for number, tenant in enumerate(("t1", "t2"), start=1):
        with byok.session(tenant, engine) as session:
            session.add(Person(id=number, mrn="A-1", note=tenant))
            session.commit()
    event.listen(engine, "before_cursor_execute", listen)
    for tenant in ("t1", "t2"):
        with byok.session(tenant, engine) as session:
            assert session.scalars(select(Person.note).where(Person.mrn == "A-1")).all() == [tenant]
            assert session.scalars(select(Person.note).where(Person.mrn == "B-2")).all() == []
    assert len({id(each) for each in compiled}) == 1
    assert len(set(parameters)) == 4


def _counted(method: Any, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(method.__name__)
        return method(*args, **kwargs)

    return call


def test_a_search_asks_neither_the_kms_nor_the_database_more(
    engine: Engine, byok: Byok, customers: dict[str, Kms], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a tenant is one KMS call; ten searches after it are ten statements and no call."""
    create(engine)
    calls: list[str] = []
    client: Any = type(customers["t1"].for_tenant("an-external-id").connect({}))
    for method in ("wrap", "unwrap"):
        monkeypatch.setattr(client, method, _counted(getattr(client, method), calls))
    with statements(engine) as sent, byok.session("t1", engine) as session:
        assert (len(calls), sent) == (1, [])
        for number in range(10):
            session.scalars(select(Person).where(Person.mrn == f"A-{number}")).all()
    assert (len(calls), len(sent)) == (1, 10)


# -- other types -----------------------------------------------------------------------------------------------------


class Colour(PythonEnum):
    RED = "r"
    BLUE = "b"


_VALUES: dict[str, tuple[Any, Any, Any]] = {
    "integer": (Integer(), 7, -7),
    "boolean": (Boolean(), True, False),
    "date": (Date(), date(1815, 12, 10), date(1852, 11, 27)),
    "decimal": (Numeric(10, 2), Decimal("1.50"), Decimal("1.51")),
    "uuid": (Uuid(), UUID(int=1), UUID(int=2)),
    "enum": (Enum(Colour), Colour.RED, Colour.BLUE),
    "bytes": (LargeBinary(8), b"\x00\xff", b"\x00"),
}


def test_every_searchable_type_is_found_by_its_value(engine: Engine, byok: Byok) -> None:
    """==, !=, in_ and not_in on numbers, dates, enums and the like."""
    table = Table(
        "typed",
        MetaData(),
        Column("id", Integer, primary_key=True),
        *(Column(name, Encrypted(type_, searchable=True)) for name, (type_, *_) in _VALUES.items()),
    )
    table.metadata.create_all(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        for number in (1, 2):
            connection.execute(
                insert(table), [{"id": number, **{name: values[number] for name, values in _VALUES.items()}}]
            )
        for name, (_, first, second) in _VALUES.items():
            column = table.c[name]
            for criterion, found in [
                (column == first, [1]),
                (column != first, [2]),
                (column.in_([second]), [2]),
                (column.not_in([second, None]), []),
                (column.not_in([second]), [1]),
            ]:
                assert connection.scalars(select(table.c.id).where(criterion)).all() == found, (
                    name,
                    str(criterion),
                )
