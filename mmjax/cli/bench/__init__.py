"""`mmjax bench`: an engine measured on random inputs, and a client that measures a server."""

CHAT, COMPLETIONS, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/completions", "/v1/audio/transcriptions"
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""Metrics of `mmjax bench serve`: name -> (abbreviation, heading)."""
GOALS = ("ttft", "tpot", "e2el")
"""Those that a request can miss, for its goodput."""
