"""Primary keys as JSON, by which a job goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqla_byok.errors import ConfigurationError

__all__ = ["key_from_json", "key_to_json"]

_TO: dict[type, Callable[[Any], str]] = {
    bytes: bytes.hex,
    UUID: str,
    datetime: datetime.isoformat,
    date: date.isoformat,
    time: time.isoformat,
    Decimal: str,
}
_FROM: dict[str, Callable[[str], Any]] = {
    "bytes": bytes.fromhex,
    "UUID": UUID,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "Decimal": Decimal,
}


def key_to_json(key: Sequence[Any] | None) -> Any:
    """A key as JSON takes it.

    :raises ConfigurationError: a column of it has values of another type.
    """
    return None if key is None else [_part(part) for part in key]


def _part(part: Any) -> Any:
    if isinstance(part, str | int | float) and type(part) in (str, int, float, bool):
        return part
    to = _TO.get(type(part))
    if to is None:
        raise ConfigurationError(
            f"a job cannot note a primary key with values of type {type(part).__name__}; it takes numbers, texts, "
            "bytes, UUIDs, dates and times"
        )
    return {type(part).__name__: to(part)}


def key_from_json(stored: Any) -> tuple[Any, ...] | None:
    """What :func:`key_to_json` was given."""
    if stored is None:
        return None
    return tuple(
        _FROM[next(iter(part))](next(iter(part.values()))) if isinstance(part, dict) else part
        for part in stored
    )
