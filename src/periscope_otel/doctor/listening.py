"""What exporters say of a failure: by their log, and over HTTP by what the session meets."""

from __future__ import annotations

import logging
import os
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_OTLP = "opentelemetry.exporter.otlp.proto"
_MODULES = {
    True: (
        f"{_OTLP}.grpc.exporter",
        f"{_OTLP}.grpc.trace_exporter",
        f"{_OTLP}.grpc.metric_exporter",
    ),
    False: (f"{_OTLP}.http.trace_exporter", f"{_OTLP}.http.metric_exporter", "requests"),
}
_changing = threading.Lock()


def load(*, is_grpc: bool) -> None:
    """Import what an exporter needs: a child forked in the middle of an import waits for ever."""
    for module in _MODULES[is_grpc]:
        import_module(module)


class Listener(logging.Filter):
    """Hears what exporters log in this thread, while it is entered; nobody else does.

    A filter in front of the others: the SDK's own drops a record that is like the one before it,
    though that was about another destination.

    Args:
        is_grpc: Whether the exporter is one by gRPC.
    """

    def __init__(self, *, is_grpc: bool) -> None:
        super().__init__()
        load(is_grpc=is_grpc)  # its loggers are there from then on
        self.said: list[str] = []
        self._thread = threading.get_ident()
        self._loggers = [
            logging.getLogger(name)
            for name in tuple(logging.root.manager.loggerDict)
            if name.startswith("opentelemetry")
        ]

    def __enter__(self) -> Self:
        with _changing:
            for logger in self._loggers:  # new lists: others may be going through these
                logger.filters = [self, *logger.filters]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _changing:
            for logger in self._loggers:
                logger.filters = [one for one in logger.filters if one is not self]

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record of this thread to itself."""
        if record.thread != self._thread:
            return True
        error = record.exc_info[1] if record.exc_info else None
        self.said.append(record.getMessage())
        if error is not None:
            self.said.append(repr(error))
        return False

    def session(self, signal: str) -> dict[str, Any]:
        """Return the argument that has an exporter by HTTP use a session that tells its errors.

        Args:
            signal: `traces` or `metrics`; nothing is returned where the environment names what
                makes the session.
        """
        variables = ("", f"_{signal.upper()}")
        if any(
            os.environ.get(f"OTEL_PYTHON_EXPORTER_OTLP_HTTP{one}_CREDENTIAL_PROVIDER")
            for one in variables
        ):
            return {}
        import requests

        said = self.said

        class Session(requests.Session):
            """One that tells what it meets: an exporter that gives up does not."""

            def send(self, request: Any, **options: Any) -> Any:
                try:
                    return super().send(request, **options)
                except Exception as error:
                    said.append(repr(error))
                    raise

        return {"session": Session()}
