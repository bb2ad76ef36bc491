"""From decoded media and prompts to what a model consumes: one module per family, NumPy only."""
