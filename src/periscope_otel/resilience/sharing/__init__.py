"""Breakers' verdicts, shared between processes through a Redis."""
