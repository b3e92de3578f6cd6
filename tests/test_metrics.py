"""The metrics: what a monitoring system is told, and that no customer can be read from it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, World
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from sqla_byok import KeyDisabledError, NotEncryptedError
from sqla_byok.audit import Audit, GenerationChanged, KeysOpened, KeyStateChanged, KmsCalled
from sqla_byok.crypto.values import DECRYPT_FAILURES
from sqla_byok.errors import MissingExtraError
from sqla_byok.metrics import Snapshot, observe

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
TENANT = "org-whose-name-must-not-show"

FULL = Snapshot(
    fresh=40, grace=2, dark=1, seconds_to_dark=151.5, waiters=3, breakers=4, epoch_lag=2.5,
    decrypt_failures=5, earliest_expiry=-60.0,
)  # fmt: skip


@dataclass
class Seen:
    """Metrics in memory, and the hand that moves what they show."""

    audit: Audit
    reader: InMemoryMetricReader
    now: Snapshot

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def values(self, name: str) -> dict[tuple[Any, ...], Any]:
        """Each point of a metric by the values of its attributes; a histogram's is its count and sum."""
        metric = self.metrics().get(name)
        points = [] if metric is None else metric.data.data_points
        return {
            tuple(point.attributes.values()): point.value
            if hasattr(point, "value")
            else (point.count, point.sum)
            for point in points
        }


@pytest.fixture
def seen() -> Iterator[Seen]:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    seen = Seen(Audit(), reader, FULL)
    observe(seen.audit, lambda: seen.now, provider)
    yield seen
    provider.shutdown()


def called(outcome: str = "ok", seconds: float = 0.25, **given: Any) -> KmsCalled:
    return KmsCalled(
        TENANT, given.get("provider", "aws"), given.get("operation", "unwrap"), given.get("reason", "open"),
        outcome, seconds, "request-1",
    )  # fmt: skip


def test_requests_are_counted_and_timed_by_what_they_were(seen: Seen) -> None:
    """An operator tells a throttled refresh at one cloud from an opening that went well at another."""
    for event in (
        called(),
        called(seconds=0.5),
        called("ThrottledError", 3.0, reason="refresh"),
        called(provider="azure", operation="wrap", reason="onboard"),
    ):
        seen.audit.tell(event)
    expected = {
        ("aws", "unwrap", "open", "ok"): (2, 0.75),
        ("aws", "unwrap", "refresh", "ThrottledError"): (1, 3.0),
        ("azure", "wrap", "onboard", "ok"): (1, 0.25),
    }
    assert seen.values("sqla_byok.kms.requests") == {key: count for key, (count, _) in expected.items()}
    assert seen.values("sqla_byok.kms.request.duration") == expected
    point = seen.metrics()["sqla_byok.kms.requests"].data.data_points[0]
    assert list(point.attributes) == [
        f"sqla_byok.{name}" for name in ("provider", "operation", "reason", "outcome")
    ]


def test_the_latency_is_told_apart_in_seconds(seen: Seen) -> None:
    """A call of 20 ms and one of 2 s fall into different buckets; the SDK's own are made for milliseconds."""
    for seconds in (0.018, 0.15, 2.5, 14.0):
        seen.audit.tell(called(seconds=seconds))
    (point,) = seen.metrics()["sqla_byok.kms.request.duration"].data.data_points
    assert sum(1 for count in point.bucket_counts if count) == 4


def test_other_events_are_no_requests(seen: Seen) -> None:
    """Openings and changes of state do not count as KMS requests, which cost money and quota."""
    seen.audit.tell(KeysOpened(TENANT, "open"))
    seen.audit.tell(KeyStateChanged(TENANT, "fresh", "dark", "KeyDisabledError", "customer"))
    seen.audit.tell(GenerationChanged(TENANT, "data-key", 2, "pending", 7))
    assert seen.values("sqla_byok.kms.requests") == {}


STATE = [
    ("sqla_byok.keyrings", "{tenant}", {("fresh",): 40, ("grace",): 2, ("dark",): 1}),
    ("sqla_byok.keyrings.time_to_dark", "s", {(): 151.5}),
    ("sqla_byok.opening.waiters", "{waiter}", {(): 3}),
    ("sqla_byok.kms.breakers.open", "{tenant}", {(): 4}),
    ("sqla_byok.keystore.epoch.lag", "s", {(): 2.5}),
    ("sqla_byok.decrypt.failures", "{value}", {(): 5}),
    ("sqla_byok.credential.time_to_expiry", "s", {(): -60.0}),
]


@pytest.mark.parametrize(("name", "unit", "values"), STATE, ids=[name for name, _, _ in STATE])
def test_the_state_is_shown_as_it_is(
    seen: Seen, name: str, unit: str, values: dict[tuple[Any, ...], float]
) -> None:
    """Each figure of the snapshot reaches the metric that is named for it, in the unit that it says."""
    assert seen.metrics()[name].unit == unit
    assert seen.values(name) == values


def test_every_figure_of_the_snapshot_is_shown(seen: Seen) -> None:
    """A figure added to the snapshot is not forgotten here: the table above has as many values as it has fields."""
    assert sum(len(values) for _, _, values in STATE) == len(fields(Snapshot))
    assert set(seen.metrics()) == {name for name, _, _ in STATE}


def test_the_state_is_read_at_each_collection(seen: Seen) -> None:
    """What is shown is the present, not the moment at which the metrics were set up."""
    assert seen.values("sqla_byok.keyrings")["dark",] == 1
    seen.now = Snapshot(dark=17)
    assert seen.values("sqla_byok.keyrings") == {("fresh",): 0, ("grace",): 0, ("dark",): 17}


def test_what_is_not_known_is_not_shown(seen: Seen) -> None:
    """With no tenant open nothing says that one goes dark in 0 seconds, which would wake somebody up."""
    seen.now = Snapshot()
    shown = set(seen.metrics())
    assert shown.isdisjoint(
        {
            "sqla_byok.keyrings.time_to_dark",
            "sqla_byok.keystore.epoch.lag",
            "sqla_byok.credential.time_to_expiry",
        }
    )
    assert {"sqla_byok.keyrings", "sqla_byok.opening.waiters"} <= shown


def test_no_metric_names_a_tenant(seen: Seen) -> None:
    """The monitoring vendor is not told who the customers are, nor given a series for each."""
    for event in (called(), called("KeyDisabledError"), KeysOpened(TENANT, "open", actor="ada")):
        seen.audit.tell(event)
    data = seen.reader.get_metrics_data()
    assert data is not None
    text = data.to_json()
    assert "sqla_byok.kms.requests" in text
    for secret in (TENANT, "request-1", "ada"):
        assert secret not in text


def test_the_page_lists_every_metric(seen: Seen) -> None:
    """Who builds a dashboard from docs/metrics.md finds each metric, its kind and unit, and no other."""
    seen.audit.tell(called())
    kinds = {"Histogram": "histogram", "Sum": "counter", "Gauge": "gauge"}
    real = {(name, kinds[type(metric.data).__name__], metric.unit) for name, metric in seen.metrics().items()}
    rows = re.findall(r"^\| `(sqla_byok\.\S+)` \| (\w+) \| `(\S+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert set(rows) == real


def test_the_global_provider_is_used_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that has set up OpenTelemetry as usual needs to hand over nothing."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    monkeypatch.setattr("opentelemetry.metrics._internal._METER_PROVIDER", provider)
    assert api.get_meter_provider() is provider
    observe(Audit(), lambda: FULL)
    assert "sqla_byok.keyrings" in Seen(Audit(), reader, FULL).metrics()
    provider.shutdown()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for metrics without the extra reads what to install, and no listener is left behind."""
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    audit = Audit()
    with pytest.raises(MissingExtraError, match=r"sqla-byok\[otel\]"):
        observe(audit, lambda: FULL)
    assert audit.listeners == []


def test_a_byok_reports_its_own_keys(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> None:
    """What operators see of a real process: calls, states, deadlines, looks at the keystore and values that failed."""
    world = World(tmp_path, counting_kms, keystore_key)
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    world.byok.metrics(provider)
    seen = Seen(Audit(), reader, FULL)
    failures = DECRYPT_FAILURES.value
    world.write("Ada")
    world.open("t2")
    CountingKms.on_unwrap = staticmethod(lambda: (_ for _ in ()).throw(KeyDisabledError("disabled")))
    with pytest.raises(KeyDisabledError):
        world.open("t3")
    assert seen.values("sqla_byok.keyrings") == {("fresh",): 2, ("grace",): 0, ("dark",): 1}
    assert seen.values("sqla_byok.kms.requests") == {
        ("counting", "unwrap", "open", "ok"): 2,
        ("counting", "unwrap", "open", "KeyDisabledError"): 1,
    }
    assert seen.values("sqla_byok.keyrings.time_to_dark") == {(): 300.0}
    assert seen.values("sqla_byok.keystore.epoch.lag") == {(): 0.0}
    world.clock.turn(2)
    world.open("t1")
    assert seen.values("sqla_byok.keyrings.time_to_dark") == {(): 298.0}
    assert seen.values("sqla_byok.keystore.epoch.lag") == {(): 2.0}
    with world.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE patient SET name = 'plain'")
    with pytest.raises(NotEncryptedError):
        world.read()
    assert seen.values("sqla_byok.decrypt.failures") == {(): failures + 1}
    assert "sqla_byok.credential.time_to_expiry" not in seen.metrics()
    provider.shutdown()
    world.close()
