"""What becomes of every argument of vLLM's `LLM` and `vllm serve` here: it works, is ignored, or is refused.

Those that work are fields of `EngineArgs` or flags of the server, under the same names. This table has all the others:
parser, constructor and documentation derive from it. The names are those of vLLM 0.19, and some of earlier releases
(OLDER) that commands in circulation still have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from mmjax.types.errors import ValidationError

logger = logging.getLogger(__name__)

VERSION = "0.19.0"  # of vLLM

Outcome = Literal["ignored", "refused"]
Form = Literal["switch", "value", "values", "json"]


class _Unset:
    """The default of a switch that is neither on nor off."""


SWITCH = _Unset()


@dataclass(frozen=True)
class Argument:
    """An argument that does not work here. note: why it is ignored, or what to do instead. default: vLLM's. neutral:
    the values that ask for what mmjax does anyway; they are accepted silently. form: how the command line gives it."""

    name: str
    outcome: Outcome
    note: str
    default: Any
    neutral: tuple[Any, ...]
    form: Form

    def asks(self, value: Any) -> bool:
        """Whether a value asks for something else than mmjax does."""
        return not any(_same(value, neutral) for neutral in self.neutral)


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values are equal, or the same in text, as the command line gives them."""
    if callable(neutral):
        return bool(neutral(value))
    if isinstance(neutral, (list, dict)):
        return neutral == value or (not neutral and not value)
    if isinstance(neutral, (int, float)) and not isinstance(neutral, bool):
        try:
            return float(value) == neutral
        except (TypeError, ValueError):
            return False
    return bool(value == neutral) or (isinstance(value, str) and value == str(neutral))


def _pools_as_here(config: Any) -> bool:
    """Whether a pooler_config, a mapping or an object, asks for the vectors that mmjax computes."""
    fields = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {"": config}
    usual: dict[str, Any] = {"pooling_type": "LAST", "seq_pooling_type": "LAST", "tok_pooling_type": "ALL"}
    usual |= {"normalize": True, "use_activation": True}
    return all(value is None or (name in usual and value == usual[name]) for name, value in fields.items())


# Further values that ask for nothing. The default does not, and neither does None.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "async_scheduling": (True,),
        "config_format": ("hf",),
        "data_parallel_size_local": (1,),
        "distributed_executor_backend": ("mp", "uni"),
        "enable_chunked_prefill": (True,),
        "model_impl": ("vllm",),
        "pooler_config": (_pools_as_here,),
        "tokenizer_mode": ("hf",),
    }
)


def _rows(outcome: Outcome, note: str, defaults: Mapping[str, Any]) -> Iterator[Argument]:
    for name, default in defaults.items():
        form: Form = "value"
        if default is SWITCH or isinstance(default, bool):
            form = "switch"
        elif isinstance(default, list):
            form = "values"
        elif isinstance(default, dict):
            form = "json"
        default = None if default is SWITCH else default
        yield Argument(name, outcome, note, default, (default, None, *NEUTRAL.get(name, ())), form)


def ignored(note: str, **defaults: Any) -> Iterator[Argument]:
    """Arguments that do nothing here, by name with vLLM's defaults. note: why."""
    return _rows("ignored", note, defaults)


def refused(note: str, **defaults: Any) -> Iterator[Argument]:
    """Arguments that mmjax has no counterpart of. note: what to do instead."""
    return _rows("refused", note, defaults)


def _by_name(*groups: Iterator[Argument]) -> Mapping[str, Argument]:
    return MappingProxyType({argument.name: argument for group in groups for argument in group})


ENGINE = _by_name(
    # -- model
    ignored(
        "mmjax runs its own model code, never a checkpoint's",
        trust_remote_code=False, code_revision=None,
    ),
    ignored("the fast tokenizer is always used", tokenizer_mode="auto"),
    refused("log-probabilities are those of the model's raw distribution", logprobs_mode="raw_logprobs"),
    ignored("outputs are the same", disable_cascade_attn=True, allow_deprecated_quantization=False),
    ignored("`LLM.sleep` and `LLM.wake_up` always work", enable_sleep_mode=False),
    ignored("names are shown by the server: `mmjax serve --served-model-name`", served_model_name=None),
    ignored("every thread of the LLM's pool processes prompts", renderer_num_workers=1),
    refused("put config.json beside the weights, or change its values by hf_overrides", hf_config_path=None),
    refused("only checkpoints in the layout of Hugging Face are read", config_format="auto", model_weights=""),
    refused("every model runs in mmjax's own code", model_impl="auto", override_attention_dtype=None),
    refused("the routing of experts is not returned", enable_return_routed_experts=False),
    refused("set max_model_len to the length of the window", disable_sliding_window=False),
    refused(
        "use logit_bias, allowed_token_ids, bad_words or structured_outputs of SamplingParams", logits_processors=[]
    ),
    refused("pass prompts and media themselves", io_processor_plugin=None),
    refused("a vector is the final hidden state of the last token, of length 1", pooler_config={}),
    refused("the reasoning stays in the text of the output", reasoning_parser="", reasoning_parser_plugin=None,
            reasoning_config={}),
    # -- loading
    ignored("only the files that mmjax reads are downloaded", ignore_patterns=["original/**/*"]),
    ignored("MMJAX_PROGRESS=0 hides the progress bars", use_tqdm_on_load=True),
    ignored(
        "tensors are read one at a time, straight to their devices",
        safetensors_load_strategy=None, model_loader_extra_config={}, pt_load_map_location="cpu",
        max_parallel_loading_workers=None,
    ),
    # -- kernels and compilation
    ignored(
        "there is one implementation per platform, chosen by mmjax",
        attention_backend=None, attention_config={}, mm_encoder_attn_backend=None, moe_backend="auto",
        kernel_config={}, gdn_prefill_backend=None, enable_flashinfer_autotune=SWITCH,
    ),
    ignored(
        "every program is compiled at the start, for every size",
        compilation_config={}, cudagraph_capture_sizes=[], max_cudagraph_capture_size=None, optimization_level=2,
        performance_mode="balanced", additional_config={},
    ),
    # -- devices and hosts
    ignored(
        "one process drives all devices of a host",
        distributed_executor_backend=None, data_parallel_backend="mp", ray_workers_use_nsight=False,
        distributed_timeout_seconds=None,
        data_parallel_address=None, data_parallel_rpc_port=None,
    ),
    ignored(
        "XLA makes the collectives",
        disable_custom_all_reduce=False, disable_nccl_for_dp_synchronization=SWITCH, enable_dbo=False, ubatch_size=0,
        dbo_decode_token_threshold=32, dbo_prefill_token_threshold=512,
    ),
    ignored(
        "experts are divided over the devices of tensor_parallel_size; outputs are the same",
        enable_expert_parallel=False, enable_ep_weight_filter=False, all2all_backend="allgather_reducescatter",
        enable_eplb=False, eplb_config={}, expert_placement_strategy="linear",
    ),
    ignored(
        "there is no context parallelism",
        dcp_comm_backend="ag_rs", dcp_kv_cache_interleave_size=1, cp_kv_cache_interleave_size=1,
    ),
    refused(
        "use tensor_parallel_size or data_parallel_size",
        pipeline_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1,
    ),
    refused(
        "data_parallel_size runs all copies in one process, and balances their load",
        data_parallel_rank=None, data_parallel_start_rank=None, data_parallel_size_local=None,
        data_parallel_hybrid_lb=False, data_parallel_external_lb=False, enable_elastic_ep=False,
    ),
    refused("there are no workers to replace", worker_cls="auto", worker_extension_cls=""),
    # -- memory and cache
    ignored(
        "the KV cache has the model's dtype, without scales",
        calculate_kv_scales=False, kv_cache_dtype_skip_layers=[],
    ),
    ignored("outputs are the same", prefix_caching_hash_algo="sha256", kv_sharing_fast_prefill=False,
            disable_hybrid_kv_cache_manager=SWITCH),
    ignored(
        "no model here has Mamba layers",
        mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto", mamba_block_size=None, mamba_cache_mode="none",
    ),
    ignored(
        "nothing is offloaded",
        offload_backend="auto", cpu_offload_params=[], offload_num_in_group=1, offload_prefetch_step=1,
        offload_params=[], kv_offloading_backend="native",
    ),
    refused('leave it at "auto": the KV cache has the model\'s dtype', kv_cache_dtype="auto"),
    refused("kv_cache_memory_bytes sets the size of the KV cache", num_gpu_blocks_override=None),
    refused(
        "the model must fit on the devices: use quantization=\"int8\" or tensor_parallel_size",
        cpu_offload_gb=0, offload_group_size=0,
    ),
    refused("raise kv_cache_memory_bytes or gpu_memory_utilization", kv_offloading_size=None),
    # -- scheduling
    ignored(
        "prompts are always processed in chunks of max_num_batched_tokens; outputs are the same",
        enable_chunked_prefill=SWITCH, max_num_partial_prefills=1, max_long_partial_prefills=1,
        long_prefill_token_threshold=0, disable_chunked_mm_input=False, scheduler_reserve_full_isl=True,
    ),
    ignored(
        "`LLM.generate(priority=...)` always orders its prompts; the server has the order of arrival",
        scheduling_policy="fcfs",
    ),
    ignored("the host always works while the device runs", async_scheduling=SWITCH),
    ignored("the server sends the tokens of each dispatch; see num_decode_steps", stream_interval=1),
    refused("the scheduler cannot be replaced", scheduler_cls=None),
    # -- media
    ignored("there is one process, so both kinds of cache are the same", mm_processor_cache_type="lru"),
    ignored("there is no shared memory", mm_shm_cache_max_object_size_mb=128, mm_tensor_ipc="direct_rpc"),
    ignored("encoders run on every device, and outputs are the same", mm_encoder_tp_mode="weights"),
    ignored("memory is planned without a profiling run", skip_mm_profiling=False),
    refused("no model here prunes videos", video_pruning_rate=None),
    refused("an engine also has the language model", mm_encoder_only=False),
    # -- structured outputs, speculation, adapters
    ignored(
        "llguidance compiles every grammar; `mmjax serve` reads `disable_additional_properties`",
        structured_outputs_config={},
    ),
    refused("there is no speculative decoding", speculative_config={}),
    ignored(
        "there are no adapters",
        max_loras=1, max_lora_rank=16, lora_dtype="auto", enable_tower_connector_lora=False, max_cpu_loras=None,
        fully_sharded_loras=False, lora_target_modules=[], specialize_active_lora=False,
    ),
    refused("merge the adapter into the weights, and load the result", enable_lora=False, default_mm_loras={}),
    # -- transfer between engines
    refused(
        "every engine computes its own keys, values and embeddings",
        kv_transfer_config={}, kv_events_config={}, ec_transfer_config={},
    ),
    refused("start the engine with the new weights", weight_transfer_config={}),
    refused("`/generate` takes and returns token ids", tokens_only=False),
    # -- observation
    ignored(
        "`/metrics` and `LLM.get_metrics` always have all metrics",
        show_hidden_metrics_for_version=None, kv_cache_metrics=False, kv_cache_metrics_sample=0.01,
        cudagraph_metrics=False, enable_mfu_metrics=False, enable_mm_processor_stats=False,
        aggregate_engine_logging=False, enable_logging_iteration_details=False,
    ),
    ignored("profile with `LLM.start_profile`", collect_detailed_traces=[], enable_layerwise_nvtx_tracing=False),
    refused("only the server sends traces: `mmjax serve --otlp-traces-endpoint`", otlp_traces_endpoint=None),
    ignored("the server always logs one line per request, at level info", enable_log_requests=False),
    ignored("a variable with an unusable value is always an error", fail_on_environ_validation=False),
    ignored("`mmjax serve --drain-timeout` sets how long a shutdown waits", shutdown_timeout=0),
)  # fmt: skip
"""Arguments of vLLM's `EngineArgs` that do not work here: keywords of `LLM`, and flags."""

SERVER = _by_name(
    refused("merge the adapter into the weights, and load the result", lora_modules=[]),
    ignored("requests choose it: `return_tokens_as_token_ids`", return_tokens_as_token_ids=False),
    ignored("templates never see tools that the model must not call", exclude_tools_when_tool_choice_none=False),
    refused("use one of --tool-call-parser, or parse the text of the output", tool_parser_plugin="", tool_server=None),
    refused("--uvicorn-log-level sets what is logged", log_config_file=None),
    ignored(
        "neither prompts nor outputs are ever logged",
        max_log_len=None, enable_log_outputs=False, enable_log_deltas=True,
    ),
    ignored("errors of the server are always logged with their cause", log_error_stack=False),
    ignored("`/load` always counts", enable_server_load_tracking=False),
    refused("read the tokenizer from the checkpoint", enable_tokenizer_info_endpoint=False),
    ignored(
        "the log has one line per request to the model, and none for others",
        disable_uvicorn_access_log=False, disable_access_log_for_endpoints=None,
    ),
    refused("restart the server, or end TLS in a proxy", enable_ssl_refresh=False),
    refused("put a proxy in front of the server", middleware=[]),
    ignored("--max-body-mb limits requests", h11_max_incomplete_event_size=4194304, h11_max_header_count=256),
    ignored("`/docs` loads its scripts from elsewhere; `/openapi.json` does not", enable_offline_docs=False),
    refused("one process serves one engine: start several behind a load balancer", api_server_count=1),
    refused("use HTTP", grpc=False),
)  # fmt: skip
"""Flags of `vllm serve` alone that do not work here."""

OLDER = _by_name(
    ignored("there is no swapping: preempted sequences are computed again", swap_space=4, preemption_mode=None),
    ignored("the platform is JAX's: JAX_PLATFORMS chooses it", device="auto"),
    ignored("llguidance compiles every grammar", guided_decoding_backend="auto"),
    ignored("num_decode_steps sets the steps per dispatch", num_scheduler_steps=1, multi_step_stream_outputs=True),
    ignored("every program is compiled at the start, for every size", max_seq_len_to_capture=8192,
            cuda_graph_sizes=[]),
    ignored("the server always logs one line per request; --uvicorn-log-level warning hides them",
            disable_log_requests=False),
    ignored(
        "there is nothing to choose",
        use_v2_block_manager=True, disable_async_output_proc=False, scheduler_delay_factor=0,
        num_lookahead_slots=0, disable_frontend_multiprocessing=False, worker_use_ray=False, engine_use_ray=False,
        tokenizer_pool_size=0, tokenizer_pool_type="ray", tokenizer_pool_extra_config={},
    ),
    refused("there is no speculative decoding", speculative_model=None, num_speculative_tokens=None),
    refused("put the text of the adapter into the prompt", enable_prompt_adapter=False),
    refused("the reasoning stays in the text of the output", enable_reasoning=False),
)  # fmt: skip
"""Arguments of earlier releases of vLLM that do not work here."""

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "task": '`runner`: "generate" is runner "generate", "embed" is runner "pooling"',
        "rope_scaling": "`hf_overrides`",
        "rope_theta": "`hf_overrides`",
        "disable_mm_preprocessor_cache": "`mm_processor_cache_gb` of 0",
        "override_pooler_config": "`pooler_config`",
    }
)
"""Arguments of earlier releases of vLLM that work under another name. `renamed` translates them."""

SHORT: Mapping[str, str] = MappingProxyType(
    {
        "quantization": "-q", "tensor_parallel_size": "-tp", "data_parallel_size": "-dp",
        "pipeline_parallel_size": "-pp", "nnodes": "-n", "node_rank": "-r", "decode_context_parallel_size": "-dcp",
        "prefill_context_parallel_size": "-pcp", "data_parallel_rank": "-dpn", "data_parallel_start_rank": "-dpr",
        "data_parallel_size_local": "-dpl", "data_parallel_address": "-dpa", "data_parallel_rpc_port": "-dpp",
        "data_parallel_backend": "-dpb", "data_parallel_hybrid_lb": "-dph", "data_parallel_external_lb": "-dpe",
        "enable_expert_parallel": "-ep", "speculative_config": "-sc", "compilation_config": "-cc",
        "attention_config": "-ac", "api_server_count": "-asc", "optimization_level": "-O",
    }
)  # fmt: skip
"""The short forms of flags."""

OWN = frozenset({"num_decode_steps", "max_queue", "max_body_mb", "drain_timeout"})
"""Arguments of mmjax that vLLM does not have."""

KEYWORDS: Mapping[str, Argument] = MappingProxyType({**ENGINE, **OLDER})
"""All that `LLM` may be given, and ignores or refuses."""


def settle(given: Mapping[str, Any], known: Mapping[str, Argument]) -> None:
    """Look at the arguments that do not work here: log one line for each that is ignored. ValidationError for the first
    one that is refused."""
    for name, value in given.items():
        argument = known.get(name)
        if argument is None or not argument.asks(value):
            continue
        if argument.outcome == "refused":
            raise ValidationError(f"{name} is not supported: {argument.note}.", parameter=name, value=value)
        logger.warning("%s does nothing here: %s.", name, argument.note)


def engine_keywords(given: Mapping[str, Any], fields: Iterable[str], *, look_at_fields: bool) -> dict[str, Any]:
    """Keywords of `LLM` as those of `EngineArgs`, whose fields are given. None is the default, as in vLLM. Unknown ones
    are left in. Logs and raises as `settle` does. look_at_fields: also at those that are fields, in which they stay."""
    keywords, kept = renamed(given), set(fields)
    keywords = {name: value for name, value in keywords.items() if value is not None or name not in kept}
    elsewhere = {name for name in kept if not look_at_fields or (name in ENGINE and ENGINE[name].outcome == "refused")}
    settle({name: value for name, value in keywords.items() if name not in elsewhere}, KEYWORDS)
    return {name: value for name, value in keywords.items() if name in kept or name not in KEYWORDS}


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, with those of earlier releases under their names of today. ValidationError for a task that
    mmjax has no models for."""
    keywords = {name: value for name, value in given.items() if name not in RENAMED}
    task = given.get("task")
    if task in ("embed", "embedding"):
        keywords.setdefault("runner", "pooling")
    elif task == "generate":
        keywords.setdefault("runner", "generate")
    elif task not in (None, "auto"):
        raise ValidationError(
            f"task {task!r} is not supported: a model generates text (`generate`) or computes vectors (`embed`).",
            parameter="task",
            value=task,
        )
    if given.get("disable_mm_preprocessor_cache"):
        keywords["mm_processor_cache_gb"] = 0.0
    if given.get("override_pooler_config"):
        keywords.setdefault("pooler_config", given["override_pooler_config"])
    rope = {name: given[name] for name in ("rope_scaling", "rope_theta") if given.get(name) is not None}
    if rope:
        overrides = keywords.get("hf_overrides")
        if callable(overrides):
            raise ValidationError(f"Let hf_overrides set {' and '.join(rope)}.", parameter="hf_overrides")
        keywords["hf_overrides"] = {**rope, **(overrides or {})}
    return keywords
