"""The contracts of recording without sampling, and of what is said about given samplers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    DEFAULT_ON,
    AlwaysRecordSampler,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind, TraceState

from periscope_otel import guard
from periscope_otel.resilience.sampler import (
    RecordOnlySampler,
    check_sampler,
    sampler_from_environment,
    sampler_from_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

HOST = {"server.address": "feed.example"}
RATIO = ParentBased(TraceIdRatioBased(0.1))


class Seen(SpanProcessor):
    """Keeps the spans that end."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.spans]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def provide(seen: Seen) -> Iterator[Callable[[Sampler], TracerProvider]]:
    """Return a function that makes a provider with a sampler; `seen` sees its spans."""
    made = []

    def provider(sampler: Sampler) -> TracerProvider:
        made.append(TracerProvider(sampler=sampler, shutdown_on_exit=False))
        made[-1].add_span_processor(seen)
        return made[-1]

    yield provider
    for one in made:
        one.shutdown()


def remote_parent(*, sampled: bool) -> Any:
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else 0)
    state = TraceState([("vendor", "x")])
    context = trace.SpanContext(1, 2, is_remote=True, trace_flags=flags, trace_state=state)
    return trace.set_span_in_context(trace.NonRecordingSpan(context))


# Recording.


@pytest.mark.parametrize("root", [ALWAYS_OFF, DEFAULT_OFF, TraceIdRatioBased(0.0)])
def test_what_is_dropped_and_of_interest_is_recorded(provide, seen, root):
    """With the attributes it begins with, unsampled; other kinds are dropped as ever."""
    tracer = provide(RecordOnlySampler(root)).get_tracer("x")
    with tracer.start_as_current_span("work") as work:
        assert not work.is_recording()
        with tracer.start_as_current_span("GET", kind=SpanKind.CLIENT, attributes=HOST) as get:
            assert not get.get_span_context().trace_flags.sampled
    assert seen.names == ["GET"]
    assert dict(seen.spans[0].attributes) == HOST


def test_what_is_recorded_only_is_not_exported(provide):
    """Exporters look at the flag, and so does who is called."""
    exporter = InMemorySpanExporter()
    provider = provide(RecordOnlySampler(ALWAYS_OFF))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("x").start_span("GET", kind=SpanKind.CLIENT).end()
    assert exporter.get_finished_spans() == ()


def test_an_unsampled_remote_parent_drops_no_client_span(provide, seen):
    """As where a scheduler traces a share of the jobs; its trace state is kept."""
    tracer = provide(RecordOnlySampler()).get_tracer("x")
    context = remote_parent(sampled=False)
    span = tracer.start_span("GET", kind=SpanKind.CLIENT, context=context)
    span.end()
    assert seen.names == ["GET"]
    assert span.get_span_context().trace_state.get("vendor") == "x"


def test_what_the_root_samples_is_sampled(provide, seen):
    """Its result is passed on as it is."""
    tracer = provide(RecordOnlySampler(ALWAYS_ON)).get_tracer("x")
    span = tracer.start_span("GET", kind=SpanKind.CLIENT, attributes=HOST)
    span.end()
    assert span.get_span_context().trace_flags.sampled
    assert dict(seen.spans[0].attributes) == HOST


def test_a_root_samples_the_same_share_as_without(provide):
    """Decisions are the root's own, span by span."""
    sampler, ids = RecordOnlySampler(RATIO), [(1 << 63) // 50 * number for number in range(100)]
    given = [(None, one, "GET", SpanKind.CLIENT, HOST) for one in ids]
    alone = [RATIO.should_sample(*one).decision.is_sampled() for one in given]
    assert [sampler.should_sample(*one).decision.is_sampled() for one in given] == alone
    assert 0 < sum(alone) < 50


def test_kinds_and_names_say_what_is_of_interest(provide, seen):
    """One of both suffices."""
    sampler = RecordOnlySampler(ALWAYS_OFF, kinds=[SpanKind.PRODUCER], names={"store"})
    tracer = provide(sampler).get_tracer("x")
    for name, kind in (
        ("a", SpanKind.PRODUCER),
        ("b", SpanKind.CLIENT),
        ("store", SpanKind.SERVER),
    ):
        tracer.start_span(name, kind=kind).end()
    assert seen.names == ["a", "store"]


class Odd(Sampler):
    """A sampler with parameter names of its own, which adds an attribute to what it drops."""

    def should_sample(  # type: ignore[override]  # noqa: PLR0917
        self, context, trace, span, sort=None, values=None, others=None
    ):
        return SamplingResult(Decision.DROP, {"rule": "odd", "server.address": "kept"})

    def get_description(self) -> str:
        return "Odd"


def test_attributes_of_the_root_are_kept_too():
    """They come last, and its parameters may be called anything."""
    result = RecordOnlySampler(Odd()).should_sample(None, 1, "x", SpanKind.CLIENT, HOST)
    assert dict(result.attributes) == {"rule": "odd", "server.address": "kept"}


def test_it_can_be_called_as_every_sampler():
    """By position and by keyword: some wrappers do the one, some the other."""
    for inner in (RecordOnlySampler(ALWAYS_OFF), ParentBased(RecordOnlySampler(ALWAYS_OFF))):
        result = inner.should_sample(
            parent_context=None,
            trace_id=1,
            name="x",
            kind=SpanKind.CLIENT,
            attributes=None,
            links=None,
            trace_state=None,
        )
        assert result.decision is Decision.RECORD_ONLY
    assert RecordOnlySampler(RATIO).get_description() == (
        f"RecordOnlySampler{{{RATIO.get_description()}}}"
    )


def test_a_trace_state_is_passed_on_where_there_is_one():
    """To roots that take it."""
    result = RecordOnlySampler(AlwaysRecordSampler(ALWAYS_OFF)).should_sample(
        None, 1, "x", None, None, None, TraceState()
    )
    assert result.decision is Decision.RECORD_ONLY


# By name.


@pytest.mark.parametrize(
    ("argument", "root"),
    [
        (None, DEFAULT_ON),
        ("", DEFAULT_ON),
        ("0.1", RATIO),
        (" 0.1 ", RATIO),
        (0.1, RATIO),
        ("0", ParentBased(TraceIdRatioBased(0.0))),
        ("always_off", ALWAYS_OFF),
        ("parentbased_always_off", DEFAULT_OFF),
    ],
)
def test_the_environment_names_a_share_or_a_root(argument, root):
    """Nothing is the SDK's default."""
    description = sampler_from_environment(argument).get_description()
    assert description == RecordOnlySampler(root).get_description()


@pytest.mark.parametrize("argument", ["a lot", "1.5", "-1", "nan", "0,1", "always", [], "inf"])
def test_a_bad_argument_is_warned_about(argument, caplog):
    """The default is used in its place."""
    guard.reset()
    description = sampler_from_environment(argument).get_description()
    assert description == RecordOnlySampler().get_description()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, RecordOnlySampler()),
        ({"root": 0.1}, RecordOnlySampler(RATIO)),
        ({"root": ALWAYS_OFF}, RecordOnlySampler(ALWAYS_OFF)),
        ({"root": {"always_off": None}}, RecordOnlySampler(ALWAYS_OFF)),
        (
            {"root": {"trace_id_ratio_based": {"ratio": 0.1}}},
            RecordOnlySampler(TraceIdRatioBased(0.1)),
        ),
        (
            {"root": {"parent_based": {"root": {"trace_id_ratio_based": {"ratio": 0.1}}}}},
            RecordOnlySampler(RATIO),
        ),
        ({"root": {"parent_based": {}}}, RecordOnlySampler(DEFAULT_ON)),
    ],
)
def test_a_file_names_a_root_in_its_own_way(options, expected):
    """Or says nothing at all."""
    assert sampler_from_file(**options).get_description() == expected.get_description()


def test_a_file_names_kinds_and_names():
    """By their names."""
    sampler = sampler_from_file(root="always_off", kinds=["client", "PRODUCER"], names=["store"])
    assert [kind for kind in SpanKind if sampler.records(kind)] == [
        SpanKind.CLIENT,
        SpanKind.PRODUCER,
    ]
    assert sampler.should_sample(None, 1, "store").decision is Decision.RECORD_ONLY


@pytest.mark.parametrize(
    "options",
    [{"root": {"x": {}}}, {"root": {}}, {"kinds": ["x"]}, {"kind": "client"}, {"root": "x"}],
)
def test_a_bad_option_of_a_file_is_warned_about(options, caplog):
    """The rest counts."""
    guard.reset()
    assert isinstance(sampler_from_file(**options), RecordOnlySampler)
    assert len(caplog.records) == 1


def test_a_file_may_be_nested_only_so_deep(caplog):
    """Whatever is in it."""
    root: Any = "always_off"
    for _ in range(100):
        root = {"parent_based": {"root": root}}
    guard.reset()
    assert isinstance(sampler_from_file(root=root), RecordOnlySampler)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("group", "function"),
    [
        ("opentelemetry_traces_sampler", sampler_from_environment),
        ("opentelemetry_sampler", sampler_from_file),
    ],
)
def test_it_is_found_by_name(group, function):
    """In both groups of entry points."""
    (found,) = entry_points(group=group, name="periscope_record_only")
    assert found.load() is function


def test_the_sdk_takes_it_from_the_environment():
    """As `opentelemetry-instrument` sets it up."""
    code = (
        "from opentelemetry.sdk._configuration import _OTelSDKConfigurator\n"
        "from opentelemetry import trace\n"
        "_OTelSDKConfigurator().configure()\n"
        "print(trace.get_tracer_provider().sampler.get_description())\n"
    )
    environment = {
        **os.environ,
        "OTEL_TRACES_SAMPLER": "periscope_record_only",
        "OTEL_TRACES_SAMPLER_ARG": "0.25",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("RecordOnlySampler{ParentBased{root:TraceIdRatioBased{0.25}"), (
        done.stderr
    )


# What is wrong with a given one.


@pytest.mark.parametrize(
    "sampler",
    [
        ALWAYS_ON,
        DEFAULT_ON,
        TraceIdRatioBased(1.0),
        RecordOnlySampler(),
        RecordOnlySampler(ALWAYS_OFF),
        RecordOnlySampler(ParentBased(RecordOnlySampler(RATIO))),
        AlwaysRecordSampler(RecordOnlySampler(RATIO)),
        AlwaysRecordSampler(ALWAYS_ON),
        Odd(),
    ],
    ids=lambda sampler: sampler.get_description()[:60],
)
def test_nothing_is_said_where_nothing_is_wrong(provide, sampler):
    """Nor about a sampler that nobody knows."""
    assert check_sampler(provide(sampler)) is None


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (ALWAYS_OFF, "see no client spans of unsampled traces"),
        (RATIO, "see no client spans of unsampled traces"),
        (TraceIdRatioBased(0.5), "see no client spans of unsampled traces"),
        (ParentBased(RecordOnlySampler(RATIO)), "RecordOnlySampler is inside ParentBased"),
        (ParentBased(ALWAYS_ON, local_parent_not_sampled=RecordOnlySampler()), "is inside"),
        (ParentBased(AlwaysRecordSampler(ALWAYS_OFF)), "AlwaysRecordSampler is inside ParentBased"),
        (AlwaysRecordSampler(RATIO), "loses the attributes"),
        (RecordOnlySampler(RATIO, kinds=()), "kinds= has no CLIENT"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get_description()[:60],
)
def test_what_is_wrong_is_said_in_a_line(provide, sampler, words):
    """With what to do about it."""
    said = check_sampler(provide(sampler))
    assert words in said
    assert "\n" not in said


def test_what_is_said_is_true(provide, seen):
    """The wrong orders lose what they are said to lose."""
    context = remote_parent(sampled=False)
    tracer = provide(ParentBased(RecordOnlySampler(ALWAYS_OFF))).get_tracer("x")
    tracer.start_span("GET", kind=SpanKind.CLIENT, context=context).end()
    with tracer.start_as_current_span("work"):
        tracer.start_span("GET", kind=SpanKind.CLIENT).end()
    assert seen.names == []
    tracer = provide(AlwaysRecordSampler(ALWAYS_OFF)).get_tracer("x")
    tracer.start_span("GET", kind=SpanKind.CLIENT, attributes=HOST).end()
    assert dict(seen.spans[0].attributes) == {}


class Hostile:
    """A provider that nobody has seen the like of."""

    @property
    def sampler(self) -> Any:
        raise RuntimeError


def test_of_a_strange_provider_nothing_is_said():
    """Nor of one without a sampler, or with one that wraps itself."""
    endless = ParentBased(ALWAYS_OFF)
    endless._root = endless
    for provider in (None, object(), Hostile(), trace.NoOpTracerProvider()):
        assert check_sampler(provider) is None
    said = check_sampler(TracerProvider(sampler=endless, shutdown_on_exit=False))
    assert said is None
