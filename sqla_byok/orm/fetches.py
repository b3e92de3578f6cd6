"""Reading: rows are opened as they are fetched, many values at once, and the clocks are looked at in between.

A result keeps the turn of its statement, so that rows fetched later, in another block, thread or task, are still read
under the statement's own tenant. No value is opened by keys whose deadline has passed, however long a batch takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqla_byok.crypto.values import Opening, Taker
from sqla_byok.orm.current import Turn, check_time
from sqla_byok.orm.direct import Cells, decrypted
from sqla_byok.orm.rings import StatementRing

__all__ = ["Fetch", "Reader"]

# How many values are opened between two looks at the clocks: a quarter of a millisecond's work. Where the column's
# type runs code of the application, which may take any time, the clocks are looked at before each.
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

    def __init__(
        self,
        taker: Taker,
        opening: Opening,
        *,
        own_code: bool,
        cells: Cells | None = None,
    ) -> None:
        self._taker = taker
        self.owner, self.cells, self.own_code = taker.owner, cells, own_code
        self.one, self.many = opening if cells is None else cells.opening(opening)

    def __call__(self, value: Any) -> Any:
        """Open a value that SQLAlchemy reads before it gives the result away, as RETURNING beside server defaults."""
        ring: Any = self._taker.ring()
        if ring is not None:
            check_time(self._taker.attachment.keyrings, ring)  # type: ignore[attr-defined] # an Attachment
        if self.cells is not None:
            value = self.cells.decrypted(ring, value)
        return self.one(ring, value)


class Fetch:
    """Stands before a result's cursor strategy: whoever fetches, rows are opened under the statement's turn.

    :param inner: the cursor strategy that fetches.
    :param turn: the statement's.
    :param readers: for each column that is to be opened, its place in the fetched rows and what reads it.
    """

    __slots__ = ("_at_once", "_direct", "_inner", "_own_code", "_readers", "_rings", "_turn")

    def __init__(self, inner: Any, turn: Turn, readers: Sequence[tuple[int, Reader]]) -> None:
        self._inner, self._turn = inner, turn
        self._readers = [(place, reader, turn.rings.get(reader.owner)) for place, reader in readers]
        rings = {id(ring): ring for _, _, ring in self._readers if ring is not None}
        self._rings: Sequence[StatementRing] = list(rings.values())
        self._direct = [(place, reader.cells) for place, reader in readers if reader.cells is not None]
        self._own_code = any(reader.own_code for _, reader in readers)
        self._at_once = max(1, _AT_ONCE // len(readers))

    @property
    def alternate_cursor_description(self) -> Any:
        return self._inner.alternate_cursor_description

    def fetchone(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        row = self._inner.fetchone(result, *args, **kwargs)
        return row if row is None else self._opened(result, (row,))[0]

    def fetchmany(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        return self._opened(result, self._inner.fetchmany(result, *args, **kwargs))

    def fetchall(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        return self._opened(result, self._inner.fetchall(result, *args, **kwargs))

    def yield_per(self, result: Any, cursor: Any, num: int) -> None:
        self._inner.yield_per(result, cursor, num)
        if result.cursor_strategy is not self:
            result.cursor_strategy = Fetch(
                result.cursor_strategy, self._turn, [(place, reader) for place, reader, _ in self._readers]
            )

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
        try:
            if self._direct:
                self._check_time()  # nor is the KMS asked for more
                rows = decrypted(rows, self._direct, self._turn)
            if self._own_code or len(rows) < _MANY:
                return self._few(rows)
            opened: list[Any] = []
            rows = list(rows)  # a buffer may be no list
            for start in range(0, len(rows), self._at_once):
                opened += self._many(rows[start : start + self._at_once])
            return opened
        except BaseException:
            result.close()  # or whoever fetched on would miss these rows
            raise

    def _few(self, rows: Iterable[Any]) -> list[Any]:
        opened = []
        for row in rows:
            self._check_time()
            cells = list(row)
            for place, reader, ring in self._readers:
                if self._own_code:
                    self._check_time()
                cells[place] = reader.one(ring, cells[place])
            opened.append(tuple(cells))
        return opened

    def _many(self, rows: Sequence[Any]) -> Iterable[Any]:
        self._check_time()
        columns = list(zip(*rows, strict=True))
        for place, reader, ring in self._readers:
            columns[place] = reader.many(ring, columns[place])  # type: ignore[call-overload]
        return zip(*columns, strict=True)

    def _check_time(self) -> None:
        keyrings = self._turn.attachment.keyrings
        for ring in self._rings:
            check_time(keyrings, ring)  # type: ignore[arg-type]  # there are rings where an engine is attached only
