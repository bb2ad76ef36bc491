"""The model that ships with mmjax, and its media: pictures and videos of colored shapes, recordings of spoken words.

`LLM("demo")` loads the model, `mmjax demo` shows what it can do, and examples/train_demo has trained it on these media.
"""

from mmjax.loader.checkpoint import DEMO as NAME
from mmjax.loader.checkpoint import DEMO_DIRECTORY as DIRECTORY

__all__ = ["DIRECTORY", "NAME"]
