"""Names that scripts for vLLM import from its package of this name. Their code is elsewhere."""
