"""What the unit tests share: no example that is made up fails by how long it has taken."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine stops any test for seconds, also in the middle of an example. Whatever else was
# chosen, as hypothesis does by itself where CI is set, stays.
settings.register_profile(
    "however long it takes",
    settings(),
    deadline=None,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("however long it takes")
