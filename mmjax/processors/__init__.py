"""Arrays and tokens to what a model consumes; one module per family, NumPy only."""
