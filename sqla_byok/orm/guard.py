"""The guard: refuses a statement that would compare, sort, group or compute on ciphertext.

It walks a statement once, when it was compiled, by an allow-list: an encrypted column may stand where it is only
selected, counted or tested for NULL, or where the comparator has made a look-up on its hash column of it. Wherever
else one is met, the database would answer, and wrongly.

A column counts as encrypted also where another ``Table`` of the same name knows nothing of it. Text is not parsed:
what it names is refused where that is an encrypted column of the statement's own tables; else see :meth:`Guard.text`.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Integer, Select, Table, select
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseElement,
    ClauseList,
    ColumnClause,
    ColumnElement,
    False_,
    Grouping,
    Label,
    Null,
    Over,
    True_,
    Tuple,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    AliasedReturnsRows,
    CompoundSelect,
    Exists,
    FromClause,
    Join,
    Lateral,
    ScalarSelect,
    SelectBase,
    TableClause,
    TextualSelect,
    Values,
)
from sqlalchemy.sql.visitors import iterate

from sqla_byok.errors import ConfigurationError, UnsupportedQueryError
from sqla_byok.keys.searchable import HashSpec
from sqla_byok.orm import upstream
from sqla_byok.orm.comparator import HashComparison, hash_column_of, search_keys, way
from sqla_byok.orm.constructs import children, is_own, tables_held
from sqla_byok.orm.hash_index import IndexComparator
from sqla_byok.orm.namesakes import Naming, Stored, protected_in
from sqla_byok.orm.schema import cannot_follow
from sqla_byok.orm.sql_text import (
    Name,
    Syntax,
    columns_in,
    computes,
    lists_columns,
    name_alone,
    positions_in,
    rows_in,
    tables_in,
    without_parameters,
    written_in,
)
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["Findings", "Guard", "Verdict", "search_hash"]

_log = logging.getLogger("sqla_byok.guard")
_OURS = (Encrypted, SearchHash)
_TEXTS_KEPT = 1_000


def search_hash(column: Any) -> ColumnElement[Any]:
    """The hash column of a searchable encrypted column or of a :class:`~sqla_byok.hash_index`.

    ::

        select(Patient.id, search_hash(Patient.mrn))                                 # to read the hashes of rows
        select(search_hash(Patient.city), func.count()).group_by(search_hash(Patient.city))
        inner = select(Patient.id, Patient.mrn, search_hash(Patient.mrn)).subquery() # can be searched by inner.c.mrn

    No attribute is mapped to it: this is the way to group by it, to count distinct values or to carry it through a
    subquery. The database sees which rows share a value, which it does anyway. While a tenant's search salts are being
    rotated one value may have two hashes: a statement that groups by them is refused for that tenant meanwhile.

    :param column: the attribute, column or hash_index, also of an alias; a column of a subquery or CTE that selects
        the hash column too.
    :returns: the hash column in the same FROM. Fetched, it is a :class:`~sqla_byok.Digest`.
    :raises UnsupportedQueryError: if it is no searchable encrypted column, or its FROM has no hash column.
    """
    comparator = getattr(column, "comparator", None)
    if isinstance(comparator, IndexComparator):
        return comparator.hash_column()
    element = column.__clause_element__() if hasattr(column, "__clause_element__") else column
    type_ = getattr(_bare(element), "type", None)
    name = getattr(type_, "column_id", None)
    if not isinstance(type_, Encrypted) or not type_.searchable:
        raise UnsupportedQueryError(
            f"{name or 'the expression'}: it has no search hash; declare the column with "
            "Encrypted(…, searchable=True)",
            column=name,
        )
    found = hash_column_of(element)
    if found is None:
        raise UnsupportedQueryError(
            f"{name}: its FROM has no hash column for each of its rows; select search_hash() of it there too",
            column=name,
        )
    return upstream.of_entity(found, element)


# -- what is said ----------------------------------------------------------------------------------------------------


class _Why(NamedTuple):
    """Why an encrypted column may not stand in a place, and what to do instead."""

    what: str
    way: str
    unsearchable: str | None = None  # the way where the column has no hashes


_PYTHON = "select the column and do it in Python"
_CASEFOLD = (
    "to find a value whatever its case, declare the column with searchable=True and normalize=casefold of "
    "sqla_byok.normalize, and filter by column == value; to show it so, " + _PYTHON
)
_LOOK_UP = "filter by column == value, with the column on the left"
_DECLARE = "declare it with Encrypted(…, searchable=True) and filter by =="

_ORDER_BY = _Why("ORDER BY would sort ciphertext", "sort in Python, or by a plaintext column")
_GROUP_BY = _Why(
    "GROUP BY would find each ciphertext different",
    "group by search_hash(column), or add the table's primary key",
    "add the table's primary key, or group in Python",
)
_UNGROUPED = _Why(
    "it is compared by its search hash, which GROUP BY leaves out", "add search_hash(column) to group_by()"
)
_DISTINCT = _Why(
    "DISTINCT would find each ciphertext different",
    "select search_hash(column) instead, or the table's primary key too",
    "select the table's primary key too, or compare in Python",
)
_COUNT_DISTINCT = _Why(
    "count(distinct …) would find each ciphertext different",
    "count distinct(search_hash(column))",
    "count in Python",
)
_SET = _Why(
    "the set operation would find each ciphertext different",
    "use union_all(), or select the table's primary key too, in each part from the same table",
)
_MIXED = _Why(
    "its ciphertext would be mixed with what was not encrypted for the same column",
    "use NULL, or a literal of the column's type, or select the parts apart",
)
_COMPARED = _Why("the comparison would be made with ciphertext", _LOOK_UP, _DECLARE)
_COMPUTED = _Why("the expression would be computed on ciphertext", _PYTHON)
_TUPLE = _Why("a tuple would be compared with ciphertext", "compare the columns one by one, with and_()")
_CASE = _Why("case(value=…) would compare ciphertext", "write case((column == value, …))")
_CAST = _Why("CAST would convert ciphertext", _PYTHON)
_WINDOW = _Why("a window would sort or part by ciphertext", "use search_hash(column) to part by", _PYTHON)
_TRUTH = _Why("it stands for a condition, and the database sees ciphertext", "write column == True", _DECLARE)
_COPIED = _Why(
    "its ciphertext would be copied to where it does not open", "read the value and write it as a value"
)
_VALUES = _Why("VALUES would carry ciphertext", "use in_() with the values")
_RETURNED = _Why(
    "its type decrypts values of one column only", "select the parts apart, or declare one column_id"
)
_LIGHT = _Why(
    "table(), column() or another Table of its name knows nothing of its encryption",
    "use the model or its Table",
)
_TEXT = _Why("textual SQL names it, and would see ciphertext", "use the model's columns")
_DEFAULT = _Why(
    "its default or onupdate cannot be encrypted or hashed: it is a SQL expression, or changes one of several columns "
    "of a hash_index",
    "give it a Python value or function, or the values in the statement",
)
_HIDDEN = _Why(
    "a construct of somebody's own renders it without telling so, and would see ciphertext",
    "use the model's columns and operators in its place",
)
_UNKNOWN = _Why(
    "a construct of somebody's own has its table or class, and cannot be rendered by itself to see what it makes of it",
    "give it the columns that it is of",
)
_OWN = _Why(
    "a construct of somebody's own writes to it, where nothing would be encrypted or hashed",
    "use insert() or update() of the model",
)
_HASHES = _Why(
    "its search hashes stand beside hashes that are made in another way, or beside other values",
    "give the columns one salt_scope, hash and normalize, and take none but their hashes",
)
_HASH = _Why(
    "a search hash would be compared with something that is not hashed", _LOOK_UP + ", and never with a tuple"
)
_BIND = _Why(
    "one parameter name stands for values of several columns, which would be bound alike",
    "give each a name of its own",
)


_EXPRESSIONS = (ClauseElement, tuple)
_COMPARISONS = (_COMPARED, _TUPLE, _CASE, _HASH)


# The places of a function's arguments that are lengths or positions, and so no values.
_PLACES = {
    **dict.fromkeys(("substr", "substring", "mid"), (1, 2)),
    **dict.fromkeys(("left", "right", "lpad", "rpad", "repeat", "round", "lag", "lead", "nth_value"), (1,)),
    "split_part": (2,),
}


# What may be asked of bytes that a Table takes for bytes.
_MEASURING = ("length", "octet_length", "bit_length")


# What a text in an INSERT, UPDATE or DELETE may call the row that is written.
_ROWS_OF_DML = frozenset(("excluded", "new", "old"))

# The functions within which GROUP BY takes a number for a position.
_OF_POSITIONS = frozenset(("cube", "grouping_sets", "rollup"))


def _is_raw(element: Any) -> bool:
    return isinstance(element, ColumnClause) and upstream.is_binary(element.type)


def _function(name: str) -> _Why:
    shown = f"{name}()" if name else "the function"
    way = _CASEFOLD if name in ("lower", "upper") else _PYTHON
    return _Why(f"{shown} would be computed on ciphertext", way)


def _id(type_: Any) -> str:
    return str((type_.source if isinstance(type_, SearchHash) else type_).column_id)


class Finding(NamedTuple):
    """A place in a statement where an encrypted column may not stand."""

    column: str
    message: str
    leaks: bool  # it would send a value past the column's type, in the clear


class Findings:
    """What the guard has found with ``guard="report"``, by column."""

    def __init__(self) -> None:
        self._lock, self._by_column = Lock(), dict[str, Counter[str]]()

    def note(self, finding: Finding) -> None:
        """Count it, and log it when it is met first."""
        with self._lock:
            counts = self._by_column.setdefault(finding.column, Counter())
            counts[finding.message] += 1
            first = counts[finding.message] == 1
        if first:
            _log.warning("%s", finding.message)

    def summary(self) -> dict[str, dict[str, int]]:
        """What was found, with the number of compiled statements in which it was."""
        with self._lock:
            return {column: dict(counts) for column, counts in sorted(self._by_column.items())}


class Verdict(NamedTuple):
    """What the guard says of a compiled statement."""

    refusal: tuple[str, str | None] | None = None  # message and column
    # How the hashes are made that it tells apart other than by a look-up, by the columns' owners.
    grouped: Mapping[str | None, frozenset[HashSpec]] = MappingProxyType({})


_FINE = Verdict()


class Guard:
    """What an attached engine does about statements that would run on ciphertext, and about text.

    :param mode: ``"raise"`` or ``"report"``.
    :param raw_sql: ``"warn"``, ``"refuse"`` or ``"allow"``.
    :param findings: where reports go.
    :param dialect: the engine's, which says how text is read.
    :raises ConfigurationError: for other words.
    """

    def __init__(self, mode: str, raw_sql: str, findings: Findings, dialect: Dialect | None = None) -> None:
        if mode not in ("raise", "report"):
            raise ConfigurationError('guard takes "raise" or "report"')
        if raw_sql not in ("warn", "refuse", "allow"):
            raise ConfigurationError('raw_sql takes "warn", "refuse" or "allow"')
        self._reports, self._raw_sql, self._findings = mode == "report", raw_sql, findings
        self._dialect = dialect
        self._texts: dict[str, set[Name]] = {}

    def judge(self, compiled: Any) -> Verdict:
        """Walk a compiled statement."""
        created = None if isinstance(compiled, SQLCompiler) else upstream.selected_by(compiled)
        if created is not None:
            compiled = compiled.sql_compiler
        elif not isinstance(compiled, SQLCompiler):
            return _FINE
        statement = upstream.executed(compiled) if created is None else created
        walk = _Walk(compiled).over(statement)
        if walk.findings and walk.by_name:
            gc.collect()  # a table that nobody has any more is no reason to refuse
            walk = _Walk(compiled).over(statement)
        refused = walk.findings
        if self._reports and refused:
            for finding in refused:
                self._findings.note(finding)
            if not walk.sends_values():
                refused = [finding for finding in refused if finding.leaks]
        if refused:
            return Verdict((refused[0].message, refused[0].column))
        refusals = (
            *(self.text(text) for text in walk.whole_texts),
            *(self._about(table) for table in walk.tables_in_texts()),
        )
        owners = {type_.source.owner for type_ in walk.grouped}
        return Verdict(
            next((refusal for refusal in refusals if refusal), None),
            {
                owner: frozenset(type_.spec for type_ in walk.grouped if type_.source.owner == owner)
                for owner in owners
            },
        )

    def text(self, text: str) -> tuple[str, str | None] | None:
        """What is to be said of a statement that is text: it may name no table with encrypted columns.

        DDL and what only inspects is left alone.
        """
        if self._raw_sql == "allow":
            return None
        names, again = self._texts.get(text), True
        if names is None:
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.clear()
            names, again = tables_in(text, Syntax.of(self._dialect)), False
            self._texts[text] = names
        if not names:
            return None
        naming = Naming.of(self._dialect)
        protected = (name.name for name in names if naming.protected(*name, loosely=True))
        return self._about(next(protected, None), again)

    def _about(self, table: str | None, again: bool = False) -> tuple[str, str | None] | None:
        if table is None or self._raw_sql == "allow":
            return None
        # Not the text itself: it may hold values.
        message = (
            f"{table}: textual SQL names this table, which has encrypted columns; nothing in it is encrypted, hashed "
            "or checked. Use the model, or Byok.hash() for a look-up; attach(…, raw_sql='allow') where it is meant"
        )
        if self._raw_sql == "refuse":
            return message, None
        if not again:
            _log.warning("%s", message)
        return None


class _Visible(NamedTuple):
    """What names and texts within a statement can mean."""

    named: Callable[[str], upstream.Named]
    froms: list[Any]
    columns: Sequence[Any] = ()
    grows: bool = False  # UPDATE and DELETE take in the tables of the columns that they name
    counted: bool = True  # a position is that of a column; not so where a text is of several


def _nothing(name: str) -> upstream.Named:
    return upstream.Named([], [])


class _Text(NamedTuple):
    """A piece of text, or the name of a column without a table."""

    text: str
    visible: tuple[_Visible, ...]
    in_from: bool = False
    column: bool = False


class _Walk:
    """One walk over a statement. ``why`` is None where an encrypted column may stand, and else says why it may not."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._enclosing = compiled, upstream.Enclosing(compiled)
        self._syntax = Syntax.of(compiled.dialect)
        self._naming = Naming.of_compiled(compiled)
        self.findings: list[Finding] = []
        self.grouped: list[SearchHash] = []
        self.by_name = False  # a table was known by its name alone
        self.whole_texts: list[str] = []  # statements that are text
        self._embedded: list[Any] = []  # tables that are put into such a text
        self._texts: list[_Text] = []
        self._visible: list[_Visible] = []
        self._parts: list[Any] = []  # the expressions that were walked, each as a whole
        # What was walked, by its id, and kept alive, so that no id comes twice.
        self._seen: dict[tuple[int, bool], tuple[Any, list[list[Any]], set[tuple[str, bool]]]] = {}
        self._met: set[tuple[str, bool]] = (
            set()
        )  # the encrypted columns and hash columns that were met: see _own()
        self._tested: dict[int, Any] = {}  # SELECTs of which only is asked whether there is a row
        self._open: set[int] = set()  # the ids of the expressions whose parts are being walked
        self._sources: dict[int, Any] = {}
        self._tables: dict[int, tuple[Any, dict[str, Any]]] = {}

    def over(self, statement: Any) -> _Walk:
        """Walk the whole statement."""
        self.top(statement)
        for cte in self._compiled.ctes or ():
            self.source(cte)
        self.names(self._compiled.bind_names)
        self.named_in_texts()
        return self

    # -- what is found ---------------------------------------------------------------------------------------------

    def _refuse(self, type_: Any, why: _Why, leaks: bool = False) -> None:
        source = type_.source if isinstance(type_, SearchHash) else type_
        way = why.way if source.searchable or why.unsearchable is None else why.unsearchable
        column = _id(type_)
        self.findings.append(Finding(column, f"{column}: {why.what}; {way}", leaks))

    def names(self, bind_names: Mapping[Any, str]) -> None:
        """Find parameter names that stand for values of two columns, one of which is ours."""
        kinds: dict[str, tuple[Any, Any]] = {}
        for bind, name in bind_names.items():
            kind = _kind(bind.type)
            first, type_ = kinds.setdefault(name, (kind, bind.type))
            if kind != first:
                self._refuse(bind.type if isinstance(bind.type, _OURS) else type_, _BIND, True)

    # -- text ------------------------------------------------------------------------------------------------------

    def _text(self, text: str, *, in_from: bool = False, column: bool = False) -> None:
        self._texts.append(_Text(text, tuple(self._visible), in_from, column))

    def named_in_texts(self) -> None:
        """Find the encrypted columns of the statement's own tables that its texts name."""
        for piece in self._texts:
            for type_ in self._named_in(piece):
                self._refuse(type_, _LIGHT if piece.column else _TEXT, True)
            if piece.visible and not piece.column:
                places = positions_in(piece.text, self._syntax, clause=True)
                for column in self._at(places, piece.visible[-1]):
                    self._part(column, _ORDER_BY)

    def _named_in(self, piece: _Text) -> Iterator[Any]:
        """The types of the encrypted columns that a text names, or the whole rows of."""
        if piece.column:
            names, rows = {Name(piece.text)}, {piece.text: False} if self._syntax.postgresql else {}
        else:
            names = columns_in(piece.text, self._syntax, in_from=piece.in_from)
            rows = rows_in(piece.text, self._syntax, in_from=piece.in_from)
        alone = piece.column or not tables_in(piece.text, self._syntax, fragment=True)
        meant = [self._meant_by(name, piece.visible, alone) for name in sorted(names, key=str)]
        meant += [self._in_row(name, certain, piece.visible) for name, certain in sorted(rows.items())]
        return (type_ for type_ in meant if type_ is not None)

    def _in_row(self, name: str, certain: bool, visible: tuple[_Visible, ...]) -> Any:
        """The type of an encrypted column of the row that a name stands for; None where there is none.

        :param certain: it is no column's name.
        """
        called = self._naming.column(name)
        for level in () if certain else visible:
            if any(called in self._named_columns(source)[1] for source in _flat(level.froms)):
                return None
        for level in reversed(visible):
            for source in _flat(level.froms):
                if self._is_called(source, called) or (level.grows and called in _ROWS_OF_DML):
                    columns = self._named_columns(source)[1].values()
                    return next((type_ for type_ in columns if type_ is not None), None)
        return None

    def _is_called(self, source: Any, called: str) -> bool:
        name: Any = getattr(source, "name", None)
        if upstream.is_made_up(name):
            return upstream.may_become(name, called)
        return self._naming.column(name) == called

    def tables_in_texts(self) -> Iterator[str]:
        """The tables with encrypted columns that its texts name."""
        for table in self._embedded:
            if self._naming.protected(table.name, table.schema):
                yield table.name
        for piece in self._texts:
            if not piece.column:
                for name in tables_in(piece.text, self._syntax, fragment=True, in_from=piece.in_from):
                    if self._naming.protected(*name, loosely=True):
                        yield name.name

    def _meant_by(self, name: Name, visible: tuple[_Visible, ...], alone: bool) -> Any:
        """The type of the encrypted column that a name means in a text; None where it means something else.

        :param alone: the text has no FROM of its own, so that what stands before the name is of the statement, such
            as ``excluded`` or an alias that SQLAlchemy names.
        """
        column, unnamed = self._naming.column(name.name), None
        for level in reversed(visible):
            known = [self._named_columns(source) for source in _flat(level.froms)]
            if name.before is None:
                known.append((None, self._columns_by_name(level.columns)))
            for called, columns in known:
                if name.before is None or (called or "").lower() == name.before.lower():
                    if column in columns and (columns[column] is not None or name.before is not None):
                        return columns[column]
                elif alone or called is None:
                    unnamed = unnamed or columns.get(column)
            if name.before is None and any(column in columns for _, columns in known):
                return None  # a column of a table nearer by
        return unnamed

    def _named_columns(self, source: Any) -> tuple[str | None, dict[str, Any]]:
        """The name of a FROM, None where SQLAlchemy makes one up, and its columns with the types of the encrypted."""
        columns = {**self._columns_by_name(getattr(source, "c", ())), **self._protected(source)}
        name = getattr(source, "name", None)
        return (None if upstream.is_made_up(name) else name), columns

    def _columns_by_name(self, columns: Iterable[Any]) -> dict[str, Any]:
        return {
            self._naming.column(name): self._type_of(column) or self._ciphertext(column)
            for column in columns
            if isinstance(name := getattr(column, "name", None), str)
        }

    # -- what is sent with guard="report" --------------------------------------------------------------------------

    def sends_values(self) -> bool:
        """Whether a value stands beside ciphertext in some expression, or comes to it from another part."""
        return any(self._sends_value(part) for part in self._parts)

    def _sends_value(self, part: Any) -> bool:
        value = ciphertext = False
        waiting, seen = [part], dict[int, Any]()
        while waiting and not (value and ciphertext):
            element = _element(waiting.pop())
            if element is None or id(element) in seen:
                continue
            seen[id(element)] = element
            if isinstance(element, BindParameter):
                value = value or not isinstance(element.type, _OURS)
            elif (
                isinstance(element, True_ | False_)
                or _is_text(element)
                or not isinstance(element, _EXPRESSIONS)
            ):
                value = True
            elif isinstance(element, ColumnClause) and self._type_of(element) is not None:
                ciphertext = True
            else:
                value = value or is_own(element)
                waiting.extend(_made_of(element))
        return value and ciphertext

    # -- which columns are encrypted -------------------------------------------------------------------------------

    def _type_of(self, element: Any) -> Any:
        """The type of an encrypted column or hash column, also where its table says nothing of it; else None."""
        type_ = getattr(element, "type", None)
        if isinstance(type_, _OURS):
            return type_
        if not isinstance(element, ColumnClause):
            return None
        found = self._protected(element.table)
        return found.get(self._naming.column_of(element)) if found else None

    def _protected(self, source: Any) -> dict[str, Any]:
        """The types of the encrypted columns of a table by its name, where it or an alias of it does not tell them."""
        known = self._tables.get(id(source))
        if known is None:
            table, found = _origin(source), {}
            # A Table with encrypted columns of its own is a model, and says which they are; jobs move stored bytes.
            known_of_itself = isinstance(table, Stored) or (isinstance(table, Table) and protected_in(table))
            if isinstance(table, TableClause) and not known_of_itself:
                found = self._naming.protected(table.name, table.schema)
                self.by_name = self.by_name or bool(found)
            known = self._tables[id(source)] = (source, found)
        return known[1]

    def _ciphertext(self, element: Any) -> Any:
        """The type of the encrypted column whose ciphertext an expression gives, under whatever type; else None."""
        bare = _bare(element)
        type_ = self._type_of(bare)
        if isinstance(type_, Encrypted) or (type_ is not None and type_ is not getattr(bare, "type", None)):
            return type_
        return next(
            (type_ for part in _given_by(bare) if (type_ := self._ciphertext(part)) is not None), None
        )

    # -- statements ------------------------------------------------------------------------------------------------

    def top(self, statement: Any) -> None:
        """The statement itself."""
        if (text := upstream.text_of(statement)) is not None:
            self.whole_texts.append(text)
            for piece in upstream.pieces_of(statement):
                self._embedded.extend(upstream.tables_of(piece))
            return
        if is_own(statement) and not (
            isinstance(statement, SelectBase) or getattr(statement, "is_dml", False)
        ):
            lists = self._whole_of_own(statement)
        else:
            lists = self.statement(statement, None)
        self._visible.append(_Visible(_nothing, list(upstream.targets(self._compiled))))
        for column in upstream.returned(self._compiled):
            self._returned(column)
        self._visible.pop()
        for position in zip(*lists, strict=False):
            types = {type_.column_id: type_ for column in position for type_ in _stored_types(column)}
            if len(types) > 1:
                self._refuse(next(iter(types.values())), _RETURNED)

    def _whole_of_own(self, statement: Any) -> list[list[Any]]:
        """A statement of somebody's own, by what it holds and as it was rendered; returns as :meth:`statement` does."""
        text = self._compiled.string
        named = {
            self._naming.column(name.name) for name in columns_in(text, self._syntax) if name.before is None
        }
        for table, whole in written_in(text, self._syntax).items():
            for column, type_ in self._naming.protected(*table, loosely=True).items():
                if whole or column in named:
                    self._refuse(type_, _OWN, True)
        lists: list[list[Any]] = []
        for child in children(statement):
            if isinstance(child, SelectBase) and self._is_all(child, text):
                lists = self.statement(child, None)
            else:
                self._part(child, _COMPUTED)
        self._hidden_in(text)
        return lists

    def _is_all(self, inner: Any, text: str) -> bool:
        """Whether a statement makes up a text but for words around it that compute nothing, such as EXPLAIN."""
        rendered = None
        with suppress(Exception):
            translated = self._compiled.schema_translate_map
            rendered = str(inner.compile(dialect=self._compiled.dialect, schema_translate_map=translated))
        before, found, after = text.partition(rendered or text)
        return bool(rendered and found) and not (
            computes(before, self._syntax) or computes(after, self._syntax)
        )

    def statement(self, statement: Any, why: _Why | None, in_from: Any = None) -> list[list[Any]]:
        """Any statement; returns the columns of each of its parts.

        :param in_from: the subquery that it makes up, where it stands in a FROM.
        """
        key = (id(statement), why is None)
        known = self._seen.get(key)
        if known is None:
            outer, self._met = self._met, set()
            self._seen[key] = known = (statement, [], self._met)
            for cte in upstream.added_ctes(statement):
                self.source(cte)
            known[1].extend(self._statement(statement, why, in_from))
            self._met = outer
        self._met |= known[2]
        return known[1]

    def _statement(self, statement: Any, why: _Why | None, in_from: Any) -> list[list[Any]]:
        if isinstance(statement, SelectBase) and is_own(statement) and upstream.renders_itself(statement):
            with self._telling(statement):
                return self._standard(statement, why, in_from)
        return self._standard(statement, why, in_from)

    def _standard(self, statement: Any, why: _Why | None, in_from: Any) -> list[list[Any]]:
        if isinstance(statement, Select):
            return [self._select(statement, why, in_from)]
        if isinstance(statement, CompoundSelect):
            return self._compound(statement, why, in_from)
        if getattr(statement, "is_dml", False):
            self._dml(statement)
        elif is_own(statement):
            self.visit(statement, why or _COMPUTED)
        elif (text := upstream.text_of(getattr(statement, "element", statement))) is not None:
            self._text(text)
        elif isinstance(statement, ColumnElement):
            self.visit(statement, why)
        elif isinstance(inner := getattr(statement, "element", None), ClauseElement):
            return self.statement(inner, why, in_from)
        elif isinstance(statement, ClauseElement):
            self._within(statement, why or _COMPUTED)
        return []

    def _select(self, select: Any, why: _Why | None, in_from: Any) -> list[Any]:
        parts = upstream.parts(select, self._enclosing, in_from)
        self._enclosing.enter(select, parts.froms, parts.state)
        self._visible.append(self._visible_in(parts))
        for source in parts.froms:
            self.source(source)
        for column in parts.columns:
            self._part(column, why)
        if id(select) not in self._tested:
            self._all_columns((*parts.columns, *parts.others), parts.froms)
        for criterion in (*parts.criteria, *parts.having):
            self._part(criterion, _TRUTH)
        if parts.distinct and not parts.distinct_on:
            self._told_apart(parts.columns, _DISTINCT)
        for column in parts.distinct_on:
            for meant in self._meant(column, parts.columns):
                self._part(meant, _DISTINCT)
        self._grouped(parts.group_by, parts.columns)
        self._looked_up_in_groups(parts)
        for column in parts.order_by:
            self._ordered(column, parts.columns)
        for other in parts.others:
            self._part(other, _COMPUTED)
        for hint in upstream.hints(select, self._compiled):
            self._text(hint)
        self._visible.pop()
        self._enclosing.leave()
        return parts.columns

    def _visible_in(self, parts: upstream.Parts) -> _Visible:
        texts = [text for one in (*parts.columns, *parts.others) if (text := _text_in(one)) is not None]
        counted = not any(lists_columns(text, self._syntax).several for text in texts)
        return _Visible(parts.named, list(parts.froms), parts.columns, counted=counted)

    def _all_columns(self, selected: Iterable[Any], froms: Iterable[Any]) -> None:
        """Refuse a text of all columns, ``*``, where some are encrypted."""
        texts = [text for one in selected if (text := _text_in(one)) is not None]
        if not any(lists_columns(text, self._syntax).every for text in texts):
            return
        for source in _flat(froms):
            for type_ in self._named_columns(source)[1].values():
                if type_ is not None:
                    self._refuse(type_, _TEXT)

    def _compound(self, compound: Any, why: _Why | None, in_from: Any) -> list[list[Any]]:
        self._enclosing.enter(compound, None)
        lists = [columns for select in compound.selects for columns in self.statement(select, why, in_from)]
        for position in zip(*lists, strict=False):
            encrypted = [column for column in position if _is_encrypted(column)]
            if encrypted and (
                not _is_encrypted(position[0])
                or any(not _is_encrypted(column) and not _is_null(column) for column in position)
            ):
                self._refuse(encrypted[0].type, _MIXED)
                self._parts.append(position)
        if compound.keyword.name != "UNION_ALL":  # EXCEPT ALL and INTERSECT ALL compare rows too
            self._compared_rows(lists)
        order_by, group_by = upstream.ordering(compound)
        columns = lists[0] if lists else []
        counted = not any(
            lists_columns(text, self._syntax).several
            for column in columns
            if (text := _text_in(column)) is not None
        )
        named = _Visible(lambda name: upstream.named_in_compound(lists, name), [], columns, counted=counted)
        self._visible.append(named)
        for column in order_by:
            self._ordered(column, columns)
        self._grouped(group_by, columns)
        for other in upstream.beside(compound):
            self._part(other, _COMPUTED)
        self._visible.pop()
        self._enclosing.leave()
        return lists

    def _compared_rows(self, lists: list[list[Any]]) -> None:
        """The rows of the parts of a UNION or the like are compared with each other."""
        places = [[_place(column) for column in columns] for columns in lists]
        origins = [[place and place[:2] for place in those] for those in places]
        for columns in lists:
            self._told_apart(columns, _SET, all(those == origins[0] for those in origins))
        for position in zip(*lists, strict=False):
            self._check_hashes(position)
            self._parts.append(position)

    def _told_apart(self, columns: Sequence[Any], why: _Why, alike: bool = True) -> None:
        """Rows are told apart by these columns: right where those that are equal are the same row."""
        stored = [column for column in columns if self._ciphertext(column) is not None]
        hashes = [column for column in columns if isinstance(getattr(column, "type", None), SearchHash)]
        if not (stored or hashes) or (alike and _are_rows(columns, stored + hashes)):
            return
        for column in stored:
            self._refuse(self._ciphertext(column), why)
        for column in hashes:
            self._check_hashes([column])
            self.grouped.append(column.type)

    def _check_hashes(self, columns: Sequence[Any]) -> None:
        """Refuse hashes that say nothing of each other where rows are told apart by them."""
        types = [
            type_ for column in columns if isinstance(type_ := getattr(column, "type", None), SearchHash)
        ]
        if types and len({key for column in columns for key in search_keys(column)}) > 1:
            self._refuse(types[0], _HASHES)

    def _grouped(self, elements: Iterable[Any], columns: Sequence[Any]) -> None:
        bare = [
            _referred(one) for element in elements for one in self._meant(element, columns, shadowed=True)
        ]
        self._told_apart(bare, _GROUP_BY)
        for element in bare:
            if not isinstance(element, ColumnClause) or self._type_of(element) is None:
                self._part(element, _GROUP_BY)

    def _looked_up_in_groups(self, parts: upstream.Parts) -> None:
        """Refuse a look-up of what GROUP BY has, where the database would know the hash only if it had that too."""
        database = self._compiled.dialect.name
        if not parts.group_by or database == "sqlite":
            return
        groups = [
            _referred(meant)
            for element in parts.group_by
            for meant in self._meant(element, parts.columns, shadowed=True)
        ]
        elements, known = [*parts.having], {_place(group) for group in groups}
        if database == "postgresql":
            elements += [*parts.columns, *parts.order_by]
        else:
            known |= {_place(column) for column in parts.columns}
        froms = list(_flat(parts.froms))
        for comparison in (one for element in elements for one in _look_ups(element)):
            for column in comparison.hashes():
                if column.table not in froms or _place(column) in known:
                    continue
                if database != "postgresql" or not _depends(column, known):
                    self._refuse(column.type, _UNGROUPED)

    def _ordered(self, element: Any, columns: Sequence[Any]) -> None:
        for meant in self._labels_named(element, columns) or self._meant(element, columns):
            self._part(meant, _ORDER_BY)

    def _labels_named(self, element: Any, columns: Sequence[Any]) -> list[Any]:
        """The labels that a text in ORDER BY is the name of: they go before the columns of the FROM."""
        text = _text_in(_sorted_by(element))
        name = None if text is None else name_alone(text, self._syntax)
        if name is None:
            return []
        called = self._naming.column(name)
        return [
            column
            for column in columns
            if isinstance(column, Label) and self._naming.column(column.name) == called
        ]

    def _meant(self, element: Any, columns: Sequence[Any], shadowed: bool = False) -> list[Any]:
        """What an ORDER BY, GROUP BY or DISTINCT ON means by a name, or by the positions of result columns."""
        bare = _sorted_by(element)
        if isinstance(bare, ClauseList) and not is_own(bare):  # of an entity
            return [meant for one in bare.clauses for meant in self._meant(one, columns)]
        if (name := upstream.named_in_order_by(bare)) is not None:
            return self._of_name(name, shadowed)
        if not any(self._type_of(_bare(one)) or self._ciphertext(one) for one in columns):
            return [element]
        return [element, *self._at(self._positions(element, columns), self._visible[-1])]

    def _positions(self, element: Any, columns: Sequence[Any]) -> list[int | None]:
        """The positions of result columns that the database may take an expression for, as it is rendered."""
        label, bare = upstream.referred(_sorted_by(element)), _bare(_sorted_by(element))
        if isinstance(label, Label) and any(_is_label(column, label) for column in columns):
            return []  # rendered by its name
        lists = isinstance(bare, ClauseList) or getattr(bare, "name", "") in _OF_POSITIONS
        if lists and not is_own(bare):
            return [place for one in bare.clauses for place in self._positions(one, columns)]
        if any(isinstance(one, SelectBase) or _is_column(one) for one in iterate(element)):
            return []
        rendered = self._rendered(element)
        return [None] if rendered is None else positions_in(rendered, self._syntax)

    def _rendered(self, element: Any, **kwargs: Any) -> str | None:
        """An expression as it is rendered by itself; None where it cannot be."""
        rendered = None
        with suppress(Exception):
            rendered = without_parameters(
                str(element.compile(dialect=self._compiled.dialect, compile_kwargs=kwargs))
            )
        return rendered

    def _at(self, places: Iterable[int | None], visible: _Visible) -> list[Any]:
        """The result columns at these positions; where one is unknown, each that has ciphertext."""
        found: list[Any] = []
        for place in places:
            if place is None or not visible.counted:
                found += [one for one in visible.columns if self._ciphertext(one) is not None]
            elif 0 < place <= len(visible.columns):
                found.append(visible.columns[place - 1])
        return found

    # -- INSERT, UPDATE and DELETE ---------------------------------------------------------------------------------

    def _dml(self, dml: Any) -> None:
        self._visible.append(_Visible(_nothing, [dml.table], grows=True))
        self.source(dml.table)
        self._enclosing.enter(dml, upstream.written_froms(dml))
        if not dml.is_delete:
            self._written(dml)
        for criterion in upstream.criteria(dml):
            self._part(criterion, _TRUTH)
        for column in upstream.returning(dml):
            self._returned(column)
        for other in upstream.beside(dml):
            self._part(other, _COMPUTED)
        for hint in upstream.hints(dml, self._compiled):
            self._text(hint)
        self._visible.pop()
        self._enclosing.leave()

    def _written(self, dml: Any) -> None:
        table, items = dml.table, [*upstream.values(dml)]
        for group in upstream.multi_values(dml):
            items += [item for row in group if isinstance(row, Mapping) for item in row.items()]
        if upstream.select_names(dml):
            self.statement(dml.select, _COPIED)
        for conflict in upstream.conflicts(dml):
            items += upstream.conflict_values(conflict)
            for criterion in upstream.conflict_criteria(conflict):
                self._part(criterion, _COMPARED)
            for target in upstream.conflict_elements(conflict):
                if isinstance(target, ClauseElement) and not isinstance(target, ColumnClause):
                    self._part(target, _COMPUTED)
                else:
                    self._unknowing(table, target)
        for key, value in items:
            self._set(table, key, value)
        for one in _flat([table]):
            if isinstance(origin := _origin(one), Table):
                for column in cannot_follow(origin, "default" if dml.is_insert else "onupdate"):
                    self._refuse(column.type, _DEFAULT, True)
        if self._protected(table) or not isinstance(table, Table):
            for key in upstream.written(dml, self._compiled):
                self._unknowing(table, key)

    def _unknowing(self, table: Any, key: Any) -> None:
        """A column that is written through a table which does not know that it is encrypted."""
        column = _column_of(table, key)
        type_ = self._type_of(column)
        if type_ is not None and type_ is not column.type and not isinstance(column.type, _OURS):
            self._refuse(type_, _LIGHT, True)

    def _set(self, table: Any, key: Any, value: Any) -> None:
        """A value in SET or VALUES. What may be set on an encrypted column itself is the matter of ``fill``."""
        value = _element(value)
        if not isinstance(key, str) and isinstance(getattr(key, "type", None), _OURS):
            return
        # A value that is given an encrypted column's type, for bytes of one's own, is meant.
        if not (isinstance(value, BindParameter) and isinstance(value.type, _OURS)):
            self._unknowing(table, key)
        column = _column_of(table, getattr(key, "key", key))
        if isinstance(getattr(column, "type", None), _OURS):
            return
        if column is not None and isinstance(key, ColumnElement) and not isinstance(key, ColumnClause):
            self._part(key, _COMPUTED)
        if isinstance(value, ClauseElement) and not isinstance(value, BindParameter):
            self._part(value, _COPIED)

    def _returned(self, column: Any) -> None:
        bundled = _element(column)
        if isinstance(bundled, ClauseList) and not is_own(bundled):
            for one in bundled.clauses:
                self._returned(one)
        elif isinstance(column, ColumnElement) or not isinstance(column, FromClause):
            self._part(column, None)

    # -- FROM ------------------------------------------------------------------------------------------------------

    def source(self, source: Any) -> None:
        """Anything in a FROM."""
        if isinstance(source, Table) or id(source) in self._sources:
            return
        self._sources[id(source)] = source
        if isinstance(source, Join):
            self.source(source.left)
            self.source(source.right)
            self._part(source.onclause, _TRUTH)
        elif isinstance(source, Values):
            for column in source.c:
                if isinstance(column.type, _OURS):
                    self._refuse(column.type, _VALUES)
            self._rows(source)
        elif (text := upstream.text_of(source)) is not None:
            self._text(text, in_from=True)
        elif isinstance(source, FunctionElement):
            self._part(source, _COMPUTED)
        elif is_own(source):
            with self._telling(source, in_from=True):
                self._derived(source)
        else:
            self._derived(source)

    def _derived(self, source: Any) -> None:
        """An alias, a subquery, or what else a FROM is made of."""
        for other in upstream.made_by(source):
            self._part(other, _COMPUTED)
        # Its statement sees the enclosing ones, but not what it stands beside.
        visible = self._visible
        self._visible = visible if isinstance(source, Lateral) else visible[:-1]
        restated = upstream.restated(source)
        if restated is not None:
            self.source(restated)
        inner = getattr(source, "element", None)
        if isinstance(inner, FromClause) and not isinstance(inner, SelectBase | FunctionElement):
            self.source(inner)
        elif inner is not None:
            self.statement(inner, None, source)
        self._visible = visible
        if is_own(source):
            self._within(source, _COMPUTED)

    def _rows(self, values: Any) -> None:
        for value in upstream.rows_of_values(values):
            if isinstance(element := _element(value), ClauseElement):
                self._part(element, _VALUES)

    # -- expressions -----------------------------------------------------------------------------------------------

    def _part(self, element: Any, why: _Why | None) -> None:
        """A whole expression: what is sent with a refused column is looked for within it."""
        self._parts.append(element)
        self.visit(element, why)

    def visit(self, element: Any, why: _Why | None) -> None:
        """Any expression."""
        element = _element(element)  # an attribute, as mysql.match() keeps it
        if not isinstance(element, ClauseElement):
            return
        whole = isinstance(element, FromClause | SelectBase) and not isinstance(element, FunctionElement)
        if is_own(element) and not whole and id(element) not in self._open:
            with self._telling(element):
                self._known(element, why)
        else:
            self._known(element, why)

    @contextmanager
    def _telling(self, element: Any, in_from: bool = False) -> Iterator[None]:
        """Within it a construct of somebody's own is walked; what it renders besides is refused.

        It may come to a column by a way that nobody can follow: through a mapped class, a registry, a function.
        """
        outer, self._met = self._met, set()
        yield
        rendered = self._rendered(element, asfrom=True) if in_from else self._rendered(element)
        if rendered is None and isinstance(element, ColumnElement):
            rendered = self._rendered(select(element))  # it may look at the statement around it
            for table in tables_held(element) if rendered is None else ():
                for column in protected_in(table)[:1]:
                    self._refuse(column.type, _UNKNOWN, True)
        if rendered is not None:
            self._hidden_in(rendered, in_from)
        self._met |= outer

    def _hidden_in(self, rendered: str, in_from: bool = False) -> None:
        """Refuse the encrypted columns that a construct of somebody's own renders, but for those that were met."""
        for type_ in self._named_by_own(rendered, in_from):
            if (_id(type_), isinstance(type_, SearchHash)) not in self._met:
                self._refuse(type_, _HIDDEN, True)

    def _named_by_own(self, rendered: str, in_from: bool) -> Iterator[Any]:
        """The types of the encrypted columns of the statement's tables, and of its own, that a construct names."""
        syntax, sources = self._syntax, [source for level in self._visible for source in _flat(level.froms)]
        tables = tables_in(rendered, syntax, fragment=True, in_from=in_from)
        within = [self._naming.protected(*table, loosely=True) for table in tables]
        for name in columns_in(rendered, syntax, in_from=in_from):
            column, table = self._naming.column(name.name), name.before and self._naming.column(name.before)
            known = [
                self._named_columns(one)[1] for one in sources if not table or self._is_called(one, table)
            ]
            found = (columns.get(column) for columns in (*within, *known))
            yield from (type_ for type_ in found if type_ is not None)
        for row, certain in rows_in(rendered, syntax, in_from=in_from).items():
            if (type_ := self._in_row(row, certain, tuple(self._visible))) is not None:
                yield type_

    def _known(self, element: Any, why: _Why | None) -> None:
        """An expression by what it is made of."""
        if isinstance(element, ColumnClause):
            self._column(element, why)
        elif isinstance(element, HashComparison):
            self._looked_up(element)
        elif isinstance(element, BindParameter):
            if why is not None and isinstance(element.type, _OURS):
                self._refuse(element.type, why)
        elif isinstance(element, FunctionElement):
            self._called(element, why)
        elif is_own(element) and not isinstance(element, FromClause | SelectBase):
            self._within(element, why or _COMPUTED)
        elif isinstance(element, BinaryExpression):
            self._binary(element)
        elif isinstance(element, BooleanClauseList) and element.operator is not operators.comma_op:
            for criterion in element.clauses:
                self._part(criterion, _TRUTH)
        elif isinstance(element, Label | Grouping):
            self.visit(element.element, why)
        else:
            self._rarer(element, why)

    def _rarer(self, element: Any, why: _Why | None) -> None:
        if (text := upstream.text_of(element)) is not None:
            self._text(text)
            for piece in upstream.pieces_of(element):
                for column in upstream.columns_of(piece):
                    self.visit(column, _TEXT)
                self.visit(piece, _TEXT)
        elif isinstance(element, Case):
            self._case(element, why)
        elif isinstance(element, Cast):
            self._cast(element)
        elif isinstance(element, TypeCoerce):
            self.visit(element.clause, why)
            if why is not None and isinstance(element.type, Encrypted) and not _is_encrypted(element.clause):
                self._refuse(element.type, why)
        elif isinstance(element, Tuple):
            for part in element.clauses:
                self._operand(part, _TUPLE)
        elif isinstance(element, Over):
            self.visit(element.element, _COMPUTED)
            self.visit(element.partition_by, _WINDOW)
            self.visit(element.order_by, _WINDOW)
        elif isinstance(element, UnaryExpression) and why is None and not isinstance(element, Exists):
            self._within(element, _COUNT_DISTINCT if element.operator is operators.distinct_op else _COMPUTED)
        elif not (self._nested(element, why) or self._named(element, why)):
            self._within(element, why or _COMPUTED)

    def _nested(self, element: Any, why: _Why | None) -> bool:
        """A statement or a FROM in an expression; False for anything else."""
        if isinstance(element, Exists):
            inner = _inner(element)
            self._tested[id(inner)] = inner
            self.statement(inner, None)
        elif isinstance(element, ScalarSelect):
            if why is not None and isinstance(element.type, Encrypted):
                self._refuse(element.type, why)
            self.statement(_inner(element), why)
        elif isinstance(element, SelectBase):
            self.statement(element, why)
        elif isinstance(element, FromClause):
            self.source(element)
        elif upstream.has_rows(element):  # VALUES as an operand
            self._rows(element)
        else:
            return False
        return True

    def _named(self, element: Any, why: _Why | None) -> bool:
        """A string that names a column, or a FROM that stands for its row; False for anything else."""
        if (name := upstream.named_in_order_by(element)) is not None:
            for column in self._of_name(name, shadowed=True):
                self._part(column, why)
        elif (row := upstream.row_of(element)) is not None:
            self.source(row)
            if why is not None and (carried := self._ciphertext(element)) is not None:
                self._refuse(carried, why)
        else:
            return False
        return True

    def _within(self, element: Any, why: _Why) -> None:
        """The parts of an expression. Those of somebody's own may lead back to it."""
        if id(element) in self._open:
            return
        self._open.add(id(element))
        for child in children(element):
            self.visit(child, why)
        self._open.discard(id(element))

    def _column(self, column: Any, why: _Why | None) -> None:
        table = column.table
        if column.is_literal:
            self._text(column.name)
        elif table is None:
            self._text(column.name, column=True)
        if table is not None:
            self.source(table)
            if self._visible and self._visible[-1].grows:
                self._visible[-1].froms.append(table)
        type_ = self._type_of(column)
        if type_ is not None:
            self._met.add((_id(type_), isinstance(type_, SearchHash)))
        if type_ is None:
            if (
                why is not None
                and not isinstance(table, Table)
                and (carried := self._ciphertext(column)) is not None
            ):
                self._refuse(carried, why)
        elif type_ is not column.type:
            self._of_unknowing(column, type_, why)
        elif isinstance(type_, Encrypted):
            if why is not None:
                self._refuse(type_, why)
        elif table is not None:
            self._hash(column, type_, why)

    def _hash(self, column: Any, type_: Any, why: _Why | None) -> None:
        if why in _COMPARISONS:
            self._refuse(type_, _HASH)
        elif why is not None:
            self._check_hashes([column])
            self.grouped.append(type_)

    def _of_unknowing(self, column: Any, type_: Any, why: _Why | None) -> None:
        """An encrypted column or hash column of a table that says nothing of it; its bytes may be read, of a Table."""
        if not isinstance(_origin(column.table), Table):
            self._refuse(type_, _LIGHT, True)
        elif why is not None:
            self._refuse(type_, _Why(why.what, _LIGHT.way))

    def _looked_up(self, comparison: HashComparison) -> None:
        for side in (_bare(comparison.left), _bare(comparison.right)):
            if isinstance(side, ScalarSelect) and isinstance(inner := _inner(side), Select):
                self._order_of(inner)
        shown = comparison.rendered(1)  # what of it is sent
        for side in (_bare(shown.left), _bare(shown.right)):
            for operand in side.clauses if isinstance(side, ClauseList) else (side,):
                self._part(_bare(operand), None)

    def _order_of(self, select: Any) -> None:
        """A subquery's ORDER BY as it was written: of a position, before a hash took the place of what was selected."""
        parts = upstream.parts(select, self._enclosing)
        self._visible.append(self._visible_in(parts))
        for column in parts.order_by:
            self._ordered(column, parts.columns)
        self._visible.pop()

    def _binary(self, binary: Any) -> None:
        left, right = binary.left, binary.right
        if _is_null_test(binary):
            self.visit(left, None)
            self.visit(right, None)
            return
        why = _COMPARED if operators.is_comparison(binary.operator) else _COMPUTED
        self._operand(left, why)
        self._operand(right, why)

    def _operand(self, operand: Any, why: _Why) -> None:
        """An operand of a comparison that is none of hashes: a hash column may not stand there either."""
        bare = _bare(operand)
        type_ = getattr(bare, "type", None)
        if isinstance(type_, SearchHash) and not isinstance(bare, BindParameter):
            self._refuse(type_, _HASH)
        self.visit(operand, why)

    def _called(self, function: Any, why: _Why | None) -> None:
        name = str(getattr(function, "name", "")).lower()
        if is_own(function):
            self._within(function, _function(name))
        elif name == "count":
            for argument in function.clauses:
                self.visit(argument, None)
        elif name == "coalesce":
            self._alternatives(list(function.clauses), why)
        else:
            measures = name in _MEASURING
            for argument in function.clauses:
                self.visit(argument, None if measures and _is_raw(argument) else _function(name))

    def _case(self, case: Any, why: _Why | None) -> None:
        if case.value is not None:
            self._operand(case.value, _CASE)
        for condition, _ in case.whens:
            self._operand(condition, _CASE) if case.value is not None else self._part(condition, _TRUTH)
        results = [result for _, result in case.whens]
        self._alternatives(results if case.else_ is None else [*results, case.else_], why)

    def _alternatives(self, results: list[Any], why: _Why | None) -> None:
        """What CASE or COALESCE gives: of one encrypted column, or of none."""
        encrypted = [result for result in results if _is_encrypted(result)]
        if why is None and encrypted:
            same = {result.type.column_id for result in encrypted}
            if len(same) > 1 or any(not _is_encrypted(one) and not _is_null(one) for one in results):
                self._refuse(encrypted[0].type, _MIXED)
        self._check_hashes(results)
        for result in results:
            self.visit(result, why)

    def _cast(self, cast: Any) -> None:
        if _is_null(cast.clause):
            return
        if isinstance(cast.type, Encrypted):
            self._refuse(cast.type, _CAST)
        self.visit(cast.clause, _CAST)

    def _of_name(self, name: str, shadowed: bool) -> list[Any]:
        """The columns that a string may name.

        :param shadowed: where a label has the name, the database takes a column of the FROM first: but in ORDER BY.
        """
        if not self._visible:
            return []
        meant, alike = self._visible[-1].named(name)
        if shadowed:
            return meant + alike if any(isinstance(column, Label) for column in meant) else meant
        return meant[:1]


# -- what an element is ----------------------------------------------------------------------------------------------


def _bare(element: Any) -> Any:
    while isinstance(element, Label | Grouping):
        element = element.element
    return element


def _referred(element: Any) -> Any:
    """What GROUP BY means by an element: the label's own expression, where it is one."""
    label = upstream.referred(element)
    return _bare(element if label is None else label)


def _inner(element: Any) -> Any:
    """The statement inside EXISTS, a scalar subquery or parentheses."""
    while not isinstance(element, Select | CompoundSelect | TextualSelect):
        element = element.element
    return element


def _is_encrypted(element: Any) -> bool:
    return isinstance(getattr(element, "type", None), Encrypted)


def _is_null(element: Any) -> bool:
    bare = _bare(element)
    if isinstance(bare, Cast | TypeCoerce):
        bare = _bare(bare.clause)
    return isinstance(bare, Null)


def _element(value: Any) -> Any:
    """An attribute as the construct that it stands for."""
    if isinstance(value, ClauseElement) or not hasattr(value, "__clause_element__"):
        return value  # to ask an expression for an attribute that it has not costs much
    return value.__clause_element__()


def _origin(table: Any) -> Any:
    """The table of which a FROM is an alias, or one of its aliases."""
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    return table


def _column_of(table: Any, key: Any) -> Any:
    """The column that a key of VALUES or SET stands for; None for an unknown one."""
    if isinstance(key, ColumnClause) and (getattr(key, "table", None) is not None or not hasattr(table, "c")):
        return key
    name = key if isinstance(key, str) else getattr(key, "key", None)
    return table.c.get(name) if hasattr(table, "c") else None


def _flat(froms: Iterable[Any]) -> Iterator[Any]:
    """The members of a FROM, without joins."""
    for source in froms:
        if isinstance(source, Join):
            yield from _flat((source.left, source.right))
        else:
            yield source


def _text_in(element: Any) -> str | None:
    """The text that an element is: text() or literal_column(), or a label of one; None for any other."""
    bare = _bare(element)
    return bare.name if getattr(bare, "is_literal", False) else upstream.text_of(bare)


def _sorted_by(element: Any) -> Any:
    """What is sorted by, without the way of sorting."""
    while isinstance(element, UnaryExpression):
        element = element.element
    return element


def _is_label(column: Any, label: Any) -> bool:
    return column is label or (
        isinstance(column, Label) and column.name == label.name and label.shares_lineage(column)
    )


def _is_column(element: Any) -> bool:
    return isinstance(element, ColumnClause) and not element.is_literal


def _is_text(element: Any) -> bool:
    return bool(getattr(element, "is_literal", False)) or upstream.text_of(element) is not None


def _is_null_test(element: Any) -> bool:
    return (
        isinstance(element, BinaryExpression)
        and element.operator in (operators.is_, operators.is_not)
        and (_is_null(element.left) or _is_null(element.right))
    )


def _but_columns(elements: Iterable[Any]) -> list[Any]:
    return [element for element in elements if not isinstance(_bare(element), ColumnClause | Null)]


def _made_of(element: Any) -> Iterable[Any]:
    """The parts that an expression's values come from, through subqueries too; not what is only tested or counted."""
    if isinstance(element, tuple):
        return element
    if isinstance(element, HashComparison | Exists):
        return ()
    if upstream.has_rows(element):
        return tuple(upstream.rows_of_values(element))
    if _is_null_test(element):
        return _but_columns((element.left, element.right))
    if isinstance(element, ColumnClause):
        inner = getattr(element.table, "element", element.table)
        rows = upstream.rows_of_values(inner) if upstream.has_rows(inner) else ()
        told = (inner,) if isinstance(inner, FunctionElement | TextualSelect) else ()
        return (*upstream.proxied(element), *rows, *told)
    if isinstance(element, FunctionElement) and not is_own(element):
        name = str(getattr(element, "name", "")).lower()
        if name == "count":
            return _but_columns(element.clauses)
        places = _PLACES.get(name, ())
        return [
            argument
            for place, argument in enumerate(element.clauses)
            if not (place in places and isinstance(argument.type, Integer))
        ]
    if isinstance(element, ScalarSelect | SelectBase):
        inner = _inner(element)
        if isinstance(inner, TextualSelect):
            return (inner.element,)
        return inner.selects if isinstance(inner, CompoundSelect) else tuple(inner.selected_columns)
    return children(element) if isinstance(element, ClauseElement) else ()


def _given_by(element: Any) -> Iterable[Any]:
    """The parts of an expression that it may give unchanged."""
    if isinstance(element, TypeCoerce):
        return (element.clause,)
    if isinstance(element, Case):
        return [*(result for _, result in element.whens), element.else_]
    if isinstance(element, FunctionElement):
        return tuple(element.clauses) if getattr(element, "name", "") == "coalesce" else ()
    if isinstance(element, ScalarSelect):
        inner = _inner(element)
        return tuple(inner.selected_columns) if isinstance(inner, Select | CompoundSelect) else ()
    if (row := upstream.row_of(element)) is not None:
        return tuple(row.c)
    return (base for base in getattr(element, "base_columns", ()) if base is not element)


def _stored_types(column: Any) -> Iterator[Any]:
    """The types of the encrypted columns whose values a result column has."""
    bare = _bare(column)
    for base in getattr(bare, "base_columns", (bare,)):
        if _is_encrypted(bare) and _is_encrypted(base):
            yield base.type


def _are_rows(columns: Sequence[Any], ours: Sequence[Any]) -> bool:
    """Whether rows that are equal in the columns are one row of each table that an encrypted column comes from."""
    there = {place for column in columns if (place := _place(column)) is not None}
    for column in ours:
        place = _place(column)
        if place is None:
            return False
        table, _, through = place
        keys = list(table.primary_key.columns)
        if not keys or any((table, key.key, through) not in there for key in keys):
            return False
    return True


def _look_ups(element: Any) -> Iterator[HashComparison]:
    """The look-ups in an expression, subqueries included; not those that an aggregate function is over."""
    if isinstance(element, HashComparison):
        yield element
    elif not isinstance(element, FunctionElement):
        for child in element.get_children():
            yield from _look_ups(child)


def _depends(column: Any, groups: set[Any]) -> bool:
    """Whether PostgreSQL knows a column in each group, by the primary key of its table."""
    table, through = _origin(column.table), way(column)
    keys = list(table.primary_key.columns) if isinstance(table, Table) else []
    return bool(keys) and all((table, key.key, through) in groups for key in keys)


def _place(column: Any) -> tuple[Any, Any, Any] | None:
    """The table and the key of a column, and the way that it comes; None if it is of more than one, or of none."""
    bare = _bare(column)
    while isinstance(bare, TypeCoerce):
        bare = _bare(bare.clause)
    table = getattr(bare, "table", None)
    if isinstance(table, Table):
        return table, bare.key, table
    origins = [_place(one) for one in upstream.proxied(bare)] if table is not None else []
    first = origins[0] if origins else None
    if first is None or any(place is None or place[:2] != first[:2] for place in origins):
        return None
    return (*first[:2], way(bare))


def _kind(type_: Any) -> Any:
    """Two parameters of one kind are bound alike; None for all that are not ours."""
    if isinstance(type_, SearchHash):
        return SearchHash, type_.nth, type_.source.search_key, type_.source.type_._static_cache_key
    return (Encrypted, type_.column_id) if isinstance(type_, Encrypted) else None
