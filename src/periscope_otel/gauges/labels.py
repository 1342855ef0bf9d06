"""What the platform calls its devices, made fit for an attribute of a metric.

Names of interfaces, devices and mount points are bytes that somebody has chosen. What is not UTF-8
comes to Python as lone surrogates, which neither OTLP nor a Prometheus page can carry: one such
name would cost all the figures that are sent with it.
"""

from __future__ import annotations

from typing import Final

LONGEST: Final = 200
"""Characters of a label at most."""

_UNKNOWN: Final = "\N{REPLACEMENT CHARACTER}"
_CUT: Final = "…"


def label(name: str) -> str:
    r"""Return a name of the platform as it may be told.

    Args:
        name: As Python has it from the platform; bytes that are no UTF-8 are surrogates in it.

    Returns:
        The name with a replacement character for each that cannot be printed, cut to its limit.

    Example:
        >>> label("eth0"), label("usb\udcff")
        ('eth0', 'usb\ufffd')
    """
    if not name.isprintable():
        name = "".join(one if one.isprintable() else _UNKNOWN for one in name)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + _CUT
