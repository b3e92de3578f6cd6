"""Further search indexes of encrypted columns: :class:`hash_index`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Column, Table, event, inspect
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.hybrid import Comparator, hybrid_property
from sqlalchemy.orm import ColumnProperty, Mapped, MappedColumn, Mapper
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    ClauseElement,
    ClauseList,
    ColumnElement,
    Null,
)
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator

from sqla_byok.errors import ConfigurationError, DeclarationError, UnsupportedQueryError
from sqla_byok.normalize import identity
from sqla_byok.orm import upstream
from sqla_byok.orm.comparator import (
    LOOK_UPS,
    NULL_TESTS,
    HashComparison,
    hash_column_of,
    spelled,
)
from sqla_byok.orm.schema import IndexOf, add_index, hash_key
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.types import Encrypted, IndexHash, SearchHash

__all__ = ["IndexComparator", "hash_index", "searched_id"]

_T = TypeVar("_T")

_INSTEAD = "only ==, !=, in_(), not_in(), is_(None) and is_not(None) work on a hash_index, with values"


class hash_index(hybrid_property[_T | None]):  # noqa: N801 - used like hybrid_property
    """A further index of an encrypted column: what to find its rows by, besides the whole value.

    ::

        class Patient(Base):
            ...
            phone: Mapped[str] = mapped_column(Encrypted(String(40)))
            phone_last4 = hash_index("phone", transform=last(4))
            surname: Mapped[str] = mapped_column(Encrypted(String(80)))
            born: Mapped[date] = mapped_column(Encrypted(Date))
            surname_and_year = hash_index("surname", "born", transform=surname_and_year)

        patient.phone_last4                                       # "1234", computed from the decrypted value
        select(Patient).where(Patient.phone_last4 == "1234")      # a look-up on the column phone_last4_hash

    A hybrid attribute, with a hash column of its own (32 bytes, indexed) that is kept in step with its sources by every
    INSERT and UPDATE. ``==``, ``!=``, ``in_``, ``not_in`` and NULL tests work, with the transform's result on the other
    side: the transform is not applied to what is searched. Hashes of different indexes cannot be compared, since each
    has a salt of its own. A value that is None, or a transform that returns None, gives no hash; of several sources
    each has to have a value.

    The hash column is added to the table when the class is mapped. In imperative mapping call ``map_imperatively()``
    before ``create_all()``.

    :param sources: the encrypted attributes of the same class and table, by name or as they were declared. They need
        not be searchable. With several, a flush that changes one brings the others along (loading those that are
        not there); a bulk UPDATE has to set all of them.
    :param transform: takes the values of the sources as they are read, and returns what to search by: str unless
        :func:`~sqla_byok.normalize.named` says otherwise. One of :mod:`sqla_byok.normalize`, or your own under a
        name that lasts.
    :param name: the name of the index in the database, by which its salt is derived; the attribute's name unless given.
        Keep the old one when you rename the attribute.
    :param unique: no two rows may have the same result.
    :raises DeclarationError: on declaring or mapping: a transform without a name, a source that is not there, not
        encrypted or of another table, a name that is taken.
    """

    def __init__(
        self,
        *sources: str | Mapped[Any] | Column[Any],
        transform: Callable[..., _T | None],
        name: str | None = None,
        unique: bool = False,
    ) -> None:
        if not sources:
            raise DeclarationError("hash_index takes the encrypted attributes that it indexes")
        if name is not None and not name.isidentifier():
            raise DeclarationError("hash_index takes a name like an attribute's")
        identity(transform)
        super().__init__(self._result_of, custom_comparator=lambda cls: IndexComparator(cls, self))  # type: ignore[arg-type] # a function of the class
        self._given = sources
        self._name = name
        self.transform = transform
        self.unique = unique
        self.sources: tuple[str, ...] = ()

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.__name__ = name
        self._name = self._name or name
        names = {id(value): attribute for attribute, value in vars(owner).items()}
        # Refused in add_to(): before Python 3.12 what is raised here comes out as a RuntimeError.
        self.sources = tuple(
            source if isinstance(source, str) else names.get(id(source), "") for source in self._given
        )

    def _result_of(self, instance: Any) -> _T | None:
        if not self.sources:
            _ = self.key  # says what is wrong
        values = [getattr(instance, source) for source in self.sources]
        for value in values:
            if value is None or type(value) is Sealed:
                return value  # type: ignore[return-value] # of a sealed value nobody knows the result
        return self.transform(*values)

    @property
    def key(self) -> str:
        """The key of the hash column.

        :raises DeclarationError: it was not declared in the body of a class.
        """
        if not self.sources or self._name is None:
            raise DeclarationError("a hash_index is declared in the body of its class")
        return hash_key(self._name)

    def add_to(self, mapper: Mapper[Any]) -> None:
        """Give the table of a class that is being mapped the hash column.

        :raises DeclarationError: the table has not all of its sources, or the hash column's name is taken.
        """
        table, key = mapper.local_table, self.key
        named = f"{mapper.class_.__name__}.{self.__name__}"
        if "" in self.sources or len(set(self.sources)) < len(self.sources):
            raise DeclarationError(
                f"{named}: it takes attributes of the class in which it stands, each once; give the name of one that "
                "stands elsewhere as a string"
            )
        if not isinstance(table, Table) and isinstance(getattr(table.c.get(key), "type", None), IndexHash):
            return  # AbstractConcreteBase maps a union of tables that have it already
        columns = [_column(mapper, source) for source in self.sources]
        missing = [source for source, found in zip(self.sources, columns, strict=True) if found is None]
        if missing or not isinstance(table, Table):
            names = ", ".join(missing or self.sources)
            raise DeclarationError(
                f"{named}: there is no column {names!r} in the table of this class; a hash_index is declared on the "
                "class whose table has the columns"
            )
        index = IndexOf(key[: -len(hash_key(""))], tuple(column.key for column in columns), self.transform)
        add_index(table, index, self.unique)
        if len(columns) > 1:
            _bring_along(mapper, columns)


def _bring_along(mapper: Mapper[Any], sources: list[Any]) -> None:
    """Have a flush that changes one source set the others too. Where it becomes None there is no hash anyway."""

    def before_update(mapper: Mapper[Any], connection: Any, instance: Any) -> None:
        known = upstream.properties_of(mapper)
        if any(source not in known for source in sources):
            return  # a class in the same table that has not all of them
        state, names = inspect(instance), [known[source].key for source in sources]
        attributes = state.attrs
        changed = [name for name in names if attributes[name].history.has_changes()]
        if changed and all(attributes[name].loaded_value is not None for name in changed):
            deferred = [name for name in names if name in state.unloaded - state.expired_attributes]
            if deferred:  # of some an access would raise: raiseload=True
                state.session.refresh(instance, deferred)
            for name in names:
                if name not in changed:
                    getattr(instance, name)
                    flag_modified(instance, name)

    def listen(mapper: Mapper[Any], *_: Any) -> None:
        event.listen(mapper, "before_update", before_update, propagate=True)

    # Objects of all classes in the table: of parents and siblings too.
    while mapper.inherits is not None and mapper.inherits.local_table is mapper.local_table:
        mapper = mapper.inherits
    if mapper.configured:
        listen(mapper)
    else:  # behind the application's own listeners, which may change a source
        event.listen(mapper, "mapper_configured", listen)


@event.listens_for(Mapper, "instrument_class", insert=True)
def _add_indexes(mapper: Mapper[Any], cls: type[Any]) -> None:
    """Before the hash columns of the table are left out of the mapping: see schema.py."""
    inherited = () if mapper.inherits is None or mapper.concrete else tuple(_declared(mapper.inherits.class_))
    for index in _declared(cls):
        if not any(index is other for other in inherited):
            index.add_to(mapper)


def _declared(cls: type[Any]) -> Iterator[hash_index[Any]]:
    seen: set[str] = set()
    for each in cls.__mro__:
        for name, value in vars(each).items():
            if isinstance(value, hash_index) and name not in seen:
                yield value
        seen.update(vars(each))


def _column(mapper: Mapper[Any], attribute: str) -> Any:
    """The column of the class's own table that an attribute stands for; None where there is none."""
    given: Any = upstream.given_property(mapper, attribute)
    if isinstance(given, MappedColumn):
        given = given.column
    elif isinstance(given, ColumnProperty):
        given = given.columns[0]
    if given is None:
        given = mapper.local_table.c.get(attribute.removeprefix(mapper.column_prefix or ""))
    return (
        given if isinstance(given, Column) and getattr(given, "table", None) is mapper.local_table else None
    )


class IndexComparator(Comparator[Any]):
    """What ``Patient.phone_last4`` is in a query."""

    def __init__(self, cls: Any, index: hash_index[Any]) -> None:
        super().__init__(None)  # type: ignore[arg-type] # made only when asked for
        self._cls, self._index = cls, index

    @property
    def hash_type(self) -> SearchHash:
        """The type of the hash column."""
        found: Any = self.hash_column()
        type_: SearchHash = found.type
        return type_

    def hash_column(self) -> ColumnElement[Any]:
        """The hash column in the FROM of the sources.

        :raises UnsupportedQueryError: it has none there.
        """
        source = self._operand()
        found = self._hash_column(source)
        if found is None:
            self._refuse("its FROM has not its hash column")
        return upstream.of_entity(found, source)

    def __clause_element__(self) -> NoReturn:
        self._refuse(
            f"it is computed in Python, so the database cannot select, order or group by it; {_INSTEAD}"
        )

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        operand: Any = other[0] if other else None
        is_null = operand is None or isinstance(operand, Null)
        if op not in LOOK_UPS and not (op in NULL_TESTS and is_null):
            self._refuse(f"{spelled(op)} means nothing on a search hash; {_INSTEAD}")
        if op in NULL_TESTS and is_null:
            op, operand = NULL_TESTS[op], None
        source, comparison = self._operand(), None
        with suppress(ArgumentError):  # its text shows the value
            comparison = TypeDecorator.Comparator.operate(source.comparator, op, operand, **kwargs)
        if not isinstance(comparison, BinaryExpression):
            self._refuse(f"{spelled(op)} takes values")
        return _over_index(comparison, self._index.key)

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> NoReturn:
        self._refuse(f"{spelled(op)} means nothing on a search hash; {_INSTEAD}")

    def _operand(self) -> Any:
        """The first source, in whose FROM the hash column is looked for when the comparison is compiled."""
        _ = self._index.key
        return getattr(self._cls, self._index.sources[0]).__clause_element__()

    def _hash_column(self, source: Any) -> Any:
        return hash_column_of(source, lambda column: _beside(column, self._index.key))

    def _refuse(self, reason: str) -> NoReturn:
        found = self._hash_column(self._operand())
        name = self._index.__name__ if found is None else found.type.source.column_id
        raise UnsupportedQueryError(f"{name}: {reason}", column=name)


def searched_id(attribute: Any) -> str:
    """The column id by which a searchable attribute, column or :class:`hash_index` is known; an id is given back.

    :raises ConfigurationError: it is not declared searchable.
    """
    if isinstance(attribute, str):
        return attribute
    comparator = getattr(attribute, "comparator", None)
    if isinstance(comparator, IndexComparator):
        type_: Any = comparator.hash_type.source
    else:
        type_ = getattr(attribute, "type", None)
        type_ = type_.source if isinstance(type_, SearchHash) else type_
    if not isinstance(type_, Encrypted) or not type_.searchable or type_.column_id is None:
        raise ConfigurationError(f"{attribute}: it is not declared searchable")
    return type_.column_id


@upstream.traverse_too("index")
class IndexComparison(HashComparison):
    """``source (==, !=, IN, NOT IN, IS) value``, rendered over the hash column of an index of the source.

    :ivar index: the key of the hash column.
    """

    inherit_cache = True
    index: str

    @property
    def compares_values(self) -> bool:
        """False: it compares a source with a result."""
        return False

    def _found(self) -> Any:
        return hash_column_of(self.left, lambda column: _beside(column, self.index))

    def get_children(self, **kwargs: Any) -> Iterator[ClauseElement]:
        yield from BinaryExpression.get_children(self, **kwargs)
        found = self._found()
        if found is not None:
            yield found

    def _negate(self) -> ColumnElement[Any]:
        return _over_index(BinaryExpression._negate(self), self.index)  # type: ignore[no-untyped-call]

    def rendered(self, live: int) -> ColumnElement[Any]:
        found = self._found()
        if found is None:
            source = next(self.encrypted(), None)
            where = getattr(getattr(source, "table", None), "description", None) or "its FROM"
            raise UnsupportedQueryError(
                f"{self.index.removesuffix('_hash')}: {where} has no column {self.index} for each of its rows; "
                "select search_hash() of it there too, and instead of subqueryload() use selectinload()",
                column=self.index.removesuffix("_hash"),
            )
        right = self._compared(self.right, found)
        if live == 1 or self.operator in (operators.is_, operators.is_not):
            return self._over(found, right, self.operator)
        return self._fanned_out(found, right, live)

    def _compared(self, operand: Any, found: Any) -> Any:
        """What stands for an operand: values are hashed by the index's salt; nothing else can be compared."""
        bare = getattr(operand, "element", operand)
        if isinstance(bare, BindParameter):
            return upstream.bound_as(bare, found.type.source.hash_type)
        if isinstance(bare, ClauseList):
            values = upstream.with_clauses(bare, [self._compared(value, found) for value in bare.clauses])
            return values.self_group(against=self.operator)
        if isinstance(bare, Null):
            return bare
        raise UnsupportedQueryError(
            f"{found.type.source.column_id}: a hash_index is compared with values only, not with a SQL expression",
            column=found.type.source.column_id,
        )


def _beside(column: Any, key: str) -> Any:
    """The hash column of an index beside a column of a table; None where the table has it not."""
    table = getattr(column, "table", None)
    found = table.c.get(key) if isinstance(table, Table) else None
    return found if found is not None and isinstance(found.type, IndexHash) else None


def _over_index(comparison: Any, index: str) -> IndexComparison:
    comparison.__class__ = IndexComparison
    comparison.index = index
    taken: IndexComparison = comparison
    return taken
