"""What users call: `LLM`, `AsyncLLM`, transcription."""
