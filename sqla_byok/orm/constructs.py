"""What a SQL construct of somebody's own holds, whatever it keeps it in."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cached_property, lru_cache
from sys import stdlib_module_names
from types import FunctionType, ModuleType
from typing import Any
from weakref import ReferenceType

from sqlalchemy import Table, inspect
from sqlalchemy.sql.base import ColumnCollection
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import FromClause

__all__ = ["children", "is_own", "parts_held", "tables_held"]

_PLAIN = (str, bytes, int, float, complex, type(None), type, ModuleType)
_CONTAINERS = (dict, list, tuple, set, frozenset)
# Of the standard library only what is there to hold something; a logger or a thread would lead anywhere.
_HOLDING = frozenset(
    ("builtins", "collections", "functools", "types", "dataclasses", "weakref", "contextvars")
)


def is_own(element: Any) -> bool:
    """Whether the class of a construct is somebody's own: neither SQLAlchemy's nor this package's."""
    cls: Any = type(element)
    return _is_own(cls)


@lru_cache(maxsize=2_000)
def _is_own(cls: type) -> bool:
    return any(issubclass(each, ClauseElement) for each in _own_classes(cls))


@lru_cache(maxsize=2_000)
def _own_classes(cls: type) -> tuple[type, ...]:
    # The standard library's are left out: caches of typing's lead to whatever was ever annotated.
    others = {"sqlalchemy", "sqla_byok", *stdlib_module_names}
    return tuple(each for each in cls.__mro__ if _package(each) not in others)


def _classes(holder: Any) -> tuple[type, ...]:
    cls: Any = type(holder)
    return _own_classes(cls)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


@lru_cache(maxsize=2_000)
def _is_holding(cls: type) -> bool:
    """Whether objects of a class may hold constructs for another; SQLAlchemy's sessions, types and mappers do not."""
    if issubclass(cls, _CONTAINERS):
        return True
    packages = {_package(each) for each in cls.__mro__}
    if packages & {"sqlalchemy", "sqla_byok"}:
        return False
    return _package(cls) in _HOLDING or _package(cls) not in stdlib_module_names


def _is_looked_into(holder: Any) -> bool:
    cls: Any = type(holder)
    return _is_holding(cls) and "_sa_instance_state" not in getattr(holder, "__dict__", ())


def parts_held(element: Any) -> Iterator[Any]:
    """The SQL constructs that one of somebody's own holds: in attributes, properties, its class, and containers.

    Containers and objects may stand in each other, to any depth, and lead back to where they are.
    """
    return (part for part in _held(element) if not isinstance(part, type))


def tables_held(element: Any) -> Iterator[Table]:
    """The tables of a construct of somebody's own: those that it holds, and those of the classes that it holds."""
    for part in _held(element):
        found = inspect(part, raiseerr=False) if isinstance(part, type) else part
        selectable = getattr(found, "selectable", found)
        table = getattr(selectable, "table", selectable)
        if isinstance(table, Table):
            yield table


def _held(element: Any) -> Iterator[Any]:
    """The SQL constructs that one of somebody's own holds, and the classes."""
    seen: dict[int, Any] = {id(element): element}  # kept alive, so that no id comes twice
    waiting = [*_stored(element), *_computed(element)]
    while waiting:
        part = waiting.pop()
        if (isinstance(part, _PLAIN) and not isinstance(part, type)) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, ColumnCollection) and isinstance(element, FromClause):
            continue  # its own columns
        if isinstance(part, ClauseElement | type) or hasattr(type(part), "__clause_element__"):
            yield part
        elif isinstance(part, FunctionType):
            waiting += (*(part.__closure__ or ()), *(part.__defaults__ or ()))
            waiting += (part.__kwdefaults__ or {}).values()
        elif isinstance(part, ReferenceType):
            waiting.append(part())
        elif _is_looked_into(part):
            waiting += _stored(part)
            if is_dataclass(part):
                waiting += _computed(part)


def _stored(holder: Any) -> list[Any]:
    """What an object or its class refers to: attributes, slots, and what is in a container of any kind."""
    classes: tuple[type, ...] = _classes(holder)
    return gc.get_referents(holder) + [value for each in classes for value in vars(each).values()]


def _computed(holder: Any) -> list[Any]:
    """What its properties give."""
    found = []
    for each in _classes(holder):
        for name, value in vars(each).items():
            if isinstance(value, property | cached_property):
                with suppress(Exception):
                    found.append(getattr(holder, name))
    return found


def children(element: Any) -> Iterator[Any]:
    """The parts of an expression: what it tells, and of a class of somebody's own whatever else it holds."""
    yield from element.get_children()
    if is_own(element):
        yield from parts_held(element)
