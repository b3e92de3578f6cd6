"""From a SQLAlchemy type to bytes: which types can be wrapped, and how their values become bytes and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Dialect, LargeBinary
from sqlalchemy.sql import sqltypes
from sqlalchemy.sql.cache_key import NO_CACHE
from sqlalchemy.sql.elements import Null
from sqlalchemy.types import TypeDecorator, TypeEngine

from sqla_byok.crypto import codecs
from sqla_byok.crypto.codecs import Codec
from sqla_byok.errors import DeclarationError, DecryptError, EncodeError
from sqla_byok.orm import upstream
from sqla_byok.orm.rings import SEALED
from sqla_byok.orm.sealed import Sealed

__all__ = [
    "Ours",
    "Process",
    "cache_key_of",
    "chain",
    "checked",
    "codec_of",
    "comparing_otherwise",
    "decorators",
    "driver_binary",
    "driver_bytes",
    "is_plain_decorator",
    "layers",
    "none_when_sealed",
    "plain_steps",
    "undecorated",
]

Process = Callable[[Any], Any]

# Drivers that take and give bytes as they are. LargeBinary would wrap each value in the driver's Binary(): with
# psycopg that alone made an insert of five columns 1.4 times as long.
_PLAIN_BYTES = frozenset(
    ["pysqlite", "aiosqlite", "psycopg", "psycopg_async", "asyncpg", "pymysql", "aiomysql", "asyncmy"]
)


class Ours:
    """What the types of this package derive from: none of them is a plain type inside another."""


def undecorated(type_: TypeEngine[Any], dialect: Dialect | None = None) -> TypeEngine[Any]:
    """The type inside all TypeDecorators and variants; for a dialect, the one that they choose for it."""
    type_ = _variant(type_, dialect)
    while is_plain_decorator(type_):
        _refuse_expressions(type_)
        type_ = _variant(_inside(type_, dialect), dialect)
    return type_


def _variant(type_: TypeEngine[Any], dialect: Dialect | None) -> TypeEngine[Any]:
    return type_ if dialect is None else upstream.variants(type_).get(dialect.name, type_)


def _refuse_unfit(type_: Any) -> None:
    """Refuse a type whose values are more than what its codec makes of them."""
    if isinstance(type_, Ours):
        raise DeclarationError("Encrypted cannot wrap Encrypted: what is inside it has to be a plain type")
    _refuse_expressions(type_)
    if _processes(type_):
        raise DeclarationError(
            f"Encrypted cannot wrap {type(type_).__name__}: it converts values by processors of its own, which would "
            "be passed over; make it a TypeDecorator with process_bind_param() and process_result_value()"
        )


def _refuse_expressions(type_: Any) -> None:
    """Refuse a type that has the database make something of its values, which would be of ciphertext."""
    for method in ("bind_expression", "column_expression"):
        known = (None, getattr(TypeEngine, method), getattr(TypeDecorator, method))
        if getattr(type(type_), method, None) not in known:
            raise DeclarationError(
                f"Encrypted cannot wrap {type(type_).__name__}: its {method}() would run on ciphertext; convert values "
                "in Python, in the process_bind_param() and process_result_value() of a TypeDecorator"
            )


# Compared byte by byte, as hashes are.
_EXACT = re.compile(r"(c|posix|ucs_basic|binary|c\.utf-?8|pg_c_utf8|.*_bin)\Z", re.IGNORECASE)
_EQUALITY = ("operate", "__eq__", "__ne__", "in_", "not_in", "is_distinct_from")


def comparing_otherwise(type_: TypeEngine[Any]) -> str | None:
    """The rule of a type by which unequal values are equal, in the database or by its own comparator; else None."""
    for each in (type_, *upstream.variants(type_).values()):
        collation = getattr(each, "collation", None)
        if isinstance(collation, str) and not _EXACT.match(collation):
            return f"its collation {collation!r}"
        if "citext" in f"{type(each).__name__} {getattr(each, '__visit_name__', '')}".lower():
            return "its rule that ignores case"
        comparator = getattr(each, "comparator_factory", None)
        own = (
            cls for cls in getattr(comparator, "__mro__", ()) if not cls.__module__.startswith("sqlalchemy.")
        )
        if any(name in vars(cls) for cls in own if cls is not object for name in _EQUALITY):
            return "its own comparator"
        if isinstance(each, TypeDecorator) and (rule := comparing_otherwise(each.impl_instance)) is not None:
            return rule
    return None


def layers(type_: TypeEngine[Any]) -> Iterator[TypeEngine[Any]]:
    """The type, and what is inside each of its TypeDecorators."""
    yield type_
    while is_plain_decorator(type_):
        type_ = _inside(type_, None)
        yield type_


def decorators(type_: Any, *methods: str) -> Iterator[str]:
    """The names of the TypeDecorators around a type that may make another value of one, by these methods."""
    while is_plain_decorator(type_):
        if any(_overrides(type_, method) for method in methods):
            yield type(type_).__name__
        type_ = _inside(type_, None)


def _inside(decorator: Any, dialect: Dialect | None) -> TypeEngine[Any]:
    inside: TypeEngine[Any] = decorator.impl_instance
    if dialect is not None and _overrides(decorator, "load_dialect_impl"):
        inside = decorator.load_dialect_impl(dialect)
    return inside


def codec_of(type_: TypeEngine[Any], dialect: Dialect | None = None) -> Codec:
    """The codec of a type, whatever TypeDecorators are around it."""
    type_ = undecorated(type_, dialect)
    _refuse_unfit(type_)
    if isinstance(type_, sqltypes.Enum):
        return codecs.enum_codec(type_.enums)
    if isinstance(type_, sqltypes.String):
        return codecs.text_codec(type_.length)
    if upstream.is_binary(type_):
        return codecs.bytes_codec(type_.length)
    if isinstance(type_, sqltypes.Boolean):
        return codecs.bool_codec()
    if isinstance(type_, sqltypes.Integer):
        return codecs.int_codec(16 if isinstance(type_, sqltypes.SmallInteger) else 64)
    if isinstance(type_, sqltypes.Float):
        return codecs.float_codec(as_decimal=type_.asdecimal)
    if isinstance(type_, sqltypes.Numeric):
        return codecs.decimal_codec(type_.precision, type_.scale, as_float=not type_.asdecimal)
    if isinstance(type_, sqltypes.DateTime):
        return codecs.datetime_codec(aware=type_.timezone)
    if isinstance(type_, sqltypes.Date):
        return codecs.date_codec()
    if isinstance(type_, sqltypes.Time):
        return codecs.time_codec(aware=type_.timezone)
    if isinstance(type_, sqltypes.Interval):
        return codecs.interval_codec()
    if isinstance(type_, sqltypes.Uuid):
        return codecs.uuid_codec(as_uuid=type_.as_uuid)
    if isinstance(type_, sqltypes.JSON):
        writes, reads = upstream.json_functions(dialect)
        dumps, loads = writes or json.dumps, reads or json.loads
        return codecs.json_codec(lambda value: "null" if value is sqltypes.JSON.NULL else dumps(value), loads)
    raise DeclarationError(
        f"Encrypted cannot wrap {type(type_).__name__}; wrap String, LargeBinary, JSON or another "
        "standard type, or a TypeDecorator over one"
    )


def _processes(type_: Any) -> bool:
    """Whether a type that is no TypeDecorator converts values by code of somebody's own."""
    own = (cls for cls in type(type_).__mro__ if not cls.__module__.startswith("sqlalchemy."))
    methods = ("bind_processor", "result_processor")
    return any(method in vars(cls) for cls in own for method in methods)


def is_plain_decorator(type_: Any) -> bool:
    """Whether it is a decorator that works by process_bind_param and process_result_value, and not below them."""
    return (
        isinstance(type_, TypeDecorator)
        and not isinstance(type_, sqltypes.Interval | Ours)
        and not _overrides(type_, "bind_processor")
        and not _overrides(type_, "result_processor")
    )


def plain_steps(type_: Any, dialect: Dialect) -> tuple[Process | None, Codec, Process | None]:
    """How values of ``type_`` become what its codec takes, the codec, and the way back."""
    type_ = _variant(type_, dialect)
    if isinstance(type_, sqltypes.Enum):
        before, after = _enum_steps(type_)
        return before, codec_of(type_, dialect), after
    if isinstance(type_, sqltypes.JSON):
        none = None if type_.none_as_null else sqltypes.JSON.NULL
        return _json_step(none), codec_of(type_, dialect), None
    if not is_plain_decorator(type_):
        return None, codec_of(type_, dialect), None
    before, codec, after = plain_steps(_inside(type_, dialect), dialect)
    bind = type_.process_bind_param if _overrides(type_, "process_bind_param") else None
    result = type_.process_result_value if _overrides(type_, "process_result_value") else None
    to_plain = None if bind is None else lambda value: bind(value, dialect)
    from_plain = None if result is None else lambda value: result(value, dialect)
    return _chain_or_none(to_plain, before), codec, _chain_or_none(after, from_plain)


def _json_step(none: Any) -> Process:
    """What JSON makes of None, NULL for a column that says so and else JSON's null; null() is always NULL."""
    return lambda value: none if value is None else None if isinstance(value, Null) else value


def _overrides(type_: TypeDecorator[Any], method: str) -> bool:
    return getattr(type(type_), method) is not getattr(TypeDecorator, method)


def cache_key_of(type_: TypeEngine[Any]) -> Any:
    """SQLAlchemy's own key, and what it leaves out: what is inside a TypeDecorator, variants, the names of an Enum."""
    parts: list[Any] = [type_._static_cache_key]
    if isinstance(type_, sqltypes.Enum):
        parts += [type_.enum_class, *type_.enums]
    if is_plain_decorator(type_):
        parts.append(cache_key_of(_inside(type_, None)))
    for dialect_name, variant in upstream.variants(type_).items():
        parts += [dialect_name, cache_key_of(variant)]
    return NO_CACHE if NO_CACHE in parts else tuple(parts)


def _enum_steps(type_: sqltypes.Enum) -> tuple[Process | None, Process | None]:
    """From the members of the Enum's class to the names that stand for them in the database, and back."""
    cls = type_.enum_class
    if cls is None:
        return None, None
    members = list(cls)
    if len(members) != len(type_.enums):  # omit_aliases=False
        members = list(cls.__members__.values())
    names = dict(zip(members, type_.enums, strict=True))
    by_name = dict(zip(type_.enums, members, strict=True))
    return (
        lambda value: names[value] if isinstance(value, cls) else value,
        lambda value: None if value is None else by_name[value],
    )


def checked(
    step: Process | None, column: str, error: type[EncodeError] | type[DecryptError]
) -> Process | None:
    """Keep the wrapped type's own code from telling a value in its exception, and from sealed values."""
    if step is None:
        return None

    def convert(value: Any) -> Any:
        if type(value) is Sealed:
            return value
        try:
            return step(value)
        except Exception as raised:  # noqa: BLE001 - a user's code
            name = type(raised).__name__
        raise error(f"{column}: the column's own type raised {name} for a value", column=column)

    return convert


def none_when_sealed(step: Process, current: Callable[[], Any]) -> Process:
    """Keep None as NULL where nothing can be encrypted: there it was read of NULL, since JSON's null is sealed."""
    return lambda value: None if value is None and current() is SEALED else step(value)


def driver_binary(dialect: Dialect) -> Process | None:
    if getattr(dialect, "driver", None) in _PLAIN_BYTES:  # that of str(statement) has none
        return None
    return LargeBinary().dialect_impl(dialect).bind_processor(dialect)


def driver_bytes(dialect: Dialect, coltype: object) -> Process | None:
    if getattr(dialect, "driver", None) in _PLAIN_BYTES:
        return None
    return LargeBinary().dialect_impl(dialect).result_processor(dialect, coltype)


def _chain_or_none(*steps: Process | None) -> Process | None:
    return chain(*steps) if any(steps) else None


def chain(*steps: Process | None) -> Process:
    """One function that runs the steps that are there, in order; the only step itself where there is one."""
    there = [step for step in steps if step is not None]
    if len(there) == 1:
        return there[0]
    first, *rest = there

    def run(value: Any) -> Any:
        value = first(value)
        for step in rest:
            value = step(value)
        return value

    return run
