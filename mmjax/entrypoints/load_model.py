"""Loads a model: checkpoint, mesh, parameters, sizes, engines, and the host code around them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from mmjax.chat import ChatRenderer, StoredTemplates, load_template
from mmjax.config import EngineArgs, cache_root, env
from mmjax.engine.engine import Engine
from mmjax.engine.loaded_model import LoadedModel
from mmjax.engine.logits.structured_output import GrammarCompiler
from mmjax.inputs.input_processor import InputConfig, InputProcessor
from mmjax.inputs.params import ParamsChecker
from mmjax.loader.checkpoint import Checkpoint, find_model
from mmjax.multimodal.connector import Connect, Connector, IoKwargs
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.processors.base import Processor
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, ValidationError

if TYPE_CHECKING:
    import jax

    from mmjax.distributed.hosts import Hosts

logger = logging.getLogger(__name__)
T = TypeVar("T")


def load_model(args: EngineArgs, *, compile_behind: bool = False) -> LoadedModel:
    """Load a model and compile its programs: all, or with `compile_behind` those that the first requests need, and the
    others while requests run. ValueError for a model that cannot be loaded or does not fit."""
    start = time.perf_counter()
    start_jax(args)
    from mmjax.distributed.hosts import Hosts

    hosts = Hosts.join(args)
    with contextlib.nullcontext() if hosts is None else hosts.loading():
        return _load(args, hosts, start, compile_behind=compile_behind and hosts is None)


def _load(args: EngineArgs, hosts: Hosts | None, start: float, *, compile_behind: bool) -> LoadedModel:
    directory = find_model(args.model, revision=args.revision, token=args.hf_token, cache_dir=args.download_dir)
    checkpoint = Checkpoint.open(str(directory), token=args.hf_token, overrides=args.hf_overrides)
    replicas = _replica_devices(args) if hosts is None else [hosts.devices(args.tensor_parallel_size)]
    tokenizer = None if args.skip_tokenizer_init else Tokenizer(_tokenizer_directory(args, checkpoint))
    generation_config, eos_ids = _generation_config(args, checkpoint, tokenizer)
    processor = checkpoint.processor(tokenizer)
    _check_options(args, processor)
    limits = args.limits(processor.mm_limits)
    engines, reload_params = [], []
    for devices in replicas:
        engine, reload = _load_engine(args, checkpoint, devices, limits, hosts)
        engines.append(engine)
        reload_params.append(reload)
    compile_s = 0.0
    if not args.enforce_eager:
        compile_s = sum(engine.runner.warm_up(_progress_bar("Compiling"), behind=compile_behind) for engine in engines)
    first = engines[0]
    if hosts is not None:
        hosts.start(first.runner, reload_params[0])
    input_processor = _input_processor(args, processor, tokenizer, first, limits)
    connect = functools.partial(_connect, args, input_processor)
    for name in checkpoint.unread_overrides():
        logger.warning("hf_overrides: %r changes nothing: %s does not read it", name, checkpoint.family.name)
    startup_s = time.perf_counter() - start
    logger.info("ready in %.1f s, of which %.1f s compiling", startup_s, compile_s)
    return LoadedModel(
        engines=engines,
        reload_params=reload_params,
        input_processor=input_processor,
        chat=_chat_renderer(args, checkpoint, input_processor, connect),
        connect=connect,
        tokenizer=tokenizer,
        params_checker=ParamsChecker(
            vocab_size=first.spec.vocab_size,
            hidden_size=first.spec.hidden_size,
            max_model_len=first.memory.max_model_len,
            max_logprobs=args.max_logprobs,
            pooling=args.pooling,
            has_tokenizer=tokenizer is not None,
        ),
        grammar_compiler=GrammarCompiler(tokenizer, first.spec.vocab_size, eos_ids),
        spec=first.spec,
        buckets=first.buckets,
        generation_config=generation_config,
        eos_ids=eos_ids,
        max_model_len=first.memory.max_model_len,
        startup_s=startup_s,
        compile_s=compile_s,
        seeds=(args.seed * 1_000_003 + n for n in itertools.count()),
        request_ids=map(str, itertools.count()),
        lost=None if hosts is None else hosts.lost,
    )


def _check_options(args: EngineArgs, processor: Processor) -> None:
    """ValidationError for media_io_kwargs and mm_processor_kwargs that would make every request fail."""
    from mmjax.inputs.processor_kwargs import check_kwargs_for
    from mmjax.multimodal.media import MediaConnector  # imports an HTTP client

    checks: list[tuple[str, Mapping[str, Any] | None, Callable[[Mapping[str, Any]], object]]] = [
        ("media_io_kwargs", args.media_io_kwargs, MediaConnector),
        ("mm_processor_kwargs", args.mm_processor_kwargs, functools.partial(check_kwargs_for, processor)),
    ]
    for name, given, check in checks:
        try:
            check(given or {})
        except ValidationError:
            raise  # it is about an environment variable
        except RequestError as error:
            message = f"--{name.replace('_', '-')}: {str(error).removeprefix(f'{name}: ')}"
            raise ValidationError(message, parameter=name, value=given) from error


def _input_processor(
    args: EngineArgs,
    processor: Processor,
    tokenizer: Tokenizer | None,
    engine: Engine,
    limits: Mapping[str, int],
) -> InputProcessor:
    """The input processor for engines like this one."""
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


def _connect(args: EngineArgs, input_processor: InputProcessor, io_kwargs: IoKwargs) -> Connector:
    """The media connector of a request with these media_io_kwargs."""
    from mmjax.multimodal.media import MediaConnector  # imports an HTTP client

    return MediaConnector(
        media_io_kwargs=input_processor.merged_io_kwargs(io_kwargs),
        allowed_local_media_path=args.allowed_local_media_path,
        allowed_media_domains=args.allowed_media_domains,
        limits=input_processor.config.media_limits,
    )


def _chat_renderer(
    args: EngineArgs, checkpoint: Checkpoint, input_processor: InputProcessor, connect: Connect
) -> ChatRenderer:
    """The chat renderer of the model. ValueError for a template that cannot be read."""
    stored = StoredTemplates.read(checkpoint.directory, input_processor.tokenizer, checkpoint.config.get("model_type"))
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
    return find_model(
        args.tokenizer, revision=args.tokenizer_revision, token=args.hf_token, cache_dir=args.download_dir
    )


def start_jax(args: EngineArgs, cache: Path | None = None) -> None:
    """Import jax. It reads the share of memory and the compilation cache when it starts, so set them first. cache:
    directory of compiled programs; by default that of jax's configuration, else that of the environment."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(args.gpu_memory_utilization))
    import jax

    if cache or jax.config.values["jax_compilation_cache_dir"] is None:
        directory = str(cache or env("COMPILATION_CACHE", str(cache_root() / "xla")))
        if directory != "0":
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _replica_devices(args: EngineArgs) -> list[list[jax.Device]]:
    """The devices of each replica. ValueError when there are too few."""
    import jax

    devices, tp_size, dp_size = jax.local_devices(), args.tensor_parallel_size, args.data_parallel_size
    if tp_size * dp_size > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tp_size} times data_parallel_size {dp_size} needs {tp_size * dp_size} devices, "
            f"but this machine has {len(devices)} ({devices[0].platform})"
        )
    return [devices[i * tp_size : (i + 1) * tp_size] for i in range(dp_size)]


def _load_engine(
    args: EngineArgs,
    checkpoint: Checkpoint,
    devices: list[jax.Device],
    limits: Mapping[str, int],
    hosts: Hosts | None,
) -> tuple[Engine, Callable[[], list[Any]]]:
    """The engine of one replica, with its weights on its devices and its programs not compiled yet; and a function that
    reads these weights again."""
    from mmjax import sharding
    from mmjax.entrypoints.replica import Replica

    replica = Replica(args, checkpoint, sharding.mesh(devices), limits)
    progress = _progress_bar("Loading weights")
    runner, memory = replica.build(progress, hosts)
    prefix_caching = args.enable_prefix_caching
    if prefix_caching is None:
        prefix_caching = not replica.spec.is_encoder_decoder
    engine = Engine(runner, replica.spec, memory, prefix_caching=prefix_caching)
    reload = lambda: list(replica.load(progress).values())  # noqa: E731
    return engine, reload if hosts is None else functools.partial(hosts.reload, reload)


def _generation_config(
    args: EngineArgs, checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(sampling defaults, end-of-sequence tokens) of the model's generation_config.json, overridden by the caller's."""
    stored = checkpoint.files.get("generation_config.json", {})
    config = checkpoint.config
    thinker = config.get("thinker_config", {})
    places = (stored, config, config.get("text_config", {}), thinker, thinker.get("text_config", {}))
    known = (place.get("eos_token_id") for place in places)
    stored_eos: Any = next((eos for eos in known if eos is not None and eos != []), [])
    eos_ids = [int(token) for token in np.atleast_1d(stored_eos)]
    if tokenizer is not None and tokenizer.eos_id is not None:
        eos_ids = [tokenizer.eos_id, *eos_ids]
    defaults = dict(stored) if args.generation_config == "auto" else {}
    return defaults | dict(args.override_generation_config), tuple(dict.fromkeys(eos_ids))


def _progress_bar(name: str) -> Callable[[Iterable[T], int], Iterator[T]]:
    quiet = env("PROGRESS", "1") == "0"

    def wrap(items: Iterable[T], total: int) -> Iterator[T]:
        return iter(tqdm(items, total=total, desc=name, disable=quiet, leave=False, dynamic_ncols=True))

    return wrap
