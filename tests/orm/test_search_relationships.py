"""Relationships that are joined on encrypted columns, and inheritance: loaded, searched and written by the hash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from orm.search_forms import ENCRYPTED, PLAIN, ciphertext_compared, ids, rows, selected, statements
from sqlalchemy import Engine, ForeignKey, Integer, String, select, update
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    aliased,
    foreign,
    immediateload,
    joinedload,
    lazyload,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
    with_loader_criteria,
    with_parent,
    with_polymorphic,
)

from sqla_byok import Byok, Encrypted, UnsupportedQueryError, hash_index, search_hash
from sqla_byok.normalize import casefold, last

Person, Visit = ENCRYPTED.Person, ENCRYPTED.Visit


def _create(engine: Engine, *bases: Any) -> None:
    for base in bases or (ENCRYPTED.Base, PLAIN.Base):
        base.metadata.create_all(engine)


# With how many statements four people, and four visits, are loaded.
LOADERS = {
    "lazy": (lazyload, 5, 5),
    "joined": (joinedload, 1, 1),
    "select in": (selectinload, 2, 2),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_collections_joined_on_encrypted_columns_load(engine: Engine, byok: Byok, loader: str) -> None:
    """Each loader finds a person's records by the hash, in as many statements as in plaintext."""
    _create(engine)
    option, for_people, for_visits = LOADERS[loader]
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.commit()
        for m in (ENCRYPTED, PLAIN):
            with statements(engine) as sent:
                people = session.scalars(
                    select(m.Person).options(option(m.Person.records)).order_by(m.Person.id)
                )
                found = [ids(person.records) for person in people.unique()]
            assert found == [[1], [2, 3], [], []]
            assert len(sent) == for_people
            assert any(ciphertext_compared(sql) for sql in sent) is (m is PLAIN)
            session.expunge_all()
            with statements(engine) as sent:
                visits = session.scalars(
                    select(m.Visit).options(option(m.Visit.subject)).order_by(m.Visit.id)
                )
                subjects = [visit.subject and visit.subject.id for visit in visits.unique()]
            assert subjects == [1, 2, 2, None]
            assert len(sent) == for_visits
            assert any(ciphertext_compared(sql) for sql in sent) is (m is PLAIN)
            session.expunge_all()


@pytest.mark.parametrize("loader", LOADERS)
def test_eager_loads_survive_a_limit(engine: Engine, byok: Byok, loader: str) -> None:
    """With LIMIT the entity moves into a subquery, which has to carry the hash that the join needs."""
    _create(engine)
    option = LOADERS[loader][0]
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.commit()
        for m in (ENCRYPTED, PLAIN):
            found = select(m.Person).options(option(m.Person.records)).order_by(m.Person.id.desc())
            people = session.scalars(found.where(m.Person.mrn.in_(["A-1", "B-2"])).limit(1)).unique().all()
            assert [(person.mrn, ids(person.records)) for person in people] == [("B-2", [2, 3])]
            session.expunge_all()
            paired = select(m.Person).options(option(m.Person.visits.and_(m.Visit.code == "x"))).limit(2)
            people = session.scalars(paired.order_by(m.Person.id)).unique().all()
            assert [ids(person.visits) for person in people] == [[1], []]
            session.expunge_all()


def test_subqueryload_works_over_keys_and_is_refused_over_encrypted_columns(
    engine: Engine, byok: Byok
) -> None:
    """Its subquery of DISTINCT join columns has no hash: it raises and says what to use, it does not load nothing."""
    _create(engine, ENCRYPTED.Base)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()
        found = select(Person).where(Person.mrn == "A-1")
        with statements(engine) as sent:
            people = session.scalars(found.options(subqueryload(Person.visits)))
            assert [ids(person.visits) for person in people] == [[1, 2]]
        assert len(sent) == 2
        session.expunge_all()
        with pytest.raises(UnsupportedQueryError, match="selectinload") as raised:
            session.scalars(found.options(subqueryload(Person.records))).all()
        assert raised.value.column == "person.mrn"


def test_relationship_comparisons_search_by_hash(engine: Engine, byok: Byok) -> None:
    """contains(), == object, == None, with_parent() and join find what they find in plaintext."""
    _create(engine)
    answers = []
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED) + rows(PLAIN))
        session.commit()
        for m in (ENCRYPTED, PLAIN):
            person, visit = session.get_one(m.Person, 2), session.get_one(m.Visit, 2)
            _ = person.mrn, visit.mrn
            other = aliased(m.Visit)
            searches = (
                select(m.Person).where(m.Person.records.contains(visit)),
                select(m.Person).where(~m.Person.records.contains(visit)),
                select(m.Visit).where(m.Visit.subject == person),
                select(m.Visit).where(m.Visit.subject != person),
                select(m.Visit).where(m.Visit.subject == None),  # noqa: E711 - the form under test
                select(m.Visit).where(with_parent(person, m.Person.records)),
                select(m.Person).join(m.Person.records).where(m.Visit.id == 3),
                select(m.Person).join(m.Person.records.of_type(other)).where(other.code == "y"),
                select(m.Person).outerjoin(m.Person.records).where(m.Visit.id.is_(None)),
                select(m.Person).where(~m.Person.records.any()),
            )
            with statements(engine) as sent:
                found = [ids(session.scalars(search).unique().all()) for search in searches]
            assert len(sent) == len(found)
            assert any(ciphertext_compared(sql) for sql in sent) is (m is PLAIN)
            assert not any("_hash" in selected(sql) for sql in sent)
            answers.append(found)
    assert answers[0] == answers[1]
    assert answers[0] == [[2], [1, 3, 4], [2, 3], [1, 4], [4], [2, 3], [2], [2], [3, 4], [3, 4]]


@pytest.mark.parametrize("loader", LOADERS)
def test_loader_criteria_reach_lazy_and_eager_loads(engine: Engine, byok: Byok, loader: str) -> None:
    """with_loader_criteria() by a search limits related rows too, as an expression and as a lambda."""
    _create(engine, ENCRYPTED.Base)
    option = LOADERS[loader][0]
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()
        for wanted, found in (("x", [1]), ("y", [2])):
            for criteria in (
                with_loader_criteria(Visit, Visit.code == wanted),
                with_loader_criteria(Visit, lambda cls: cls.code == wanted),  # noqa: B023 - used within the round
            ):
                people = select(Person).where(Person.mrn == "A-1").options(option(Person.visits), criteria)
                assert [ids(person.visits) for person in session.scalars(people).unique()] == [found]
                session.expunge_all()


class _Clinic(DeclarativeBase):
    pass


class _Guest(_Clinic):
    __tablename__ = "guest"
    id = mapped_column(Integer, primary_key=True)
    number = mapped_column(Encrypted(String(20), searchable=True))
    mail = mapped_column(Encrypted(String(20), searchable=True, normalize=casefold))


class _Stay(_Clinic):
    __tablename__ = "stay"
    id = mapped_column(Integer, primary_key=True)
    guest_id = mapped_column(ForeignKey(_Guest.id))


# What is asked of the guest, and of which guests it is true.
OWN: dict[str, tuple[Any, list[int]]] = {
    "value": (_Guest.number == "A-1", [1]),
    "others": (_Guest.number != "A-1", [2]),
    "some": (_Guest.number.in_(["A-1", "C-3"]), [1]),
    "but_some": (_Guest.number.not_in(["A-1", "C-3"]), [2]),
    "normalized": (_Guest.mail == "ADA@X", [1]),
    "either": ((_Guest.mail == "ada@x") | (_Guest.number == "B-2"), [1, 2]),
}
for _name, (_criterion, _) in OWN.items():
    setattr(
        _Guest,
        _name,
        relationship(_Stay, primaryjoin=(_Guest.id == foreign(_Stay.guest_id)) & _criterion, viewonly=True),
    )


@pytest.mark.parametrize("loader", [lazyload, immediateload, selectinload, joinedload])
def test_a_relationship_may_ask_the_parents_own_column(engine: Engine, byok: Byok, loader: Any) -> None:
    """A lazy load has the parent's value where the others have its column: each finds the same, NULL nothing."""
    _create(engine, _Clinic)
    with byok.session("t1", engine) as session:
        session.add_all([_Guest(id=1, number="A-1", mail="Ada@x"), _Guest(id=2, number="B-2"), _Guest(id=3)])
        session.flush()
        session.add_all([_Stay(id=id_, guest_id=id_) for id_ in (1, 2, 3)])
        session.commit()
        for name, (_, expected) in OWN.items():
            guests = session.scalars(select(_Guest).options(loader(getattr(_Guest, name)))).unique().all()
            assert {name: sorted(one.id for guest in guests for one in getattr(guest, name))} == {
                name: expected
            }
            session.expunge_all()


class _Company(DeclarativeBase):
    pass


class _Employee(_Company):
    __tablename__ = "employee"
    id = mapped_column(Integer, primary_key=True)
    kind = mapped_column(String(10), nullable=False, default="employee")
    boss_id = mapped_column(ForeignKey("employee.id"))
    number = mapped_column(Encrypted(String(20), searchable=True))
    mail = mapped_column(Encrypted(String(20), searchable=True, normalize=casefold))
    number_end = hash_index("number", transform=last(1))
    boss = relationship("_Employee", remote_side="_Employee.id", back_populates="team")
    team = relationship("_Employee", back_populates="boss", order_by="_Employee.id")
    drivers = relationship(
        "_Driver",
        primaryjoin="_Employee.id == remote(foreign(_Driver.boss_id))",
        viewonly=True,
        order_by="_Driver.id",
    )
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "employee"}  # noqa: RUF012 - as declarative takes it


class _Driver(_Employee):
    __tablename__ = "driver"
    id = mapped_column(ForeignKey(_Employee.id), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "driver"}  # noqa: RUF012 - as declarative takes it


CRITERIA: dict[str, Callable[[Any], Any]] = {
    "a value": lambda cls: cls.number == "A-1",
    "a normalized value": lambda cls: cls.mail == "ADA@X",
    "a list of normalized values": lambda cls: cls.mail.in_(["ADA@X"]),
    "another than a normalized value": lambda cls: ~(cls.mail != "ADA@X"),
    "an index": lambda cls: cls.number_end == "1",
    "a hash": lambda cls: search_hash(cls.number) == "A-1",
    "a hash of an index": lambda cls: search_hash(cls.number_end) == "1",
}
other = aliased(_Employee)
# What each loads or joins of the employees that a criterion is true of.
MOVED: dict[str, Callable[[Callable[[Any], Any]], tuple[Any, Any]]] = {
    "an option's relationship": lambda true: (
        select(_Employee).options(joinedload(_Employee.team.and_(true(_Employee)))),
        lambda one: ids(one.team),
    ),
    "a relationship that is joined": lambda true: (
        select(_Employee).join(_Employee.team.of_type(other).and_(true(_Employee))).add_columns(other.id),
        None,
    ),
    "loader criteria": lambda true: (
        select(_Employee).options(
            joinedload(_Employee.team),
            with_loader_criteria(_Employee, true(_Employee), include_aliases=True),
        ),
        lambda one: ids(one.team),
    ),
    "loader criteria, as a lambda": lambda true: (
        select(_Employee).options(
            joinedload(_Employee.team), with_loader_criteria(_Employee, true, include_aliases=True)
        ),
        lambda one: ids(one.team),
    ),
    "loader criteria on the other side": lambda true: (
        select(_Employee).options(joinedload(_Employee.boss), with_loader_criteria(_Employee, true)),
        lambda one: one.boss and one.boss.id,
    ),
    "a subclass": lambda true: (
        select(_Employee).options(joinedload(_Employee.drivers.and_(true(_Driver)))),
        lambda one: ids(one.drivers),
    ),
}


@pytest.mark.parametrize("way", MOVED)
def test_criteria_are_moved_to_the_alias_that_is_loaded(engine: Engine, byok: Byok, way: str) -> None:
    """A search in and_() or loader criteria is one of the rows that are joined, not of those around them."""
    _create(engine, _Company)
    with byok.session("t1", engine) as session:
        session.add_all(
            [_Employee(id=id_, number=f"A-{id_}", mail=mail) for id_, mail in ((1, "Ada@x"), (2, "b@x"))]
        )
        session.flush()
        session.add_all(
            [
                _Employee(id=3, boss_id=1, number="B-2", mail="b@x"),
                _Employee(id=4, boss_id=1, number="A-1", mail="ada@X"),
                _Driver(id=5, boss_id=2, number="A-1", mail="ada@x"),
                _Driver(id=6, boss_id=1, number="C-3", mail="c@x"),
            ]
        )
        session.commit()
        answers = {}
        for name, criterion in CRITERIA.items():
            query, shown = MOVED[way](criterion)
            found = session.execute(query.order_by(_Employee.id)).unique().all()
            answers[name] = [(one.id, shown(one) if shown else more[0]) for one, *more in found]
            session.expunge_all()
    assert any(loaded for _, loaded in answers["a value"])
    assert answers == dict.fromkeys(CRITERIA, answers["a value"])


# -- writable relationships ------------------------------------------------------------------------------------------


class _Writable(DeclarativeBase):
    pass


class _Account(_Writable):
    __tablename__ = "account"
    id = mapped_column(Integer, primary_key=True)
    number = mapped_column(
        Encrypted(String(20), searchable=True, salt_scope="account", normalize=casefold), unique=True
    )
    bookings = relationship(
        "_Booking",
        primaryjoin="_Account.number == foreign(_Booking.number)",
        back_populates="account",
        order_by="_Booking.id",
    )


class _Booking(_Writable):
    __tablename__ = "booking"
    id = mapped_column(Integer, primary_key=True)
    number = mapped_column(Encrypted(String(30), searchable=True, salt_scope="account", normalize=casefold))
    account = relationship(
        "_Account", primaryjoin="foreign(_Booking.number) == _Account.number", back_populates="bookings"
    )


def test_a_writable_relationship_copies_plaintext_and_its_hash(engine: Engine, byok: Byok) -> None:
    """A flush sets the other side's encrypted column, its hash follows, and every loader finds it back."""
    _create(engine, _Writable)
    with byok.session("t1", engine) as session:
        session.add(_Account(id=1, number="Acc-1", bookings=[_Booking(id=1), _Booking(id=2)]))
        session.add(_Account(id=2, number="Acc-2"))
        session.flush()
        session.add(_Booking(id=3, account=session.get_one(_Account, 2)))
        session.commit()
        assert session.scalars(select(_Booking.number).order_by(_Booking.id)).all() == [
            "Acc-1",
            "Acc-1",
            "Acc-2",
        ]
        for option, *_ in LOADERS.values():
            session.expunge_all()
            accounts = session.scalars(
                select(_Account).options(option(_Account.bookings)).order_by(_Account.id)
            ).unique()
            assert [ids(account.bookings) for account in accounts] == [[1, 2], [3]]
        moved = session.get_one(_Booking, 2)
        moved.account = session.get_one(_Account, 2)
        session.commit()
        assert ids(session.scalars(select(_Booking).where(_Booking.number == "ACC-2")).all()) == [2, 3]
        moved.account = None
        session.commit()
        assert ids(session.scalars(select(_Booking).where(_Booking.account == None)).all()) == [2]  # noqa: E711
        session.execute(update(_Booking).where(_Booking.number == "acc-2").values(number="ACC-1"))
        session.expire_all()
        assert ids(session.get_one(_Account, 1).bookings) == [1, 3]


# -- inheritance -----------------------------------------------------------------------------------------------------


class _Family(DeclarativeBase):
    pass


class _Staff(_Family):
    __tablename__ = "staff"
    id = mapped_column(Integer, primary_key=True)
    kind = mapped_column(String(10))
    badge = mapped_column(Encrypted(String(20), searchable=True, salt_scope="badge"))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}  # noqa: RUF012 - SQLAlchemy's way


class _Nurse(_Staff):
    ward = mapped_column(Encrypted(String(20), searchable=True), nullable=True)
    __mapper_args__ = {"polymorphic_identity": "nurse"}  # noqa: RUF012


class _Doctor(_Staff):
    __tablename__ = "doctor"
    id = mapped_column(ForeignKey(_Staff.id), primary_key=True)
    licence = mapped_column(Encrypted(String(20), searchable=True))
    __mapper_args__ = {"polymorphic_identity": "doctor"}  # noqa: RUF012


class _Door(_Family):
    __tablename__ = "door"
    id = mapped_column(Integer, primary_key=True)
    badge = mapped_column(Encrypted(String(20), searchable=True, salt_scope="badge"))


def test_inherited_columns_are_searched_in_their_own_table(engine: Engine, byok: Byok) -> None:
    """Single-table and joined inheritance: base, subclass, aliases and with_polymorphic, each in one statement."""
    _create(engine, _Family)
    flat, nested = aliased(_Doctor, flat=True), aliased(_Doctor)
    every = with_polymorphic(_Staff, [_Doctor, _Nurse])
    every_aliased = with_polymorphic(_Staff, [_Doctor, _Nurse], aliased=True)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                _Staff(id=1, badge="one"),
                _Nurse(id=2, badge="two", ward="west"),
                _Doctor(id=3, badge="one", licence="lic"),
                _Door(id=1, badge="one"),
                _Door(id=2, badge="two"),
            ]
        )
        session.commit()
        for statement, found in [
            (select(_Staff).where(_Staff.badge == "one"), [1, 3]),
            (select(_Nurse).where(_Nurse.badge.in_(["one", "two"])), [2]),
            (select(_Nurse).where(_Nurse.ward == "west", _Nurse.badge == "two"), [2]),
            (select(_Doctor).where(_Doctor.badge == "one", _Doctor.licence == "lic"), [3]),
            (select(flat).where(flat.badge == "one", flat.licence == "lic"), [3]),
            (select(nested).where(nested.badge == "one", nested.licence != "no"), [3]),
            (select(every).where(every.badge == "one", every._Doctor.licence == "lic"), [3]),
            (select(every).where(every._Nurse.ward == "west"), [2]),
            (select(every_aliased).where(every_aliased.badge == "one"), [1, 3]),
            (select(every_aliased).where(every_aliased._Doctor.licence == "lic"), [3]),
        ]:
            with statements(engine) as sent:
                assert ids(session.scalars(statement).unique().all()) == found, str(statement)
            assert len(sent) == 1
            assert ciphertext_compared(sent[0]) is None


def test_a_subquery_of_a_subclass_keeps_to_the_subclass(engine: Engine, byok: Byok) -> None:
    """IN (SELECT Sub.column) keeps the join and the criteria that make the rows Sub's own."""
    _create(engine, _Family)
    with byok.session("t1", engine) as session:
        session.add_all([_Staff(id=1, badge="one"), _Nurse(id=2, badge="two"), _Doctor(id=3, badge="three")])
        session.add_all([_Door(id=1, badge="one"), _Door(id=2, badge="two"), _Door(id=3, badge="three")])
        session.commit()
        flat = aliased(_Doctor, flat=True)
        for badges, found in [
            (select(_Staff.badge), [1, 2, 3]),
            (select(_Nurse.badge), [2]),
            (select(_Doctor.badge), [3]),
            (select(_Doctor.badge).where(_Doctor.licence.is_(None)), [3]),
            (select(flat.badge), [3]),
        ]:
            assert ids(session.scalars(select(_Door).where(_Door.badge.in_(badges))).all()) == found, str(
                badges
            )
            loaded = with_loader_criteria(_Staff, _Staff.id > 9, include_aliases=True)
            assert session.scalars(select(_Door).where(_Door.badge.in_(badges)).options(loaded)).all() == []


class _Concrete(DeclarativeBase):
    pass


class _Letter(ConcreteBase, _Concrete):
    __tablename__ = "letter"
    id = mapped_column(Integer, primary_key=True)
    to = mapped_column(Encrypted(String(20), searchable=True, salt_scope="letter", column_id="letter.to"))
    __mapper_args__ = {"polymorphic_identity": "letter", "concrete": True}  # noqa: RUF012


class _Parcel(_Letter):
    __tablename__ = "parcel"
    id = mapped_column(Integer, primary_key=True)
    to = mapped_column(Encrypted(String(20), searchable=True, salt_scope="letter", column_id="letter.to"))
    __mapper_args__ = {"polymorphic_identity": "parcel", "concrete": True}  # noqa: RUF012


def test_concrete_inheritance_is_searched_across_its_union(engine: Engine, byok: Byok) -> None:
    """Tables that share one column id are searched in one UNION, by each table's own hash column."""
    _create(engine, _Concrete)
    with byok.session("t1", engine) as session:
        session.add_all([_Letter(id=1, to="Ada"), _Letter(id=2, to="Bob"), _Parcel(id=3, to="Ada")])
        session.commit()
        with statements(engine) as sent:
            assert [
                (one.id, one.to)
                for one in session.scalars(select(_Letter).where(_Letter.to == "Ada").order_by(_Letter.id))
            ] == [(1, "Ada"), (3, "Ada")]
            assert ids(session.scalars(select(_Parcel).where(_Parcel.to != "Bob")).all()) == [3]
        assert len(sent) == 2


def test_a_relationship_across_salt_scopes_is_refused(engine: Engine, byok: Byok) -> None:
    """Columns whose hashes cannot be equal raise when they are joined; they do not quietly find nothing."""

    class Base(DeclarativeBase):
        pass

    class One(Base):
        __tablename__ = "one"
        id = mapped_column(Integer, primary_key=True)
        key = mapped_column(Encrypted(String(20), searchable=True))
        others = relationship("Other", primaryjoin="One.key == foreign(Other.key)", viewonly=True)

    class Other(Base):
        __tablename__ = "other"
        id = mapped_column(Integer, primary_key=True)
        key = mapped_column(Encrypted(String(20), searchable=True))

    with byok.session("t1", engine) as session:
        for statement in (select(One).join(One.others), select(One).where(One.others.any())):
            with pytest.raises(UnsupportedQueryError, match="salt_scope"):
                session.execute(statement)
