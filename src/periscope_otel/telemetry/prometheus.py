"""Metrics in the Prometheus text format, made when they are asked for."""

from __future__ import annotations

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


class PrometheusPage:
    """A metric reader and the page that shows what it reads.

    A registry of its own keeps the application's `prometheus_client` metrics where they are.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.reader = PrometheusMetricReader(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Collect, and return the page and its content type, in a format that the client takes."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
