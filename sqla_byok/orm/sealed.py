"""A value that was read but not decrypted."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["Sealed"]


class Sealed:
    """The stored value of an encrypted column, read but not decrypted.

    Within :meth:`Byok.sealed` every encrypted value is read as one; on async engines, those of columns in
    ``mode="direct"`` are. ``byok.reveal(patient, "ssn")``, or ``await byok.areveal(…)``, decrypts it where the tenant's
    keys may be used. Until then it can be printed, which shows the column and nothing of the value; compared with
    another one, which tells whether they are the same stored value, not the same plaintext; pickled; and written back
    to the column it came from. Comparing it with anything else but None, and asking whether it is true, raises
    TypeError: either would answer for the value. JSON refuses it, unless asked: ``json.dumps(…, default=str)`` writes
    ``<Sealed patient.ssn>``.

    :param column: the id of its column, such as ``patient.ssn``.
    :param stored: the bytes that the database holds.
    """

    __slots__ = ("_column", "_stored")

    def __init__(self, column: str, stored: bytes) -> None:
        self._column, self._stored = column, stored

    @property
    def column(self) -> str:
        """The id of its column."""
        return self._column

    @property
    def stored(self) -> bytes:
        """The bytes that the database holds; ciphertext."""
        return self._stored

    def __repr__(self) -> str:
        return f"<Sealed {self._column}>"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __eq__(self, other: object) -> bool:
        if other is None:
            return False
        if not isinstance(other, Sealed):
            self._unknown()
        return (self._column, self._stored) == (other._column, other._stored)

    def __hash__(self) -> int:
        return hash((self._column, self._stored))

    def __bool__(self) -> NoReturn:
        self._unknown()

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (self._column, self._stored)

    def _unknown(self) -> NoReturn:
        raise TypeError(
            f"the value of {self._column} is sealed, so nothing is known about it; reveal it first, with byok.reveal() "
            "or areveal(), or test it with 'is None'"
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """For Pydantic: takes a Sealed as it is; JSON of it is refused, unless a field_serializer makes some."""
        from pydantic_core import core_schema  # only Pydantic calls this

        return core_schema.is_instance_schema(cls)
