"""Reading: rows are opened as they are fetched, many values at once, and the clocks are looked at in between.

A result keeps the turn of its statement, so that rows fetched later, in another block, thread or task, are still read
under the statement's own tenant. No value is opened by keys whose deadline has passed, however long a batch takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from sqla_byok.crypto.values import Opening, Taker
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.orm.current import Turn
from sqla_byok.orm.direct import Cells, decrypted
from sqla_byok.orm.rings import StatementRing, singles

__all__ = ["Columns", "Fetch", "Reader"]

# How many values are opened between two looks at the clocks: a quarter of a millisecond's work. Where a column's type
# runs code of the application, which may take any time, the clocks are looked at before each.
_AT_ONCE = 256

# With fewer rows it does not pay to open them column by column.
_MANY = 4


class Reader:
    """Reads one encrypted column; SQLAlchemy takes it for the column's result processor.

    :param taker: finds the keyring of the running statement.
    :param opening: makes Python values of stored ones.
    :param own_code: whether it runs code of the application for each value.
    :param cells: of a direct column: what the KMS has to decrypt first.
    """

    __slots__ = ("_taker", "cells", "many", "one", "own_code", "owner")

    def __init__(self, taker: Taker, opening: Opening, *, own_code: bool, cells: Cells | None = None) -> None:
        self._taker, self.owner = taker, taker.owner
        self.cells, self.own_code = cells, own_code
        self.one, self.many = opening if cells is None else cells.opening(opening)

    def __call__(self, value: Any) -> Any:
        """Open a value that SQLAlchemy reads before it gives the result away, as RETURNING beside server defaults."""
        ring = cast("StatementRing | None", self._taker.ring())
        for each in singles(ring):
            self._taker.attachment.keyrings.check(each)  # type: ignore[attr-defined] # an Attachment
        if self.cells is not None:
            value = self.cells.decrypted(ring, value)
        return self.one(ring, value)


class Columns(NamedTuple):
    """The columns of a compiled statement's result that are opened at the fetch.

    :param readers: for each its place in the fetched rows, the place of its owner, and what opens one value and many.
    :param owners: whose keys they take.
    :param direct: those whose values the KMS decrypts.
    :param own_code: whether code of the application runs for each value.
    :param at_once: how many rows are opened between two looks at the clocks.
    """

    readers: Sequence[tuple[int, int, Any, Any]]
    owners: Sequence[str | None]
    direct: Sequence[tuple[int, Cells]]
    own_code: bool
    at_once: int

    @classmethod
    def of(cls, found: Sequence[Reader | None]) -> Columns | None:
        """Of what there is for each of the cursor's columns; None where nothing is to be opened."""
        readers = [(place, reader) for place, reader in enumerate(found) if reader is not None]
        if not readers:
            return None
        owners = list(dict.fromkeys(reader.owner for _, reader in readers))
        return cls(
            [(place, owners.index(reader.owner), reader.one, reader.many) for place, reader in readers],
            owners,
            [(place, reader.cells) for place, reader in readers if reader.cells is not None],
            any(reader.own_code for _, reader in readers),
            max(1, _AT_ONCE // len(readers)),
        )


class Fetch:
    """Stands before a result's cursor strategy: whoever fetches, rows are opened under the statement's turn.

    :param inner: the cursor strategy that fetches.
    :param turn: the statement's.
    :param columns: what is to be opened.
    """

    __slots__ = ("_check", "_checked", "_columns", "_inner", "_rings", "_turn")

    def __init__(self, inner: Any, turn: Turn, columns: Columns) -> None:
        self._inner, self._turn, self._columns = inner, turn, columns
        self._rings: Sequence[StatementRing] = [turn.rings[owner] for owner in columns.owners]
        self._checked: Sequence[Keyring] = (
            self._rings  # type: ignore[assignment] # of one tenant, as most often
            if all(type(ring) is Keyring for ring in self._rings)
            else [each for ring in self._rings for each in singles(ring)]
        )
        self._check = cast("Keyrings", turn.attachment.keyrings).check

    @property
    def alternate_cursor_description(self) -> Any:
        return self._inner.alternate_cursor_description

    def fetchone(self, result: Any, cursor: Any, hard_close: bool = False) -> Any:
        row = self._inner.fetchone(result, cursor, hard_close)
        return row if row is None else self._opened(result, (row,))[0]

    def fetchmany(self, result: Any, cursor: Any, size: int | None = None) -> Any:
        return self._opened(result, self._inner.fetchmany(result, cursor, size))

    def fetchall(self, result: Any, cursor: Any) -> Any:
        return self._opened(result, self._inner.fetchall(result, cursor))

    def yield_per(self, result: Any, cursor: Any, num: int) -> None:
        self._inner.yield_per(result, cursor, num)
        if result.cursor_strategy is not self:
            result.cursor_strategy = Fetch(result.cursor_strategy, self._turn, self._columns)

    def soft_close(self, *args: Any) -> None:
        self._inner.soft_close(*args)

    def hard_close(self, *args: Any) -> None:
        self._inner.hard_close(*args)

    def handle_exception(self, *args: Any) -> Any:
        return self._inner.handle_exception(*args)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _opened(self, result: Any, rows: Sequence[Any]) -> Sequence[Any]:
        if not rows:
            return rows
        columns = self._columns
        try:
            self._look()
            if columns.direct:
                rows = decrypted(rows, columns.direct, self._turn)
                self._look()  # the KMS may have taken long
            if columns.own_code or len(rows) < _MANY:
                return self._few(rows)
            rows, opened = list(rows), list[Any]()  # a buffer may be no list
            for start in range(0, len(rows), columns.at_once):
                opened += self._batch(rows[start : start + columns.at_once])
            return opened
        except BaseException:
            result.close()  # or whoever fetched on would miss these rows
            raise

    def _few(self, rows: Iterable[Any]) -> list[tuple[Any, ...]]:
        rings, own_code, opened = self._rings, self._columns.own_code, []
        for row in rows:
            cells = list(row)
            for place, owner, one, _ in self._columns.readers:
                if own_code:
                    self._look()
                cells[place] = one(rings[owner], cells[place])
            opened.append(tuple(cells))
        return opened

    def _batch(self, rows: Sequence[Any]) -> Iterable[Any]:
        self._look()
        cells: list[Sequence[Any]] = list(zip(*rows, strict=True))
        for place, owner, _, many in self._columns.readers:
            cells[place] = many(self._rings[owner], cells[place])
        return zip(*cells, strict=True)

    def _look(self) -> None:
        for keyring in self._checked:
            self._check(keyring)
