"""Sample media under the names of vLLM's. They are generated here, so nothing is downloaded."""
