"""Text to tokens and back. Imports no jax."""
