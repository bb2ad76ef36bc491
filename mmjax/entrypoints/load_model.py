"""From arguments to a running model: checkpoint, mesh, parameters, sizes, engines."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmjax.chat import ChatRenderer, StoredTemplates, load_template
from mmjax.config import EngineArgs, cache_root, env
from mmjax.engine.engine import Engine
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits.structured_output import GrammarCompiler
from mmjax.engine.memory import EngineMemory
from mmjax.inputs.input_processor import InputConfig, InputProcessor
from mmjax.loader.checkpoint import Checkpoint, find_model
from mmjax.loader.params import load_params, param_specs
from mmjax.loader.precision import Precision
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.spec import ModelSpec
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

logger = logging.getLogger(__name__)


def load_model(args: EngineArgs) -> LoadedModel:
    """Load a model and compile its programs. Raises ValueError for whatever cannot be loaded or does not fit."""
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(args.model, revision=args.revision, token=args.hf_token, overrides=args.hf_overrides)
    jax = _start_jax(args)
    replicas = _replica_devices(jax, args)
    tokenizer = None if args.skip_tokenizer_init else Tokenizer(_tokenizer_directory(args, checkpoint))
    generation_config, eos_ids = _generation(args, checkpoint, tokenizer)
    processor = checkpoint.family.processor(checkpoint.config, checkpoint.files, tokenizer)
    _check_options(args, processor)
    limits = args.limits(processor.mm_limits)
    engines = [_load_engine(args, checkpoint, devices, limits) for devices in replicas]
    compile_s = 0.0
    if not args.enforce_eager:
        compile_s = sum(engine.runner.warm_up(_progress_bar("Compiling")) for engine in engines)
    first = engines[0]
    input_processor = _input_processor(args, processor, tokenizer, first, limits)
    startup_s = time.perf_counter() - begin
    logger.info("ready in %.1f s, of which %.1f s compiling", startup_s, compile_s)
    return LoadedModel(
        engines=engines,
        input_processor=input_processor,
        chat=_chat_renderer(args, checkpoint, input_processor),
        tokenizer=tokenizer,
        grammar_compiler=GrammarCompiler(tokenizer, first.spec.vocab_size, eos_ids),
        spec=first.spec,
        buckets=first.buckets,
        generation_config=generation_config,
        eos_ids=eos_ids,
        max_model_len=first.memory.max_model_len,
        startup_s=startup_s,
        compile_s=compile_s,
        seeds=(args.seed * 1_000_003 + n for n in itertools.count()),
    )


def _check_options(args: EngineArgs, processor: Any) -> None:
    """ValidationError for options of the decoders and of the processor with which no request could be served."""
    from mmjax.inputs.processor_kwargs import check_kwargs_for
    from mmjax.multimodal.media import MediaConnector  # imports an HTTP client

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


def _input_processor(
    args: EngineArgs,
    processor: Any,
    tokenizer: Tokenizer | None,
    engine: Engine,
    limits: Mapping[str, int],
) -> InputProcessor:
    """What turns requests into prompts that this engine can run."""
    spec, buckets = engine.spec, engine.buckets
    config = InputConfig(
        model_id=args.model,
        vocab_size=spec.vocab_size,
        max_model_len=engine.memory.max_model_len,
        limit_mm_per_prompt=limits,
        mm_processor_kwargs=args.mm_processor_kwargs,
        media_io_kwargs=args.media_io_kwargs,
        media_limits=MediaLimits.from_env(),
        cache_gb=args.mm_processor_cache_gb,
        media_embeds_dim=spec.mm_embed_dim if args.enable_mm_embeds else None,
        prompt_embeds_dim=spec.hidden_size if args.enable_prompt_embeds else None,
        mm_embed_dim=spec.mm_embed_dim,
        block_size=buckets.block_size,
        prefix_caching=engine.scheduler.prefix_caching,
        encoder_decoder=spec.is_encoder_decoder,
        generates=not spec.pooling,
        max_item_embeds=engine.encoder_cache.capacity or None,
        max_item_inputs={
            modality: buckets.encoder_buckets[name][-1]
            for name, each in spec.encoders.items()
            for modality in each.modalities
        },
    )
    return InputProcessor(processor, tokenizer, config)


def _chat_renderer(args: EngineArgs, checkpoint: Checkpoint, input_processor: InputProcessor) -> ChatRenderer:
    """What writes conversations for the model. ValueError for a template that cannot be read."""
    stored = StoredTemplates.read(checkpoint.directory, input_processor.tokenizer, checkpoint.config.get("model_type"))

    def connect(io_kwargs: Mapping[str, Mapping[str, Any]]) -> Any:
        from mmjax.multimodal.media import MediaConnector

        return MediaConnector(
            media_io_kwargs=input_processor.merged_io_kwargs(io_kwargs),
            allowed_local_media_path=args.allowed_local_media_path,
            allowed_media_domains=args.allowed_media_domains,
            limits=input_processor.config.media_limits,
        )

    return ChatRenderer(
        stored,
        placeholder=input_processor.processor.placeholder_text if input_processor.processor else {},
        check=input_processor.check_count,
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
        where = env("COMPILATION_CACHE", str(cache_root() / "xla"))
        if where != "0":
            jax.config.update("jax_compilation_cache_dir", where)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return jax


def _replica_devices(jax: Any, args: EngineArgs) -> list[list[Any]]:
    """The devices of each replica. Raises ValueError when there are too few."""
    devices, tp_size, copies = jax.local_devices(), args.tensor_parallel_size, args.data_parallel_size
    if tp_size * copies > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tp_size} times data_parallel_size {copies} needs {tp_size * copies} devices, "
            f"but this machine has {len(devices)} ({devices[0].platform})"
        )
    return [devices[i * tp_size : (i + 1) * tp_size] for i in range(copies)]


def _load_engine(args: EngineArgs, checkpoint: Checkpoint, devices: list[Any], limits: Mapping[str, int]) -> Engine:
    """One replica, its weights on its devices and none of its programs compiled."""
    from mmjax import sharding
    from mmjax.engine.model_runner import ModelRunner

    platform = {"cuda": "gpu", "rocm": "gpu"}.get(devices[0].platform, devices[0].platform)
    precision = Precision.of(args.dtype, checkpoint.config, platform)
    dummy = args.load_format == "dummy"
    config = checkpoint.model_config(dummy=dummy, headless=args.pooling)
    if args.pooling and config.spec.is_encoder_decoder:
        raise ValueError("runner 'pooling' is for decoder-only models: an encoder-decoder has no vectors to give")
    encoders = {
        name
        for name, encoder in config.spec.encoders.items()
        if any(limits.get(modality, 0) for modality in encoder.modalities)
    }
    mesh = sharding.mesh(devices)
    graph, config, params = load_params(
        checkpoint,
        config,
        mesh,
        precision,
        dummy_seed=args.seed if dummy else None,
        int8=args.quantization == "int8",
        text_only=not encoders and not config.spec.is_encoder_decoder,
        progress=_progress_bar("Loading weights"),
    )
    spec = _served_spec(args, config.spec, encoders)
    memory = EngineMemory.plan(
        args, spec, platform, kv_dtype=precision.kv_dtype, tp_size=sharding.tp_size(mesh), device=devices[0]
    )
    # the rotary frequencies of some models depend on the longest sequence that there can be
    graph, _ = param_specs(checkpoint.family, config.for_max_len(memory.max_model_len))
    runner = ModelRunner(graph, params, spec, memory, mesh, precision, platform=platform)
    caching = not spec.is_encoder_decoder if args.enable_prefix_caching is None else args.enable_prefix_caching
    return Engine(runner, spec, memory, prefix_caching=caching)


def _served_spec(args: EngineArgs, spec: ModelSpec, encoders: set[str]) -> ModelSpec:
    """The model's spec without the encoders that no request may use."""
    mm_embed_dim = spec.mm_embed_dim if encoders or args.enable_mm_embeds else 0
    if args.enable_prompt_embeds and not spec.is_encoder_decoder:
        mm_embed_dim = spec.mm_embed_dim or spec.hidden_size
    return dataclasses.replace(
        spec,
        encoders={name: encoder for name, encoder in spec.encoders.items() if name in encoders},
        mm_embed_dim=mm_embed_dim,
        pooling=args.pooling,
    )


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


def _progress_bar(name: str) -> Callable[[Iterator[Any], int], Iterator[Any]]:
    quiet = env("PROGRESS", "1") == "0"

    def wrap(items: Iterator[Any], total: int) -> Iterator[Any]:
        return iter(tqdm(items, total=total, desc=name, disable=quiet, leave=False, dynamic_ncols=True))

    return wrap
