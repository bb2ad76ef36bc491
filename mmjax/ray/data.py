"""Batch inference over a Ray Data dataset: rows in, rows with outputs out, by a pool of actors with an engine each."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from mmjax import LLM, AsyncLLM, EngineDeadError, PoolingParams, SamplingParams
from mmjax.config import EngineArgs
from mmjax.ray.resources import actor_options, needs_ray

logger = logging.getLogger(__name__)

Row = dict[str, Any]
MapRow = Callable[[Row], Row]

PICKLED = "__row"
"""The only column between the stages: rows as pickle writes them, since Arrow has no type for a PIL image, and gives
the parts of a message the fields of each other."""

ERROR = "__inference_error__"
"""The column of the error of a row, as Ray's own processors name it; empty for a row that has its output."""


OUTPUTS: Mapping[str, Any] = MappingProxyType(
    {
        "generated_text": "",
        "generated_tokens": [],
        "finish_reason": "",
        "num_input_tokens": 0,
        "num_generated_tokens": 0,
    }
)
"""The columns of a generated output, as they are for a row that failed."""

EMBEDDINGS: Mapping[str, Any] = MappingProxyType({"embeddings": [], "num_input_tokens": 0})
"""The same for task_type "embed"."""

CHAT_OPTIONS = ("chat_template_kwargs", "mm_processor_kwargs")


@dataclasses.dataclass(frozen=True)
class EngineProcessorConfig:
    """How a `Processor` runs engines. Names and meanings are those of `ray.data.llm.vLLMEngineProcessorConfig`.

    model_source, engine_kwargs: the arguments of `LLM`. task_type: "generate" or "embed". batch_size: rows of one call
    of an engine, and of one checkpoint. concurrency: actors; (m, n) = from m to n. max_concurrent_batches: calls of an
    engine at once, which keep it busy while others end. accelerator_type: as in `deployment`. resources_per_actor:
    further options of its actor, such as num_cpus. runtime_env: its environment. should_continue_on_error: a row that
    fails gets an error, in the column `__inference_error__`, instead of ending the job. max_task_retries: how often a
    batch whose actor died is tried again.
    """

    model_source: str
    engine_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task_type: str = "generate"
    batch_size: int = 32
    concurrency: int | tuple[int, int] = 1
    max_concurrent_batches: int = 8
    accelerator_type: str | None = None
    resources_per_actor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = None
    should_continue_on_error: bool = False
    max_task_retries: int = 3

    def __post_init__(self) -> None:
        if self.task_type not in ("generate", "embed"):
            raise ValueError(f"task_type must be 'generate' or 'embed', got {self.task_type!r}.")
        for name in ("batch_size", "max_concurrent_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        pool = self.concurrency if isinstance(self.concurrency, tuple) else (1, self.concurrency)
        if len(pool) != 2 or not 1 <= pool[0] <= pool[1]:
            raise ValueError(f"concurrency must be n or (m, n) with 1 <= m <= n, got {self.concurrency!r}.")
        actor_options(self.engine_args(), self.accelerator_type, self.resources_per_actor)

    def engine_args(self) -> EngineArgs:
        """The arguments of the engines. TypeError and ValueError as `LLM` raises them."""
        runner = {"runner": "pooling"} if self.task_type == "embed" else {}
        return EngineArgs.of(self.model_source, **{**self.engine_kwargs, **runner})


class Processor:
    """Applies an engine to the rows of a dataset: `build_processor` makes one."""

    def __init__(self, config: EngineProcessorConfig, preprocess: MapRow | None, postprocess: MapRow | None) -> None:
        self.config = config
        self.preprocess = preprocess
        self.postprocess = postprocess

    def __call__(self, dataset: Any) -> Any:
        """The dataset of outputs. It is computed when it is read; Ray Data shows the progress."""
        with needs_ray():
            from ray.data import ActorPoolStrategy
        config = self.config
        low, high = config.concurrency if isinstance(config.concurrency, tuple) else (config.concurrency,) * 2
        strategy = ActorPoolStrategy(
            min_size=low,
            max_size=high,
            max_concurrent_calls_per_actor=config.max_concurrent_batches,
            max_tasks_in_flight_per_actor=2 * config.max_concurrent_batches,
        )
        options = actor_options(config.engine_args(), config.accelerator_type, config.resources_per_actor)
        if config.runtime_env is not None:
            options["runtime_env"] = dict(config.runtime_env)
        # One batch per block: a block is what a worker is given, what is tried again, and what is written at once.
        batches = dataset.repartition(target_num_rows_per_block=config.batch_size)
        packed = batches.map(pack_rows(self.preprocess, config.should_continue_on_error))
        outputs = packed.map_batches(
            Engine,
            fn_constructor_args=(config,),
            batch_size=config.batch_size,
            batch_format="numpy",
            compute=strategy,
            max_task_retries=config.max_task_retries,
            **options,
        )
        return outputs.map(unpack_rows(self.postprocess, config.should_continue_on_error))

    def write(self, dataset: Any, path: str, *, id_column: str) -> None:
        """Write the outputs to `path`/rows, as Parquet, and the ids of rows that are written to `path`/checkpoint.

        Called again after it was interrupted, this leaves out the rows that were written. path: a directory or URL
        that all machines see. id_column: a column of the dataset with unique values, which `postprocess` must keep.
        ValueError for a dataset that is not read from files, which Ray Data cannot resume.
        """
        with needs_ray():
            from ray.data.checkpoint import CheckpointConfig
        _check_resumable(dataset)
        root = (path if "://" in path else os.path.abspath(path)).rstrip("/")
        outputs = self(dataset)
        outputs.context.checkpoint_config = CheckpointConfig(
            id_column, f"{root}/checkpoint", delete_checkpoint_on_success=False
        )
        outputs.write_parquet(f"{root}/rows")


def build_processor(
    config: EngineProcessorConfig, preprocess: MapRow | None = None, postprocess: MapRow | None = None
) -> Processor:
    """A processor of datasets, as `ray.data.llm.build_processor` makes one.

    preprocess: from a row of the dataset to `messages`, as `LLM.chat` takes them, or `prompt`, as `LLM.generate` takes
    it, and optionally `sampling_params` (a dictionary or SamplingParams), `chat_template_kwargs` and
    `mm_processor_kwargs`. Media are URLs, base64, PIL images or arrays. What it returns is added to the row.
    postprocess: from that row, with `generated_text`, `generated_tokens`, `finish_reason`, `num_input_tokens` and
    `num_generated_tokens` (or `embeddings` and `num_input_tokens`), to a row of the result; without it, the result is
    the row of the dataset with these columns. A row that failed has them empty, and goes through postprocess too, so
    that all rows have the same columns.
    """
    return Processor(config, preprocess, postprocess)


class Engine:
    """An actor's engine. The batches of several calls run together."""

    def __init__(self, config: EngineProcessorConfig) -> None:
        self.config = config
        args = config.engine_args()
        self.engine = AsyncLLM(LLM.from_engine_args(args))

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows of a batch, pickled, with their outputs."""
        rows = [pickle.loads(pickled) for pickled in batch[PICKLED]]
        outputs = await asyncio.gather(*(self._complete(row) for _, row in rows))
        done = np.empty(len(rows), object)
        done[:] = [pickle.dumps((own, {**row, **out})) for (own, row), out in zip(rows, outputs, strict=True)]
        return {PICKLED: done}

    async def _complete(self, row: Row) -> Row:
        """The columns of a row's output, or of its error."""
        config = self.config
        error = row.get(ERROR, "")
        if not error:
            try:
                return {**await self._output(row), ERROR: ""}
            except EngineDeadError:
                logger.exception("the engine has stopped: its actor ends, and another one gets its batches")
                os._exit(1)  # an exception would leave this actor in the pool
            except Exception as failure:
                if not config.should_continue_on_error:
                    raise
                error = _describe(failure)
        return {**(EMBEDDINGS if config.task_type == "embed" else OUTPUTS), ERROR: error}

    async def _output(self, row: Row) -> Row:
        engine = self.engine
        if "messages" in row:
            options = {name: row[name] for name in CHAT_OPTIONS if name in row}
            engine_input = await engine.prepare_chat(row["messages"], **options)
        elif "prompt" in row:
            engine_input = await engine.prepare(row["prompt"])
        else:
            raise ValueError(f"a row needs `messages` or `prompt` after preprocess; it has {', '.join(sorted(row))}")
        num_input_tokens = len(engine_input.token_ids)
        if self.config.task_type == "embed":
            pooled = await engine.embed(engine_input, PoolingParams())
            return {"embeddings": pooled.outputs.data.tolist(), "num_input_tokens": num_input_tokens}
        given = row.get("sampling_params")
        if given is None:
            given = engine.llm.get_default_sampling_params()
        params = SamplingParams(**given) if isinstance(given, Mapping) else given
        output = await engine.complete(engine_input, params, await engine.compile_grammar(params))
        first = output.outputs[0]
        return {
            "generated_text": first.text,
            "generated_tokens": list(first.token_ids),
            "finish_reason": first.finish_reason,
            "num_input_tokens": num_input_tokens,
            "num_generated_tokens": len(first.token_ids),
        }


def pack_rows(preprocess: MapRow | None, continue_on_error: bool) -> MapRow:
    """From a row of the dataset to the names of its columns and what `preprocess` makes of it, pickled."""

    def pack(row: Row) -> Row:
        try:
            added = {} if preprocess is None else preprocess(row)
        except Exception as failure:
            if not continue_on_error:
                raise
            added = {ERROR: _describe(failure)}
        return {PICKLED: pickle.dumps((list(row), {**row, **added}))}

    return pack


def unpack_rows(postprocess: MapRow | None, continue_on_error: bool) -> MapRow:
    """From a pickled row with its output to a row of the result."""

    def unpack(packed: Row) -> Row:
        own, row = pickle.loads(packed[PICKLED])
        error = row.pop(ERROR)
        if error:
            logger.warning("a row failed: %s", error)
        if postprocess is not None:
            result = postprocess(row)
        else:
            result = {name: row[name] for name in (*own, *OUTPUTS, *EMBEDDINGS) if name in row}
        return {**result, ERROR: error} if continue_on_error else result

    return unpack


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check_resumable(dataset: Any) -> None:
    """ValueError for a source whose rows Ray Data does not compare with the checkpoint: it would compute all of them
    again, and say nothing."""
    sources = {type(source).__name__ for source in dataset._logical_plan.sources()}
    if others := sorted(name for name in sources if not name.startswith(("Read", "ListFiles"))):
        raise ValueError(
            f"a job can only be resumed over a dataset that is read (ray.data.read_parquet, read_images, ...), not one "
            f"from {', '.join(others)}: write it to Parquet first, or write the result of the processor yourself."
        )
