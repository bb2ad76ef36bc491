"""The engine's arguments, typed, checked and documented; and the only reader of environment variables."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from mmjax.types import UNLIMITED, ValidationError, read_limit, vllm_arguments

DTYPES = {"half": "float16", "float": "float32", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}

MAX_NUM_BATCHED_TOKENS = {"cpu": 1024, "gpu": 8192, "tpu": 4096}
MAX_NUM_SEQS = {"cpu": 32, "gpu": 256, "tpu": 128}
BLOCK_SIZES = {"cpu": 64, "gpu": 64, "tpu": 64}

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "CACHE_ROOT": "directory of all caches; everything in it can be made again",
        "COMPILATION_CACHE": "directory that caches compiled programs; `0` disables the cache",
        "PROGRESS": "`0` hides the progress bars of loading",
        "API_KEY": "API key of the server if `--api-key` is not given",
        "HTTP_TIMEOUT_KEEP_ALIVE": "seconds that the server keeps an idle connection open",
        "SERVER_DEV_MODE": "`1` adds routes that empty the caches, profile, and put the engine to sleep",
        "RESPONSES_STORE_MB": "MiB of the answers of `/v1/responses` that are stored; 0 stores none",
        "MAX_AUDIO_CLIP_FILESIZE_MB": "MB of an audio file that is uploaded for transcription",
        "MAX_COMPLETION_PROMPTS": "prompts in one request to the server; 0 means no limit",
        "MAX_STOP_STRINGS": "strings in `stop` of one request to the server; 0 means no limit",
        "MAX_N_SEQUENCES": "largest `n`, the number of outputs per prompt",
        "IMAGE_FETCH_TIMEOUT": "seconds for the first attempt to fetch an image; each further attempt gets four times "
        "as long",
        "VIDEO_FETCH_TIMEOUT": "the same for a video",
        "AUDIO_FETCH_TIMEOUT": "the same for audio",
        "MEDIA_FETCH_MAX_RETRIES": "attempts to fetch a media item, including the first",
        "MEDIA_URL_ALLOW_REDIRECTS": "`0` does not follow redirects",
        "MEDIA_EGRESS_BLOCK_PRIVATE": "`0` also fetches from private addresses, and uses proxies; "
        "a host named in `--allowed-media-domains` may always be private",
        "MEDIA_CACHE": "directory that caches fetched media; unset: no cache",
        "MEDIA_CACHE_MAX_SIZE_MB": "MiB of that directory; above it, the least recently used files are removed; "
        "0 means no limit",
        "MEDIA_CACHE_TTL_HOURS": "hours after which cached media are fetched again; 0 means no limit",
        "MEDIA_CONNECTOR": "name of the connector that fetches media",
        "MEDIA_LOADING_THREAD_COUNT": "threads that decode fetched media",
        "VIDEO_LOADER_BACKEND": "how frames of a video are sampled: `opencv` or `opencv_dynamic`",
        "MAX_MEDIA_DOWNLOAD_SIZE_MB": "MiB of one encoded media item; 0 means no limit, here and in the limits below",
        "MAX_IMAGE_PIXELS": "pixels of an image",
        "MAX_AUDIO_DECODE_DURATION_S": "seconds of an audio file",
        "MAX_AUDIO_DECODE_BYTES": "bytes of decoded audio",
        "MAX_VIDEO_FRAMES": "sampled frames of a video",
        "MAX_VIDEO_DECODE_BYTES": "bytes of a decoded video",
        "MAX_EMBED_DECODE_BYTES": "bytes of a tensor sent in base64",
        "MM_HASHER_ALGORITHM": "hash that identifies media: `sha256` or `sha512`; `blake3` means `sha256`",
        "TORCH_PROFILER_DIR": "directory to which `LLM.start_profile` writes",
        "ASSETS_CACHE": "directory to which sample media are written",
    }
)
"""Every environment variable, without its prefix, and what it sets. The documentation is generated from this table;
defaults are where a variable is read."""

T = TypeVar("T")


def env(name: str, default: str) -> str:
    """MMJAX_<name>, else VLLM_<name>, else the default."""
    return os.environ.get(f"MMJAX_{name}", os.environ.get(f"VLLM_{name}", default))


def vllm_variable(name: str) -> str:
    """A variable as a script for vLLM reads it, by its whole name; empty if it is unset."""
    return os.environ.get(name, "")


def env_number(name: str, default: float) -> float:
    """`env` as a finite number of at least 0. ValidationError for other values, naming the variable."""
    text = env(name, str(default)).strip()
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    _require(0 <= number < float("inf"), f"MMJAX_{name}", text, "a number of at least 0")
    return number


def env_flag(name: str, default: bool) -> bool:
    """`env` as a boolean. ValidationError for other values, naming the variable."""
    text = env(name, str(int(default))).strip().lower()
    _require(text in ("0", "1", "false", "true"), f"MMJAX_{name}", text, "0 or 1")
    return text in ("1", "true")


def xla_flag_is_set(name: str) -> bool:
    """Whether XLA_FLAGS, or the file that it names, sets a flag."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        flags = Path(flags).read_text()
    return f"--{name}" in (flag.partition("=")[0] for flag in flags.split())


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a cluster's scheduler tells this process. num_processes: those it has started together. whole_hosts: whether
    each of them has all devices of a host, though jax would give it one."""

    scheduler: str = ""
    num_processes: int = 1
    whole_hosts: bool = False

    @classmethod
    def read(cls) -> Environment:
        """From the variables by which `jax.distributed.initialize()` finds the others: Slurm's, and those of TPU slices
        on GKE."""
        known = os.environ.get
        if all(f"SLURM_{name}" in os.environ for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")):
            tasks = int(known("SLURM_NTASKS", "1"))
            return cls("Slurm", tasks, whole_hosts=tasks == int(known("SLURM_STEP_NUM_NODES", "0")))
        workers = known("TPU_PROCESS_ADDRESSES", known("TPU_WORKER_HOSTNAMES", ""))
        slices = int(known("MEGASCALE_NUM_SLICES", "1") or 1)
        return cls("GKE", len(workers.split(",")) * slices) if workers else cls()


def set_xla_flag(name: str, value: str) -> None:
    """Set a flag of XLA that XLA_FLAGS does not set. Before XLA starts."""
    if not xla_flag_is_set(name):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()


def cache_root() -> Path:
    """The directory of all caches."""
    return Path(env("CACHE_ROOT", "~/.cache/mmjax")).expanduser()


def argument(default: T, help: str, *, human: bool = False) -> T:
    """A field of EngineArgs: its default, and its meaning for `--help` and the documentation. human: its flag may be
    written as 8k or 8K."""
    metadata = {"help": help, "human": human}
    field: Any = (
        dataclasses.field(default_factory=default.copy, metadata=metadata)
        if isinstance(default, dict)
        else dataclasses.field(default=default, metadata=metadata)
    )
    return field


def accepted(name: str) -> str:
    """The meaning of an argument that is accepted and ignored."""
    return f"accepted; {vllm_arguments.ENGINE[name].note}"


@dataclasses.dataclass
class EngineArgs:
    """Arguments of `mmjax.LLM`, with vLLM's names and meanings.

    model: a local directory (in Hugging Face layout, or written by `mmjax convert`) or a hub id. runner: "pooling"
    computes embeddings (`LLM.embed`), "generate" text; convert "embed" is runner "pooling". dtype: "auto" follows the
    checkpoint, except that float32 becomes bfloat16 on GPU and TPU. On the CPU, weights are rounded to dtype, but
    stored and multiplied in float32, except for bfloat16 matrices if the processor has instructions to multiply them.
    enforce_eager: compile each program on first use instead of all at start. max_model_len: most tokens of prompt and
    output ("4k" = 4000, "4K" = 4096, "auto" or -1 = as many as model and memory allow). max_num_seqs: sequences decoded
    together. max_num_batched_tokens: prompt tokens per step, and embeddings of the largest media item.
    gpu_memory_utilization: share of the accelerator's memory to use; on the CPU `kv_cache_memory_bytes` (default 1 GiB,
    at most what max_num_seqs sequences can fill) bounds the cache. num_decode_steps: decode steps per dispatch while no
    sequence needs the host. enable_prefix_caching: None = on for decoder-only models. limit_mm_per_prompt: {"image": 2}
    or {"image": {"count": 2}}. quantization: "int8" stores the language model's matrices in 8 bits, with a scale per
    output channel, quantized when they are loaded; arithmetic stays in dtype. generation_config: "auto" takes sampling
    defaults from the model's generation_config.json, "vllm" neutral ones.
    """

    model: str
    runner: str = argument("auto", "`generate` returns text, `pooling` vectors; `auto` is `generate`")
    convert: str = argument("auto", "`embed` is runner `pooling`")
    tokenizer: str | None = argument(None, "directory of a tokenizer that replaces the model's")
    tokenizer_mode: str = argument("auto", accepted("tokenizer_mode"))
    skip_tokenizer_init: bool = argument(False, "no tokenizer: prompts are token ids, outputs have no text")
    trust_remote_code: bool = argument(False, accepted("trust_remote_code"))
    allowed_local_media_path: str = argument("", "directory from which `file:` URLs may be read; empty: none may")
    allowed_media_domains: Sequence[str] | None = argument(
        None, "hosts from which media may be fetched; unset allows all"
    )
    tensor_parallel_size: int = argument(1, "devices that share one copy of the model")
    data_parallel_size: int = argument(1, "copies of the model, each on its own devices")
    nnodes: int | None = argument(None, "hosts that share one copy of the model; unset: by Slurm or GKE, else 1")
    node_rank: int = argument(0, "number of this host; 0 schedules and serves, the others follow it")
    master_addr: str = argument("127.0.0.1", "address of host 0, as the others reach it")
    master_port: int = argument(29501, "port at that address")
    dtype: str = argument("auto", "dtype to compute in; `auto` follows the checkpoint and the platform")
    load_format: str = argument(
        "auto", "`dummy` uses random weights instead of the checkpoint's; `auto` and `safetensors` are the same"
    )
    download_dir: str | None = argument(None, "directory for files from the Hugging Face hub; unset: the hub's cache")
    quantization: str | None = argument(None, "`int8` halves the memory of the language model's weights")
    revision: str | None = argument(None, "branch, tag or commit of the model on the Hugging Face hub")
    tokenizer_revision: str | None = argument(None, "the same for the tokenizer")
    hf_token: str | bool | None = argument(
        None, "token for the Hugging Face hub; without a value, the one that `hf auth login` stored"
    )
    hf_overrides: Mapping[str, Any] | Callable[[Any], Any] | None = argument(
        None, "values merged into config.json; in Python also a function of the configuration that returns it"
    )
    seed: int = argument(0, "seed for requests without one")
    gpu_memory_utilization: float = argument(0.9, "share of the accelerator's memory to use")
    kv_cache_memory_bytes: int | None = argument(None, "bytes of the KV cache; on the CPU 1 GiB if unset", human=True)
    enforce_eager: bool = argument(False, "compile each shape on first use instead of all at start")
    chat_template: str | None = argument(None, "file or text of a template that replaces the model's")
    max_model_len: int | str | None = argument(
        None, "most tokens of prompt and output: `4096`, `4k` (4000), `4K` (4096), `auto`"
    )
    max_num_seqs: int | None = argument(None, "sequences decoded together; unset: by platform")
    max_num_batched_tokens: int | None = argument(
        None, "prompt tokens per step, and the largest media item; unset: by platform", human=True
    )
    block_size: int | None = argument(None, "tokens per block of the KV cache; unset: by platform")
    num_decode_steps: int = argument(8, "decode steps per dispatch while no sequence needs the host")
    limit_mm_per_prompt: Mapping[str, Any] = argument({}, "most items of a modality in one prompt")
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = argument({}, "options of the decoders, by modality")
    mm_processor_kwargs: Mapping[str, Any] | None = argument(None, "options of the model's processor")
    enable_mm_embeds: bool = argument(False, "accept embeddings in place of media")
    enable_prompt_embeds: bool = argument(False, "accept embeddings in place of a whole prompt")
    interleave_mm_strings: bool = argument(
        False, "put the placeholders of media between the texts of a chat message, not in front"
    )
    mm_processor_cache_gb: float = argument(4.0, "GiB of processed media to cache; 0 disables the cache")
    mm_processor_cache_type: str = argument("lru", accepted("mm_processor_cache_type"))
    mm_shm_cache_max_object_size_mb: int = argument(128, accepted("mm_shm_cache_max_object_size_mb"))
    mm_encoder_tp_mode: str = argument("weights", accepted("mm_encoder_tp_mode"))
    skip_mm_profiling: bool = argument(False, accepted("skip_mm_profiling"))
    video_pruning_rate: float | None = argument(None, "must be unset: no model here prunes videos")
    enable_prefix_caching: bool | None = argument(
        None, "share the blocks of equal prefixes; unset: on for decoder-only models"
    )
    language_model_only: bool = argument(False, "accept no media")
    max_logprobs: int = argument(20, "most log-probabilities per token; -1 is the vocabulary")
    generation_config: str = argument("auto", "`auto` takes sampling defaults from the model, `vllm` neutral ones")
    override_generation_config: Mapping[str, Any] = argument({}, "sampling defaults that replace the model's")
    disable_log_stats: bool = argument(True, "do not log statistics")
    profiler_config: Mapping[str, Any] | None = argument(
        None, "`torch_profiler_dir`: directory to which `LLM.start_profile` writes; other keys are ignored"
    )

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        if self.max_model_len is not None:
            self.max_model_len = human_int("max_model_len", self.max_model_len)
        for name in ("limit_mm_per_prompt", "media_io_kwargs", "override_generation_config"):
            value = getattr(self, name)
            _require(isinstance(value, Mapping), name, value, "a dictionary")
        for name in ("mm_processor_kwargs", "profiler_config"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, Mapping), name, value, "a dictionary or None")
        value, rule = self.hf_overrides, "a dictionary, a function or None"
        _require(value is None or isinstance(value, Mapping) or callable(value), "hf_overrides", value, rule)
        if isinstance(self.allowed_media_domains, str):
            self.allowed_media_domains = [self.allowed_media_domains]
        for modality, limit in self.limit_mm_per_prompt.items():
            read_limit(modality, limit)
        path = self.allowed_local_media_path
        if path and not Path(path).is_dir():
            reason = "must be a directory" if Path(path).exists() else "does not exist"
            raise ValidationError(
                f"Invalid `--allowed-local-media-path`: The path {path} {reason}.",
                parameter="allowed_local_media_path",
                value=path,
            )

    def _check_sizes(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size", "num_decode_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.nnodes is None or self.nnodes >= 1, "nnodes", self.nnodes, "at least 1")
        hosts = self.nnodes or 1
        _require(0 <= self.node_rank < hosts, "node_rank", self.node_rank, f"from 0 to {hosts - 1} with nnodes={hosts}")
        _require(0 < self.master_port < 2**16, "master_port", self.master_port, "from 1 to 65535")
        _require(
            0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", self.gpu_memory_utilization, "in (0, 1]"
        )
        _require(self.max_logprobs >= -1, "max_logprobs", self.max_logprobs, "at least 0, or -1 for the vocabulary")
        _require(self.mm_processor_cache_gb >= 0, "mm_processor_cache_gb", self.mm_processor_cache_gb, "at least 0")

    def _check_choices(self) -> None:
        _require(self.dtype in ("auto", *DTYPES), "dtype", self.dtype, f"one of auto, {', '.join(DTYPES)}")
        formats = ("auto", "safetensors", "dummy")
        _require(self.load_format in formats, "load_format", self.load_format, "'auto', 'safetensors' or 'dummy'")
        _require(self.quantization in (None, "int8"), "quantization", self.quantization, "None or 'int8'")
        _require(
            self.runner in ("auto", "generate", "pooling"), "runner", self.runner, "'auto', 'generate' or 'pooling'"
        )
        _require(self.convert in ("auto", "none", "embed"), "convert", self.convert, "'auto', 'none' or 'embed'")
        _require(
            self.runner != "generate" or self.convert != "embed",
            "convert",
            self.convert,
            "'auto' with runner='generate'",
        )
        cache = self.mm_processor_cache_type
        _require(cache in ("lru", "shm"), "mm_processor_cache_type", cache, "'lru' or 'shm'")
        _require(self.tokenizer_mode in ("auto", "hf"), "tokenizer_mode", self.tokenizer_mode, "'auto' or 'hf'")
        mode = self.mm_encoder_tp_mode
        _require(mode in ("weights", "data"), "mm_encoder_tp_mode", mode, "'weights' or 'data'")
        _require(not self.video_pruning_rate, "video_pruning_rate", self.video_pruning_rate, "None: no model prunes")
        _require(
            self.generation_config in ("auto", "vllm"), "generation_config", self.generation_config, "'auto' or 'vllm'"
        )

    @classmethod
    def of(cls, model: str, **keywords: Any) -> EngineArgs:
        """The arguments for any keywords of `LLM`, vLLM's included. Those that do nothing here are logged.
        ValidationError for one that is not supported, TypeError for an unknown one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(model, **vllm_arguments.engine_keywords(keywords, names, look_at_fields=True))

    @property
    def pooling(self) -> bool:
        """Whether the engine computes embeddings instead of text."""
        return self.runner == "pooling" or self.convert == "embed"

    def limits(self, model_limits: Mapping[str, int | None]) -> dict[str, int]:
        """The most items per prompt, by modality. model_limits: the model's own limits; None for any number."""
        limits = {}
        for modality, most in model_limits.items():
            count = read_limit(modality, self.limit_mm_per_prompt.get(modality, UNLIMITED))
            limits[modality] = 0 if self.language_model_only else min(count, UNLIMITED if most is None else most)
        return limits


def human_int(name: str, value: int | str) -> int:
    """4096, "4k" (4000), "4K" (4096), "1m", "1M"; "auto" and -1 give -1. ValidationError for other values."""
    text = str(value).strip()
    if text in ("auto", "-1"):
        return -1
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
    if match is None:
        raise ValidationError(
            f"{name} must be a number such as 4096, 4k or 4K, got {value!r}.", parameter=name, value=value
        )
    scale = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}[match[2]]
    number = int(float(match[1]) * scale)
    _require(number >= 1, name, value, "at least 1")
    return number


def _require(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ValidationError(f"{name} must be {rule}, got {value!r}.", parameter=name, value=value)
