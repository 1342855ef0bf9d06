"""The contracts of the settings: keyword, then `PERISCOPE_*`, then default; one clear error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from periscope_otel import settings as settings_module
from periscope_otel.settings import SETTINGS, Address, SettingsError, differences, load

DEFAULTS = {
    "service_name": None,
    "otlp_endpoint": None,
    "otlp_protocol": None,
    "prometheus": None,
    "label_limit": 1500,
    "shutdown_timeout": 5.0,
    "exit_report": "always",
    "dead_letters": None,
    "data_dir": None,
    "redis_url": None,
    "dead_letter_inline_limit": 8 << 20,
    "dead_letter_file_limit": 1 << 30,
    "dead_letter_headers": (),
    "jaeger_url": None,
    "breaker_sharing": True,
    "breaker_spans": None,
    "record_client_spans": False,
    "gauges": (),
    "gauges_interval": 5.0,
}


def test_defaults():
    """Without keywords and environment every setting has its default: nothing uses the network."""
    assert load({}, {})._asdict() == DEFAULTS


@pytest.mark.parametrize(
    ("name", "given_value", "text", "expected"),
    [
        ("service_name", "feeds", " feeds ", "feeds"),
        ("otlp_endpoint", "http://c:4318", " http://c:4318", "http://c:4318"),
        ("otlp_endpoint", "https://[::1]:4317/x", "https://[::1]:4317/x", "https://[::1]:4317/x"),
        ("otlp_protocol", "grpc", "GRPC", "grpc"),
        ("otlp_protocol", "http/protobuf", "HTTP/protobuf", "http/protobuf"),
        ("prometheus", True, "true", Address("127.0.0.1", 9464)),
        ("prometheus", True, "1", Address("127.0.0.1", 9464)),
        ("prometheus", False, "off", None),
        ("prometheus", "0.0.0.0:80", "0.0.0.0:80", Address("0.0.0.0", 80)),
        ("prometheus", ":9000", ":9000", Address("127.0.0.1", 9000)),
        ("prometheus", "[::1]:9464", "[::1]:9464", Address("::1", 9464)),
        ("label_limit", 7, "7", 7),
        ("shutdown_timeout", 2, "2", 2.0),
        ("shutdown_timeout", 0.5, "0.5", 0.5),
        ("exit_report", "never", "Never", "never"),
        ("dead_letters", True, "on", True),
        ("dead_letters", False, "No", False),
        ("data_dir", Path("/var/lib/feeds"), " /var/lib/feeds", "/var/lib/feeds"),
        ("redis_url", "redis://r:6379/1", "redis://r:6379/1 ", "redis://r:6379/1"),
        ("redis_url", "unix:///run/r.sock", "unix:///run/r.sock", "unix:///run/r.sock"),
        ("dead_letter_inline_limit", 4096, "4096", 4096),
        ("dead_letter_file_limit", 1 << 20, "1048576", 1 << 20),
        ("dead_letter_headers", ["tenant", "case"], "tenant, case", ("tenant", "case")),
        ("jaeger_url", "http://j:16686", "http://j:16686", "http://j:16686"),
        ("breaker_sharing", False, "off", False),
        ("breaker_spans", True, "yes", True),
        ("record_client_spans", True, "1", True),
        ("gauges_interval", 30, "30", 30.0),
        ("gauges", True, "true", ("host", "gpu")),
        ("gauges", False, "off", ()),
        ("gauges", {"gpu"}, "GPU", ("gpu",)),
        ("gauges", ["gpu", "host"], " gpu,host ", ("host", "gpu")),
        ("gauges", {"per_cpu"}, "per_cpu", ("host", "per_cpu")),
    ],
)
def test_keyword_and_variable_are_read_alike(name, given_value, text, expected):
    """A setting has the same value whether it is given as keyword or as text in the environment."""
    variable = f"PERISCOPE_{name.upper()}"
    assert getattr(load({name: given_value}, {}), name) == expected
    assert getattr(load({}, {variable: text}), name) == expected
    assert load({name: given_value}, {})._asdict() == {**DEFAULTS, name: expected}


def test_keyword_wins_over_the_environment():
    """A keyword wins over the variable, also where it is False or 0; None means not given."""
    environment = {
        "PERISCOPE_PROMETHEUS": "true",
        "PERISCOPE_SHUTDOWN_TIMEOUT": "9",
        "PERISCOPE_SERVICE_NAME": "env",
    }
    loaded = load({"prometheus": False, "shutdown_timeout": 0, "service_name": None}, environment)
    assert loaded.prometheus is None
    assert loaded.shutdown_timeout == 0.0
    assert loaded.service_name == "env"


@pytest.mark.parametrize("name", DEFAULTS)
def test_blank_variable_is_not_set(name):
    """A variable that is empty or blank counts as not set."""
    for blank in ("", "  "):
        assert load({}, {f"PERISCOPE_{name.upper()}": blank})._asdict() == DEFAULTS


def test_process_environment_is_the_default(monkeypatch):
    """Where no environment is given it is the process's own."""
    monkeypatch.setenv("PERISCOPE_SERVICE_NAME", "from the process")
    assert load({}).service_name == "from the process"


BAD = [
    ("otlp_endpoint", "localhost:4317"),
    ("otlp_endpoint", "ftp://host"),
    ("otlp_endpoint", "http://"),
    ("otlp_endpoint", "http://host:port"),
    ("otlp_endpoint", "http://[::1"),
    ("otlp_protocol", "http/json"),
    ("prometheus", "9464"),
    ("prometheus", "host"),
    ("prometheus", "host:99999"),
    ("prometheus", "host:1/metrics"),
    ("prometheus", "user@host:1"),
    ("label_limit", "many"),
    ("label_limit", "0"),
    ("label_limit", "1501"),
    ("label_limit", "1.5"),
    ("shutdown_timeout", "soon"),
    ("shutdown_timeout", "-1"),
    ("shutdown_timeout", "nan"),
    ("shutdown_timeout", "inf"),
    ("exit_report", "sometimes"),
    ("gauges", "cpu"),
    ("gauges", "host,true"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_ill_typed_variable_is_one_clear_error(name, value):
    """The error names the variable, the value and what was expected, in one line."""
    variable = f"PERISCOPE_{name.upper()}"
    (setting,) = [one for one in SETTINGS if one.name == name]
    with pytest.raises(SettingsError) as raised:
        load({}, {variable: value})
    message = str(raised.value)
    assert message.startswith(variable)
    assert setting.expected in message
    assert "\n" not in message
    if "@" not in value:
        assert value in message
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *BAD,
        ("service_name", 3),
        ("service_name", b"feeds"),
        ("otlp_endpoint", 4317),
        ("otlp_protocol", ["grpc"]),
        ("prometheus", 9464),
        ("prometheus", 1),
        ("prometheus", ("127.0.0.1", 9464)),
        ("label_limit", True),
        ("label_limit", 2.0),
        ("shutdown_timeout", True),
        ("shutdown_timeout", []),
        ("exit_report", False),
    ],
)
def test_ill_typed_keyword_is_one_clear_error(name, value):
    """A keyword that does not fit is an error that names the keyword, and is a ValueError."""
    with pytest.raises(SettingsError, match=rf"^{name}=") as raised:
        load({name: value}, {})
    assert isinstance(raised.value, ValueError)


JUNK = st.one_of(
    st.text(max_size=30), st.integers(), st.floats(), st.booleans(), st.binary(max_size=5),
    st.lists(st.integers(), max_size=2), st.just(object()),
)  # fmt: skip


@given(name=st.sampled_from(sorted(DEFAULTS)), value=JUNK)
@example(name="shutdown_timeout", value=10**400)
@example(name="label_limit", value="9" * 5000)
@example(name="prometheus", value="a:\ud800")
@example(name="otlp_endpoint", value="http://\u2100.example")
def test_any_value_fits_or_is_a_settings_error(name, value):
    """Whatever a setting is given, it is read or refused; nothing else is ever raised."""
    try:
        told = repr(load({name: value}, {}))
    except SettingsError as refused:
        told = str(refused)
    assert told.startswith((f"{name}=", "Settings("))


def test_error_shows_no_secret():
    """A secret in a value that does not fit is not in the error."""
    for environment in (
        {"PERISCOPE_OTLP_ENDPOINT": "ftp://bob:hunter2Qx9@collector/"},
        {"PERISCOPE_PROMETHEUS": "http://bob:hunter2Qx9@host:1/"},
    ):
        with pytest.raises(SettingsError) as raised:
            load({}, environment)
        assert "hunter2Qx9" not in str(raised.value)


def test_error_is_bounded():
    """A value of a mebibyte makes no error of a mebibyte."""
    with pytest.raises(SettingsError) as raised:
        load({}, {"PERISCOPE_LABEL_LIMIT": "x" * (1 << 20)})
    assert len(str(raised.value)) < 300


def test_unknown_variable_is_one_warning(caplog):
    """A `PERISCOPE_*` variable that is no setting is warned about once, with the nearest name."""
    environment = {"PERISCOPE_LABEL_LIMT": "3", "PERISCOPE_SERVICE_NAME": "x", "OTHER": "y"}
    with caplog.at_level(logging.WARNING, "periscope_otel"):
        for _ in range(3):
            load({}, environment)
    (record,) = caplog.records
    assert "PERISCOPE_LABEL_LIMT" in record.getMessage()
    assert "PERISCOPE_LABEL_LIMIT" in record.getMessage()


@pytest.mark.parametrize("name", ["VENV", "BENCH_CACHE", "STACK_CACHE"])
def test_variables_of_the_projects_scripts_are_no_mistake(caplog, name):
    """What this project's own scripts read is not warned about where it is set for all."""
    load({}, {f"PERISCOPE_{name}": "/somewhere"})
    assert caplog.text == ""


def test_unknown_variable_shows_no_value(caplog):
    """The warning names the variable and not its value, which may be a secret."""
    load({}, {"PERISCOPE_PASSWORD": "hunter2Qx9"})
    assert "PERISCOPE_PASSWORD" in caplog.text
    assert "hunter2Qx9" not in caplog.text


def test_known_variables_are_not_warned_about(caplog):
    """Every setting's own variable is known."""
    load({}, {one.variable: "" for one in SETTINGS})
    assert caplog.records == []


def test_every_setting_is_described():
    """The table of settings has each field once, with its variable, expectation and meaning."""
    assert [one.name for one in SETTINGS] == list(DEFAULTS)
    for one in SETTINGS:
        assert one.variable == f"PERISCOPE_{one.name.upper()}"
        assert one.expected
        assert one.description.endswith(".")
        assert one.default == DEFAULTS[one.name]


def test_differences_name_what_differs_without_secrets():
    """`differences` tells old and new of each setting that differs, with secrets left out."""
    one = load({"service_name": "a", "otlp_endpoint": "http://bob:hunter2Qx9@c:4318"}, {})
    other = load({"service_name": "b", "prometheus": True}, {})
    told = differences(one, other)
    assert [line.split(":")[0] for line in told] == ["service_name", "otlp_endpoint", "prometheus"]
    assert told[0] == "service_name: a -> b"
    assert "127.0.0.1:9464" in told[2]
    assert "hunter2Qx9" not in " ".join(told)
    assert differences(one, one) == []


def test_address_prints_as_it_is_written():
    """An address prints as it would be written, IPv6 in brackets."""
    assert str(Address("127.0.0.1", 9464)) == "127.0.0.1:9464"
    assert str(Address("::1", 80)) == "[::1]:80"
    assert settings_module.load({"prometheus": str(Address("::1", 80))}, {}).prometheus == (
        "::1",
        80,
    )
