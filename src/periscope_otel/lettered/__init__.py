"""Operations whose failed payload, or failed items, become dead letters."""

from periscope_otel.lettered.policy import Call, LetterPolicy, policy_of

__all__ = ["Call", "LetterPolicy", "policy_of"]
