"""How equality on an encrypted column becomes a look-up on its hash column.

``Patient.mrn == "A-1"`` keeps the encrypted column as its operand, so that the ORM can adapt, alias, bind and
evaluate it like any other comparison. Only when the statement is compiled does :class:`HashComparison` look for the
hash column, in whatever FROM the operand stands by then. Looking it up when ``==`` is written gave wrong rows with
``Query.union_all().filter()``, concrete inheritance and relationships on encrypted columns.

What can be told from a Python value or an operator alone is refused when it is written; what depends on the other
operand is refused when it is compiled, since SQLAlchemy itself compares columns with ``==`` to find them in lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn

from sqlalchemy import CompoundSelect, Select, Table, and_, or_
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    Cast,
    ClauseElement,
    ClauseList,
    CollectionAggregate,
    ColumnElement,
    False_,
    Grouping,
    Label,
    Null,
    True_,
    TypeCoerce,
)
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.sql.selectable import ScalarSelect, SelectStatementGrouping
from sqlalchemy.types import TypeDecorator

from sqla_byok.errors import UnsupportedQueryError
from sqla_byok.orm import kept, upstream
from sqla_byok.orm.schema import hash_key
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = [
    "LOOK_UPS",
    "NULL_TESTS",
    "EncryptedComparator",
    "HashComparator",
    "HashComparison",
    "hash_column_of",
    "search_keys",
    "spelled",
    "way",
]

LOOK_UPS = {operators.eq, operators.ne, operators.in_op, operators.not_in_op}
NULL_TESTS = {
    operators.eq: operators.is_,
    operators.ne: operators.is_not,
    operators.is_: operators.is_,
    operators.is_not: operators.is_not,
}
_OF_HASHES = {
    *LOOK_UPS,
    *NULL_TESTS,
    operators.asc_op,
    operators.desc_op,
    operators.nulls_first_op,
    operators.nulls_last_op,
    operators.distinct_op,
}
_WRAPPERS = (Label, Grouping)
_OURS = (Encrypted, SearchHash)
_INSTEAD = "only ==, !=, in_(), not_in(), is_(None) and is_not(None) work on a searchable encrypted column"
_CASEFOLD = "to ignore case, declare it with normalize=casefold of sqla_byok.normalize and compare it with =="
_IGNORING_CASE = {
    operators.ilike_op,
    operators.not_ilike_op,
    operators.icontains_op,
    operators.not_icontains_op,
    operators.istartswith_op,
    operators.not_istartswith_op,
    operators.iendswith_op,
    operators.not_iendswith_op,
}
_ROTATING = (
    "it cannot be compared with another column or a subquery while its salts are being rotated, nor across several "
    "tenants, since equal values may have unequal hashes; compare it with values"
)
_OTHER_KEY = (
    "{} hashes with another salt or in another way; give both columns one salt_scope, hash and normalize"
)
_OTHER_KEYS = (
    "it is compared with hashes of several columns that are made with several salts or in several ways; give all of "
    "the columns one salt_scope, hash and normalize"
)
_NO_HASH = (
    "cannot be compared with a SQL expression that has no search hash; compare it with values, or with a searchable "
    "column of its salt_scope"
)
# By how many search salts, of several tenants or of one that rotates them, a statement looks a value up.
_SALTS_AT_MOST = 20
_NOT_SEARCHABLE = "it is not searchable; declare it with Encrypted(…, searchable=True) and fill its hashes"


class EncryptedComparator(TypeDecorator.Comparator[Any]):
    """The operators of an encrypted column."""

    __slots__ = ()

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        operand: Any = other[0] if other else None
        if hasattr(operand, "__clause_element__"):
            operand = operand.__clause_element__()
        if isinstance(operand, True_ | False_):
            operand = isinstance(operand, True_)
        if op in NULL_TESTS and (operand is None or isinstance(operand, Null)):
            return super().operate(NULL_TESTS[op], None)
        if op not in LOOK_UPS:
            instead = f"{_INSTEAD}; {_CASEFOLD}" if op in _IGNORING_CASE else _INSTEAD
            _refuse(self.expr, f"{spelled(op)} would run on ciphertext; {instead}")
        type_: Encrypted[Any] = self.expr.type  # type: ignore[assignment]
        if not type_.searchable and not isinstance(operand, ClauseElement):
            _refuse(self.expr, _NOT_SEARCHABLE)
        comparison: Any = None
        try:  # noqa: SIM105 - suppress() costs as much again as the comparison
            comparison = super().operate(op, operand, **kwargs)
        except ArgumentError:  # its text shows the value, so it must not travel on, chained neither
            pass
        if comparison is None:
            _refuse(self.expr, f"{spelled(op)} takes {'a value' if op in NULL_TESTS else 'a list of values'}")
        comparison.__class__ = HashComparison  # in place: see _over_hashes()
        taken: HashComparison = comparison
        return taken

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> NoReturn:
        _refuse(self.expr, f"{spelled(op)} would run on ciphertext; {_INSTEAD}")


class HashComparator(TypeDecorator.Comparator[Any]):
    """The operators of a hash column, and of a value that stands on the left of an encrypted one.

    SQLAlchemy turns ``"x" + Patient.mrn`` into an operation of the bound value, so the column's own comparator never
    hears of it.
    """

    __slots__ = ()

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        if op not in _OF_HASHES:
            _refuse(self.expr, f"{spelled(op)} means nothing on a search hash; {_INSTEAD}")
        plain: Any = None
        with suppress(ArgumentError):  # its text shows the value
            plain = super().operate(op, *other, **kwargs)
        if plain is None:
            _refuse(self.expr, f"{spelled(op)} takes {'a value' if op in NULL_TESTS else 'a list of values'}")
        if op in LOOK_UPS and isinstance(plain, BinaryExpression) and plain.operator in LOOK_UPS:
            plain = _over_hashes(plain)
        result: ColumnElement[Any] = plain
        return result


# types.py cannot import this module, since this one needs its classes.
Encrypted.comparator_factory = EncryptedComparator  # type: ignore[assignment,method-assign]
SearchHash.comparator_factory = HashComparator  # type: ignore[assignment,method-assign]


class HashComparison(BinaryExpression[Any]):
    """``encrypted column (==, !=, IN, NOT IN) value or encrypted column``, rendered over the hash columns."""

    inherit_cache = True

    @property
    def compares_values(self) -> bool:
        """Whether values and their hashes are equal alike, so that the ORM may compare the values in Python.

        Not so of normalized values, nor of a value and a hash: the session would be left stale.
        """
        types = [getattr(_bare(side), "type", None) for side in (self.left, self.right)]
        if any(isinstance(type_, Encrypted) and type_.normalize is not None for type_ in types):
            return False
        return not (_is_hash_column(self.left) or _is_hash_column(self.right))

    def encrypted(self) -> Iterator[Any]:
        """The operands that are encrypted columns."""
        for side in (self.left, self.right):
            bare = _bare(side)
            for operand in bare.clauses if isinstance(bare, ClauseList) else (bare,):
                if _is_encrypted_column(operand):
                    yield _bare(operand)

    def get_children(self, **kwargs: Any) -> Iterator[ClauseElement]:
        """Show the hash columns too, so that a wrapping subquery carries them along."""
        yield from super().get_children(**kwargs)
        for column in self.encrypted():
            found = hash_column_of(column)
            if found is not None:
                yield found

    def hashes(self) -> Iterator[Any]:
        """The hash columns that are compared, outside of subqueries."""
        shown = self.rendered(1)
        for side in (_bare(getattr(shown, "left", None)), _bare(getattr(shown, "right", None))):
            for operand in side.clauses if isinstance(side, ClauseList) else (side,):
                if _is_hash_column(operand):
                    yield _bare(operand)

    def _negate(self) -> ColumnElement[Any]:
        return _over_hashes(super()._negate())  # type: ignore[no-untyped-call]

    def rendered(self, live: int) -> ColumnElement[Any]:
        """The comparison of hashes that the database sees.

        :param live: how many search salts the tenant has: one, but for the time in which they are rotated.
        :raises UnsupportedQueryError: if an operand has no hash that could be compared with the others'.
        """
        column, left, right = next(self.encrypted(), None), self.left, self.right
        if column is None and _is_value_of_column(left) and not _is_hash_column(right):
            # A lazy load has put the parent's value in the column's place. One salt tells what is equal.
            column, live = left, 1
        if column is not None:
            _check_searchable(column)
            left, right = _hashed(left, column), _hashed(right, column)
        else:
            column = next((side for side in (left, right) if _is_hash_column(side)), None)
            if column is None:
                _refuse(left, "only an encrypted column itself can be looked up, not an expression over it")
            left, right = _beside_hash(left, column), _beside_hash(right, column)
        return self._over(left, right, self.operator) if live == 1 else self._fanned_out(left, right, live)

    def _fanned_out(self, left: Any, right: Any, live: int) -> ColumnElement[Any]:
        """The comparison with what a value may be hashed to by each of several search salts.

        NULL as the value finds nothing, and a NULL in the column is not found, as in a comparison with one hash.
        """
        if isinstance(_bare(left), BindParameter) and self.operator in NULL_TESTS:
            left, right = right, left
        if not _is_hash_column(left):
            _refuse(left, _ROTATING)
        equal, bare = self.operator in (operators.eq, operators.in_op), _bare(right)
        op = operators.in_op if equal else operators.not_in_op
        if isinstance(bare, BindParameter) and bare.expanding:
            parts = [self._over(left, _by_salt(bare, nth), op) for nth in range(live)]
            return (or_ if equal else and_)(*parts).self_group()
        hashes: list[Any] = []
        for value in bare.clauses if isinstance(bare, ClauseList) else (bare,):
            if isinstance(_bare(value), BindParameter):
                hashes += [_by_salt(_bare(value), nth) for nth in range(live)]
            elif isinstance(_bare(value), Null):
                hashes.append(value)
            else:
                _refuse(left, _ROTATING)
        return self._over(left, ClauseList(*hashes).self_group(against=op), op)

    def _over(self, left: Any, right: Any, op: OperatorType) -> BinaryExpression[Any]:
        return BinaryExpression(
            left, right, op, type_=self.type, negate=self.negate, modifiers=self.modifiers
        )


upstream.evaluate_only(lambda binary: not isinstance(binary, HashComparison) or binary.compares_values)


@compiles(HashComparison)
def _compile_comparison(element: HashComparison, compiler: Any, **kwargs: Any) -> Any:
    # The steps of a statement see to it that it is compiled anew where the number is another.
    column = next(element.encrypted(), element.left)
    type_ = getattr(column, "type", None)
    owner = (
        (type_.source if isinstance(type_, SearchHash) else type_).owner if isinstance(type_, _OURS) else None
    )
    live = upstream.fanned_out(compiler).get(owner, 1)
    if live > _SALTS_AT_MOST:
        _refuse(
            column,
            f"a search takes at most {_SALTS_AT_MOST} search salts, not {live}; name fewer tenants at once",
        )
    rendered = element.rendered(live)
    kept.note_compared(compiler, live, owner, {type_.spec for type_ in _searched(rendered)})
    return compiler.process(rendered, **kwargs)


def _searched(rendered: Any) -> Iterator[SearchHash]:
    """The types of the hash columns that a rendered comparison compares."""
    bare = _bare(rendered)
    if isinstance(bare, BinaryExpression):
        operands: Any = (bare.left, bare.right)
    else:
        operands = getattr(bare, "clauses", ())
    for operand in operands:
        one = _bare(operand)
        one = _selected(one) if isinstance(one, ScalarSelect) else one
        if one is not None and _is_hash_column(one):
            yield one.type
        elif isinstance(one, BinaryExpression | ClauseList):
            yield from _searched(one)


def _over_hashes(comparison: Any) -> HashComparison:
    """Make a comparison that SQLAlchemy has just built one over the hashes.

    In place: to build it a second time would nearly double what each ``==`` in a program costs.
    """
    comparison.__class__ = HashComparison
    taken: HashComparison = comparison
    return taken


def _hashed(operand: Any, column: Any) -> Any:
    """What stands for an operand in a comparison with the column's hashes."""
    bare = _bare(operand)
    if isinstance(bare, BindParameter):
        return _retyped(bare, column.type.hash_type)
    if isinstance(bare, Null):
        return bare
    if isinstance(bare, ClauseList):
        return upstream.with_clauses(bare, [_hashed(value, column) for value in bare.clauses])
    source = _selected(bare) if isinstance(bare, ScalarSelect) else bare
    if not _is_encrypted_column(source):
        _refuse(column, f"it {_NO_HASH}")
    _check_searchable(source)
    if source.type.search_key != column.type.search_key:
        _refuse(
            column,
            _OTHER_KEY.format(_named(source)),
        )
    found = hash_column_of(source)
    if found is None:
        _refuse(
            source,
            f"{getattr(source.table, 'description', None) or 'its FROM'} has no hash column for each of its rows; "
            f"select {_hash_named(source)} there too, and instead of subqueryload() use selectinload()",
        )
    return _select_of_hash(bare, source, found) if isinstance(bare, ScalarSelect) else found


class _BySalt(ColumnElement[Any]):
    """A bound value once more, hashed by another of the live search salts. It takes the value of the first."""

    inherit_cache = False  # there only while a statement is compiled

    def __init__(self, bind: Any, nth: int) -> None:
        self.type = bind.type.at(nth)
        self.bind, self.nth = upstream.bound_as(bind, self.type), nth


@compiles(_BySalt)
def _compile_by_salt(element: _BySalt, compiler: Any, **kwargs: Any) -> Any:
    return upstream.render_again(element.bind, compiler, f"__byok_salt{element.nth}", **kwargs)


def _by_salt(bind: Any, nth: int) -> Any:
    if not isinstance(bind.type, SearchHash):
        _refuse(bind, "a search hash is compared with a value of another type; give the value without a type")
    return _BySalt(bind, nth) if nth else bind


def _retyped(bind: Any, hash_type: SearchHash) -> Any:
    """Bind values through the hash type, whatever type they were given; keep their names."""
    return bind if bind.type is hash_type else upstream.bound_as(bind, hash_type)


def hash_column_of(
    element: ClauseElement, sibling: Callable[[Any], ColumnElement[Any] | None] | None = None
) -> ColumnElement[Any] | None:
    """The hash column that belongs to an encrypted column, in the same FROM; None where that FROM has it not.

    In a subquery or CTE it is the hash column that comes from the same table columns through the same tables: two
    aliases of one table, or a label that borrows another column's name, are told apart. In a UNION each part has to
    have it, with hashes that can be compared.

    :param sibling: finds the hash column beside a table's column, where it is not the column's own.
    """
    sibling, column = sibling or _sibling, _bare(element)
    table = getattr(column, "table", None)
    if table is None:
        return None
    if isinstance(table, Table):
        return sibling(column)
    siblings = {sibling(base) for base in column.base_columns}
    if None in siblings or len({found.type.source.search_key for found in siblings}) > 1:  # type: ignore[union-attr]
        return None
    through = way(column)
    candidates = (candidate for candidate in table.c if isinstance(candidate.type, SearchHash))
    return next((one for one in candidates if one.base_columns == siblings and way(one) == through), None)


def _sibling(column: Any) -> ColumnElement[Any] | None:
    table = getattr(column, "table", None)
    found = table.c.get(hash_key(column.key)) if isinstance(table, Table) else None
    return found if found is not None and isinstance(found.type, SearchHash) else None


def _hash_named(column: Any) -> str:
    """How the hash column of a column is asked for; where its name cannot be told, what it is."""
    base = next(iter(column.base_columns))
    return (
        f"search_hash({base.key})" if isinstance(getattr(base, "table", None), Table) else "its hash column"
    )


def way(column: Any) -> Any:
    """The aliases and subqueries through which a column comes, down to its table.

    Of a UNION the ways through each of its parts, in order: the same aliases in another order are other rows.
    """
    bare = _bare(column)
    while isinstance(bare, TypeCoerce):
        bare = _bare(bare.clause)
    table = getattr(bare, "table", None)
    if table is None or isinstance(table, Table):
        return table
    return (table, *(way(one) for one in upstream.proxied(bare)))


def _bare(element: Any) -> Any:
    while isinstance(element, _WRAPPERS):
        element = element.element
    return element


def _is_encrypted_column(element: Any) -> bool:
    bare = _bare(element)
    return isinstance(getattr(bare, "type", None), Encrypted) and getattr(bare, "table", None) is not None


def _is_value_of_column(element: Any) -> bool:
    return isinstance(element, BindParameter) and isinstance(element.type, Encrypted)


def _is_hash_column(element: Any) -> bool:
    return isinstance(getattr(_bare(element), "type", None), SearchHash) and not isinstance(
        _bare(element), BindParameter
    )


def _selected(select: Any) -> Any:
    """The one column of a scalar subquery, without labels; None where it is not that simple."""
    inner = _bare(select.element)
    if not isinstance(inner, Select) or upstream.tells_rows_apart(inner):  # they may name the ciphertext
        return None
    columns = list(inner.selected_columns)
    return _bare(columns[0]) if len(columns) == 1 else None


def _select_of_hash(select: Any, source: Any, found: Any) -> Any:
    """The same scalar subquery of the hash column."""
    return _bare(select.element).with_only_columns(upstream.of_entity(found, source)).scalar_subquery()


def _beside_hash(operand: Any, column: Any) -> Any:
    """What stands for an operand in a comparison with a hash column: values are hashed, hashes have to be like it."""
    bare, type_ = _bare(operand), _bare(column).type
    if isinstance(bare, BindParameter):
        return _retyped(bare, type_.source.hash_type)
    if isinstance(bare, ClauseList):
        return upstream.with_clauses(bare, [_beside_hash(value, column) for value in bare.clauses])
    keys = search_keys(bare)
    if None in keys:
        _refuse(column, f"its search hash {_NO_HASH}")
    if len(keys) > 1:
        _refuse(column, _OTHER_KEYS)
    if keys - {type_.source.search_key}:
        _refuse(column, _OTHER_KEY.format(_named(operand)))
    return operand


def search_keys(element: Any) -> set[Any]:
    """How the hashes are made that an expression gives; None is among them where it gives something else too."""
    bare = _bare(element)
    if isinstance(bare, ScalarSelect | CompoundSelect):
        parts = bare.selects if isinstance(bare, CompoundSelect) else [_bare(bare.element)]
        return {key for part in parts for key in search_keys(part)}
    if isinstance(bare, Select):
        return {key for column in bare.selected_columns for key in search_keys(column)}
    if isinstance(bare, CollectionAggregate | SelectStatementGrouping):  # any_(), and parentheses
        return search_keys(bare.element)
    if isinstance(bare, Cast | TypeCoerce) and isinstance(_bare(bare.clause), Null):
        return set()
    stored = [column for column in getattr(bare, "base_columns", ()) if column is not bare]
    if stored:
        return {key for column in stored for key in search_keys(column)}
    if isinstance(bare, Null):
        return set()
    type_ = getattr(bare, "type", None)
    return {type_.source.search_key if isinstance(type_, SearchHash) else None}


def _check_searchable(element: Any) -> None:
    if not _bare(element).type.searchable:
        _refuse(element, _NOT_SEARCHABLE)


def _refuse(element: Any, reason: str) -> NoReturn:
    raise UnsupportedQueryError(f"{_named(element)}: {reason}", column=_column_id(element))


def _column_id(element: Any) -> str | None:
    type_ = getattr(_bare(element), "type", None)
    return type_.source.column_id if isinstance(type_, SearchHash) else getattr(type_, "column_id", None)


def _named(element: Any) -> str:
    """The column's id where it has one; never a value."""
    return str(_column_id(element) or getattr(_bare(element), "key", None) or "the expression")


_SIGNS = {
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "add": "+", "sub": "-", "mul": "*",
    "truediv": "/", "floordiv": "//", "mod": "%", "neg": "-", "inv": "~", "and_": "&", "or_": "|", "getitem": "[]",
    "in_op": "in_()", "any_op": "any_()", "all_op": "all_()", "custom_op": "op()",
}  # fmt: skip


def spelled(op: OperatorType) -> str:
    """The operator as it is written: its sign, or the method's name."""
    name = op.__name__
    return _SIGNS.get(name, f"{name.removesuffix('_op')}()")
