"""Secrets that the environment holds: whatever a server or library repeats, they are not told."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from periscope_otel.doctor.finding import Finding
    from periscope_otel.settings import Settings

_HEADERS: Final = (
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
)
_URLS: Final = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
_SHORTEST: Final = 4
"""Characters of a value that is hidden wherever it stands; a shorter one is no secret."""
_MARKER: Final = "[redacted]"


class Secrets:
    """The values that are secret, however they may be spelled.

    Args:
        settings: Whose URLs may have passwords.
        environment: Whose headers and endpoints may.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        found = set(_of_headers(environment)) | set(_of_urls(settings, environment))
        found |= {unquote(one) for one in found}
        long_enough = (one for one in found if len(one) >= _SHORTEST)
        self._values = sorted(long_enough, key=len, reverse=True)

    def hidden(self, finding: Finding) -> Finding:
        """Return a finding that tells none of them."""
        remedy = None if finding.remedy is None else self._hide(finding.remedy)
        return finding._replace(message=self._hide(finding.message), remedy=remedy)

    def _hide(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, _MARKER)
        return text


def _of_headers(environment: Mapping[str, str]) -> Iterator[str]:
    for variable in _HEADERS:
        for pair in environment.get(variable, "").split(","):
            value = pair.partition("=")[2].strip()
            yield value
            yield from unquote(value).split()  # as in `Bearer …`


def _of_urls(settings: Settings, environment: Mapping[str, str]) -> Iterator[str]:
    proxies = (value for name, value in environment.items() if name.lower().endswith("_proxy"))
    urls: Iterable[str | None] = (
        settings.otlp_endpoint,
        settings.redis_url,
        settings.jaeger_url,
        *(environment.get(variable) for variable in _URLS),
        environment.get("PERISCOPE_REDIS_URL"),
        *proxies,
    )
    for url in urls:
        user, colon, password = (url or "").rpartition("@")[0].rpartition("//")[2].partition(":")
        secret = password if colon else user
        yield secret
        yield from re.split("[/?#@:]", secret)  # what is left of it where it splits a URL
