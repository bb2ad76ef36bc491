"""Converts text to tokens and back. Imports no jax."""
