"""Normalizers: what a search regards as equal, and that the stored value keeps its form."""

from __future__ import annotations

import sys
from datetime import date
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, insert, select

from sqla_byok import Byok, DeclarationError, EncodeError, Encrypted, UnsupportedQueryError
from sqla_byok.normalize import (
    casefold,
    compose,
    digits,
    email_domain,
    first,
    identity,
    last,
    named,
    returned,
    trim,
    year,
)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Ada@Example.ORG", "ada@example.org"),
        ("STRASSE", "straße"),
        ("ﬁn", "FIN"),
        ("Ｆｕｌｌ", "full"),
        ("e\u0301", "É"),
        ("Σίσυφος", "ΣΊΣΥΦΟΣ"),
        ("\u1e9e", "ss"),
        ("Å", "\u212b"),
    ],
)
def test_casefold_ignores_case_and_compatibility_forms(text: str, same: str) -> None:
    """Texts that differ only in case, composition or compatibility forms are equal."""
    assert casefold(text) == casefold(same)


@pytest.mark.parametrize(("text", "other"), [("a", "b"), ("resume", "résumé"), ("a b", "ab"), ("i", "ı")])
def test_casefold_keeps_what_differs_apart(text: str, other: str) -> None:
    """Accents, spaces and letters still count."""
    assert casefold(text) != casefold(other)


def test_casefold_is_stable_for_every_character() -> None:
    """Folding what was folded changes nothing, so that a stored normal form finds itself."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    assert [text for text in characters if casefold(casefold(text)) != casefold(text)] == []
    marks = ["\u0345", "\u0301", "\u0323", "\u0307", "\u0327"]
    unstable = [
        text + mark
        for text in characters[:0x2200]
        for mark in marks
        if casefold(casefold(text + mark)) != casefold(text + mark)
    ]
    assert unstable == []


@pytest.mark.parametrize(
    ("normalize", "text", "normal"),
    [
        (trim, " \t A-1\u00a0\n", "A-1"),
        (trim, "A - 1", "A - 1"),
        (digits, "+1 (555) 010-1234", "15550101234"),
        (digits, "٠١٢ ⁵ Ⅷ ½ ３", "0123"),
        (digits, "none", ""),
        (compose(trim, casefold), "  Ada ", "ada"),
        (compose(casefold, str.upper), "ß", "SS"),
        (compose(), "as it is", "as it is"),
        (first(3), "Lovelace", "Lov"),
        (first(3), "Lo", "Lo"),
        (last(4), "555-1234", "1234"),
        (compose(digits, last(4)), "(12) 3-4 5", "2345"),
        (email_domain, "a@b@Example.ORG ", "example.org"),
        (email_domain, "no address", None),
        (compose(email_domain, str.upper), "no address", None),
    ],
)
def test_normal_forms(normalize: Any, text: str, normal: str) -> None:
    """What each normalizer makes of a text."""
    assert normalize(text) == normal


def test_compositions_of_equal_steps_are_equal() -> None:
    """A model that is declared twice keeps its cached statements, and its columns stay comparable."""
    assert compose(trim, casefold) == compose(trim, casefold)
    assert hash(compose(trim, casefold)) == hash(compose(trim, casefold))
    assert compose(trim, casefold) != compose(casefold, trim)
    assert compose(trim) != trim
    assert repr(compose(trim, casefold)) == "compose(trim, casefold)"


def test_year() -> None:
    """Of a date or datetime, as a number."""
    assert year(date(1815, 12, 10)) == 1815
    assert (returned(year), returned(compose(trim)), returned(compose())) == (int, str, str)


class Texts:
    """Where a method stands."""

    def lower(self, text: str) -> str:
        """A method as a normalizer."""
        return text.lower()


IDENTITIES = {
    "casefold/1": casefold,
    "last(4)/1": last(4),
    "compose(trim/1,casefold/1)/1": compose(trim, casefold),
    "soundex/3": named("soundex", 3)(lambda text: text),
    "part/1": named("part")(partial(str.replace, "a")),
    "builtins.str.upper/1": str.upper,
    f"{__name__}.Texts.lower/1": Texts().lower,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_each_function_has_a_name_that_lasts(name: str) -> None:
    """It goes into the keystore: it must never change by itself."""
    function: Any = IDENTITIES[name]
    assert identity(function) == name


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Encrypted(String(9), searchable=True, normalize=lambda text: text),
        lambda: Encrypted(String(9), searchable=True, normalize=compose(trim, partial(str.replace, "a"))),
        lambda: named("")(trim),
        lambda: named("x" * 61)(trim),
        lambda: named("x", 0)(trim),
        lambda: named("x")(str.upper),
        lambda: first(0),
        lambda: last(-1),
    ],
)
def test_what_has_no_name_is_refused(wrong: Any) -> None:
    """Nobody could tell whether it is the same function in the next release."""
    with pytest.raises(DeclarationError):
        wrong()


# -- on a column -----------------------------------------------------------------------------------------------------


def last_four(text: str) -> str | None:
    """A normalizer of a user's own; shorter texts get no hash."""
    return text[-4:] if len(text) >= 4 else None


def picky(text: str) -> str:
    """A normalizer that raises, with the value in its text."""
    if "secret" in text:
        raise ValueError(f"cannot take {text}")
    return text


def number(text: str) -> Any:
    """A normalizer that breaks its promise to return text."""
    return len(text)


def _column(name: str, normalize: Any) -> Column[Any]:
    return Column(name, Encrypted(String(40), searchable=True, salt_scope="one", normalize=normalize))


_table = Table(
    "normal",
    MetaData(),
    Column("id", Integer, primary_key=True),
    _column("email", casefold),
    _column("phone", compose(trim, digits)),
    _column("card", last_four),
    _column("long", compose(last_four, str.upper)),
    _column("raw", None),
    _column("picky", picky),
    _column("odd", number),
)


def test_a_search_finds_by_the_normal_form_and_reads_the_given_one(engine: Engine, byok: Byok) -> None:
    """Writing and searching are normalized alike, in ==, !=, in_ and not_in; the value is not."""
    _table.metadata.create_all(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        row = {"email": "Ada@Example.org", "phone": " +1 (555) 0101", "card": "4111-1234", "raw": "Ada"}
        connection.execute(insert(_table).values(id=1, **row))
        for criterion, found in [
            (_table.c.email == "ADA@EXAMPLE.ORG", True),
            (_table.c.email != "ADA@EXAMPLE.ORG", False),
            (_table.c.email.in_(["x", "ada@example.ORG"]), True),
            (_table.c.email.not_in(["x", "ada@example.ORG"]), False),
            (_table.c.email == "ada@example", False),
            (_table.c.phone == "1-555-0101", True),
            (_table.c.card == "1234", True),
            (_table.c.card == "9999-1234", True),
            (_table.c.raw == "ada", False),
        ]:
            assert connection.scalars(select(_table.c.id).where(criterion)).all() == ([1] if found else [])
        assert connection.execute(select(_table.c.email, _table.c.phone)).one() == (
            row["email"],
            row["phone"],
        )


def test_no_normal_form_means_no_hash(engine: Engine, byok: Byok) -> None:
    """Where a normalizer returns None the row is kept and read, but no search finds it, nor by != ."""
    _table.metadata.create_all(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(
            insert(_table),
            [{"id": 1, "card": "123", "long": "abc"}, {"id": 2, "card": "1234", "long": "abcd"}],
        )
        find = select(_table.c.id).order_by(_table.c.id)
        assert connection.scalars(find.where(_table.c.card == "123")).all() == []
        assert connection.scalars(find.where(_table.c.card != "9999")).all() == [2]
        assert connection.scalars(find.where(_table.c.card.in_(["123", "1234"]))).all() == [2]
        assert connection.scalars(find.where(_table.c.card.is_not(None))).all() == [1, 2]
        assert connection.scalars(find.where(_table.c.long == "x-aBCD")).all() == [2]
        assert connection.scalars(find.where(_table.c.long == "abc")).all() == []
        assert connection.scalars(select(_table.c.card).order_by(_table.c.id)).all() == ["123", "1234"]


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception and all that it was raised from or while handling."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in found:
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found


@pytest.mark.parametrize(("name", "reason"), [("picky", "ValueError"), ("odd", "expects str")])
def test_a_failing_normalizer_tells_no_value(engine: Engine, byok: Byok, name: str, reason: str) -> None:
    """EncodeError names the column and what was raised; the value is in no text, attribute or chained exception."""
    _table.metadata.create_all(engine)
    column = _table.c[name]
    for statement in (
        insert(_table).values(id=1, **{name: "secret-1"}),
        select(_table.c.id).where(column == "secret-1"),
    ):
        with (
            byok.tenant("t1"),
            engine.connect() as connection,
            pytest.raises(EncodeError, match=reason) as raised,
        ):
            connection.execute(statement)
        error = raised.value
        assert error.column == f"normal.{name}"
        assert not any("secret" in str(each) or "secret" in repr(vars(each)) for each in _chain(error))
    with byok.tenant("t1"), engine.connect() as connection:
        assert connection.scalars(select(_table.c.id)).all() == []


def test_columns_of_other_normalizers_are_not_comparable(engine: Engine, byok: Byok) -> None:
    """In one salt scope, columns that normalize otherwise would compare what is not comparable; they are refused."""
    with byok.tenant("t1"), engine.connect() as connection:
        for criterion in (_table.c.email == _table.c.raw, _table.c.raw.in_([_table.c.email])):
            with pytest.raises(UnsupportedQueryError, match="normalize"):
                connection.execute(select(_table.c.id).where(criterion))
