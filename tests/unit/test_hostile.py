"""Hostile names and messages: nothing raises, every exporter can carry them, no secret gets out."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from periscope_otel import operation
from periscope_otel.telemetry.current import current, telemetry_on
from periscope_otel.telemetry.prometheus import PrometheusPage

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTILE = {
    "escapes": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b1m",
    "markup": "[bold]x[/bold] [/nope] [link=http://x]y[/link]",
    "label breakers": 'a"b\\c\nd\r\n{e="f"} 1 # EOF\n# HELP x y',
    "lone surrogates": "\ud800x\udfff",
    "bidi": "\u202eevil\u2066\u2069\u200f",
    "NUL": "a\x00b",
    "formats": "%s %(x)s {0} {x} {{",
    "not ASCII": "мошенничество 詐欺 💀 é e\u0301",
    "blank": "   \t\n ",
    "empty": "",
    "10k": "n" * 10_000,
    "10k of lines": "line\n" * 2_000,
}
SECRET = "hunter2Qx9"
URL = f"https://user:{SECRET}@host.example/?api_key={SECRET}"
MEBIBYTE = 1 << 20

CONTROL = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} | set("\u202e\u2066\u2069")


class Emitted:
    """Telemetry on providers with every kind of exporter behind them."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.page = PrometheusPage()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader, self.page.reader], shutdown_on_exit=False)
        self.telemetry = telemetry_on(self.tracers, self.meters)

    def span(self, name: str | None = None) -> Any:
        (found,) = [
            span for span in self.exporter.get_finished_spans() if name in (None, span.name)
        ]
        return found

    def label_values(self) -> set[str]:
        data = json.loads(self.reader.get_metrics_data().to_json())
        return {
            str(value)
            for resource in data["resource_metrics"]
            for scope in resource["scope_metrics"]
            for metric in scope["metrics"]
            for point in metric["data"]["data_points"]
            for value in point["attributes"].values()
        }

    def assert_exportable(self) -> None:
        """Encode everything as OTLP, and read the Prometheus page back in both formats."""
        assert encode_spans(self.exporter.get_finished_spans()).SerializeToString()
        assert encode_metrics(self.reader.get_metrics_data()).SerializeToString()
        text = self.page.render("text/plain")[0].decode()
        assert_no_duplicates(text_string_to_metric_families(text))
        modern = self.page.render("application/openmetrics-text; version=1.0.0")[0].decode()
        assert_no_duplicates(openmetrics_parser.text_string_to_metric_families(modern))

    def everything(self) -> str:
        """All that is emitted, as one text."""
        parts = []
        for span in self.exporter.get_finished_spans():
            parts += [span.name, repr(span.status.description), repr(dict(span.attributes))]
            parts += [repr(dict(event.attributes)) for event in span.events]
        parts.append(self.reader.get_metrics_data().to_json())
        parts.append(self.page.render("text/plain")[0].decode())
        parts.append(str(encode_spans(self.exporter.get_finished_spans())))
        return "\n".join(parts)


def assert_no_duplicates(families: Any) -> None:
    # To Prometheus a label without a value is the same as no such label.
    samples = [
        (sample.name, tuple(sorted(item for item in sample.labels.items() if item[1])))
        for family in families
        for sample in family.samples
    ]
    assert samples
    assert len(set(samples)) == len(samples)


@pytest.fixture
def emitted(caplog: pytest.LogCaptureFixture) -> Iterator[Emitted]:
    """Emit to every exporter; an exporter that logs that it left something out fails the test."""
    made = Emitted()
    before, current.telemetry = current.telemetry, made.telemetry
    with caplog.at_level(logging.WARNING, "opentelemetry"):
        try:
            yield made
        finally:
            current.telemetry = before
            made.tracers.shutdown()
            made.meters.shutdown()
    logged = caplog.get_records("call")
    assert [one.getMessage() for one in logged if one.name.startswith("opentelemetry")] == []


def exercise(text: str) -> None:
    """Put a text into every place that takes one."""
    with operation(text, feed=text, breaker=text, attributes={"given": text}) as op:
        op.set_attribute("set", text)
        op.set_attribute("listed", [text, text])
        op.received(3)
        op.skipped(reason=text)
        op.failed(text, ValueError(text))
    with operation("told", feed=text) as op:
        op.fail(text)
    error = type("".join(text.split("\x00")).encode(errors="replace").decode(), (Exception,), {})
    with pytest.raises(error), operation("raised", feed=text):
        raise error(text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_anywhere_can_be_exported(emitted, text):
    """Whatever stands in names, feeds, reasons, attributes and errors, everything is exported."""
    exercise(text)
    assert len(emitted.exporter.get_finished_spans()) == 3
    emitted.assert_exportable()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_become_one_clean_bounded_line(emitted, text):
    """Span names and labels are one line of at most 200 characters, without control codes."""
    exercise(text)
    found = emitted.label_values() | {span.name for span in emitted.exporter.get_finished_spans()}
    for value in found:
        assert len(value) <= 200
        assert not CONTROL & set(value)
        value.encode()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_on_spans_is_harmless_and_bounded(emitted, text):
    """Attributes, events and status hold no escape, and no more than some thousand characters."""
    exercise(text)
    for span in emitted.exporter.get_finished_spans():
        texts = [span.status.description or ""]
        for attributes in (span.attributes, *(event.attributes for event in span.events)):
            for value in attributes.values():
                texts += value if isinstance(value, tuple) else [value]
        for one in texts:
            if isinstance(one, str):
                assert len(one) <= 4096
                assert not (CONTROL - set("\n\t")) & set(one)
                one.encode()


def test_hostile_feeds_together_can_be_exported(emitted):
    """All hostile names at once, with and without a feed, make no two Prometheus samples alike."""
    for text in HOSTILE.values():
        exercise(text)
    with operation("told"):
        pass
    emitted.assert_exportable()


def test_empty_feed_is_no_feed(emitted):
    """A feed or reason without a character is left out: Prometheus could not tell it from none."""
    for feed in (None, ""):
        with operation("store", feed=feed) as op:
            op.received(2)
            op.skipped(reason=feed)
            op.ingested(1)
    emitted.assert_exportable()


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_any_text_can_be_exported(text):
    """Any Unicode text at all, surrogates included, raises nothing and is exported."""
    made = Emitted()
    before, current.telemetry = current.telemetry, made.telemetry
    try:
        exercise(text)
        made.assert_exportable()
    finally:
        current.telemetry = before
        made.tracers.shutdown()
        made.meters.shutdown()


def test_mebibyte_message_is_bounded(emitted):
    """An exception with a message of 1 MiB leaves a bounded event and status."""
    with pytest.raises(ValueError, match="x"), operation("store"):
        raise ValueError("x" * MEBIBYTE)
    span = emitted.span()
    (event,) = span.events
    assert len(span.status.description) <= 4096
    assert all(len(value) <= 8192 for value in event.attributes.values())
    assert len(encode_spans([span]).SerializeToString()) < 32_768


def test_mebibyte_everywhere_is_bounded(emitted):
    """Names, attributes, reasons and failed items of 1 MiB leave a span of some kilobytes."""
    huge = "y" * MEBIBYTE
    with operation(huge, feed=huge, attributes={"a": huge}) as op:
        op.set_attribute("b", huge)
        op.set_attribute("c", (huge, huge))
        op.skipped(reason=huge)
        op.fail(huge)
        for _ in range(100):
            op.failed(huge, ValueError(huge))
    assert len(encode_spans([emitted.span()]).SerializeToString()) < 65_536
    emitted.assert_exportable()


def test_attribute_list_is_bounded(emitted):
    """A list of very many texts as an attribute does not make a span of megabytes."""
    with operation("store") as op:
        op.set_attribute("rows", ["z" * 100] * 50_000)
    assert len(encode_spans([emitted.span()]).SerializeToString()) < MEBIBYTE


@pytest.mark.parametrize(
    "key",
    ["\ud800", "k" * 100_000, "\x1b[31mred", "a\x00b", "two\nlines"],
    ids=lambda key: repr(key[:9]),
)
def test_hostile_attribute_keys_are_harmless(emitted, key):
    """An attribute's key is made as harmless as its value."""
    with operation("store", attributes={key: 1}) as op:
        op.set_attribute(key, 2)
    for name in emitted.span().attributes:
        assert len(name) <= 1024
        assert not CONTROL & set(name)
        name.encode()
    emitted.assert_exportable()


class _HostileError(Exception):
    """An exception none of whose own code works."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("frozen")


def test_exception_whose_own_code_raises_passes_unchanged(emitted):
    """An exception whose every method raises leaves the operation as it is, recorded."""
    error = _HostileError()
    caught: BaseException | None = None
    try:
        with operation("outer"), operation("store") as op:
            op.failed(None, error)
            raise error
    except _HostileError as passed:
        caught = passed
    assert caught is error
    assert emitted.span("store").attributes["error.type"] == "_HostileError"
    emitted.assert_exportable()


def test_exception_class_with_hostile_names_is_recorded(emitted):
    """A class whose module and name are nonsense is recorded under a clean, bounded name."""
    error = type("N\n\x1b[1m" * 500, (Exception,), {"__module__": "m\x00\n" * 500})
    with pytest.raises(error), operation("store"):
        raise error("x")
    (event,) = emitted.span().events
    assert len(event.attributes["exception.type"]) <= 200
    assert not CONTROL & set(event.attributes["exception.type"])
    assert not CONTROL & set(emitted.span().attributes["error.type"])


# --- secrets -------------------------------------------------------------------------------------


def secret_in_name() -> None:
    with operation(f"fetch {URL}"):
        pass


def secret_in_feed() -> None:
    with operation("fetch", feed=URL):
        pass


def secret_in_breaker() -> None:
    with operation("fetch", breaker=URL):
        pass


def secret_in_reason() -> None:
    with operation("fetch") as op:
        op.skipped(reason=f"see {URL}")


def secret_in_attributes() -> None:
    with operation("fetch", attributes={"url": URL, "urls": [URL], "pair": (URL, "x")}) as op:
        op.set_attribute("late", URL)
        op.set_attribute("late list", [URL])


def secret_in_nested_attribute() -> None:
    with operation("fetch") as op:
        op.set_attribute("nested", [["deep", URL]])  # type: ignore[list-item]


def secret_in_mapping_attribute() -> None:
    with operation("fetch", attributes={"request": {"url": URL}}):  # type: ignore[dict-item]
        pass


def secret_in_bytes_attribute() -> None:
    with operation("fetch") as op:
        op.set_attribute("url", URL.encode())  # type: ignore[arg-type]


class _UrlObject:
    def __str__(self) -> str:
        return URL


def secret_in_object_attribute() -> None:
    with operation("fetch") as op:
        op.set_attribute("url", _UrlObject())  # type: ignore[arg-type]


def secret_in_set_attribute() -> None:
    with operation("fetch") as op:
        op.set_attribute("urls", {URL})  # type: ignore[arg-type]


def secret_in_key() -> None:
    with operation("fetch") as op:
        op.set_attribute(URL, 1)


def secret_in_message() -> None:
    with pytest.raises(ConnectionError), operation("outer"), operation("fetch"):
        raise ConnectionError(f"cannot reach {URL}")


def secret_in_cause() -> None:
    def connect() -> None:
        try:
            raise OSError(f"refused {URL}")
        except OSError as error:
            raise RuntimeError("no feed") from error

    with pytest.raises(RuntimeError), operation("fetch"):
        connect()


def secret_in_failure() -> None:
    with operation("fetch") as op:
        op.fail(f"cannot reach {URL}")
    with operation("fetch") as op:
        op.fail(ValueError(f"cannot reach {URL}"))


def secret_in_failed_item() -> None:
    with operation("fetch") as op:
        op.failed({"url": URL}, ValueError(f"cannot reach {URL}"))


def secret_in_group() -> None:
    with pytest.raises(ExceptionGroup), operation("fetch"):
        raise ExceptionGroup(URL, [ValueError(URL), OSError(URL)])


def secret_in_note() -> None:
    error = ValueError("x")
    error.add_note(f"while fetching {URL}")
    with pytest.raises(ValueError, match="x"), operation("fetch"):
        raise error


PLACES = [value for name, value in list(globals().items()) if name.startswith("secret_in_")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.filterwarnings("ignore")
def test_no_secret_reaches_telemetry(place, caplog):
    """The password and the API key of a URL reach no span, event, status, label, page or log."""
    made = Emitted()
    before, current.telemetry = current.telemetry, made.telemetry
    try:
        with caplog.at_level(logging.DEBUG):
            place()
            assert SECRET not in made.everything()
        assert SECRET not in caplog.text
    finally:
        current.telemetry = before
        made.tracers.shutdown()
        made.meters.shutdown()


def test_indicators_stay_readable(emitted):
    """What is no secret stays: domains, hashes and file names that only sound like one."""
    for indicator in (
        "auth-paypal-login.example",
        "https://token-service.example/session/login.php?id=7",
        "d41d8cd98f00b204e9800998ecf8427e",
        "secret_token_stealer.exe",
    ):
        with operation("store", feed=indicator) as op:
            op.set_attribute("indicator", indicator)
            op.fail(ValueError(f"bad row: {indicator}"))
        span = emitted.exporter.get_finished_spans()[-1]
        assert span.attributes["indicator"] == indicator
        assert span.attributes["threat.feed.name"] == indicator
        assert indicator in span.status.description


def test_stack_text_holds_no_values(emitted):
    """The stack text names files, lines and functions, and no argument or local variable."""

    def parse(payload: str) -> None:
        token = payload.upper()
        raise KeyError("row 7") from ValueError(len(token))

    with pytest.raises(KeyError), operation("store"):
        parse("top-payload-content")
    (event,) = emitted.span().events
    stack = event.attributes["exception.stacktrace"]
    assert "test_hostile.py" in stack
    assert "parse" in stack
    assert "payload-content" not in stack.lower()
    assert "payload.upper" not in stack  # no source lines either: they may hold literals


def test_stack_text_of_deep_recursion_is_bounded(emitted):
    """A recursion of hundreds of frames leaves some kilobytes of stack text."""

    def down(depth: int) -> None:
        if depth == 0:
            raise LookupError("bottom")
        down(depth - 1)

    with pytest.raises(LookupError), operation("store"):
        down(400)
    (event,) = emitted.span().events
    stack = event.attributes["exception.stacktrace"]
    assert len(stack) <= 8192
    assert "down" in stack
    assert "bottom" in stack
