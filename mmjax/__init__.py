"""mmjax: multimodal inference in JAX. Text, images, video and audio in; text and embeddings out.

The public names are imported when they are first used, so that `import mmjax` costs nothing and starts no device.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.async_llm import AsyncLLM, Delta, EngineDeadError
    from mmjax.config import EngineArgs
    from mmjax.llm import LLM
    from mmjax.speech import Speech, SpeechTask, Transcript
    from mmjax.types import (
        CompletionOutput,
        EmbeddingRequestOutput,
        PoolingParams,
        PoolingRequestOutput,
        RequestError,
        RequestOutput,
        SamplingParams,
        TextPrompt,
        TokensPrompt,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Delta",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineDeadError",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Speech",
    "SpeechTask",
    "TextPrompt",
    "TokensPrompt",
    "Transcript",
    "__version__",
]

# In a source checkout kernels/, converters/ and serve/ lie beside this folder instead of inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

_HOMES = {
    "LLM": "mmjax.llm",
    "AsyncLLM": "mmjax.async_llm",
    "Delta": "mmjax.async_llm",
    "EngineDeadError": "mmjax.async_llm",
    "EngineArgs": "mmjax.config",
    "Speech": "mmjax.speech",
    "SpeechTask": "mmjax.speech",
    "Transcript": "mmjax.speech",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "mmjax.types")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
