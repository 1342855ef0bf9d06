"""What `configure()` does for breakers: client spans that drive them, and other processes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from periscope_otel.resilience.breaker import breakers

if TYPE_CHECKING:
    from periscope_otel.resilience.sharing.verdicts import SharedVerdicts
    from periscope_otel.resilience.span_processor import BreakerSpanProcessor

logger = logging.getLogger("periscope_otel")


def share(redis_url: str) -> SharedVerdicts:
    """Have breakers tell other processes what they find, by way of a Redis."""
    from periscope_otel.redis_link import RedisLink
    from periscope_otel.resilience.sharing.verdicts import SharedVerdicts

    verdicts = SharedVerdicts(RedisLink(redis_url), breakers)
    verdicts.start()
    breakers.share(verdicts)
    return verdicts


def end_sharing(verdicts: SharedVerdicts, timeout: float) -> None:
    """Have breakers decide alone again; tells within `timeout` seconds what is not yet told."""
    breakers.share(None)
    verdicts.close(timeout)


def drive(
    provider: Any, *, is_ours: bool, record_client_spans: bool
) -> BreakerSpanProcessor | None:
    """Have a provider's client spans drive the breakers of their hosts, as far as it lets them.

    Args:
        provider: A TracerProvider.
        is_ours: Whether `configure()` has built it, so that its sampler may be wrapped.
        record_client_spans: Whether client spans are to be seen where their trace is not sampled.

    Returns:
        What drives them; None where the provider takes no span processor.
    """
    from periscope_otel.resilience.sampler import RecordOnlySampler, check_sampler
    from periscope_otel.resilience.span_processor import BreakerSpanProcessor

    add = getattr(provider, "add_span_processor", None)
    if add is None:
        logger.warning("breaker_spans: %s takes no span processor", type(provider).__name__)
        return None
    processor = BreakerSpanProcessor()
    add(processor)
    if record_client_spans and is_ours:
        # Outside of what OTEL_TRACES_SAMPLER names, which the provider has read itself.
        provider.sampler = RecordOnlySampler(provider.sampler)
    elif not is_ours and (wrong := check_sampler(provider)) is not None:
        logger.warning("breaker_spans: %s", wrong)
    return processor
