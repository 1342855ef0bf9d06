"""Breakers and retries: a failing dependency is left alone, and retries never make it worse."""
