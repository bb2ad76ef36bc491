"""Converts text to tokens and back. Does not import JAX."""
