"""Fetches and decodes media to plain arrays. Knows formats, not models; imports neither jax nor torch."""
