"""Operations whose failed payload, or failed items, become dead letters."""

from periscope_otel.lettered.operation import LetteredOperation
from periscope_otel.lettered.payload import Call
from periscope_otel.lettered.policy import LetterPolicy, policy_of

__all__ = ["Call", "LetterPolicy", "LetteredOperation", "policy_of"]
