"""Examines the environment: every area at once, each within its time."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY as SUPPRESS_KEY
from opentelemetry.context import attach, set_value

from periscope_otel.doctor import configuration, exporting, files, machine, page, shared
from periscope_otel.doctor.finding import Diagnosis, Finding, broken, off, said_by
from periscope_otel.doctor.program import PROGRAM
from periscope_otel.doctor.secrets import Secrets
from periscope_otel.settings import read_address, read_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from periscope_otel.settings import Address, Settings

TIMEOUT: Final = 3.0
"""Seconds that each server has to answer."""
_MORE: Final = 2.0
"""How much longer the whole may take, in timeouts: some servers are asked several times."""


class _Area(NamedTuple):
    """What is looked at in a thread of its own: a call into a driver may hang for ever."""

    check: str
    """Its first."""
    look: Callable[[], Iterable[Finding]]
    late: Callable[[], Finding] | None = None
    """What is found where it has no end."""


def examine(
    settings: Settings | None = None,
    *,
    program: str | None = None,
    inside: Callable[[], Iterable[Finding]] | None = None,
    timeout: float = TIMEOUT,
) -> Diagnosis:
    """Say what is found and what is not, with the reason and the remedy.

    The servers that are configured are asked, and nothing is changed.

    Args:
        settings: Whose; by default those of the environment.
        program: `host:port` of a running program's Prometheus page, which tells what is found
            inside of it; by default where the settings say.
        inside: Says what is found inside of this program, where it examines itself.
        timeout: Seconds that each server has to answer; the whole takes a few times that at most.

    Returns:
        The findings; `ok` says whether nothing is broken.

    Raises:
        ValueError: If `program` is no address.

    Example:
        >>> [one.message for one in examine().broken]
        []
    """
    in_use = read_environment(os.environ)[0] if settings is None else settings
    address = in_use.prometheus if program is None else read_address(program)
    _load(in_use)
    found = _in_time(_areas(in_use, address, inside, timeout), timeout)
    secrets = Secrets(in_use)
    told = [secrets.hidden(one) for one in found]
    # What a program tells of itself comes last, wherever it was asked.
    return Diagnosis(tuple(sorted(told, key=lambda one: one.check.startswith(PROGRAM))))


def _load(settings: Settings) -> None:
    """Import what is needed before threads do: a child forked in the middle waits for ever."""
    exporting.load(settings)
    for module in ("psutil", "pynvml", *(("redis",) if settings.redis_url else ())):
        with suppress(ImportError):
            import_module(module)


def _areas(
    settings: Settings,
    address: Address | None,
    inside: Callable[[], Iterable[Finding]] | None,
    timeout: float,
) -> list[_Area]:
    """Return every area, in the order in which they are told."""
    environment = dict(os.environ)

    def anywhere() -> Iterable[Finding]:
        return exporting.anywhere_findings(settings)

    areas = [
        _Area("settings.values", lambda: configuration.settings_findings(environment)),
        _Area("sdk.versions", lambda: configuration.sdk_findings(environment)),
        *(_export_area(settings, signal, timeout) for signal in exporting.SIGNALS),
        *([_Area("export.anywhere", anywhere)] if inside is None else ()),
        _Area("data_dir.folder", lambda: files.folder_findings(settings)),
        _Area(
            "redis.reached",
            lambda: shared.redis_findings(settings, timeout),
            shared.late_findings,
        ),
        _Area(
            "breakers.shared",
            lambda: shared.breaker_findings(settings, timeout),
            lambda: off("breakers.shared", "the Redis cannot be asked"),
        ),
        _Area("host.figures", machine.host_findings),
        _Area(
            "gpu.devices",
            lambda: machine.gpu_findings(settings),
            lambda: machine.hanging_gpu(settings, timeout),
        ),
    ]
    if inside is not None:
        areas.append(_Area("program.traces", inside))
    elif address is not None:
        where = _Area(
            "metrics.prometheus",
            lambda: page.page_findings(address, timeout),
            page.late_findings,
        )
        areas.insert(4, where)
    return areas


def _export_area(settings: Settings, signal: str, timeout: float) -> _Area:
    return _Area(
        f"{signal}.export",
        lambda: exporting.export_findings(settings, signal, timeout),
        lambda: exporting.late_findings(signal),
    )


class _Running:
    """An area that is being looked at."""

    def __init__(self, area: _Area) -> None:
        self.area = area
        self._findings: list[Finding] = []
        self._thread = threading.Thread(
            target=self._run, name=f"periscope-{area.check}", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        # Other instrumentations make no spans of what is asked.
        attach(set_value(SUPPRESS_KEY, True))
        try:
            for one in self.area.look():
                self._findings.append(one)
        except Exception as error:  # noqa: BLE001 - other areas' findings are worth having
            said = f"could not be looked at: {said_by(error)}"
            self._findings.append(broken(self.area.check, said, "please report it"))

    def findings(self, wait: float) -> Iterator[Finding]:
        """Give what was found, `wait` seconds from now at the latest."""
        self._thread.join(max(0.0, wait))
        ended = not self._thread.is_alive()
        yield from list(self._findings)
        if not ended and self.area.late is not None:
            yield self.area.late()
        elif not ended:
            yield broken(
                self.area.check, "has not ended in time", "try again with a longer --timeout"
            )


def _in_time(areas: Iterable[_Area], timeout: float) -> Iterator[Finding]:
    running = [_Running(area) for area in areas]
    deadline = time.monotonic() + (1 + _MORE) * timeout
    for one in running:
        yield from one.findings(deadline - time.monotonic())
