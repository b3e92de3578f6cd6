"""What a search regards as equal: normalizers for ``Encrypted(…, searchable=True, normalize=…)``.

A normalizer is applied to a value before it is hashed, on writing and on searching alike; the stored value keeps its
form. It changes which values share a hash, so a column whose normalizer changes has to be hashed anew.

A function of your own works too, if it is deterministic, takes ``str`` and returns ``str`` (or ``None`` for "no hash").
Define it once, at module level: its identity is part of the column's type.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

__all__ = ["casefold", "compose", "digits", "trim"]


def casefold(text: str) -> str:
    """Ignore case and Unicode's compatibility forms: NFKC, then full case folding, then NFKC again.

    >>> casefold("Ada@Example.ORG") == casefold("ADA@example.org")
    True

    The Unicode Standard, section 3.13, "NFKC_Casefold", without the removal of ignorable characters.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def trim(text: str) -> str:
    """Ignore white space at both ends.

    >>> trim("  A-1 ")
    'A-1'
    """
    return text.strip()


def digits(text: str) -> str:
    """Keep the decimal digits only, as ASCII, whatever script they are written in.

    >>> digits("+1 (555) 010-1234")
    '15550101234'
    """
    return "".join(str(unicodedata.decimal(character)) for character in text if character.isdecimal())


class _Composed:
    """Several normalizers, one after the other. Equal where its steps are, so that a model can be declared twice."""

    def __init__(self, steps: tuple[Callable[[str], str | None], ...]) -> None:
        self._steps = steps

    def __call__(self, text: str) -> str | None:
        normal: str | None = text
        for step in self._steps:
            if normal is None:
                break
            normal = step(normal)
        return normal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Composed) and other._steps == self._steps

    def __hash__(self) -> int:
        return hash(self._steps)

    def __repr__(self) -> str:
        return f"compose({', '.join(getattr(step, '__name__', repr(step)) for step in self._steps)})"


def compose(*steps: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """One normalizer out of several, applied from left to right, until one returns ``None``.

    >>> compose(trim, casefold)("  Ada ")
    'ada'
    """
    return _Composed(steps)
