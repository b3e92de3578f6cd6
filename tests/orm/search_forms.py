"""Query forms that search encrypted columns, over two sets of models that differ only in the encryption.

Each form is built once for the encrypted models and once for their plaintext twins, with ``select`` or with a
session's ``query``; both must find the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import (
    Engine,
    ForeignKey,
    Integer,
    String,
    and_,
    bindparam,
    event,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    aliased,
    defer,
    load_only,
    mapped_column,
    relationship,
    undefer,
    with_loader_criteria,
)

from sqla_byok import Encrypted, hash_index, search_hash
from sqla_byok.normalize import first


class Models(NamedTuple):
    """One set of the models."""

    Base: Any
    Person: Any
    Visit: Any
    Card: Any


def _models(prefix: str, text: Callable[[str | None], Any], initial_of: Callable[[str], Any]) -> Models:
    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = f"{prefix}person"
        id = mapped_column(Integer, primary_key=True)
        mrn = mapped_column(text("record"), nullable=False, index=True)
        nick = mapped_column(text(None))
        note = mapped_column(String(20))
        visits = relationship("Visit", back_populates="person", order_by="Visit.id")
        records = relationship(
            "Visit", primaryjoin="Person.mrn == foreign(Visit.mrn)", viewonly=True, order_by="Visit.id"
        )

    class Visit(Base):
        __tablename__ = f"{prefix}visit"
        id = mapped_column(Integer, primary_key=True)
        person_id = mapped_column(ForeignKey(Person.id))
        mrn = mapped_column(text("record"))
        code = mapped_column(text(None))
        person = relationship("Person", back_populates="visits")
        subject = relationship("Person", primaryjoin="foreign(Visit.mrn) == Person.mrn", viewonly=True)

    class Card(Base):
        __tablename__ = f"{prefix}card"
        id = mapped_column(Integer, primary_key=True)
        holder = mapped_column(text(None))
        initial = initial_of("holder")

    return Models(Base, Person, Visit, Card)


def _plain_initial(source: str) -> Any:
    """What hash_index() gives, as a column that keeps the transform's result."""

    def first_letter(context: Any) -> str | None:
        value = context.get_current_parameters()[source]
        return None if value is None else value[:1]

    return mapped_column(String(1), default=first_letter)


ENCRYPTED = _models(
    "",
    lambda scope: Encrypted(String(20), searchable=True, salt_scope=scope),
    lambda source: hash_index(source, transform=first(1)),
)
PLAIN = _models("plain_", lambda scope: String(20), _plain_initial)


def rows(models: Models) -> list[Any]:
    """The rows that every form is tried on."""
    person, visit, card = models.Person, models.Visit, models.Card
    return [
        person(id=1, mrn="A-1", nick="ada", note="first"),
        person(id=2, mrn="B-2", nick=None, note="second"),
        person(id=3, mrn="C-3", nick="cy", note="A-1"),
        person(id=4, mrn="D-4", nick="ada", note=None),
        visit(id=1, person_id=1, mrn="A-1", code="x"),
        visit(id=2, person_id=1, mrn="B-2", code="y"),
        visit(id=3, person_id=2, mrn="B-2", code=None),
        visit(id=4, person_id=None, mrn=None, code="x"),
        card(id=1, holder="Ann"),
        card(id=2, holder=None),
        card(id=3, holder="Bea"),
        card(id=4, holder="Abe"),
    ]


Start = Callable[..., Any]
Build = Callable[[Models, Start], Any]


class Form(NamedTuple):
    """A way to search: what builds it, the ids that it finds, and whether it takes the hash column to find them."""

    build: Build
    found: list[int]
    hashed: bool = True


def _where(criterion: Callable[[Models], Any], found: list[int], hashed: bool = True) -> Form:
    return Form(lambda m, start: start(m.Person).where(criterion(m)), found, hashed)


def _self_join(m: Models, start: Start) -> Any:
    one, other = aliased(m.Person), aliased(m.Person)
    return start(one).join(other, one.nick == other.nick).where(one.id < other.id)


def _aliased(m: Models, start: Start) -> Any:
    other = aliased(m.Person)
    return start(other).where(other.mrn == "B-2")


def _subquery(m: Models, start: Start) -> Any:
    inner = select(m.Person).where(m.Person.id > 1).subquery()
    return start(aliased(m.Person, inner)).where(inner.c.mrn == "B-2")


def _entity_of_subquery(m: Models, start: Start) -> Any:
    inner = aliased(m.Person, select(m.Person).where(m.Person.id > 1).subquery())
    return start(inner).where(inner.mrn.in_(["A-1", "B-2"]))


def _columns_of_subquery(m: Models, start: Start) -> Any:
    inner = select(m.Person.id, *with_hash(m.Person, "mrn")).subquery()
    return start(inner.c.id).where(inner.c.mrn == "B-2")


def _nested_subquery(m: Models, start: Start) -> Any:
    inner = select(select(m.Person.id, *with_hash(m.Person, "mrn")).subquery()).subquery()
    return start(inner.c.id).where(inner.c.mrn != "B-2")


def _labelled_subquery(m: Models, start: Start) -> Any:
    mrn, *hashes = with_hash(m.Person, "mrn")
    inner = select(
        m.Person.id, mrn.label("the_mrn"), *(found.label("look_up_hash") for found in hashes)
    ).subquery()
    return start(inner.c.id).where(inner.c.the_mrn == "B-2")


def _labelled_hash(m: Models, start: Start) -> Any:
    mrn, *hashes = with_hash(m.Person, "mrn")
    inner = select(m.Person.id, mrn, *(found.label("look_up_hash") for found in hashes)).subquery()
    return start(inner.c.id).where(inner.c.mrn == "B-2")


def _labelled_hash_in_a_union(m: Models, start: Start) -> Any:
    mrn, *hashes = with_hash(m.Person, "mrn")
    person = select(
        m.Person.id, mrn.label("the_mrn"), *(found.label("h").label("look_up_hash") for found in hashes)
    )
    both = union_all(person, select(m.Visit.id + 10, *with_hash(m.Visit, "mrn"))).subquery()
    inner = select(both).cte()
    return start(inner.c.id).where(inner.c.the_mrn == "B-2")


def _two_aliases_in_a_subquery(m: Models, start: Start) -> Any:
    one, other = aliased(m.Person), aliased(m.Person)
    both = (
        select(
            one.id,
            *(column.label(f"one_{column.key}") for column in with_hash(one, "mrn")),
            *(column.label(f"other_{column.key}") for column in with_hash(other, "mrn")),
        )
        .where(one.id + 1 == other.id)
        .subquery()
    )
    return start(both.c.id).where(both.c.other_mrn == "B-2", both.c.one_mrn != "B-2")


def _cte(m: Models, start: Start) -> Any:
    inner = select(m.Person.id, *with_hash(m.Person, "mrn")).cte("chosen")
    return start(inner.c.id).where(inner.c.mrn.in_(["B-2", "C-3"]))


def _union_all(m: Models, start: Start) -> Any:
    parts = [select(m.Person).where(m.Person.id == 1), select(m.Person).where(m.Person.id > 2)]
    inner = aliased(m.Person, union_all(*parts).subquery())
    return start(inner).where(inner.mrn.in_(["A-1", "B-2", "C-3"]))


def _union_of_one_scope(m: Models, start: Start) -> Any:
    both = union_all(
        select(m.Person.id, *with_hash(m.Person, "mrn")), select(m.Visit.id + 10, *with_hash(m.Visit, "mrn"))
    ).subquery()
    return start(both.c.id).where(both.c.mrn == "B-2")


def _correlated_scalar(m: Models, start: Start) -> Any:
    newest = (
        select(m.Visit.mrn).where(m.Visit.person_id == m.Person.id, m.Visit.code == "y").scalar_subquery()
    )
    return start(m.Person).where(m.Person.mrn != newest)


def with_hash(entity: Any, name: str) -> tuple[Any, ...]:
    """The attribute, and its hash where it is encrypted."""
    attribute = getattr(entity, name)
    return (attribute, search_hash(attribute)) if isinstance(attribute.type, Encrypted) else (attribute,)


def _hash(entity: Any, name: str) -> Any:
    """The hash of an attribute; the attribute itself where the entity has none."""
    return with_hash(entity, name)[-1]


def _index(criterion: Callable[[Any], Any], found: list[int]) -> Form:
    return Form(lambda m, start: start(m.Card).where(criterion(m.Card)), found)


FORMS: dict[str, Form] = {
    "==": _where(lambda m: m.Person.mrn == "A-1", [1]),
    "== finds several": _where(lambda m: m.Person.nick == "ada", [1, 4]),
    "== finds none": _where(lambda m: m.Person.mrn == "Z-9", []),
    "== empty text": _where(lambda m: m.Person.mrn == "", []),
    "!=": _where(lambda m: m.Person.mrn != "A-1", [2, 3, 4]),
    "!= leaves NULL out": _where(lambda m: m.Person.nick != "ada", [3]),
    "reversed": _where(lambda m: "A-1" == m.Person.mrn, [1]),  # noqa: SIM300 - the form under test
    "not ==": _where(lambda m: ~(m.Person.nick == "ada"), [3]),
    "not !=": _where(lambda m: ~(m.Person.nick != "ada"), [1, 4]),
    "not not ==": _where(lambda m: ~~(m.Person.nick == "ada"), [1, 4]),
    "in_": _where(lambda m: m.Person.mrn.in_(["A-1", "C-3", "no"]), [1, 3]),
    "in_ one": _where(lambda m: m.Person.mrn.in_(("B-2",)), [2]),
    "in_ a generator": _where(lambda m: m.Person.mrn.in_(iter(["A-1", "B-2"])), [1, 2]),
    "in_ a set": _where(lambda m: m.Person.mrn.in_({"A-1", "B-2"}), [1, 2]),
    "in_ with None": _where(lambda m: m.Person.nick.in_(["ada", None]), [1, 4]),
    "in_ only None": _where(lambda m: m.Person.nick.in_([None]), []),
    "in_ nothing": _where(lambda m: m.Person.mrn.in_([]), []),
    "not_in": _where(lambda m: m.Person.mrn.not_in(["A-1", "C-3"]), [2, 4]),
    "not_in leaves NULL out": _where(lambda m: m.Person.nick.not_in(["ada"]), [3]),
    "not_in with None finds none": _where(lambda m: m.Person.nick.not_in(["ada", None]), []),
    "not_in nothing": _where(lambda m: m.Person.nick.not_in([]), [1, 2, 3, 4]),
    "not in_": _where(lambda m: ~m.Person.nick.in_(["ada"]), [3]),
    "not not_in": _where(lambda m: ~m.Person.nick.not_in(["ada"]), [1, 4]),
    "in_ literals and columns": _where(
        lambda m: m.Person.mrn.in_([literal("B-2"), literal("C-3", String), m.Person.mrn]), [1, 2, 3, 4]
    ),
    "in_ typed literals": _where(lambda m: m.Person.nick.in_([literal("cy", String), null()]), [3]),
    "is_(None)": _where(lambda m: m.Person.nick.is_(None), [2], hashed=False),
    "is_not(None)": _where(lambda m: m.Person.nick.is_not(None), [1, 3, 4], hashed=False),
    "== None": _where(lambda m: m.Person.nick == None, [2], hashed=False),  # noqa: E711 - the form under test
    "!= None": _where(lambda m: m.Person.nick != None, [1, 3, 4], hashed=False),  # noqa: E711 - the form under test
    "== null()": _where(lambda m: m.Person.nick == null(), [2], hashed=False),
    "not is_(None)": _where(lambda m: ~m.Person.nick.is_(None), [1, 3, 4], hashed=False),
    "and_, or_": _where(
        lambda m: or_(and_(m.Person.nick == "ada", m.Person.mrn != "A-1"), m.Person.mrn == "B-2"), [2, 4]
    ),
    "filter_by": Form(lambda m, start: start(m.Person).filter_by(nick="ada", mrn="D-4"), [4]),
    "bindparam": Form(
        lambda m, start: start(m.Person).where(m.Person.mrn == bindparam("q")).params(q="B-2"), [2]
    ),
    "bindparam with a type": Form(
        lambda m, start: start(m.Person).where(m.Person.mrn == bindparam("q", type_=String)).params(q="B-2"),
        [2],
    ),
    "bindparam with a value": _where(lambda m: m.Person.mrn == bindparam("given", "B-2", type_=String), [2]),
    "bindparam on the left": _where(
        lambda m: bindparam("q", "B-2", type_=m.Person.mrn.type) == m.Person.mrn, [2]
    ),
    "bindparam of None": Form(
        lambda m, start: start(m.Person).where(m.Person.nick == bindparam("q")).params(q=None), []
    ),
    "bindparam expanding": Form(
        lambda m, start: (
            start(m.Person).where(m.Person.mrn.in_(bindparam("q", expanding=True))).params(q=["B-2", "C-3"])
        ),
        [2, 3],
    ),
    "bindparam expanding with a type": Form(
        lambda m, start: (
            start(m.Person)
            .where(m.Person.mrn.not_in(bindparam("q", type_=String, expanding=True)))
            .params(q=["B-2"])
        ),
        [1, 3, 4],
    ),
    "bindparams in a list": Form(
        lambda m, start: start(m.Person).where(m.Person.mrn.in_([bindparam("q"), "C-3"])).params(q="B-2"),
        [2, 3],
    ),
    "literal": _where(lambda m: m.Person.mrn == literal("B-2"), [2]),
    "literal with a type": _where(lambda m: m.Person.mrn == literal("B-2", String), [2]),
    "two values of its type": _where(
        lambda m: literal("B-2", m.Person.mrn.type) == "B-2", [1, 2, 3, 4], hashed=False
    ),
    "label": _where(lambda m: m.Person.mrn.label("number") == "B-2", [2]),
    "Core column": _where(lambda m: m.Person.__table__.c.mrn == "B-2", [2]),
    "Core select": Form(
        lambda m, start: start(m.Person.__table__.c.id).where(m.Person.__table__.c.nick.not_in(["cy"])),
        [1, 4],
    ),
    "Core alias": Form(
        lambda m, start: (lambda table: start(table.c.id).where(table.c.mrn == "B-2"))(
            m.Person.__table__.alias("a")
        ),
        [2],
    ),
    "column == itself": _where(lambda m: m.Person.nick == m.Person.nick, [1, 3, 4]),
    "join on columns": Form(
        lambda m, start: (
            start(m.Person).join(m.Visit, m.Visit.mrn == m.Person.mrn).where(m.Visit.code == "y")
        ),
        [2],
    ),
    "join on a relationship": Form(
        lambda m, start: start(m.Person).join(m.Person.visits).where(m.Visit.code == "y"), [1]
    ),
    "join on a relationship and more": Form(
        lambda m, start: start(m.Person).join(m.Person.visits.and_(m.Visit.code == "x")), [1]
    ),
    "outer join": Form(
        lambda m, start: (
            start(m.Person)
            .outerjoin(m.Visit, and_(m.Visit.mrn == m.Person.mrn, m.Visit.code == "x"))
            .where(m.Visit.id.is_(None))
        ),
        [2, 3, 4],
    ),
    "column != column": Form(
        lambda m, start: start(m.Visit).join(m.Visit.person).where(m.Visit.mrn != m.Person.mrn), [2]
    ),
    "self join": Form(_self_join, [1]),
    "aliased": Form(_aliased, [2]),
    "exists": _where(lambda m: exists().where(m.Visit.mrn == m.Person.mrn, m.Visit.code == "x"), [1]),
    "not exists": _where(lambda m: ~exists().where(m.Visit.mrn == m.Person.mrn), [3, 4]),
    "any": _where(lambda m: m.Person.visits.any(m.Visit.code == "y"), [1]),
    "any by a hash": _where(lambda m: m.Person.records.any(m.Visit.code == "y"), [2]),
    "any by keyword": _where(lambda m: m.Person.visits.any(code="x"), [1]),
    "has": Form(lambda m, start: start(m.Visit).where(m.Visit.person.has(m.Person.mrn == "B-2")), [3]),
    "has by a hash": Form(lambda m, start: start(m.Visit).where(m.Visit.subject.has(nick=None)), [2, 3]),
    "in_ (select)": _where(lambda m: m.Person.mrn.in_(select(m.Visit.mrn).where(m.Visit.code == "y")), [2]),
    "in_ (select distinct)": _where(lambda m: m.Person.mrn.in_(select(m.Visit.mrn).distinct()), [1, 2]),
    "in_ (select of a label)": _where(
        lambda m: m.Person.mrn.in_(
            select(m.Visit.mrn.label("it")).join(m.Visit.person).where(m.Visit.id > 1)
        ),
        [2],
    ),
    "not_in (select)": _where(
        lambda m: m.Person.mrn.not_in(select(m.Visit.mrn).where(m.Visit.mrn.is_not(None))), [3, 4]
    ),
    "not_in (select with NULL) finds none": _where(lambda m: m.Person.mrn.not_in(select(m.Visit.mrn)), []),
    "in_ (select of an alias)": _where(
        lambda m: (lambda other: m.Person.nick.in_(select(other.nick).where(other.mrn == "D-4")))(
            aliased(m.Person)
        ),
        [1, 4],
    ),
    "== scalar subquery": _where(
        lambda m: m.Person.mrn == select(m.Visit.mrn).where(m.Visit.code == "y").scalar_subquery(), [2]
    ),
    "scalar subquery on the left": _where(
        lambda m: select(m.Visit.mrn).where(m.Visit.code == "y").scalar_subquery() == m.Person.mrn, [2]
    ),
    "correlated scalar subquery": Form(_correlated_scalar, [1]),
    "subquery of an entity": Form(_subquery, [2]),
    "entity of a subquery": Form(_entity_of_subquery, [2]),
    "subquery of columns": Form(_columns_of_subquery, [2]),
    "nested subquery": Form(_nested_subquery, [1, 3, 4]),
    "labelled subquery": Form(_labelled_subquery, [2]),
    "labelled hash": Form(_labelled_hash, [2]),
    "labelled hash in a union": Form(_labelled_hash_in_a_union, [2, 12, 13]),
    "two aliases in a subquery": Form(_two_aliases_in_a_subquery, [1]),
    "cte": Form(_cte, [2, 3]),
    "union_all": Form(_union_all, [1, 3]),
    "union_all of one salt scope": Form(_union_of_one_scope, [2, 12, 13]),
    "Bundle": Form(lambda m, start: start(Bundle("it", m.Person.id)).where(m.Person.mrn == "B-2"), [2]),
    "load_only": Form(
        lambda m, start: start(m.Person).options(load_only(m.Person.note)).where(m.Person.mrn == "B-2"), [2]
    ),
    "defer": Form(
        lambda m, start: start(m.Person).options(defer(m.Person.mrn)).where(m.Person.mrn == "B-2"), [2]
    ),
    "undefer": Form(
        lambda m, start: start(m.Person).options(undefer(m.Person.mrn)).where(m.Person.mrn == "B-2"), [2]
    ),
    "limit": Form(
        lambda m, start: start(m.Person).where(m.Person.nick == "ada").order_by(m.Person.id).limit(1), [1]
    ),
    "with_loader_criteria": Form(
        lambda m, start: start(m.Person).options(with_loader_criteria(m.Person, m.Person.nick == "ada")),
        [1, 4],
    ),
    "with_loader_criteria of a lambda": Form(
        lambda m, start: start(m.Person).options(
            with_loader_criteria(m.Person, lambda cls: cls.nick == "ada")
        ),
        [1, 4],
    ),
    "hash column": _where(lambda m: _hash(m.Person, "nick") == "ada", [1, 4]),
    "hash column and a literal with a type": _where(
        lambda m: _hash(m.Person, "nick") == literal("ada", String), [1, 4]
    ),
    "hash column in literals with a type": _where(
        lambda m: _hash(m.Person, "nick").in_([literal("cy", String), null()]), [3]
    ),
    "hash column and a bindparam with a type": Form(
        lambda m, start: (
            start(m.Person).where(_hash(m.Person, "nick") != bindparam("q", type_=String)).params(q="ada")
        ),
        [3],
    ),
    "index ==": _index(lambda card: card.initial == "A", [1, 4]),
    "index !=": _index(lambda card: card.initial != "A", [3]),
    "index not ==": _index(lambda card: ~(card.initial == "A"), [3]),
    "index in_": _index(lambda card: card.initial.in_(["B", "C", None]), [3]),
    "index in_ nothing": _index(lambda card: card.initial.in_([]), []),
    "index not_in": _index(lambda card: card.initial.not_in(["A"]), [3]),
    "index not_in nothing": _index(lambda card: card.initial.not_in([]), [1, 2, 3, 4]),
    "index not_in with None finds none": _index(lambda card: card.initial.not_in(["A", None]), []),
    "index is_(None)": _index(lambda card: card.initial.is_(None), [2]),
    "index is_not(None)": _index(lambda card: card.initial.is_not(None), [1, 3, 4]),
    "index == None": _index(lambda card: card.initial == None, [2]),  # noqa: E711 - the form under test
    "index literal with a type": _index(lambda card: card.initial == literal("A", String), [1, 4]),
    "index bindparam": Form(
        lambda m, start: start(m.Card).where(m.Card.initial == bindparam("q")).params(q="A"), [1, 4]
    ),
    "index of an alias": Form(
        lambda m, start: (lambda other: start(other).where(other.initial == "B"))(aliased(m.Card)), [3]
    ),
    "index of a subquery": Form(
        lambda m, start: (lambda inner: start(inner).where(inner.initial == "A"))(
            aliased(m.Card, select(m.Card).where(m.Card.id > 1).subquery())
        ),
        [4],
    ),
    "count": Form(lambda m, start: start(func.count(m.Person.id)).where(m.Person.nick == "ada"), [2]),
}


def ids(found: Sequence[Any]) -> list[int]:
    """The ids of entities, of bundles, or the numbers themselves."""
    return sorted(row if isinstance(row, int) else row.id for row in found)


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """The SQL that is sent within the block."""
    sent: list[str] = []

    def listen(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(" ".join(statement.split()))

    event.listen(engine, "before_cursor_execute", listen)
    yield sent
    event.remove(engine, "before_cursor_execute", listen)


_COLUMN = r"\b(?:\w+_)?(?:mrn|nick|code|initial)\b[`\"]?"
_COMPARED = re.compile(
    # with the column on the left, on the right, or selected by the subquery of an IN
    rf"{_COLUMN}\)? (?:=|!=|<>|\(?(?:NOT )?IN\b)"
    rf"|(?<!\w)(?:=|!=|<>) \(?(?:\w+\.)?{_COLUMN}(?!\.)"
    rf"|IN \(SELECT (?:DISTINCT )?\w+\.{_COLUMN} "
    # a NULL test of an index is one of its hash column
    r"|\binitial[`\"]? IS "
)


def ciphertext_compared(sql: str) -> str | None:
    """The place where the statement compares an encrypted column and not its hash."""
    found = _COMPARED.search(sql)
    return None if found is None else sql[max(0, found.start() - 20) : found.end() + 20]


def selected(sql: str) -> str:
    """The statement's own column list."""
    return sql[sql.rindex("SELECT ", 0, sql.index(" FROM ", sql.find(") SELECT ") + 1)) :].split(" FROM ", 1)[
        0
    ]
