"""From arguments to a running model: checkpoint, mesh, parameters, sizes, engines."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmjax.chat import ChatRenderer, StoredTemplates, load_template
from mmjax.config import BLOCK_SIZES, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, EngineArgs, env, resolve_dtype
from mmjax.engine.engine import Engine
from mmjax.engine.grammar import GrammarCompiler
from mmjax.engine.pack import BucketConfig
from mmjax.load import Checkpoint, find_model, load_params, param_specs
from mmjax.models.family import ModelSpec
from mmjax.multimodal.limits import MediaLimits
from mmjax.render import InputProcessor
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

logger = logging.getLogger(__name__)

# Between one size of program and the next lies padding that is computed for nothing, which a CPU cannot afford; more
# sizes take longer to compile, which a GPU's compiler does slowly.
LEAST_TOKENS = {"cpu": 128, "gpu": 256, "tpu": 256}
TOKENS_STEP = {"cpu": 2, "gpu": 4, "tpu": 4}
STOPS = 16  # stop tokens per sequence that the device watches for
READY_ROWS = 256  # rows per dispatch of those that come ready: an image of most families is one or two
CPU_CACHE_BYTES = 1 << 30
WORKSPACE_BYTES = 2 << 30  # of an accelerator's memory, for what the programs hold while they run


@dataclasses.dataclass
class LoadedModel:
    """A built model. eos: end tokens, the primary one first. generation: the sampling defaults in force."""

    engines: list[Engine]
    input_processor: InputProcessor
    chat: ChatRenderer
    tokenizer: Tokenizer | None
    grammar_compiler: GrammarCompiler
    spec: ModelSpec
    buckets: BucketConfig
    generation_config: dict[str, Any]
    eos_ids: tuple[int, ...]
    max_model_len: int
    startup_s: float
    compile_s: float
    seeds: Iterator[int]

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def next_seed(self) -> int:
        """The seed of the next request that names none."""
        return next(self.seeds)


def load_model(args: EngineArgs) -> LoadedModel:
    """Load a model and compile its programs. Raises ValueError for whatever cannot be loaded or does not fit."""
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(args.model, revision=args.revision, token=args.hf_token, overrides=args.hf_overrides)
    jax = _start_jax(args)
    replicas = _replicas(jax, args)
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(replicas[0][0].platform, replicas[0][0].platform)
    config = checkpoint.model_config(dummy=args.load_format == "dummy", headless=args.pooling)
    dtype = resolve_dtype(args.dtype, _stored_dtype(checkpoint.config), platform)
    tokenizer = None if args.skip_tokenizer_init else Tokenizer(_tokenizer_directory(args, checkpoint))
    generation, eos = _generation(args, checkpoint, tokenizer)
    processor = checkpoint.family.processor(checkpoint.config, checkpoint.files, tokenizer)
    _check_options(args, processor)
    limits = args.limits(processor.mm_limits)
    engines, sizes, spec, max_len, compile_s = [], None, None, 0, 0.0
    for devices in replicas:
        engine, sizes, spec, max_len, seconds = _engine(args, checkpoint, config, devices, platform, dtype, limits)
        engines.append(engine)
        compile_s += seconds
    assert sizes is not None and spec is not None
    renderer = _renderer(args, processor, tokenizer, engines[0], limits, max_len)
    startup = time.perf_counter() - begin
    logger.info("ready in %.1f s, of which %.1f s compiling", startup, compile_s)
    seeds = (args.seed * 1_000_003 + n for n in itertools.count())
    chat = _chat(args, checkpoint, renderer)
    vocabulary = GrammarCompiler(tokenizer, spec.vocab_size, eos)
    return LoadedModel(
        engines,
        renderer,
        chat,
        tokenizer,
        vocabulary,
        spec,
        sizes,
        generation,
        eos,
        max_len,
        startup,
        compile_s,
        seeds,
    )


def _check_options(args: EngineArgs, processor: Any) -> None:
    """ValidationError for options of the decoders and of the processor with which no request could be served."""
    from mmjax.multimodal.media import MediaConnector  # imports an HTTP client
    from mmjax.processors.options import check_kwargs_for

    checks: dict[str, Callable[[Any], object]] = {
        "media_io_kwargs": MediaConnector,
        "mm_processor_kwargs": functools.partial(check_kwargs_for, processor),
    }
    for name, check in checks.items():
        given = getattr(args, name)
        try:
            check(given or {})
        except ValidationError:
            raise  # a variable of the environment, by its name
        except RequestError as error:
            words = f"--{name.replace('_', '-')}: {str(error).removeprefix(f'{name}: ')}"
            raise ValidationError(words, parameter=name, value=given) from error


def _renderer(
    args: EngineArgs,
    processor: Any,
    tokenizer: Tokenizer | None,
    engine: Engine,
    limits: Mapping[str, int],
    max_len: int,
) -> InputProcessor:
    """What turns requests into prompts that this engine can run."""
    spec, units = engine.spec, engine.buckets.encoder_buckets
    return InputProcessor(
        processor,
        tokenizer,
        model_id=args.model,
        vocab_size=spec.vocab_size,
        max_model_len=max_len,
        limit_mm_per_prompt=limits,
        mm_processor_kwargs=args.mm_processor_kwargs,
        media_io_kwargs=args.media_io_kwargs,
        media_limits=MediaLimits.from_env(),
        cache_gb=args.mm_processor_cache_gb,
        mm_embeds_dim=spec.mm_embed_dim if args.enable_mm_embeds else None,
        prompt_embed_dim=spec.hidden_size if args.enable_prompt_embeds else None,
        mm_embed_dim=spec.mm_embed_dim,
        block_size=engine.buckets.block_size,
        prefix_caching=engine.scheduler.prefix_caching,
        encoder_decoder=spec.is_encoder_decoder,
        generates=not spec.pooling,
        max_item_embeds=engine.encoder_cache.capacity or None,
        max_item_inputs={
            modality: units[name][-1] for name, each in spec.encoders.items() for modality in each.modalities
        },
    )


def _chat(args: EngineArgs, checkpoint: Checkpoint, renderer: InputProcessor) -> ChatRenderer:
    """What writes conversations for the model. ValueError for a template that cannot be read."""
    stored = StoredTemplates.read(checkpoint.directory, renderer.tokenizer, checkpoint.config.get("model_type"))

    def connect(io_kwargs: Mapping[str, Mapping[str, Any]]) -> Any:
        from mmjax.multimodal.media import MediaConnector

        return MediaConnector(
            media_io_kwargs=renderer.merged_io_kwargs(io_kwargs),
            allowed_local_media_path=args.allowed_local_media_path,
            allowed_media_domains=args.allowed_media_domains,
            limits=renderer.media_limits,
        )

    return ChatRenderer(
        stored,
        placeholder=renderer.processor.placeholder_text if renderer.processor else {},
        check=renderer.check_count,
        connect=connect,
        default_template=load_template(args.chat_template, stored),
        interleave=args.interleave_mm_strings,
        processor_kwargs=args.mm_processor_kwargs,
    )


def _tokenizer_directory(args: EngineArgs, checkpoint: Checkpoint) -> Path:
    if args.tokenizer is None:
        return checkpoint.directory
    return find_model(args.tokenizer, revision=args.tokenizer_revision, token=args.hf_token)


def _start_jax(args: EngineArgs) -> Any:
    """Import jax with the memory share and the compilation cache it must know of before it starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(args.gpu_memory_utilization))
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        where = env("COMPILATION_CACHE", str(Path(env("CACHE_ROOT", "~/.cache/mmjax")).expanduser() / "xla"))
        if where != "0":
            jax.config.update("jax_compilation_cache_dir", where)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax


def _replicas(jax: Any, args: EngineArgs) -> list[list[Any]]:
    """The devices of each replica. Raises ValueError when there are too few."""
    devices, tp_size, copies = jax.local_devices(), args.tensor_parallel_size, args.data_parallel_size
    if tp_size * copies > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tp_size} times data_parallel_size {copies} needs {tp_size * copies} devices, "
            f"but this machine has {len(devices)} ({devices[0].platform})"
        )
    return [devices[i * tp_size : (i + 1) * tp_size] for i in range(copies)]


def _engine(
    args: EngineArgs,
    checkpoint: Checkpoint,
    config: Any,
    devices: list[Any],
    platform: str,
    dtype: str,
    limits: Mapping[str, int],
) -> tuple[Engine, BucketConfig, ModelSpec, int, float]:
    """One replica: (engine, sizes, spec, longest sequence, seconds spent compiling)."""
    from mmjax import sharding
    from mmjax.engine.runner import ModelRunner

    mesh = sharding.mesh(devices)
    held, matrices = _kept_in(dtype, platform)
    keys = matrices or held
    if args.pooling and config.spec.is_encoder_decoder:
        raise ValueError("runner 'pooling' is for decoder-only models: an encoder-decoder has no vectors to give")
    encoders = {
        name
        for name, encoder in config.spec.encoders.items()
        if any(limits.get(modality, 0) for modality in encoder.modalities)
    }
    graph, split, params = load_params(
        checkpoint,
        config,
        mesh,
        dtype,
        held,
        matmul_dtype=matrices,
        dummy=args.load_format == "dummy",
        seed=args.seed,
        int8=args.quantization == "int8",
        text_only=not encoders and not config.spec.is_encoder_decoder,
        progress=_bar("Loading weights"),
    )
    spec: ModelSpec = split.spec
    mm_embed_dim = spec.mm_embed_dim if encoders or args.enable_mm_embeds else 0
    if args.enable_prompt_embeds and not spec.is_encoder_decoder:
        mm_embed_dim = spec.mm_embed_dim or spec.hidden_size
    spec = dataclasses.replace(
        spec,
        encoders={name: encoder for name, encoder in spec.encoders.items() if name in encoders},
        mm_embed_dim=mm_embed_dim,
        pooling=args.pooling,
    )
    block_bytes = _block_bytes(args, spec, platform, keys, sharding.tp_size(mesh))
    budget = _cache_bytes(args, devices[0], platform)
    max_len, pages = _cache_size(args, spec, platform, budget, block_bytes)
    if hasattr(split, "for_max_len"):  # some models turn with the longest sequence that there can be
        graph, _ = param_specs(checkpoint.family, split.for_max_len(max_len))
    num_mm_rows = _num_mm_rows(args, spec, platform, max_len)
    sizes = _sizes(args, spec, platform, max_len, num_mm_rows)
    runner = ModelRunner(
        graph,
        params,
        spec,
        sizes,
        mesh,
        num_blocks=pages,
        num_mm_rows=num_mm_rows,
        compute_dtype=held,
        kv_dtype=keys,
        platform=platform,
    )
    seconds = 0.0 if args.enforce_eager else runner.warm_up(_bar("Compiling"))
    caching = not spec.is_encoder_decoder if args.enable_prefix_caching is None else args.enable_prefix_caching
    engine = Engine(runner, sizes, spec, num_blocks=pages, num_mm_rows=num_mm_rows, prefix_caching=caching)
    return engine, sizes, spec, max_len, seconds


def _page(args: EngineArgs, platform: str) -> int:
    return args.block_size or BLOCK_SIZES[platform]


def _kept_in(dtype: str, platform: str) -> tuple[str, str | None]:
    """(dtype of the parameters and of arithmetic, dtype of the matrices and the cache where it is another).

    XLA:CPU emulates half precision, which makes a decode step take 10 times as long; but for products of bfloat16, on
    processors that have them.
    """
    from mmjax.kernels import multiplies_bfloat16

    if platform != "cpu":
        return dtype, None
    return "float32", "bfloat16" if dtype == "bfloat16" and multiplies_bfloat16() else None


def _block_bytes(args: EngineArgs, spec: ModelSpec, platform: str, dtype: str, tp_size: int) -> int:
    """Bytes of one page over all layers, on one device."""
    from mmjax.engine.runner import kv_block_shape

    page, kept = kv_block_shape(spec, _page(args, platform), dtype, platform, tp_size)
    return 2 * spec.num_layers * math.prod(page) // tp_size * int(kept.itemsize)


def _cache_bytes(args: EngineArgs, device: Any, platform: str) -> int:
    """Bytes the pool may take on one device."""
    if args.kv_cache_memory_bytes:
        return args.kv_cache_memory_bytes
    stats = device.memory_stats() if platform != "cpu" else None
    if not stats:
        return CPU_CACHE_BYTES
    free = int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    return max(free - min(WORKSPACE_BYTES, free // 4), free // 4)


def _cache_size(args: EngineArgs, spec: ModelSpec, platform: str, budget: int, block_bytes: int) -> tuple[int, int]:
    """(longest sequence in tokens, pages). Raises ValueError when one such sequence does not fit the budget."""
    page = _page(args, platform)
    seqs = args.max_num_seqs or MAX_NUM_SEQS[platform]
    cross = -(-spec.cross_len // page)
    affordable = budget // block_bytes - 1
    asked = args.max_model_len
    if isinstance(asked, int) and asked > spec.max_positions:
        raise ValueError(
            f"max_model_len {asked} is greater than the {spec.max_positions} positions that the model was made for"
        )
    longest = asked if isinstance(asked, int) and asked > 0 else spec.max_positions
    if longest > (affordable - cross) * page:
        fits = (affordable - cross) * page
        if asked == -1 and fits > 0:
            longest = fits
        else:
            raise ValueError(
                f"one sequence of max_model_len {longest} tokens needs {longest * block_bytes / page / 2**30:.2f} GiB "
                f"of cache, but only {budget / 2**30:.2f} GiB are there, enough for {max(fits, 0)} tokens. "
                f"Lower max_model_len (or set it to 'auto'), or raise "
                f"{'kv_cache_memory_bytes' if platform == 'cpu' else 'gpu_memory_utilization'}."
            )
    useful = seqs * (-(-longest // page) + cross)
    return longest, min(affordable, useful if platform == "cpu" else affordable) + 1


def _num_mm_rows(args: EngineArgs, spec: ModelSpec, platform: str, max_len: int) -> int:
    """Media rows to keep on the device: at least the largest item that a prompt can hold."""
    least = max((encoder.embeds_per_group for encoder in spec.encoders.values()), default=0)
    if not least and not spec.mm_embed_dim:
        return 0
    tokens = args.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[platform]
    return max(tokens, least, min(max_len, spec.max_item_embeds))


def _sizes(args: EngineArgs, spec: ModelSpec, platform: str, max_len: int, num_mm_rows: int) -> BucketConfig:
    from mmjax.kernels import q_block_size

    block, page = q_block_size(platform), _page(args, platform)
    seqs = args.max_num_seqs or MAX_NUM_SEQS[platform]
    tokens = -(-(args.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[platform]) // block) * block
    units = {}
    for name, encoder in spec.encoders.items():
        most = (
            num_mm_rows // encoder.embeds_per_group * encoder.group_size if encoder.embeds_per_group else min(seqs, 8)
        )
        most = max(most, encoder.max_item_inputs)
        units[name] = bucket_sizes(max(encoder.group_size, min(256, most)) if encoder.group_size > 1 else 1, most, 2)
    return BucketConfig(
        token_buckets=bucket_sizes(min(LEAST_TOKENS[platform], tokens), tokens, TOKENS_STEP[platform]),
        seq_buckets=bucket_sizes(1, seqs, 4),
        encoder_buckets=units,
        num_mm_rows=num_mm_rows,
        q_block_size=block,
        block_size=page,
        max_blocks_per_seq=-(-max_len // page),
        cross_blocks_per_seq=-(-spec.cross_len // page),
        rope_axes=spec.rope_axes,
        num_rows=seqs + 1,
        max_stop_ids=STOPS,
        num_decode_steps=args.num_decode_steps,
        max_logprobs=spec.vocab_size if args.max_logprobs == -1 else min(args.max_logprobs, spec.vocab_size),
        embed_rows=min(READY_ROWS, num_mm_rows) if args.enable_mm_embeds or args.enable_prompt_embeds else 0,
    )


def bucket_sizes(least: int, most: int, factor: int) -> tuple[int, ...]:
    """Ascending sizes from `least`, each `factor` times the last, ending with `most`."""
    sizes = []
    size = least
    while size < most:
        sizes.append(size)
        size *= factor
    return (*sizes, most)


def _stored_dtype(config: Mapping[str, Any]) -> str:
    for part in (config, config.get("text_config", {}), config.get("thinker_config", {})):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key])
    return "float32"


def _generation(
    args: EngineArgs, checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(sampling defaults, end tokens): what the model's generation_config says, overridden by the caller."""
    stored = checkpoint.files.get("generation_config.json", {})
    config = checkpoint.config
    ends = stored.get("eos_token_id", config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id")))
    eos = [int(e) for e in np.atleast_1d(ends)] if ends is not None else []
    if tokenizer is not None and tokenizer.eos_id is not None:
        eos = [tokenizer.eos_id, *eos]
    defaults = dict(stored) if args.generation_config == "auto" else {}
    return defaults | dict(args.override_generation_config), tuple(dict.fromkeys(eos))


def _bar(name: str) -> Callable[[Iterator[Any], int], Iterator[Any]]:
    quiet = env("PROGRESS", "1") == "0"

    def wrap(items: Iterator[Any], total: int) -> Iterator[Any]:
        return iter(tqdm(items, total=total, desc=name, disable=quiet, leave=False, dynamic_ncols=True))

    return wrap
