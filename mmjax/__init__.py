"""mmjax: multimodal inference in JAX. Text, images, video and audio in; text and embeddings out.

The public names are imported when they are first used, so `import mmjax` is fast and starts no device.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mmjax.version import __version__

if TYPE_CHECKING:
    from mmjax.config import EngineArgs
    from mmjax.entrypoints.async_llm import AsyncLLM, EngineDeadError
    from mmjax.entrypoints.llm import LLM
    from mmjax.entrypoints.metrics import EngineMetrics
    from mmjax.entrypoints.transcription import Speech, SpeechTask, Transcript
    from mmjax.outputs.completion import Delta
    from mmjax.types import (
        CompletionOutput,
        EmbeddingRequestOutput,
        PoolingParams,
        PoolingRequestOutput,
        RequestError,
        RequestOutput,
        SamplingParams,
        ScoringRequestOutput,
        TextPrompt,
        TokensPrompt,
    )

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Delta",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineDeadError",
    "EngineMetrics",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "Speech",
    "SpeechTask",
    "TextPrompt",
    "TokensPrompt",
    "Transcript",
    "__version__",
]

# In a source checkout, kernels/, converters/ and serve/ are beside this folder instead of inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

_MODULES = {  # of the names that are not in mmjax.types
    "LLM": "mmjax.entrypoints.llm",
    "AsyncLLM": "mmjax.entrypoints.async_llm",
    "Delta": "mmjax.outputs.completion",
    "EngineDeadError": "mmjax.entrypoints.async_llm",
    "EngineArgs": "mmjax.config",
    "EngineMetrics": "mmjax.entrypoints.metrics",
    "Speech": "mmjax.entrypoints.transcription",
    "SpeechTask": "mmjax.entrypoints.transcription",
    "Transcript": "mmjax.entrypoints.transcription",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "mmjax.types")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
