"""The guard: refuses a statement that would compare, sort, group or compute on ciphertext.

It walks a statement once, when it was compiled, by an allow-list: an encrypted column may stand where it is only
selected, counted or tested for NULL, or where the comparator has made a look-up on its hash column of it. Wherever
else one is met, the database would answer, and wrongly.

Text is not parsed: see :meth:`Guard.text`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Column, Select, Table, event
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
    Grouping,
    Label,
    Null,
    Over,
    TextClause,
    Tuple,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import (
    CompoundSelect,
    Exists,
    FromClause,
    Join,
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
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["Findings", "Guard", "Verdict", "search_hash"]

_log = logging.getLogger("sqla_byok.guard")
_OURS = (Encrypted, SearchHash)
_TEXTS_KEPT = 1_000


def search_hash(column: Any) -> ColumnElement[Any]:
    """The hash column of a searchable encrypted column, to group by or to count distinct values on purpose.

    ::

        select(search_hash(Patient.city), func.count()).group_by(search_hash(Patient.city))

    The database then sees which rows share a value, which it does anyway. While a tenant's search salts are being
    rotated one value may have two hashes: a statement that groups by them is refused for that tenant meanwhile.

    :param column: the attribute or column, also of an alias, or of a subquery that selects the hash column too.
    :returns: the hash column in the same FROM. Fetched, it is a :class:`~sqla_byok.Digest`.
    :raises UnsupportedQueryError: if it is no searchable encrypted column, or its FROM has no hash column.
    """
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
            f"{name}: its FROM has no hash column for each of its rows; select the hash column there too",
            column=name,
        )
    entity = {key: value for key, value in element._annotations.items() if key != "proxy_key"}
    annotated: ColumnElement[Any] = found._annotate(entity)
    return annotated


# -- which tables have encrypted columns -----------------------------------------------------------------------------

_tables: dict[str, WeakSet[Table]] = {}


@event.listens_for(Encrypted, "after_parent_attach")
def _declared(type_: Encrypted[Any], column: Any) -> None:
    if isinstance(column, Column):
        event.listen(column, "after_parent_attach", _protect)


def _protect(_: Any, table: Any) -> None:
    if isinstance(table, Table):
        _tables.setdefault(table.name.lower(), WeakSet()).add(table)


def _protected(name: str) -> dict[str, str]:
    """The column ids of the encrypted columns and hash columns of all tables of a name, by lower-case column name."""
    return {name: id_ for table in _tables.get(name.lower(), ()) for name, id_ in _encrypted_in(table)}


def _encrypted_in(table: Table) -> Iterator[tuple[str, str]]:
    for column in table.c:
        if isinstance(column.type, _OURS):
            yield column.name.lower(), _id(column.type)


# Strings and comments first, so that nothing within them is taken for a name.
_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | --[^\n]* | /\*.*?\*/ | \$(\w*)\$.*?\$\1\$ | %\(\w+\)s
    | "((?:[^"]|"")+)" | `([^`]+)` | \[([^\]]+)\] | (?<![:@\w])(\w+)""",
    re.VERBOSE | re.DOTALL,
)
_TOUCHING = frozenset(
    ("select", "with", "insert", "update", "delete", "merge", "replace", "copy", "values", "table", "explain", "load")
)  # fmt: skip


def _names_in(text: str) -> list[str]:
    """The names and words in SQL text, in lower case."""
    found = (
        match.group(2) or match.group(3) or match.group(4) or match.group(5)
        for match in _TOKENS.finditer(text)
    )
    return [name.lower() for name in found if name]


# -- what is said ----------------------------------------------------------------------------------------------------


class _Why(NamedTuple):
    """Why an encrypted column may not stand in a place, and what to do instead."""

    what: str
    way: str
    unsearchable: str | None = None  # the way where the column has no hashes


_PYTHON = "select the column and do it in Python"
_LOOK_UP = "filter by column == value, with the column on the left"
_DECLARE = "declare it with Encrypted(…, searchable=True) and filter by =="

_ORDER_BY = _Why("ORDER BY would sort ciphertext", "sort in Python, or by a plaintext column")
_GROUP_BY = _Why(
    "GROUP BY would find each ciphertext different",
    "group by search_hash(column), or add the table's primary key",
    "add the table's primary key, or group in Python",
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
_LIGHT = _Why("table() and column() know nothing of its encryption", "use the model or its Table")
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


_COMPARISONS = (_COMPARED, _TUPLE, _CASE, _HASH)


def _may_be_a_value(type_: Any, source: Any, why: _Why) -> bool:
    """Whether a parameter may carry a value of the column in the clear, and is not merely a length or a position."""
    if isinstance(type_, _OURS):
        return False
    try:
        return why in _COMPARISONS or type_.python_type is source.python_type
    except NotImplementedError:
        return True


def _function(name: str) -> _Why:
    shown = f"{name}()" if name else "the function"
    return _Why(f"{shown} would be computed on ciphertext", _PYTHON)


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
    :raises ConfigurationError: for other words.
    """

    def __init__(self, mode: str, raw_sql: str, findings: Findings) -> None:
        if mode not in ("raise", "report"):
            raise ConfigurationError('guard takes "raise" or "report"')
        if raw_sql not in ("warn", "refuse", "allow"):
            raise ConfigurationError('raw_sql takes "warn", "refuse" or "allow"')
        self._reports, self._raw_sql, self._findings = mode == "report", raw_sql, findings
        self._texts: dict[str, str | None] = {}

    def judge(self, compiled: Any) -> Verdict:
        """Walk a compiled statement."""
        created = None if isinstance(compiled, SQLCompiler) else upstream.selected_by(compiled)
        if created is not None:
            compiled = compiled.sql_compiler
        elif not isinstance(compiled, SQLCompiler):
            return _FINE
        statement = upstream.executed(compiled) if created is None else created
        if (text := upstream.text_of(statement)) is not None:
            return Verdict(self.text(text))
        walk = _Walk(compiled)
        walk.top(statement)
        for cte in compiled.ctes or ():
            walk.source(cte)
        walk.names(compiled.bind_names)
        walk.loose()
        refused = walk.findings
        if self._reports:
            for finding in refused:
                self._findings.note(finding)
            refused = [finding for finding in refused if finding.leaks]
        if refused:
            return Verdict((refused[0].message, refused[0].column))
        refusals = (self._about(text, table) for text, table in walk.named_in_texts())
        refusal = next((refusal for refusal in refusals if refusal), None)
        owners = {type_.source.owner for type_ in walk.grouped}
        return Verdict(
            refusal,
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
        if text not in self._texts:
            names = _names_in(text)
            touching = bool(names) and names[0] in _TOUCHING
            table = next((name for name in names if _tables.get(name)), None) if touching else None
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.clear()
            self._texts[text] = table
            return self._about(text, table)
        return self._about(text, self._texts[text], again=True)

    def _about(self, text: str, table: str | None, again: bool = False) -> tuple[str, str | None] | None:
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


class _Walk:
    """One walk over a statement. ``why`` is None where an encrypted column may stand, and else says why it may not."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._around = compiled, upstream.Around(compiled)
        self.findings: list[Finding] = []
        self.grouped: list[SearchHash] = []
        self._root: Any = None  # the expression that is being walked, as a whole
        # What was walked, by its id, and kept alive, so that no id comes twice.
        self._seen: dict[tuple[int, bool], tuple[Any, list[list[Any]]]] = {}
        self._open: set[int] = set()  # the ids of the expressions whose parts are being walked
        self._sources: dict[int, Any] = {}
        self._scopes: list[Callable[[str], upstream.Named]] = []
        self._found: set[Table] = set()
        self._light_names: set[str] = set()
        self._texts: list[str] = []
        self._loose: list[str] = []

    # -- what is found ---------------------------------------------------------------------------------------------

    def _refuse(self, type_: Any, why: _Why) -> None:
        source = type_.source if isinstance(type_, SearchHash) else type_
        way = why.way if source.searchable or why.unsearchable is None else why.unsearchable
        leaks = self._root is not None and any(
            isinstance(element, BindParameter) and _may_be_a_value(element.type, source, why)
            for element in iterate(self._root)
        )
        self._add(_id(type_), why.what, way, leaks)

    def _add(self, column: str, what: str, way: str, leaks: bool) -> None:
        self.findings.append(Finding(column, f"{column}: {what}; {way}", leaks))

    def names(self, bind_names: Mapping[Any, str]) -> None:
        """Find parameter names that stand for values of two columns, one of which is ours."""
        kinds: dict[str, tuple[Any, Any]] = {}
        for bind, name in bind_names.items():
            kind = _kind(bind.type)
            first, type_ = kinds.setdefault(name, (kind, bind.type))
            if kind != first:
                ours = bind.type if isinstance(bind.type, _OURS) else type_
                self._add(_id(ours), _BIND.what, _BIND.way, True)

    def loose(self) -> None:
        """Find ``column("mrn")`` without a table, where a table of the statement has such an encrypted column."""
        if self._loose:
            encrypted = {name: id_ for table in self._found for name, id_ in _encrypted_in(table)}
            for table in self._light_names:
                encrypted.update(_protected(table))
            for name in self._loose:
                if name in encrypted:
                    self._add(encrypted[name], _LIGHT.what, _LIGHT.way, True)

    def named_in_texts(self) -> Iterator[tuple[str, str | None]]:
        """The pieces of text that name an encrypted column of the statement's tables, or another protected table."""
        if not self._texts:
            return
        columns = {name: table.name for table in self._found for name, _ in _encrypted_in(table)}
        here = {table.name.lower() for table in self._found}
        here.update(column.name.lower() for table in self._found for column in table.c)
        for text in self._texts:
            for name in _names_in(text):
                if name in columns or (_tables.get(name) and name not in here):
                    yield text, columns.get(name, name)
                    break

    # -- statements ------------------------------------------------------------------------------------------------

    def top(self, statement: Any) -> None:
        """The statement itself."""
        lists = self.statement(statement, None)
        for position in zip(*lists, strict=False):
            types = {type_.column_id: type_ for column in position for type_ in _stored_types(column)}
            if len(types) > 1:
                self._root = None
                self._refuse(next(iter(types.values())), _RETURNED)

    def statement(self, statement: Any, why: _Why | None, in_from: Any = None) -> list[list[Any]]:
        """Any statement; returns the columns of each of its parts.

        :param in_from: the subquery that it makes up, where it stands in a FROM.
        """
        key = (id(statement), why is None)
        known = self._seen.get(key)
        if known is None:
            root, self._root = self._root, None
            self._seen[key] = known = (statement, [])
            known[1].extend(self._statement(statement, why, in_from))
            self._root = root
        return known[1]

    def _statement(self, statement: Any, why: _Why | None, in_from: Any) -> list[list[Any]]:
        if isinstance(statement, Select):
            return [self._select(statement, why, in_from)]
        if isinstance(statement, CompoundSelect):
            return self._compound(statement, why, in_from)
        if getattr(statement, "is_dml", False):
            self._dml(statement)
        elif (text := upstream.text_of(getattr(statement, "element", statement))) is not None:
            self._texts.append(text)
        elif isinstance(statement, ColumnElement):
            self.visit(statement, why)
        elif isinstance(inner := getattr(statement, "element", None), ClauseElement):
            return self.statement(inner, why, in_from)
        elif isinstance(statement, ClauseElement):  # of a class of somebody's own
            self._within(statement, why or _COMPUTED)
        return []

    def _select(self, select: Any, why: _Why | None, in_from: Any) -> list[Any]:
        parts = upstream.parts(select, self._around, in_from)
        self._around.enter(select, parts.froms, parts.state)
        self._scopes.append(parts.named)
        for column in parts.columns:
            self._part(column, why)
        for source in parts.froms:
            self.source(source)
        for criterion in parts.criteria:
            self._part(criterion, _TRUTH)
        if parts.distinct and not parts.distinct_on:
            self._told_apart(parts.columns, _DISTINCT)
        for column in parts.distinct_on:
            self._part(column, _DISTINCT)
        self._grouped(parts.group_by, parts.columns)
        for column in parts.order_by:
            self._ordered(column, parts.columns)
        for other in parts.others:
            self._part(other, _COMPUTED)
        self._scopes.pop()
        self._around.leave()
        return parts.columns

    def _compound(self, compound: Any, why: _Why | None, in_from: Any) -> list[list[Any]]:
        self._around.enter(compound, None)
        lists = [columns for select in compound.selects for columns in self.statement(select, why, in_from)]
        for position in zip(*lists, strict=False):
            encrypted = [column for column in position if _is_encrypted(column)]
            if encrypted and (
                not _is_encrypted(position[0])
                or any(not _is_encrypted(column) and not _is_null(column) for column in position)
            ):
                self._refuse(encrypted[0].type, _MIXED)
        if compound.keyword.name != "UNION_ALL":  # EXCEPT ALL and INTERSECT ALL compare rows too
            places = [[_place(column) for column in columns] for columns in lists]
            origins = [[place and place[:2] for place in those] for those in places]
            for columns in lists:
                self._told_apart(columns, _SET, all(those == origins[0] for those in origins))
            for position in zip(*lists, strict=False):
                self._check_hashes(position)
        order_by, group_by = upstream.ordering(compound)
        self._scopes.append(lambda name: upstream.named_in_compound(lists, name))
        for column in order_by:
            self._ordered(column, lists[0] if lists else ())
        self._grouped(group_by, lists[0] if lists else ())
        self._scopes.pop()
        self._around.leave()
        return lists

    def _told_apart(self, columns: Sequence[Any], why: _Why, alike: bool = True) -> None:
        """Rows are told apart by these columns: right where those that are equal are the same row."""
        stored = [column for column in columns if _ciphertext(column) is not None]
        hashes = [column for column in columns if isinstance(getattr(column, "type", None), SearchHash)]
        if not (stored or hashes) or (alike and _are_rows(columns, stored + hashes)):
            return
        for column in stored:
            self._refuse(_ciphertext(column), why)
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
            if not isinstance(getattr(element, "type", None), _OURS) or not isinstance(element, ColumnClause):
                self._part(element, _GROUP_BY)

    def _ordered(self, element: Any, columns: Sequence[Any]) -> None:
        for meant in self._meant(element, columns):
            self._part(meant, _ORDER_BY)

    def _meant(self, element: Any, columns: Sequence[Any], shadowed: bool = False) -> list[Any]:
        """What an ORDER BY or GROUP BY means by a name, or by the positions of result columns in a text."""
        bare = element
        while isinstance(bare, UnaryExpression):
            bare = bare.element
        if isinstance(bare, ClauseList):  # of an entity
            return [meant for one in bare.clauses for meant in self._meant(one, columns)]
        if (name := upstream.named_in_order_by(bare)) is not None:
            return self._of_name(name, shadowed)
        text = bare.text if isinstance(bare, TextClause) else getattr(bare, "is_literal", False) and bare.name
        places = [int(place) - 1 for place in re.findall(r"(?:^|,)\s*(\d+)\b", text or "")]
        return [columns[place] for place in places if place < len(columns)] or [element]

    def _dml(self, dml: Any) -> None:
        table = dml.table
        self.source(table)
        self._around.enter(dml, upstream.written_froms(dml))
        if not dml.is_delete:
            if _is_light(table):
                for name in self._compiled.bind_names.values():  # of values and of rows given apart
                    self._light(table, name)
            items = [*upstream.values(dml)]
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
            for key, value in items:
                self._set(table, key, value)
        for criterion in upstream.criteria(dml):
            self._part(criterion, _TRUTH)
        for column in upstream.returning(dml):
            if isinstance(column, ColumnElement):
                self._part(column, None)
        self._around.leave()

    def _set(self, table: Any, key: Any, value: Any) -> None:
        """A value in SET or VALUES. What may be set on an encrypted column itself is the matter of ``fill``."""
        if hasattr(value, "__clause_element__"):
            value = value.__clause_element__()
        if not isinstance(key, str) and isinstance(getattr(key, "type", None), _OURS):
            return
        name = key if isinstance(key, str) else getattr(key, "key", None)
        column = table.c.get(name) if hasattr(table, "c") else None
        if isinstance(getattr(column, "type", None), _OURS):
            return
        if column is not None and isinstance(key, ColumnElement):
            self._part(key, _COMPUTED)
        # A value that is given an encrypted column's type, for bytes of one's own, is meant.
        if isinstance(value, ClauseElement) and not isinstance(value, BindParameter):
            self._part(value, _COPIED)

    # -- FROM ------------------------------------------------------------------------------------------------------

    def source(self, source: Any) -> None:
        """Anything in a FROM."""
        if isinstance(source, Table):
            self._found.add(source)
            return
        if id(source) in self._sources:
            return
        self._sources[id(source)] = source
        if _is_light(source):
            self._light_names.add(source.name)
        if isinstance(source, Join):
            self.source(source.left)
            self.source(source.right)
            self._part(source.onclause, _TRUTH)
        elif isinstance(source, Values):
            for column in source.c:
                if isinstance(column.type, _OURS):
                    self._refuse(column.type, _VALUES)
            for value in upstream.rows_of_values(source):
                if isinstance(value, ClauseElement):
                    self._part(value, _VALUES)
        elif isinstance(source, FunctionElement) or upstream.text_of(source) is not None:
            self._part(source, _COMPUTED)
        else:
            restated = upstream.restated(source)
            if restated is not None:
                self.source(restated)
            inner = getattr(source, "element", None)
            if isinstance(inner, FromClause) and not isinstance(inner, SelectBase | FunctionElement):
                self.source(inner)
            elif inner is not None:
                self.statement(inner, None, source)

    # -- expressions -----------------------------------------------------------------------------------------------

    def _part(self, element: Any, why: _Why | None) -> None:
        """A whole expression: what is sent with a refused column is looked for within it."""
        root, self._root = self._root, element
        self.visit(element, why)
        self._root = root

    def visit(self, element: Any, why: _Why | None) -> None:
        """Any expression."""
        if element is None:
            return
        if not isinstance(element, ClauseElement):  # an attribute, as mysql.match() keeps it
            element = element.__clause_element__()
        if isinstance(element, ColumnClause):
            self._column(element, why)
        elif isinstance(element, HashComparison):
            self._looked_up(element)
        elif isinstance(element, BindParameter):
            if why is not None and isinstance(element.type, _OURS):
                self._refuse(element.type, why)
        elif isinstance(element, BinaryExpression):
            self._binary(element)
        elif isinstance(element, BooleanClauseList) and element.operator is not operators.comma_op:
            for criterion in element.clauses:
                self._part(criterion, _TRUTH)
        elif isinstance(element, Label | Grouping):
            self.visit(element.element, why)
        elif (text := upstream.text_of(element)) is not None:
            self._texts.append(text)
        else:
            self._rarer(element, why)

    def _rarer(self, element: Any, why: _Why | None) -> None:
        if isinstance(element, FunctionElement):
            self._called(element, why)
        elif isinstance(element, Exists):
            self.statement(_inner(element), None)
        elif isinstance(element, ScalarSelect):
            if why is not None and isinstance(element.type, Encrypted):
                self._refuse(element.type, why)
            self.statement(_inner(element), why)
        elif isinstance(element, SelectBase):
            self.statement(element, why)
        elif isinstance(element, FromClause):
            self.source(element)
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
        elif (name := upstream.named_in_order_by(element)) is not None:
            for column in self._of_name(name, shadowed=True):
                self._part(column, why)
        elif (row := upstream.row_of(element)) is not None:
            self.source(row)
            if why is not None and (carried := _ciphertext(element)) is not None:
                self._refuse(carried, why)
        else:
            if isinstance(element, UnaryExpression) and why is None:
                why = _COUNT_DISTINCT if element.operator is operators.distinct_op else _COMPUTED
            self._within(element, why or _COMPUTED)

    def _within(self, element: Any, why: _Why) -> None:
        """The parts of an expression. Those of somebody's own may lead back to it."""
        if id(element) in self._open:
            return
        self._open.add(id(element))
        for child in upstream.children(element):
            if isinstance(child, ClauseElement) or hasattr(child, "__clause_element__"):
                self.visit(child, why)
        self._open.discard(id(element))

    def _column(self, column: Any, why: _Why | None) -> None:
        type_, table = column.type, column.table
        if table is None:
            if isinstance(type_, Encrypted) and why is not None:
                self._refuse(type_, why)
            (self._texts if column.is_literal else self._loose).append(column.name.lower())
            return
        self.source(table)
        if isinstance(type_, Encrypted):
            if why is not None:
                self._refuse(type_, why)
        elif isinstance(type_, SearchHash):
            if why in _COMPARISONS:
                self._refuse(type_, _HASH)
            elif why is not None:
                self._check_hashes([column])
                self.grouped.append(type_)
        elif not isinstance(table, Table):
            if why is not None and (carried := _ciphertext(column)) is not None:
                self._refuse(carried, why)
            for base in column.base_columns:
                if _is_light(getattr(base, "table", None)):
                    self._light(base.table, base.name)

    def _light(self, table: Any, name: str) -> None:
        known = _protected(table.name)
        if name.lower() in known:
            self._add(known[name.lower()], _LIGHT.what, _LIGHT.way, True)

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
        parts = upstream.parts(select, self._around)
        self._scopes.append(parts.named)
        for column in parts.order_by:
            self._ordered(column, parts.columns)
        self._scopes.pop()

    def _binary(self, binary: Any) -> None:
        left, right = binary.left, binary.right
        if binary.operator in (operators.is_, operators.is_not) and (_is_null(left) or _is_null(right)):
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
        arguments = list(function.clauses)
        if name == "count":
            for argument in arguments:
                self.visit(argument, None)
        elif name == "coalesce":
            self._alternatives(arguments, why)
        else:
            for argument in arguments:
                self.visit(argument, _function(name))

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
        if not self._scopes:
            return []
        meant, alike = self._scopes[-1](name)
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


def _is_light(table: Any) -> bool:
    return isinstance(table, TableClause) and not isinstance(table, Table)


def _ciphertext(element: Any) -> Any:
    """The type of the encrypted column whose ciphertext an expression gives, under whatever type; else None."""
    bare = _bare(element)
    if _is_encrypted(bare):
        return bare.type
    return next((type_ for part in _given_by(bare) if (type_ := _ciphertext(part)) is not None), None)


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
        return SearchHash, type_.slot, type_.source.search_key, type_.source.type_._static_cache_key
    return (Encrypted, type_.column_id) if isinstance(type_, Encrypted) else None
