"""The names that scripts import from `vllm`, and the import hook that gives them mmjax's.

`mmjax run` installs the hook in its own process. A module or a name that is not listed here is an ImportError, so that
scripts for several releases of vLLM find the names that there are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmjax.cli.vllm_stand_ins import unsupported

logger = logging.getLogger(__name__)

ROOT = "vllm"
Names = Mapping[str, str]
"""name in a module of vLLM -> "module:name" of what it is here, or "!" and why it cannot be used."""


def _from(module: str, names: str) -> dict[str, str]:
    """Names of a module of mmjax."""
    return {name: f"{module}:{name}" for name in names.split()}


def _not(advice: str, names: str) -> dict[str, str]:
    """Names that can be imported, but not used. advice: what to do instead."""
    return dict.fromkeys(names.split(), f"!{advice}")


MIRROR = "*"  # as the only name: all names of a module of mmjax


def _mirror(module: str) -> dict[str, str]:
    return {MIRROR: module}


HERE = "mmjax.cli.vllm_stand_ins"
OUTPUTS = _from(
    "mmjax.types",
    "CompletionOutput EmbeddingOutput EmbeddingRequestOutput PoolingOutput PoolingRequestOutput RequestOutput "
    "ScoringOutput ScoringRequestOutput",
) | _not("no model here classifies", "ClassificationOutput ClassificationRequestOutput")
PROMPTS = _from(
    "mmjax.types",
    "EmbedsPrompt ExplicitEncoderDecoderPrompt MultiModalDataDict MultiModalUUIDDict PromptType SingletonPrompt "
    "TextPrompt TokensPrompt",
) | _not("pass prompts and media themselves", "DataPrompt")
ENGINE_ARGS = _from(HERE, "AsyncEngineArgs EngineArgs")
ASYNC = {"AsyncLLM": "mmjax:AsyncLLM", "AsyncLLMEngine": "mmjax:AsyncLLM"}
LLM_ENGINE = _from("mmjax.entrypoints.llm_engine", "LLMEngine")
LOGPROBS = _from("mmjax.types", "Logprob PromptLogprobs SampleLogprobs")
PARSER = _from(HERE, "FlexibleArgumentParser")
CLEAN_UP = _from(HERE, "cleanup_dist_env_and_memory destroy_distributed_environment destroy_model_parallel")
SCORES = _from(HERE, "ScoreMultiModalParam")
TOKENIZERS = _from(HERE, "get_tokenizer") | {"AnyTokenizer": "typing:Any", "TokenizerLike": "typing:Any"}
SERVERS = "start the server by `mmjax serve`"
MODELS = "add a family to mmjax, as docs/adding_a_family.md says"
PROCESSORS = "use the parameters of SamplingParams: logit_bias, allowed_token_ids, bad_words, structured_outputs"
SETTINGS = (
    "AttentionConfig CompilationConfig EPLBConfig KernelConfig PoolerConfig ProfilerConfig StructuredOutputsConfig"
)
CONFIGS = "one set of arguments, EngineArgs, configures an engine"

MODULES: Mapping[str, Names] = {
    "vllm": {
        **ENGINE_ARGS,
        **ASYNC,
        **LLM_ENGINE,
        **OUTPUTS,
        **_from("mmjax", "LLM PoolingParams SamplingParams"),
        **_from("mmjax.types", "PromptType TextPrompt TokensPrompt"),
        **_from(HERE, "__version__ __version_tuple__"),
        **_not(MODELS, "ModelRegistry"),
        **_not("one process drives all devices of a host", "initialize_ray_cluster"),
    },
    "vllm.assets": {},
    "vllm.assets.audio": _mirror("mmjax.assets.audio"),
    "vllm.assets.image": _mirror("mmjax.assets.image"),
    "vllm.assets.video": _mirror("mmjax.assets.video"),
    "vllm.assets.base": _not("samples are drawn, not downloaded", "get_vllm_public_assets VLLM_S3_BUCKET_URL"),
    "vllm.beam_search": _not("beam search is not supported", "BeamSearchOutput BeamSearchSequence"),
    "vllm.config": {
        **_from(HERE, SETTINGS),
        **_not(CONFIGS, "CacheConfig DeviceConfig LoadConfig LoRAConfig ModelConfig MultiModalConfig ParallelConfig "
               "SchedulerConfig SpeculativeConfig VllmConfig set_current_vllm_config get_current_vllm_config "
               "CompilationMode CUDAGraphMode CompilationLevel PassConfig"),
        **_not("every engine computes its own keys and values", "KVTransferConfig KVEventsConfig"),
    },
    "vllm.config.attention": _from(HERE, "AttentionConfig"),
    "vllm.config.compilation": _from(HERE, "CompilationConfig"),
    "vllm.config.pooler": _from(HERE, "PoolerConfig"),
    "vllm.config.profiler": _from(HERE, "ProfilerConfig"),
    "vllm.config.structured_outputs": _from(HERE, "StructuredOutputsConfig"),
    "vllm.distributed": CLEAN_UP,
    "vllm.distributed.parallel_state": CLEAN_UP,
    "vllm.engine": {},
    "vllm.engine.arg_utils": ENGINE_ARGS,
    "vllm.engine.async_llm_engine": ASYNC,
    "vllm.engine.llm_engine": LLM_ENGINE,
    "vllm.entrypoints": {},
    "vllm.entrypoints.chat_utils": {
        **_from(HERE, "ChatCompletionMessageParam ConversationMessage load_chat_template"),
        **_not("use `LLM.chat`", "apply_hf_chat_template parse_chat_messages"),
    },
    "vllm.entrypoints.llm": _from("mmjax", "LLM"),
    "vllm.entrypoints.openai": {},
    "vllm.entrypoints.openai.api_server": _not(SERVERS, "build_app init_app_state run_server"),
    "vllm.entrypoints.openai.cli_args": _not(SERVERS, "make_arg_parser validate_parsed_serve_args"),
    "vllm.entrypoints.pooling": {},
    "vllm.entrypoints.pooling.score": {},
    "vllm.entrypoints.pooling.score.protocol": SCORES,
    "vllm.entrypoints.pooling.score.utils": SCORES,
    "vllm.entrypoints.score_utils": SCORES,
    "vllm.envs": _mirror("mmjax.cli.vllm_envs"),
    "vllm.exceptions": _from("mmjax.types", "VLLMValidationError"),
    "vllm.inputs": PROMPTS,
    "vllm.inputs.data": PROMPTS,
    "vllm.logger": _from(HERE, "init_logger"),
    "vllm.logprobs": LOGPROBS,
    "vllm.lora": {},
    "vllm.lora.request": _from(HERE, "LoRARequest"),
    "vllm.model_executor": _not(MODELS, "set_random_seed"),
    "vllm.model_executor.models": _not(MODELS, "ModelRegistry"),
    "vllm.multimodal": {
        **_from("mmjax.types", "MultiModalDataDict MultiModalUUIDDict"),
        **_not("a family's processor is chosen by its config.json", "MULTIMODAL_REGISTRY MultiModalRegistry"),
    },
    "vllm.multimodal.audio": _mirror("mmjax.multimodal.audio"),
    "vllm.multimodal.image": _mirror("mmjax.multimodal.image"),
    "vllm.multimodal.inputs": _from("mmjax.types", "MultiModalDataDict MultiModalUUIDDict"),
    "vllm.multimodal.media": _mirror("mmjax.multimodal.media"),
    "vllm.multimodal.media.audio": _mirror("mmjax.multimodal.media.audio"),
    "vllm.multimodal.media.base": _mirror("mmjax.multimodal.media.base"),
    "vllm.multimodal.media.connector": _mirror("mmjax.multimodal.media.connector"),
    "vllm.multimodal.media.image": _mirror("mmjax.multimodal.media.image"),
    "vllm.multimodal.media.video": _mirror("mmjax.multimodal.media.video"),
    "vllm.multimodal.utils": _mirror("mmjax.multimodal.utils"),
    "vllm.multimodal.video": _mirror("mmjax.multimodal.media.video"),
    "vllm.outputs": {**OUTPUTS, **LOGPROBS},
    "vllm.platforms": _from(HERE, "current_platform"),
    "vllm.pooling_params": _from("mmjax", "PoolingParams"),
    "vllm.reasoning": _not("the reasoning stays in the text of the output", "ReasoningParser ReasoningParserManager"),
    "vllm.sampling_params": {
        **_from("mmjax.types", "RequestOutputKind SamplingParams"),
        **_from(HERE, "StructuredOutputsParams"),
        **_not("beam search is not supported: use `generate` with n > 1", "BeamSearchParams"),
        **_not("use structured_outputs=StructuredOutputsParams(...)", "GuidedDecodingParams"),
    },
    "vllm.sequence": LOGPROBS,
    "vllm.tokenizers": TOKENIZERS,
    "vllm.tool_parsers": _not("tools of requests are read by the server", "ToolParser ToolParserManager"),
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.tokenizer": TOKENIZERS,
    "vllm.usage": {},
    "vllm.usage.usage_lib": _from(HERE, "UsageContext"),
    "vllm.utils": {**PARSER, **_from(HERE, "cdiv random_uuid")},
    "vllm.utils.argparse_utils": PARSER,
    "vllm.utils.math_utils": _from(HERE, "cdiv"),
    "vllm.utils.serial_utils": _mirror("mmjax.utils.serial_utils"),
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.async_llm": ASYNC,
    "vllm.v1.engine.exceptions": _from("mmjax", "EngineDeadError"),
    "vllm.v1.engine.llm_engine": LLM_ENGINE,
    "vllm.v1.metrics": {},
    "vllm.v1.metrics.reader": _mirror("mmjax.types.metrics"),
    "vllm.v1.metrics.loggers": _not("read `LLM.get_metrics` or `/metrics`", "LoggingStatLogger PrometheusStatLogger "
                                    "StatLoggerBase"),
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": _not(PROCESSORS, "AdapterLogitsProcessor BatchUpdate LogitsProcessor "
                                            "RequestLogitsProcessor"),
    "vllm.version": _from(HERE, "__version__ __version_tuple__"),
}  # fmt: skip


class VLLMFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `vllm` and its modules in MODULES. Their names are resolved when they are first used."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of vLLM; None for any other. ModuleNotFoundError for one that is not in MODULES."""
        if fullname.partition(".")[0] != ROOT:
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(f"mmjax has no counterpart of the module {fullname!r}", name=fullname)
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin="mmjax", is_package=is_package)

    def exec_module(self, module: types.ModuleType) -> None:
        """Give a new module its names."""
        spec = module.__spec__
        assert spec is not None
        fullname = spec.name
        names = dict(MODULES[fullname])
        mirrored = importlib.import_module(names.pop(MIRROR)) if MIRROR in names else None
        listed = [name for name in names if not name.startswith("__")]
        listed += [name for name in dir(mirrored) if not name.startswith("_")] if mirrored else []

        def resolve(name: str) -> Any:
            if name in names:
                value = _resolve(names[name], f"{fullname}.{name}")
            elif f"{fullname}.{name}" in MODULES:
                value = importlib.import_module(f"{fullname}.{name}")
            elif mirrored is not None and hasattr(mirrored, name):
                value = getattr(mirrored, name)
            else:
                raise AttributeError(f"mmjax has no counterpart of {fullname}.{name}")
            setattr(module, name, value)
            return value

        vars(module).update(__getattr__=resolve, __dir__=lambda: sorted(listed), __all__=listed)


def _resolve(target: str, full_name: str) -> Any:
    if target.startswith("!"):
        return unsupported(full_name, target[1:])
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def vllm_is_mmjax() -> Iterator[None]:
    """While this is open, `import vllm` gives mmjax's names. Another vLLM is left alone, and one line of the log
    says so."""
    outside = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == ROOT}
    for name in outside:
        del sys.modules[name]
    installed = importlib.util.find_spec(ROOT)
    if installed is not None:
        where = installed.origin or next(iter(installed.submodule_search_locations or ()), "")
        logger.warning("%s is not used: under `mmjax run`, `import vllm` imports mmjax.", where)
    finder = VLLMFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == ROOT]:
            del sys.modules[name]
        sys.modules.update(outside)
