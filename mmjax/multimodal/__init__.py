"""Media as people hand them over, to plain arrays: knows formats, not models. Imports neither jax nor torch."""
