"""A running program's page, asked from outside."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Final

from periscope_otel.doctor.finding import broken, from_json, off, ok, said_by
from periscope_otel.doctor.program import PAGE, PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.settings import Address

_LONGEST: Final = 1 << 20
"""Bytes that are read of an answer."""
_MOST: Final = 200
"""Findings that are read."""
_CHECK: Final = "metrics.prometheus"
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104
"""Where to ask a program that listens on every interface."""
_ANOTHER: Final = (
    "another program has this port: stop it, or choose another one in PERISCOPE_PROMETHEUS"
)


def page_findings(address: Address, timeout: float) -> Iterator[Finding]:
    """Say what a program tells that is to listen at an address.

    Args:
        address: Its Prometheus address.
        timeout: Seconds to wait for it.
    """
    host = _LOCAL.get(address.host, address.host)
    shown = f"http://{f'[{host}]' if ':' in host else host}:{address.port}"
    try:
        status, server, body = _get(host, address.port, timeout)
    except ConnectionRefusedError:
        yield off(_CHECK, f"nothing listens at {shown} now: the program does not run")
        return
    except (OSError, HTTPException) as error:
        yield broken(_CHECK, f"{shown} does not answer as it should ({said_by(error)})", _ANOTHER)
        return
    told = _told(body)
    if status == HTTPStatus.NOT_FOUND and server.startswith("periscope-otel"):
        yield ok(_CHECK, f"a program answers at {shown}; what is in it, it tells its own machine")
        return
    if told is None:
        yield broken(_CHECK, f"what answers at {shown} is no program of ours ({status})", _ANOTHER)
        return
    yield ok(_CHECK, f"a program with periscope-otel answers at {shown}")
    yield from told


def late_findings() -> Finding:
    """Return the finding that whatever listens there neither answers nor hangs up."""
    return broken(_CHECK, "what listens there does not end its answer in time", _ANOTHER)


def _get(host: str, port: int, timeout: float) -> tuple[int, str, bytes]:
    connection = HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", PAGE, headers={"Accept": "application/json"})
        response = connection.getresponse()
        return response.status, response.getheader("Server") or "", response.read(_LONGEST)
    finally:
        connection.close()


def _told(body: bytes) -> list[Finding] | None:
    """Return the findings of a page; None if it is none of ours."""
    try:
        page = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(page, dict) or not isinstance(page.get("periscope-otel"), str):
        return None
    findings = page.get("findings")
    if not isinstance(findings, list):
        return None
    told = [found for one in findings[:_MOST] if (found := from_json(one)) is not None]
    return [one for one in told if one.check.startswith(PROGRAM)]
