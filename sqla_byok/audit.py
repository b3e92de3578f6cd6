"""What is told about keys: one typed event for each KMS call, opening and change of state. No event holds a value.

Events go to the logger ``sqla_byok.audit`` (level INFO, the event itself as ``record.event``) and to the function
given as ``Byok(on_event=…)``. An event is told after the fact; what a listener raises is logged and goes no further.
What is meant to end the thread, such as Ctrl-C, goes on when all events were told to all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

__all__ = [
    "AcrossOpened",
    "Actor",
    "Audit",
    "Event",
    "GenerationChanged",
    "KeyStateChanged",
    "KeysOpened",
    "KmsCalled",
    "SealedOpened",
    "acting",
]

_log = logging.getLogger("sqla_byok.audit")


class Actor(NamedTuple):
    """On whose behalf the program works, and what for, where it said."""

    name: str | None = None
    purpose: str | None = None


NOBODY = Actor()

acting: ContextVar[Actor] = ContextVar("byok_acting", default=NOBODY)
"""Who is named in the audit for what this thread or task opens."""


@dataclass(frozen=True)
class KmsCalled:
    """The customer's KMS was called.

    :param tenant: for whom.
    :param provider: ``"aws"``, ``"azure"``, ``"local"`` or a registered provider's name.
    :param operation: ``"wrap"`` or ``"unwrap"``.
    :param reason: why: ``onboard``, ``open``, ``refresh``, ``preload``, ``probe``, ``rewrap``, ``direct`` and the like.
    :param outcome: ``"ok"``, or the name of the exception.
    :param seconds: how long it took, with all its tries.
    :param request_id: what the provider called it, for a search in the customer's log; where it said.
    """

    tenant: str
    provider: str
    operation: str
    reason: str
    outcome: str
    seconds: float
    request_id: str | None = None


@dataclass(frozen=True)
class KeysOpened:
    """A tenant's keys came into memory, or stayed there for another ``revoke_within`` seconds.

    :param tenant: whose.
    :param reason: ``open``, ``refresh`` or ``preload``.
    :param actor: who asked, where the program said.
    :param purpose: what for, where the program said.
    :param request_id: the KMS call that did it.
    """

    tenant: str
    reason: str
    actor: str | None = None
    purpose: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class KeyStateChanged:
    """A tenant's keys changed their state in this process.

    :param tenant: whose.
    :param before: ``"closed"`` (never opened, or idle), ``"fresh"``, ``"grace"`` or ``"dark"``.
    :param after: likewise.
    :param cause: the name of the exception, where one was the cause.
    :param action_by: who must act, ``"customer"`` or ``"operator"``, where somebody must.
    """

    tenant: str
    before: str
    after: str
    cause: str | None = None
    action_by: str | None = None


@dataclass(frozen=True)
class GenerationChanged:
    """A data key, search salt, tenant key or wrapping of a tenant was made or changed its state.

    :param tenant: whose.
    :param kind: ``"data-key"``, ``"search-salt"``, ``"tenant-key"`` or ``"wrapping"``.
    :param generation: which one.
    :param state: ``"pending"``, ``"active"``, ``"readable"``, ``"retired"``.
    :param epoch: the keystore's epoch of the tenant afterwards.
    """

    tenant: str
    kind: str
    generation: int
    state: str
    epoch: int


@dataclass(frozen=True)
class AcrossOpened:
    """Somebody began to read the rows of several tenants: :meth:`sqla_byok.Byok.across`.

    :param tenants: whose, sorted.
    :param actor: who.
    :param purpose: what for.
    """

    tenants: tuple[str, ...]
    actor: str
    purpose: str


@dataclass(frozen=True)
class SealedOpened:
    """Somebody began to work on rows without their tenants' keys: :meth:`sqla_byok.Byok.sealed`.

    :param actor: who.
    :param purpose: what for.
    """

    actor: str
    purpose: str


Event = KmsCalled | KeysOpened | KeyStateChanged | GenerationChanged | AcrossOpened | SealedOpened


class Audit:
    """Tells events to the log and to those who listen.

    :param listeners: each is called with each event, in the thread in which it happened.
    """

    def __init__(self, *listeners: Callable[[Event], object]) -> None:
        self.listeners = list(listeners)
        self._held = threading.local()

    @contextmanager
    def later(self) -> Iterator[None]:
        """Tell what happens within the block, in this thread, at its end.

        A listener may use what the block is about to make, such as the keys of the tenant that is being opened.
        """
        if getattr(self._held, "events", None) is not None:
            yield
            return
        events = self._held.events = []
        try:
            yield
        finally:
            self._held.events = None
            self._tell(events)

    def tell(self, event: Event) -> None:
        """Log the event and pass it on."""
        held: list[Event] | None = getattr(self._held, "events", None)
        if held is None:
            self._tell([event])
        else:
            held.append(event)

    def _tell(self, events: Iterable[Event]) -> None:
        ends: list[BaseException] = []
        for event in events:
            for listener in (_write_down, *self.listeners):
                failure = _failure(listener, event)
                if failure is not None:
                    text = "a listener to audit events failed; the event itself is told above"
                    failures = (failure, _failure(_log.error, text, exc_info=failure))
                    ends += [each for each in failures if each and not isinstance(each, Exception)]
        if ends:
            raise ends[0]


def _failure(call: Callable[..., object], *args: Any, **options: Any) -> BaseException | None:
    """Call what may be somebody else's code, and give what it raises."""
    try:
        call(*args, **options)
    except BaseException as error:  # noqa: BLE001 - who gets it decides
        return error
    return None


def _write_down(event: Event) -> None:
    if _log.isEnabledFor(logging.INFO):
        told = " ".join(f"{each.name}={getattr(event, each.name)!r}" for each in fields(event))
        _log.info("%s %s", type(event).__name__, told, extra={"event": event})
