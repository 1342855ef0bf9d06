"""Saying once why a figure is absent."""

from __future__ import annotations

import logging

from periscope_otel.redaction import clean_name

logger = logging.getLogger("periscope_otel")


class Absences:
    """Figures that could not be read; each is a log line once, not at every reading."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, figure: str, error: Exception | None) -> None:
        """Say that a figure could not be read, unless that was said before.

        Args:
            figure: A fixed text.
            error: Why; what a platform simply does not have is no line.
        """
        if isinstance(error, (AttributeError, NotImplementedError)):
            return
        why = f"{type(error).__name__}: {clean_name(error)}"
        self.say_once(figure, f"{figure}: cannot be read, and absent while that is so ({why})")

    def say_once(self, figure: str, line: str) -> None:
        """Log this line about a figure, unless one was."""
        if figure not in self._said:
            self._said.add(figure)
            logger.warning("host gauges: %s", line)
