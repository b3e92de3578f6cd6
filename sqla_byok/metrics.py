"""Metrics by OpenTelemetry: the KMS's requests as they are told to the audit, and the state of the keys in memory.

Needs the ``otel`` extra. No metric has a tenant among its attributes: a tenant's name would give every metric as many
series as there are customers, and would tell a monitoring vendor who they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqla_byok.audit import Audit, Event, KmsCalled
from sqla_byok.errors import MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

__all__ = ["Snapshot", "observe"]

# Seconds. The SDK's own boundaries are made for milliseconds; a call of all its tries ends well below 15 s.
_BOUNDARIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Snapshot:
    """The keys of one process at one moment. What is ``None`` is not reported.

    :param fresh: tenants whose keys are in memory and within ``revoke_within``.
    :param grace: tenants beyond it whose keys are used on, since their KMS does not answer (``outage_grace``).
    :param dark: tenants asked for whose KMS said no, or has not answered for longer than allowed.
    :param seconds_to_dark: until the first tenant is dark if its KMS answers no more, of those used since their last
        refresh; an idle one's keys end without harm.
    :param waiters: threads and tasks that wait for an opening.
    :param breakers: tenants whose KMS is left alone for a moment, after failures.
    :param epoch_lag: how many seconds ago the last look at the keystore was when a tenant's keys were last used, of the
        tenant for which that is longest.
    :param decrypt_failures: stored values that did not open, since the process started.
    :param earliest_expiry: seconds until the first credential for a KMS expires; below 0 if it has.
    """

    fresh: int = 0
    grace: int = 0
    dark: int = 0
    seconds_to_dark: float | None = None
    waiters: int = 0
    breakers: int = 0
    epoch_lag: float | None = None
    decrypt_failures: int = 0
    earliest_expiry: float | None = None


def observe(
    audit: Audit, snapshot: Callable[[], Snapshot], meter_provider: MeterProvider | None = None
) -> None:
    """Report KMS requests and the state of the keys to OpenTelemetry, from now on; to be called once a process.

    :param audit: tells of each KMS request.
    :param snapshot: gives the present state; called at each collection, in the collector's thread.
    :param meter_provider: where to report; the program's global one unless given.
    :raises MissingExtraError: if ``opentelemetry-api`` is not installed.

    Example::

        observe(audit, keyrings.snapshot, MeterProvider(metric_readers=[reader]))

    Source: https://opentelemetry.io/docs/specs/semconv/general/metrics/
    """
    try:
        from opentelemetry.metrics import Observation, get_meter
    except ImportError as error:
        raise MissingExtraError(
            'Metrics need the OpenTelemetry API: pip install "sqla-byok[otel]"'
        ) from error
    meter = get_meter("sqla_byok", meter_provider=meter_provider)
    audit.listeners.append(_requests(meter))
    _observe_state(meter, snapshot, Observation)


def _requests(meter: Meter) -> Callable[[Event], None]:
    """What counts the KMS's requests and times them."""
    count = meter.create_counter(
        "sqla_byok.kms.requests",
        unit="{request}",
        description="Requests to customers' KMS, tries not counted.",
    )
    duration = meter.create_histogram(
        "sqla_byok.kms.request.duration",
        unit="s",
        description="How long a request to a customer's KMS took, with all its tries.",
        explicit_bucket_boundaries_advisory=_BOUNDARIES,
    )

    def listen(event: Event) -> None:
        if isinstance(event, KmsCalled):
            attributes = {
                f"sqla_byok.{name}": getattr(event, name)
                for name in ("provider", "operation", "reason", "outcome")
            }
            count.add(1, attributes)
            duration.record(event.seconds, attributes)

    return listen


def _observe_state(meter: Meter, snapshot: Callable[[], Snapshot], observation: type[Observation]) -> None:
    def reads(field: str) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def callback(options: CallbackOptions) -> Iterator[Observation]:
            value = getattr(snapshot(), field)
            if value is not None:
                yield observation(value)

        return callback

    def states(options: CallbackOptions) -> Iterator[Observation]:
        now = snapshot()
        for state in ("fresh", "grace", "dark"):
            yield observation(getattr(now, state), {"sqla_byok.state": state})

    def gauge(name: str, callback: Any, unit: str, description: str) -> None:
        meter.create_observable_gauge(
            f"sqla_byok.{name}", callbacks=[callback], unit=unit, description=description
        )

    gauge("keyrings", states, "{tenant}", "Tenants by the state of their keys in this process.")
    gauge("keyrings.time_to_dark", reads("seconds_to_dark"), "s",
          "Until the first tenant in use is dark, if its KMS answers no more.")  # fmt: skip
    gauge("opening.waiters", reads("waiters"), "{waiter}", "Threads and tasks that wait for a tenant's keys.")
    gauge(
        "kms.breakers.open", reads("breakers"), "{tenant}", "Tenants whose KMS is left alone after failures."
    )
    gauge("keystore.epoch.lag", reads("epoch_lag"), "s",
          "How old the last look at the keystore was when keys were used, at the longest.")  # fmt: skip
    gauge("credential.time_to_expiry", reads("earliest_expiry"), "s",
          "Until the first credential for a customer's KMS expires.")  # fmt: skip
    meter.create_observable_counter(
        "sqla_byok.decrypt.failures",
        callbacks=[reads("decrypt_failures")],
        unit="{value}",
        description="Stored values that did not open.",
    )
