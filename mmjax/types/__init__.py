"""The public vocabulary of mmjax: prompts, parameters, outputs, errors. Imports neither jax nor transformers."""

from mmjax.types.errors import RequestError, RequestTypeError, TooDeepError, ValidationError, VLLMValidationError
from mmjax.types.limits import LIMIT_OPTIONS, MODALITIES, UNLIMITED, read_limit
from mmjax.types.outputs import (
    FINISH_REASONS,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SampleLogprobs,
)
from mmjax.types.prompts import (
    EmbedsPrompt,
    ExplicitEncoderDecoderPrompt,
    MultiModalDataDict,
    MultiModalUUIDDict,
    PromptType,
    SingletonPrompt,
    TextPrompt,
    TokensPrompt,
)
from mmjax.types.sampling import PoolingParams, RequestOutputKind, SamplingParams

__all__ = [
    "FINISH_REASONS",
    "LIMIT_OPTIONS",
    "MODALITIES",
    "UNLIMITED",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EmbedsPrompt",
    "ExplicitEncoderDecoderPrompt",
    "Logprob",
    "MultiModalDataDict",
    "MultiModalUUIDDict",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptLogprobs",
    "PromptType",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RequestTypeError",
    "SampleLogprobs",
    "SamplingParams",
    "SingletonPrompt",
    "TextPrompt",
    "TokensPrompt",
    "TooDeepError",
    "VLLMValidationError",
    "ValidationError",
    "read_limit",
]
