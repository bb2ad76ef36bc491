"""The model that ships with mmjax, and what it was made to see and hear: coloured shapes, moving shapes, spoken words.

`LLM("demo")` loads it, `mmjax demo` shows it, and examples/train_demo trained it on the pictures drawn here.
"""

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent / "model"
"""Where the checkpoint lies: the layout of any Qwen2.5-Omni directory."""

NAME = "demo"
"""What the model is called where a directory or a hub id is asked for."""
