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

from mmjax.chat import Chat, Stored, load_template
from mmjax.config import MAX_BATCHED_TOKENS, MAX_SEQS, PAGE, EngineArgs, cache_root, env, resolve_dtype
from mmjax.engine.engine import Engine
from mmjax.engine.grammar import Vocabulary
from mmjax.engine.pack import Sizes
from mmjax.load import Checkpoint, declare, find, load_params
from mmjax.models.family import Shape
from mmjax.multimodal.limits import Limits
from mmjax.render import Renderer
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
class Parts:
    """A built model. eos: end tokens, the primary one first. generation: the sampling defaults in force."""

    engines: list[Engine]
    renderer: Renderer
    chat: Chat
    tokenizer: Tokenizer | None
    vocabulary: Vocabulary
    shape: Shape
    sizes: Sizes
    generation: dict[str, Any]
    eos: tuple[int, ...]
    max_model_len: int
    startup_s: float
    compile_s: float
    seeds: Iterator[int]

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab

    def next_seed(self) -> int:
        """The seed of the next request that names none."""
        return next(self.seeds)


def build(args: EngineArgs) -> Parts:
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
    limits = args.limits(processor.kinds)
    engines, sizes, shape, max_len, compile_s = [], None, None, 0, 0.0
    for devices in replicas:
        engine, sizes, shape, max_len, seconds = _engine(args, checkpoint, config, devices, platform, dtype, limits)
        engines.append(engine)
        compile_s += seconds
    assert sizes is not None and shape is not None
    renderer = _renderer(args, processor, tokenizer, engines[0], limits, max_len)
    startup = time.perf_counter() - begin
    logger.info("ready in %.1f s, of which %.1f s compiling", startup, compile_s)
    seeds = (args.seed * 1_000_003 + n for n in itertools.count())
    chat = _chat(args, checkpoint, renderer)
    vocabulary = Vocabulary(tokenizer, shape.vocab, eos)
    return Parts(
        engines,
        renderer,
        chat,
        tokenizer,
        vocabulary,
        shape,
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
    from mmjax.processors.options import check_for

    checks: dict[str, Callable[[Any], object]] = {
        "media_io_kwargs": MediaConnector,
        "mm_processor_kwargs": functools.partial(check_for, processor),
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
) -> Renderer:
    """What turns requests into prompts that this engine can run."""
    shape, units = engine.shape, engine.sizes.units
    return Renderer(
        processor,
        tokenizer,
        model_id=args.model,
        vocab_size=shape.vocab,
        max_model_len=max_len,
        limit_mm_per_prompt=limits,
        mm_processor_kwargs=args.mm_processor_kwargs,
        media_io_kwargs=args.media_io_kwargs,
        limits=Limits.from_env(),
        cache_gb=args.mm_processor_cache_gb,
        embed_width=shape.slab_width if args.enable_mm_embeds else None,
        prompt_width=shape.width if args.enable_prompt_embeds else None,
        slab_width=shape.slab_width,
        page=engine.sizes.page,
        prefix_caching=engine.scheduler.prefix_caching,
        encoder_decoder=shape.cross,
        answers=not shape.pooling,
        max_item_rows=engine.slab.capacity or None,
        max_item_units={kind: units[name][-1] for name, each in shape.encoders.items() for kind in each.kinds},
    )


def _chat(args: EngineArgs, checkpoint: Checkpoint, renderer: Renderer) -> Chat:
    """What writes conversations for the model. ValueError for a template that cannot be read."""
    stored = Stored.read(checkpoint.directory, renderer.tokenizer, checkpoint.config.get("model_type"))

    def connect(io_kwargs: Mapping[str, Mapping[str, Any]]) -> Any:
        from mmjax.multimodal.media import MediaConnector

        return MediaConnector(
            media_io_kwargs=renderer.merged_io_kwargs(io_kwargs),
            allowed_local_media_path=args.allowed_local_media_path,
            allowed_media_domains=args.allowed_media_domains,
            limits=renderer.limits,
        )

    return Chat(
        stored,
        placeholder=renderer.processor.placeholder if renderer.processor else {},
        check=renderer.check_count,
        connect=connect,
        default_template=load_template(args.chat_template, stored),
        interleave=args.interleave_mm_strings,
        processor_kwargs=args.mm_processor_kwargs,
    )


def _tokenizer_directory(args: EngineArgs, checkpoint: Checkpoint) -> Path:
    if args.tokenizer is None:
        return checkpoint.directory
    return find(args.tokenizer, revision=args.tokenizer_revision, token=args.hf_token)


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


def _replicas(jax: Any, args: EngineArgs) -> list[list[Any]]:
    """The devices of each replica. Raises ValueError when there are too few."""
    devices, ways, copies = jax.local_devices(), args.tensor_parallel_size, args.data_parallel_size
    if ways * copies > len(devices):
        raise ValueError(
            f"tensor_parallel_size {ways} times data_parallel_size {copies} needs {ways * copies} devices, "
            f"but this machine has {len(devices)} ({devices[0].platform})"
        )
    return [devices[i * ways : (i + 1) * ways] for i in range(copies)]


def _engine(
    args: EngineArgs,
    checkpoint: Checkpoint,
    config: Any,
    devices: list[Any],
    platform: str,
    dtype: str,
    limits: Mapping[str, int],
) -> tuple[Engine, Sizes, Shape, int, float]:
    """One replica: (engine, sizes, shape, longest sequence, seconds spent compiling)."""
    from mmjax import sharding
    from mmjax.engine.runner import Runner

    mesh = sharding.mesh(devices)
    held, matrices = _kept_in(dtype, platform)
    keys = matrices or held
    if args.pooling and config.shape.cross:
        raise ValueError("runner 'pooling' is for decoder-only models: an encoder-decoder has no vectors to give")
    encoders = {
        name for name, encoder in config.shape.encoders.items() if any(limits.get(kind, 0) for kind in encoder.kinds)
    }
    graph, split, params = load_params(
        checkpoint,
        config,
        mesh,
        dtype,
        held,
        matrices=matrices,
        dummy=args.load_format == "dummy",
        seed=args.seed,
        int8=args.quantization == "int8",
        text_only=not encoders and not config.shape.cross,
        progress=_bar("Loading weights"),
    )
    shape: Shape = split.shape
    slab_width = shape.slab_width if encoders or args.enable_mm_embeds else 0
    if args.enable_prompt_embeds and not shape.cross:
        slab_width = shape.slab_width or shape.width
    shape = dataclasses.replace(
        shape,
        encoders={name: encoder for name, encoder in shape.encoders.items() if name in encoders},
        slab_width=slab_width,
        pooling=args.pooling,
    )
    page_bytes = _page_bytes(args, shape, platform, keys, sharding.ways(mesh))
    budget = _cache_bytes(args, devices[0], platform)
    max_len, pages = _cache_size(args, shape, platform, budget, page_bytes)
    if hasattr(split, "within"):  # some models turn with the longest sequence that there can be
        graph, _ = declare(checkpoint.family, split.within(max_len))
    slab_rows = _slab_rows(args, shape, platform, max_len)
    sizes = _sizes(args, shape, platform, max_len, slab_rows)
    runner = Runner(
        graph, params, shape, sizes, mesh, pages=pages, slab_rows=slab_rows, dtype=held, keys=keys, platform=platform
    )
    seconds = 0.0 if args.enforce_eager else runner.warm_up(_bar("Compiling"))
    caching = not shape.cross if args.enable_prefix_caching is None else args.enable_prefix_caching
    engine = Engine(runner, sizes, shape, pages=pages, slab_rows=slab_rows, prefix_caching=caching)
    return engine, sizes, shape, max_len, seconds


def _page(args: EngineArgs, platform: str) -> int:
    return args.block_size or PAGE[platform]


def _kept_in(dtype: str, platform: str) -> tuple[str, str | None]:
    """(dtype of the parameters and of arithmetic, dtype of the matrices and the cache where it is another).

    XLA:CPU emulates half precision, which makes a decode step take 10 times as long; but for products of bfloat16, on
    processors that have them.
    """
    from mmjax.kernels import multiplies_bfloat16

    if platform != "cpu":
        return dtype, None
    return "float32", "bfloat16" if dtype == "bfloat16" and multiplies_bfloat16() else None


def _page_bytes(args: EngineArgs, shape: Shape, platform: str, dtype: str, ways: int) -> int:
    """Bytes of one page over all layers, on one device."""
    from mmjax.engine.runner import page_shape

    page, kept = page_shape(shape, _page(args, platform), dtype, platform, ways)
    return 2 * shape.layers * math.prod(page) // ways * int(kept.itemsize)


def _cache_bytes(args: EngineArgs, device: Any, platform: str) -> int:
    """Bytes the pool may take on one device."""
    if args.kv_cache_memory_bytes:
        return args.kv_cache_memory_bytes
    stats = device.memory_stats() if platform != "cpu" else None
    if not stats:
        return CPU_CACHE_BYTES
    free = int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    return max(free - min(WORKSPACE_BYTES, free // 4), free // 4)


def _cache_size(args: EngineArgs, shape: Shape, platform: str, budget: int, page_bytes: int) -> tuple[int, int]:
    """(longest sequence in tokens, pages). Raises ValueError when one such sequence does not fit the budget."""
    page = _page(args, platform)
    seqs = args.max_num_seqs or MAX_SEQS[platform]
    cross = -(-shape.cross_keys // page)
    affordable = budget // page_bytes - 1
    asked = args.max_model_len
    if isinstance(asked, int) and asked > shape.max_len:
        raise ValueError(
            f"max_model_len {asked} is greater than the {shape.max_len} positions that the model was made for"
        )
    longest = asked if isinstance(asked, int) and asked > 0 else shape.max_len
    if longest > (affordable - cross) * page:
        fits = (affordable - cross) * page
        if asked == -1 and fits > 0:
            longest = fits
        else:
            raise ValueError(
                f"one sequence of max_model_len {longest} tokens needs {longest * page_bytes / page / 2**30:.2f} GiB "
                f"of cache, but only {budget / 2**30:.2f} GiB are there, enough for {max(fits, 0)} tokens. "
                f"Lower max_model_len (or set it to 'auto'), or raise "
                f"{'kv_cache_memory_bytes' if platform == 'cpu' else 'gpu_memory_utilization'}."
            )
    useful = seqs * (-(-longest // page) + cross)
    return longest, min(affordable, useful if platform == "cpu" else affordable) + 1


def _slab_rows(args: EngineArgs, shape: Shape, platform: str, max_len: int) -> int:
    """Media rows to keep on the device: at least the largest item that a prompt can hold."""
    least = max((encoder.rows for encoder in shape.encoders.values()), default=0)
    if not least and not shape.slab_width:
        return 0
    tokens = args.max_num_batched_tokens or MAX_BATCHED_TOKENS[platform]
    return max(tokens, least, min(max_len, shape.largest_item))


def _sizes(args: EngineArgs, shape: Shape, platform: str, max_len: int, slab_rows: int) -> Sizes:
    from mmjax.kernels import query_block

    block, page = query_block(platform), _page(args, platform)
    seqs = args.max_num_seqs or MAX_SEQS[platform]
    tokens = -(-(args.max_num_batched_tokens or MAX_BATCHED_TOKENS[platform]) // block) * block
    units = {}
    for name, encoder in shape.encoders.items():
        most = slab_rows // encoder.rows * encoder.grain if encoder.rows else min(seqs, 8)
        most = max(most, encoder.largest)
        units[name] = ladder(max(encoder.grain, min(256, most)) if encoder.grain > 1 else 1, most, 2)
    return Sizes(
        tokens=ladder(min(LEAST_TOKENS[platform], tokens), tokens, TOKENS_STEP[platform]),
        seqs=ladder(1, seqs, 4),
        units=units,
        slab=slab_rows,
        block=block,
        page=page,
        table=-(-max_len // page),
        cross=-(-shape.cross_keys // page),
        rope_rows=shape.rope_rows,
        rows=seqs + 1,
        stops=STOPS,
        steps=args.num_decode_steps,
        top=shape.vocab if args.max_logprobs == -1 else min(args.max_logprobs, shape.vocab),
        ready=min(READY_ROWS, slab_rows) if args.enable_mm_embeds or args.enable_prompt_embeds else 0,
    )


def ladder(least: int, most: int, factor: int) -> tuple[int, ...]:
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
