"""Names that scripts import from vLLM's package of this name. Their code lies elsewhere."""
