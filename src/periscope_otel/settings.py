"""Typed settings: a keyword of `configure()` wins over `PERISCOPE_*`, which wins over the default.

What OpenTelemetry has a standard variable for is not repeated here: all `OTEL_*` keep their
meaning.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from periscope_otel import guard
from periscope_otel.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PREFIX = "PERISCOPE_"
DEFAULT_PROMETHEUS = "127.0.0.1:9464"
_OF_SCRIPTS = ("PERISCOPE_VENV", "PERISCOPE_BENCH_CACHE", "PERISCOPE_STACK_CACHE")
"""Variables of this project's own scripts, set where it is tested: no settings, no mistakes."""
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off", "none")


class SettingsError(ValueError):
    """A setting has a value that it cannot have; the message names it, the value and what fits."""


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Setting(NamedTuple):
    """One setting: how it is read and what it means."""

    name: str
    default: Any
    read: Callable[[Any], Any]
    expected: str
    description: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return PREFIX + self.name.upper()


class Settings(NamedTuple):
    """All settings, read and checked."""

    service_name: str | None
    otlp_endpoint: str | None
    otlp_protocol: str | None
    prometheus: Address | None
    label_limit: int
    shutdown_timeout: float
    exit_report: str
    dead_letters: bool | None
    data_dir: str | None
    redis_url: str | None
    dead_letter_inline_limit: int
    dead_letter_file_limit: int
    dead_letter_headers: tuple[str, ...]
    jaeger_url: str | None
    breaker_sharing: bool
    breaker_spans: bool | None
    record_client_spans: bool
    gauges: tuple[str, ...]
    gauges_interval: float


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        raise TypeError
    return value.strip() or None


def _endpoint(value: Any) -> str | None:
    text = _text(value)
    if text is None:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError
    _ = parts.port  # raises where it is no number
    return text


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def read(value: Any) -> str | None:
        text = _text(value)
        if text is not None and text.lower() not in choices:
            raise ValueError
        return None if text is None else text.lower()

    return read


def _whole_number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise ValueError
        return number

    return read


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        seconds = float(value)
        if not low <= seconds <= high:  # false for NaN too
            raise ValueError
        return seconds

    return read


def _switch(value: Any) -> bool:
    text = value.strip().lower() if isinstance(value, str) else value
    if text is True or text in _TRUE:
        return True
    if text is False or text in _FALSE:
        return False
    raise ValueError


def _folder(value: Any) -> str | None:
    text = _text(os.fspath(value))
    return None if text is None else os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def _redis(value: Any) -> str | None:
    text = _text(value)
    if text is None:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError
    _ = parts.port  # raises where it is no number
    return text


def _names(value: Any) -> tuple[str, ...]:
    texts = value.split(",") if isinstance(value, str) else value
    return tuple(text for text in map(_text, texts) if text)


def read_address(value: Any) -> Address | None:
    """Return where to listen: True is the usual address, a text is `host:port`.

    Raises:
        ValueError: If it is neither.
    """
    if value is True or (isinstance(value, str) and value.strip().lower() in _TRUE):
        value = DEFAULT_PROMETHEUS
    if value is False or (isinstance(value, str) and value.strip().lower() in _FALSE):
        return None
    parts = urlsplit(f"//{value.strip()}") if isinstance(value, str) else None
    if parts is None or parts.port is None or parts.path or parts.username:
        raise ValueError
    return Address(parts.hostname or "127.0.0.1", parts.port)


GAUGE_HOST, GAUGE_GPU, GAUGE_PER_CPU = GAUGES = ("host", "gpu", "per_cpu")
"""What gauges there are."""


def read_gauges(value: Any) -> tuple[str, ...]:
    """Return which gauges a value asks for: True is host and GPU, a text may name several.

    Raises:
        TypeError: If it is neither truth nor names.
        ValueError: If it names others.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        value = text in _TRUE if text in (*_TRUE, *_FALSE) else text.replace(",", " ").split()
    if isinstance(value, bool):
        return (GAUGE_HOST, GAUGE_GPU) if value else ()
    chosen = set(value)
    if not chosen <= set(GAUGES):
        raise ValueError(f"gauges={sorted(map(str, chosen))}: expected some of {', '.join(GAUGES)}")
    if GAUGE_PER_CPU in chosen:
        chosen.add(GAUGE_HOST)
    return tuple(one for one in GAUGES if one in chosen)


SETTINGS: tuple[Setting, ...] = (
    Setting("service_name", None, _text, "a text", "`service.name`; else `OTEL_SERVICE_NAME`."),
    Setting(
        "otlp_endpoint",
        None,
        _endpoint,
        "a URL such as http://localhost:4318",
        "Where OTLP goes; else `OTEL_EXPORTER_OTLP_ENDPOINT`, else nowhere.",
    ),
    Setting(
        "otlp_protocol",
        None,
        _one_of("grpc", "http/protobuf"),
        "grpc or http/protobuf",
        "Else `OTEL_EXPORTER_OTLP_PROTOCOL`; else gRPC on port 4317 and HTTP elsewhere.",
    ),
    Setting(
        "prometheus",
        None,
        read_address,
        "true, false or an address such as 127.0.0.1:9464",
        "Where `/metrics` listens; `true` is 127.0.0.1:9464. Off by default.",
    ),
    Setting(
        "label_limit",
        1500,
        _whole_number(1, 1500),
        "a whole number from 1 to 1500",
        "Label sets of one instrument before further values become `other`.",
    ),
    Setting(
        "shutdown_timeout",
        5.0,
        _seconds(0.0, 3600.0),
        "seconds from 0 to 3600",
        "Time at the end of the process in which everything is flushed.",
    ),
    Setting(
        "exit_report",
        "always",
        _one_of("always", "loss", "never"),
        "always, loss or never",
        "When the end of the process says in one line what was exported: `loss` only if something "
        "was not.",
    ),
    Setting(
        "dead_letters",
        None,
        _switch,
        "true or false",
        "`true` opens the dead-letter queue at once, `false` keeps none; else it is opened when an "
        "operation wants it.",
    ),
    Setting(
        "data_dir",
        None,
        _folder,
        "the path of a folder",
        "Where dead letters are kept; else `$XDG_STATE_HOME/periscope-otel`.",
    ),
    Setting(
        "redis_url",
        None,
        _redis,
        "a URL such as redis://localhost:6379/0, rediss://… or unix://…",
        "Where dead letters are moved to; else they stay in `data_dir`.",
    ),
    Setting(
        "dead_letter_inline_limit",
        8 << 20,
        _whole_number(1024, 64 << 20),
        "bytes from 1024 to 67108864",
        "Bytes of a payload, compressed, above which it is a file of its own in `data_dir`.",
    ),
    Setting(
        "dead_letter_file_limit",
        1 << 30,
        _whole_number(1 << 20, 1 << 40),
        "bytes from 1 MiB to 1 TiB",
        "Bytes that the file of dead letters on this machine may grow to.",
    ),
    Setting(
        "dead_letter_headers",
        (),
        _names,
        "names, separated by commas",
        "Entries of the OpenTelemetry baggage that a dead letter carries along.",
    ),
    Setting(
        "jaeger_url",
        None,
        _endpoint,
        "a URL such as http://localhost:16686",
        "Where `periscope dlq show` finds the trace of a dead letter.",
    ),
    Setting(
        "breaker_sharing",
        True,
        _switch,
        "true or false",
        "Whether processes that share `redis_url` share what their breakers find.",
    ),
    Setting(
        "breaker_spans",
        None,
        _switch,
        "true or false",
        "Whether client spans of other instrumentations (httpx, requests, redis …) are recorded on "
        "the breaker of their host. By default where `configure()` builds the TracerProvider.",
    ),
    Setting(
        "record_client_spans",
        False,
        _switch,
        "true or false",
        "Whether these spans are recorded for the breakers also where their trace is not sampled; "
        "they are not exported then.",
    ),
    Setting(
        "gauges",
        (),
        read_gauges,
        "true, false or some of host, gpu and per_cpu",
        "Host and GPU figures; `true` is host and gpu. Off by default.",
    ),
    Setting(
        "gauges_interval",
        5.0,
        _seconds(0.1, 86_400.0),
        "seconds from 0.1 to 86400",
        "Time between two readings of host and GPU figures.",
    ),
)


def load(keywords: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Read all settings.

    Args:
        keywords: What `configure()` was given; None means not given.
        environment: `os.environ` by default.

    Raises:
        SettingsError: If a value does not fit; the first one found.

    Example:
        >>> load({"prometheus": True}, {}).prometheus.port
        9464
    """
    environment = os.environ if environment is None else environment
    _warn_of_unknown(environment)
    return Settings(**{one.name: _value_of(one, keywords, environment) for one in SETTINGS})


def _value_of(setting: Setting, keywords: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    given = keywords.get(setting.name)
    if given is not None:
        return _read(setting, setting.name, given)
    text = environment.get(setting.variable)
    if text is not None and text.strip():
        return _read(setting, setting.variable, text)
    return setting.default


def _read(setting: Setting, source: str, value: Any) -> Any:
    try:
        return setting.read(value)
    except (TypeError, ValueError, OverflowError, OSError):
        shown = redact(repr(without_credentials(value)), 80)
        raise SettingsError(f"{source}={shown}: expected {setting.expected}") from None


def read_environment(environment: Mapping[str, str]) -> tuple[Settings, list[SettingsError]]:
    """Return what an environment says, and each variable of it that cannot be read.

    Args:
        environment: Variables; those that cannot be read count as not set.
    """
    values: dict[str, Any] = {}
    unreadable: list[SettingsError] = []
    for one in SETTINGS:
        try:
            values[one.name] = _value_of(one, {}, environment)
        except SettingsError as error:
            unreadable.append(error)
            values[one.name] = one.default
    return Settings(**values), unreadable


def unknown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Return each variable that is named like a setting and is none, and what may be meant."""
    known = [setting.variable for setting in SETTINGS]
    for variable in environment:
        if variable.startswith(PREFIX) and variable not in (*known, *_OF_SCRIPTS):
            import difflib  # for a mistake alone

            names = [one.removeprefix(PREFIX) for one in known]
            near = difflib.get_close_matches(variable.removeprefix(PREFIX).upper(), names, n=1)
            yield variable, f"{PREFIX}{near[0]}" if near else None


def without_credentials(value: object) -> object:
    """Return a text in which nothing stands before an `@`: it may be a mistaken URL."""
    if not isinstance(value, str) or "@" not in value:
        return value
    before, _, host = value.rpartition("@")
    scheme, slashes, _ = before.rpartition("//")
    return f"{scheme}{slashes}[redacted]@{host}"


def _warn_of_unknown(environment: Mapping[str, str]) -> None:
    for variable, near in unknown_variables(environment):
        hint = f"; did you mean {near}?" if near else ""
        guard.warn(f"variable {variable}", "%s is no setting of periscope-otel%s", variable, hint)


def differences(one: Settings, other: Settings) -> list[str]:
    """Return what differs between two settings, as `name: old -> new`."""
    return [
        f"{name}: {redact(str(old))} -> {redact(str(new))}"
        for name, old, new in zip(Settings._fields, one, other, strict=True)
        if old != new
    ]
