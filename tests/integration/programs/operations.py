"""Operations of a user, for replays from the command line."""

from __future__ import annotations

import os
import sys

import periscope_otel as periscope

print("imported")


@periscope.monitored("pkg.fetch")
def fetch(url: str) -> str:
    """Fail for what is evil."""
    print(f"fetching {url}")
    if "evil" in url:
        raise ValueError(f"no \x1b[31m {url}")
    return url


@periscope.monitored("pkg.refused")
def refused(url: str) -> None:
    """Fail always."""
    raise ConnectionError(url)


class Application:
    """What else is in such a module."""

    wsgi = os.name


app = Application()
assert sys.argv
