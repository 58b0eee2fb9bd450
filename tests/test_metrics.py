"""Figures: right, bounded, and addable."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from sidecar.metrics import MAX_CHILDREN, FamilySnapshot, Metrics, SnapshotCollector, merge


def registry(figures: list[FamilySnapshot]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(figures))  # type: ignore[arg-type,unused-ignore]
    return registry


def exposed(figures: list[FamilySnapshot]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a scrape reads: value by sample name and sorted labels."""
    text = generate_latest(registry(figures)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def some_figures() -> Metrics:
    metrics = Metrics()
    calls = metrics.counter("calls", "Calls.", ("model", "status"))
    calls.child("gpt", "200").inc()
    calls.child("gpt", "200").inc(2)
    calls.child('odd"\\\nname', "500").inc()
    metrics.gauge("open_calls", "Open.").child().set(7)
    seconds = metrics.histogram("wait_seconds", "Wait.", ("model",), (0.1, 1, 5.0))
    for value in (0.1, 0.2, 1.0, 7.0):
        seconds.child("gpt").observe(value)
    return metrics


def test_the_text_exposition_says_what_was_counted() -> None:
    values = exposed(some_figures().snapshot())
    gpt = ("model", "gpt")
    assert values["calls_total", (gpt, ("status", "200"))] == 3
    assert values["calls_total", (("model", 'odd"\\\nname'), ("status", "500"))] == 1
    assert values["open_calls", ()] == 7
    buckets = {"0.1": 1, "1.0": 3, "5.0": 3, "+Inf": 4}  # a bound is part of its bucket
    for bound, count in buckets.items():
        assert values["wait_seconds_bucket", (("le", bound), gpt)] == count
    assert values["wait_seconds_count", (gpt,)] == 4
    assert values["wait_seconds_sum", (gpt,)] == pytest.approx(8.3)


def test_the_openmetrics_exposition_is_valid() -> None:
    text = generate_openmetrics(registry(some_figures().snapshot())).decode()  # type: ignore[no-untyped-call]
    families = {family.name: family.type for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    assert families == {"calls": "counter", "open_calls": "gauge", "wait_seconds": "histogram"}


def test_a_metric_without_samples_is_valid() -> None:
    metrics = Metrics()
    metrics.counter("calls", "Calls.", ("model",))
    assert exposed(metrics.snapshot()) == {}


def test_a_gauge_goes_up_and_down() -> None:
    gauge = Metrics().gauge("open", "Open.").child()
    gauge.inc()
    gauge.inc(3)
    gauge.dec()
    assert gauge.value == 3
    gauge.set(1.5)
    assert gauge.value == 1.5


def test_the_same_metric_is_the_same_family_and_child() -> None:
    metrics = Metrics()
    first = metrics.counter("calls", "Calls.", ("model",)).child("a")
    assert metrics.counter("calls", "Calls.", ("model",)).child("a") is first


def test_one_name_for_two_kinds_or_label_sets_is_a_mistake() -> None:
    metrics = Metrics()
    metrics.counter("calls", "Calls.", ("model",))
    with pytest.raises(ValueError, match="calls exists already"):
        metrics.gauge("calls", "Calls.", ("model",))
    with pytest.raises(ValueError, match="calls exists already"):
        metrics.counter("calls", "Calls.", ("team",))


def test_a_wrong_number_of_label_values_is_a_mistake() -> None:
    family = Metrics().counter("calls", "Calls.", ("model", "team"))
    with pytest.raises(ValueError, match="has the labels"):
        family.child("a")


def test_label_values_past_the_fuse_are_counted_as_other() -> None:
    metrics = Metrics()
    family = metrics.counter("calls", "Calls.", ("model",))
    for number in range(MAX_CHILDREN + 500):
        family.child(str(number)).inc()
    family.child("0").inc()
    (figures,) = metrics.snapshot()
    samples = {labels[0]: value for labels, value in figures["samples"]}
    assert len(samples) == MAX_CHILDREN + 1
    assert samples["other"] == 500
    assert samples["0"] == 2


# Adding up


def test_figures_of_several_processes_add_up() -> None:
    here, there = some_figures(), some_figures()
    there.counter("calls", "Calls.", ("model", "status")).child("new", "200").inc(5)
    values = exposed(merge([here.snapshot(), there.snapshot()]))
    assert values["calls_total", (("model", "gpt"), ("status", "200"))] == 6
    assert values["calls_total", (("model", "new"), ("status", "200"))] == 5
    assert values["open_calls", ()] == 14
    assert values["wait_seconds_bucket", (("le", "1.0"), ("model", "gpt"))] == 6
    assert values["wait_seconds_count", (("model", "gpt"),)] == 8


def test_figures_survive_the_way_through_json() -> None:
    figures = some_figures().snapshot()
    received: Any = orjson.loads(orjson.dumps(figures))
    assert exposed(merge([received])) == exposed(figures)


def test_merging_changes_none_of_the_figures_it_adds() -> None:
    figures = some_figures().snapshot()
    before = exposed(figures)
    merge([figures, figures])
    assert exposed(figures) == before
    assert merge([]) == []


@given(st.lists(st.lists(st.floats(0, 1000), max_size=20), max_size=4))
def test_a_merged_histogram_is_the_histogram_of_all_observations(parts: list[list[float]]) -> None:
    def observed(values: list[float]) -> list[FamilySnapshot]:
        metrics = Metrics()
        child = metrics.histogram("wait", "Wait.").child()
        for value in values:
            child.observe(value)
        return metrics.snapshot()

    merged = merge([observed(part) for part in parts])
    together = observed([value for part in parts for value in part])
    if not parts:
        assert merged == []
        return
    *counts, total = merged[0]["samples"][0][1]
    *expected_counts, expected_total = together[0]["samples"][0][1]
    assert counts == expected_counts
    assert math.isclose(total, expected_total, abs_tol=1e-6)
