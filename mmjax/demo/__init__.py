"""The model that ships with mmjax, and what it was made to see and hear: coloured shapes, moving shapes, spoken words.

`LLM("demo")` loads it, `mmjax demo` shows it, and examples/train_demo trained it on the pictures drawn here.
"""

from mmjax.loader.checkpoint import DEMO as NAME
from mmjax.loader.checkpoint import DEMO_DIRECTORY as DIRECTORY

__all__ = ["DIRECTORY", "NAME"]
