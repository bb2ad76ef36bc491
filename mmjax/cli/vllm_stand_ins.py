"""What scripts import from `vllm` that mmjax itself has no use for."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import gc
import json
import logging
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypedDict, TypeVar

import mmjax.config
from mmjax.cli import flags
from mmjax.types import RequestError
from mmjax.types.vllm_arguments import VERSION, engine_keywords

__version__ = VERSION
__version_tuple__ = tuple(map(int, VERSION.split(".")))

Parser = TypeVar("Parser", bound=argparse._ActionsContainer)

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"  # vLLM's


# -- arguments -----------------------------------------------------------------------------------------------------


class EngineArgs(mmjax.config.EngineArgs):
    """`mmjax.EngineArgs` that takes every keyword of vLLM's, and adds its flags to a parser."""

    def __init__(self, model: str = DEFAULT_MODEL, **keywords: Any) -> None:
        # `LLM` looks at the fields
        super().__init__(model, **engine_keywords(keywords, flags.FIELDS, look_at_fields=False))

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Add `--model` and a flag for each argument, with their defaults."""
        parser.add_argument("--model", default=DEFAULT_MODEL, help="model directory, hub id, or `demo`")
        flags.add_engine_flags(parser, defaults=True)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """The arguments among parsed flags."""
        return cls(args.model, **flags.engine_kwargs(args))


class AsyncEngineArgs(EngineArgs):
    """The same, for `AsyncLLM`."""

    @staticmethod
    def add_cli_args(parser: Parser, async_args_only: bool = False) -> Parser:
        """As `EngineArgs.add_cli_args`. async_args_only: add none of these."""
        return parser if async_args_only else EngineArgs.add_cli_args(parser)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser that takes flags with dashes or underscores, JSON by keys, and a file of flags."""

    def __init__(self, *args: Any, add_json_tip: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after rewriting the flags."""
        words = list(sys.argv[1:] if args is None else args)
        mappings = frozenset(action.dest for action in self._actions if action.type is json.loads)
        try:
            if "--config" not in self._option_string_actions:
                words = flags.from_file(words)
            words = flags.fold(words, mappings)
        except flags.FlagError as error:
            self.error(str(error))
        spelled = {option.replace("_", "-"): option for option in self._option_string_actions}
        for i, word in enumerate(words):
            head, equals, value = word.partition("=")
            if head.startswith("--"):
                words[i] = spelled.get(head, head) + equals + value
        return super().parse_known_args(words, namespace)


@dataclasses.dataclass
class StructuredOutputsParams:
    """`SamplingParams.structured_outputs` as an object."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None


class Settings(dict[str, Any]):
    """A configuration of vLLM by its keywords, which are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} was made without {name}") from None


class AttentionConfig(Settings):
    """Ignored by the engine, which says so."""


class CompilationConfig(Settings):
    """Ignored by the engine, which says so."""


class EPLBConfig(Settings):
    """Ignored by the engine, which says so."""


class KernelConfig(Settings):
    """Ignored by the engine, which says so."""


class PoolerConfig(Settings):
    """Refused by the engine, unless it asks for what mmjax does."""


class ProfilerConfig(Settings):
    """`torch_profiler_dir` is where `LLM.start_profile` writes."""


class StructuredOutputsConfig(Settings):
    """Ignored by the engine, which says so."""


@dataclasses.dataclass(eq=True, frozen=True)
class LoRARequest:
    """An adapter. `LLM` refuses it."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: Any = dataclasses.field(default=None, compare=False)
    load_inplace: bool = False


# -- types ---------------------------------------------------------------------------------------------------------


class ScoreMultiModalParam(TypedDict, total=False):
    """Parts of a message to compare. `LLM.score` takes prompts."""

    content: list[dict[str, Any]]


ChatCompletionMessageParam: TypeAlias = Mapping[str, Any]
ConversationMessage: TypeAlias = Mapping[str, Any]


class UsageContext(enum.Enum):
    """Accepted by `from_engine_args`; no usage is reported."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class _Refusing(type):
    """The type of names that can be imported and subclassed, but not used."""

    advice: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise RequestError(f"{cls.__name__} is not supported: {cls.advice}.", "unsupported")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RequestError(f"{cls.__name__}.{name} is not supported: {cls.advice}.", "unsupported")


def unsupported(full_name: str, advice: str) -> type:
    """A name of vLLM that mmjax has no counterpart of. RequestError when it is called or one of its attributes is
    read."""
    module, _, name = full_name.rpartition(".")
    return _Refusing(name, (), {"advice": advice, "__module__": module})


# -- functions -----------------------------------------------------------------------------------------------------


def random_uuid() -> str:
    """A random name for a request."""
    return uuid.uuid4().hex[:16]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(a // -b)


def init_logger(name: str) -> logging.Logger:
    """The logger of this name."""
    return logging.getLogger(name)


def load_chat_template(chat_template: str | Path | None, *, is_literal: bool = False) -> str | None:
    """The text of a template: of a file, or given as it is."""
    if chat_template is None or is_literal or (isinstance(chat_template, str) and "{" in chat_template):
        return None if chat_template is None else str(chat_template)
    return Path(chat_template).read_text()


def get_tokenizer(tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """The Hugging Face tokenizer of a directory or hub id."""
    from transformers import AutoTokenizer

    kwargs = {key: value for key, value in kwargs.items() if key not in ("tokenizer_mode", "download_dir")}
    return AutoTokenizer.from_pretrained(tokenizer_name, **kwargs)


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collect garbage: an LLM that nothing refers to frees its memory."""
    gc.collect()


def destroy_model_parallel() -> None:
    """Nothing: there are no process groups."""


def destroy_distributed_environment() -> None:
    """Nothing: there are no process groups."""


class Platform:
    """The platform of JAX, as scripts ask for it."""

    @property
    def device_type(self) -> str:
        """ "cpu", "cuda" or "tpu"."""
        import jax

        return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())

    def is_cpu(self) -> bool:
        """Whether the platform is the CPU."""
        return self.device_type == "cpu"

    def is_cuda(self) -> bool:
        """Whether the platform is a GPU of NVIDIA."""
        return self.device_type == "cuda"

    def is_cuda_alike(self) -> bool:
        """The same as `is_cuda`."""
        return self.is_cuda()

    def is_tpu(self) -> bool:
        """Whether the platform is a TPU."""
        return self.device_type == "tpu"

    def is_rocm(self) -> bool:
        """False."""
        return False

    def is_xpu(self) -> bool:
        """False."""
        return False

    def device_count(self) -> int:
        """The number of devices."""
        import jax

        return len(jax.local_devices())


current_platform = Platform()
