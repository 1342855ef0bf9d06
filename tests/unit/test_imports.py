"""The contracts of imports: a light front door, and rooms that import only from below."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import grimp
import pytest

import periscope_otel

HEAVY = (
    "redis",
    "rich",
    "typer",
    "psutil",
    "pynvml",
    "grpc",
    "opentelemetry.sdk",
    "opentelemetry.exporter",
    "prometheus_client",
    "wrapt",
    "msgspec",
    "requests",
    "httpx",
    "asyncio",
    "multiprocessing",
)

# DESIGN §2 from top to bottom; rooms on one line may import each other. What the design does not
# name stands with the room that it is part of: `scope` makes operations, `progress` serves
# `op.track`, `patching` is `monitor_function`, `report` says where telemetry went.
ROOMS = (
    ("cli",),
    ("testing", "pytest_plugin"),
    ("instrumentor", "instrumentations"),
    ("runtime",),
    ("doctor",),
    ("monitor",),
    ("server",),
    ("replay",),
    ("patching",),
    ("monitored", "generators"),
    ("scope", "attempts"),
    ("call_site", "guarded"),
    ("lettered",),
    ("operation", "registry", "progress"),
    ("ending",),
    ("dead_letter",),
    ("items",),
    ("resilience",),
    ("gauges",),
    ("redis_link",),
    ("telemetry",),
    ("report",),
    ("failure",),
    ("error_text",),
    ("settings",),
    ("redaction",),
    ("async_generators",),
    ("guard",),
    ("version",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": ""},
    )


def modules_after(code: str) -> set[str]:
    done = python(code + "\nimport sys; print('\\n'.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def loaded_by_import() -> set[str]:
    """The modules that `import periscope_otel` loads."""
    return modules_after("import periscope_otel")


@pytest.mark.parametrize("package", HEAVY)
def test_import_loads_nothing_heavy(loaded_by_import, package):
    """`import periscope_otel` loads no package that only some users need."""
    # What the OpenTelemetry API loads by itself costs nobody anything more.
    already = modules_after("import opentelemetry.trace, opentelemetry.metrics")
    found = [
        name
        for name in loaded_by_import - already
        if name == package or name.startswith(package + ".")
    ]
    assert found == []


def test_import_starts_nothing():
    """Importing starts no thread, takes no signal and says nothing."""
    done = python(
        """
        import signal, threading
        before = signal.getsignal(signal.SIGTERM)
        import periscope_otel, periscope_otel.runtime
        assert threading.active_count() == 1
        assert signal.getsignal(signal.SIGTERM) is before
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", periscope_otel.__all__)
def test_public_name_can_be_imported(name):
    """Every name in `__all__` can be imported, alone and first."""
    done = python(f"from periscope_otel import {name}; assert {name} is not None")
    assert done.returncode == 0, done.stderr


def test_star_import_has_all_public_names():
    """`from periscope_otel import *` gives exactly the public names."""
    done = python(
        """
        from periscope_otel import *
        import periscope_otel
        assert set(periscope_otel.__all__) <= set(globals())
        assert sorted(periscope_otel.__all__) == sorted(dir(periscope_otel))
        """
    )
    assert done.returncode == 0, done.stderr


def test_unknown_name_is_an_attribute_error():
    """A name that does not exist is the usual error, also for `hasattr` and `from … import`."""
    assert not hasattr(periscope_otel, "no_such_name")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = periscope_otel.no_such_name
    with pytest.raises(ImportError, match="no_such_name"):
        from periscope_otel import no_such_name  # noqa: F401


def test_public_names_are_the_same_objects_wherever_they_are_imported_from():
    """A late name is the object of its module, each time."""
    from periscope_otel.patching import monitor_function
    from periscope_otel.runtime import configure, shutdown

    assert periscope_otel.configure is configure
    assert periscope_otel.shutdown is shutdown
    assert periscope_otel.monitor_function is monitor_function


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Which module imports which, at run time: imports for type checking do not count."""
    return grimp.build_graph("periscope_otel", cache_dir=None, exclude_type_checking_imports=True)


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_room(graph):
    """Each module of the package belongs to a room of the design."""
    rooms = {room_of(module) for module in graph.modules if "." in module}
    assert rooms <= set(LEVEL), rooms - set(LEVEL)


def test_rooms_import_only_from_below(graph):
    """A module imports only from rooms below its own, never upward."""
    upward = {
        f"{module} -> {imported}"
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if "." in module
        and "." in imported
        and room_of(module) != room_of(imported)
        and LEVEL[room_of(imported)] < LEVEL[room_of(module)]
    }
    assert upward == set()


def test_nothing_imports_the_front_door(graph):
    """No module imports names from the package itself: that is for users."""
    for module in graph.modules - {"periscope_otel"}:
        assert "periscope_otel" not in graph.find_modules_directly_imported_by(module), module


def test_server_knows_no_part_that_it_serves(graph):
    """The endpoint takes callables: it imports neither monitor nor telemetry."""
    imported = {
        room_of(one) for one in graph.find_upstream_modules("periscope_otel.server") if "." in one
    }
    assert not imported & {"monitor", "telemetry", "runtime", "operation"}


@pytest.mark.parametrize("package", ["redis", "pynvml", "msgspec", "typer", "rich"])
def test_runtime_loads_only_what_it_wires(package):
    """`configure()` without arguments loads no package of a part that is not used."""
    found = modules_after("import periscope_otel; periscope_otel.configure(exit_report='never')")
    assert package not in found
    assert "grpc" not in found
