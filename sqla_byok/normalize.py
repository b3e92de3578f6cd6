"""What a search regards as equal, and what of a value it looks at.

A *normalizer*, for ``Encrypted(…, searchable=True, normalize=…)``, is applied to a value before it is hashed, on
writing and on searching alike; the stored value keeps its form. A *transform*, for :class:`~sqla_byok.hash_index`,
makes what is indexed of the value: the last four digits of a number, the year of a date. A function can be either.

They change which values share a hash, so a column whose normalizer or transform changes has to be hashed anew. The
keystore keeps the name and version of each, and refuses a model with another one. So each has to have them: give a
function of your own a stable name with :func:`named`, and raise the version when you change what it returns. Without
that, a function is known by where it stands, ``module.function``, and moving it asks for a re-hash.

A function of your own has to be deterministic, and returns ``None`` for "no hash". Define it once, at module level: its
identity is part of the column's type.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from datetime import date
from functools import cache
from typing import Any, TypeVar

from sqla_byok.errors import DeclarationError

__all__ = [
    "casefold",
    "compose",
    "digits",
    "email_domain",
    "first",
    "last",
    "named",
    "trim",
    "year",
]

_F = TypeVar("_F", bound=Callable[..., Any])

# The attribute of a function that holds what named() was told.
_GIVEN = "__byok_named__"


def named(name: str, version: int = 1, returns: type = str) -> Callable[[_F], _F]:
    """Give a function of your own a name and version that last, wherever its code moves.

    ::

        @named("soundex", version=2)
        def soundex(surname: str) -> str: ...

        initial = named("initial")(lambda surname: surname[:1].upper())

    :param name: 1 to 60 characters, yours among all functions of the application.
    :param version: raise it when the function returns something else for some value; the column is then re-hashed.
    :param returns: what the function returns: str, int, bool, date, bytes or UUID. For transforms.
    :returns: a decorator, which gives the same function back.
    :raises DeclarationError: the name is empty or too long, or the version less than 1; from the decorator, if the
        object takes no attributes.
    """
    if not 1 <= len(name) <= 60 or version < 1:
        raise DeclarationError("named() takes a name of 1 to 60 characters and a version from 1 on")

    def give(function: _F) -> _F:
        given = False
        try:
            setattr(function, _GIVEN, (f"{name}/{version}", returns))
            given = True
        except AttributeError:
            pass
        if not given:
            raise DeclarationError(f"{name}: this object takes no name; wrap it in a function")
        return function

    return give


def identity(function: Callable[..., Any]) -> str:
    """The stable name and version of a normalizer or transform: ``"casefold/1"``.

    :raises DeclarationError: it has none, and none can be derived: a lambda or a partial.
    """
    if isinstance(function, _Composed):
        return f"compose({','.join(identity(step) for step in function.steps)})/1"
    given = getattr(function, _GIVEN, None)
    if given is not None:
        return str(given[0])
    name = getattr(function, "__qualname__", "")
    if not name or "<lambda>" in name:
        raise DeclarationError(
            "a lambda, partial or other object without a name cannot normalize or transform: the keystore has to tell "
            "whether it is the same as before. Give it a stable name with sqla_byok.normalize.named()"
        )
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(owner, "__module__", "")
    return f"{module}.{name}/1"


def returned(function: Callable[..., Any]) -> type:
    """What a transform returns; ``str`` unless :func:`named` was told."""
    if isinstance(function, _Composed):
        return returned(function.steps[-1]) if function.steps else str
    given: type = getattr(function, _GIVEN, ("", str))[1]
    return given


@named("casefold")
def casefold(text: str) -> str:
    """Ignore case and Unicode's compatibility forms: NFKC, then full case folding, then NFKC again.

    >>> casefold("Ada@Example.ORG") == casefold("ADA@example.org")
    True

    The Unicode Standard, section 3.13, "NFKC_Casefold", without the removal of ignorable characters.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@named("trim")
def trim(text: str) -> str:
    """Ignore white space at both ends.

    >>> trim("  A-1 ")
    'A-1'
    """
    return text.strip()


@named("digits")
def digits(text: str) -> str:
    """Keep the decimal digits only, as ASCII, whatever script they are written in.

    >>> digits("+1 (555) 010-1234")
    '15550101234'
    """
    return "".join(str(unicodedata.decimal(character)) for character in text if character.isdecimal())


@named("email_domain")
def email_domain(address: str) -> str | None:
    """The domain of an e-mail address, case-folded; ``None`` for a text without ``@``.

    >>> email_domain("Ada@Example.org")
    'example.org'
    """
    _, at, domain = address.rpartition("@")
    return casefold(domain.strip()) if at else None


@named("year", returns=int)
def year(day: date) -> int:
    """The year of a date or datetime, as a number.

    >>> year(date(1815, 12, 10))
    1815
    """
    return day.year


@cache
def first(count: int) -> Callable[[str], str]:
    """The first characters of a text; all of it where it is shorter.

    >>> first(3)("Lovelace")
    'Lov'

    :param count: how many, from 1 on.
    """
    _check_count(count)
    return _part(f"first({count})", slice(count))


@cache
def last(count: int) -> Callable[[str], str]:
    """The last characters of a text; all of it where it is shorter.

    >>> last(4)("555-1234")
    '1234'

    :param count: how many, from 1 on.
    """
    _check_count(count)
    return _part(f"last({count})", slice(-count, None))


def _part(name: str, part: slice) -> Callable[[str], str]:
    @named(name)
    def take(text: str) -> str:
        return text[part]

    return take


def _check_count(count: int) -> None:
    if count < 1:
        raise DeclarationError("first() and last() take at least 1 character")


class _Composed:
    """Several normalizers, one after the other. Equal where its steps are, so that a model can be declared twice."""

    def __init__(self, steps: tuple[Callable[[Any], Any], ...]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            if value is None:
                break
            value = step(value)
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Composed) and other.steps == self.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __repr__(self) -> str:
        return f"compose({', '.join(getattr(step, '__name__', repr(step)) for step in self.steps)})"


def compose(*steps: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """One normalizer out of several, applied from left to right, until one returns ``None``.

    >>> compose(trim, casefold)("  Ada ")
    'ada'
    """
    return _Composed(steps)
