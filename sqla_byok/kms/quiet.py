"""Keeps SDKs from logging what they send and receive: at DEBUG that includes tenant keys in base64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["quiet", "watch"]

_calling: ContextVar[bool] = ContextVar("sqla_byok_kms_call", default=False)


class _DropDuringCall(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not _calling.get()


_filter = _DropDuringCall()


def watch(*roots: str) -> None:
    """Put our filter on every logger below *roots* that exists by now.

    A filter on a logger does not see its children's records, so each logger needs it; adding it twice is
    harmless.

    :param roots: top-level logger names, such as ``"botocore"``.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in roots:
            logger.addFilter(_filter)


@contextmanager
def quiet(*roots: str) -> Iterator[None]:
    """Drop the records below WARNING of the loggers under *roots* while the block runs.

    Only the calling thread or task is affected: the application's own use of the same SDK logs as before.

    :param roots: top-level logger names, such as ``"botocore"``.
    """
    watch(*roots)
    token = _calling.set(True)
    try:
        yield
    finally:
        _calling.reset(token)
