"""Names that scripts for vLLM import from its folder of this name. What they stand for lives in other rooms."""
