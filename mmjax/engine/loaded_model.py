"""A loaded model: its engines, and the host code around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

from mmjax.chat import ChatRenderer
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.engine import Engine
from mmjax.engine.logits.structured_output import CompiledGrammar, GrammarCompiler
from mmjax.inputs.input_processor import EngineInput, InputProcessor
from mmjax.inputs.params import ParamsChecker
from mmjax.inputs.prompt_urls import fetch_prompt
from mmjax.multimodal.connector import Connect
from mmjax.spec import ModelSpec
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, SamplingParams

MEMORY = ("weights", "kv_cache")
"""What `LoadedModel.sleep` frees: the tags of `wake_up`."""


@dataclasses.dataclass
class LoadedModel:
    """engines: one per replica. reload_params: reads the parameters of each replica again. connect: makes media
    connectors. generation_config: sampling defaults. eos_ids: end-of-sequence tokens, the primary one first. seeds: for
    requests without a seed. request_ids: for all requests. asleep: those of MEMORY that are not on the devices.
    lost: with several hosts, gets an exception as soon as one is lost.

    Only the thread that steps the engines may use them, the two iterators and the reset methods. Everything else may be
    used from any thread.
    """

    engines: list[Engine]
    reload_params: list[Callable[[], list[Any]]]
    input_processor: InputProcessor
    chat: ChatRenderer
    connect: Connect
    tokenizer: Tokenizer | None
    params_checker: ParamsChecker
    grammar_compiler: GrammarCompiler
    spec: ModelSpec
    buckets: BucketConfig
    generation_config: dict[str, Any]
    eos_ids: tuple[int, ...]
    max_model_len: int
    startup_s: float
    compile_s: float
    seeds: Iterator[int]
    request_ids: Iterator[str]
    asleep: frozenset[str] = frozenset()
    lost: Future[NoReturn] | None = None
    _params_on_host: list[Any] = dataclasses.field(default_factory=list)  # of each engine, while it sleeps

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    # -- prompts -----------------------------------------------------------------------------------------------------

    def process(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """Process a prompt as `LLM.generate` takes it. TypeError for an object that is not a prompt, RequestError for
        a prompt that cannot be processed."""
        return self.input_processor.process(self.input_processor.parse(prompt), tokenization_kwargs)

    def process_chat(self, prompt: Any, tokenization_kwargs: Mapping[str, Any] | None = None) -> EngineInput:
        """`process` for a prompt written by a chat template, whose text already has its special tokens."""
        return self.process(prompt, {"add_special_tokens": False, **(tokenization_kwargs or {})})

    async def fetch(self, prompt: Any) -> Any:
        """Replace the URLs in a prompt by the media they refer to."""
        return await fetch_prompt(prompt, self.connect, self.input_processor.config)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text. RequestError without a tokenizer."""
        return self._require_tokenizer().encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special ones included. RequestError without a tokenizer."""
        return self._require_tokenizer().decode([int(token) for token in token_ids], False)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("There is no tokenizer (skip_tokenizer_init).", "no_tokenizer")
        return self.tokenizer

    # -- parameters --------------------------------------------------------------------------------------------------

    def default_sampling_params(self) -> SamplingParams:
        """The defaults of generation_config.json, unless the caller has replaced them."""
        return SamplingParams.from_generation_config(self.generation_config)

    def compile_grammar(self, params: SamplingParams) -> CompiledGrammar | None:
        """The grammar of `structured_outputs`, if set. Slow: do not call it on the engine's thread."""
        structured = params.structured_outputs
        return None if structured is None else self.grammar_compiler.compile(structured)

    # -- engines -----------------------------------------------------------------------------------------------------

    def least_busy_engine(self) -> Engine:
        """The engine with the fewest unfinished sequences."""
        return min(self.engines, key=lambda engine: engine.num_unfinished)

    def counters(self) -> dict[str, float]:
        """Counters since start by name, summed over the engines; see `LLM.counters`."""
        cache = self.input_processor.cache
        counters: dict[str, float] = {
            "startup_s": self.startup_s,
            "compile_s": self.compile_s,
            "mm_cache_queries": cache.queries,
            "mm_cache_hits": cache.hits,
        }
        for engine in self.engines:
            for name, value in engine.counters().items():
                counters[name] = counters.get(name, 0) + value
        return counters

    def load(self) -> tuple[int, int, float]:
        """(running sequences, waiting sequences, share of the KV cache's blocks in use) at this moment."""
        running = sum(len(engine.scheduler.running) for engine in self.engines)
        waiting = sum(len(engine.scheduler.waiting) for engine in self.engines)
        used = [1 - engine.block_pool.num_free / max(engine.block_pool.num_blocks - 1, 1) for engine in self.engines]
        return running, waiting, max(used)

    def sleep(self, level: int) -> None:
        """Free the devices' memory: the KV cache, and the weights, which level 1 copies to the host and level 2
        discards. RequestError while requests run, and for another level."""
        if level not in (1, 2):
            raise RequestError(f"sleep: level must be 1 or 2, got {level!r}.", "bad_level")
        if any(engine.has_work for engine in self.engines):
            raise RequestError("The engine cannot sleep while requests run.", "busy")
        if not self.asleep:
            self._params_on_host = [engine.sleep(keep_params=level == 1) for engine in self.engines]
            self.asleep = frozenset(MEMORY)

    def wake_up(self, tags: Sequence[str] | None) -> None:
        """Allocate what `sleep` has freed. tags: "weights", "kv_cache", or None for both. Weights that were discarded
        are read again. No program is compiled again."""
        unknown = [tag for tag in tags or () if tag not in MEMORY]
        if unknown:
            raise RequestError(f"wake_up: unknown tags {unknown}; known: {', '.join(MEMORY)}.", "bad_tags")
        waking = self.asleep & set(MEMORY if tags is None else tags)
        if "weights" in waking:
            for engine, host, reload in zip(self.engines, self._params_on_host, self.reload_params, strict=True):
                engine.runner.restore_params(reload() if host is None else host)
            self._params_on_host = []
        if "kv_cache" in waking:
            for engine in self.engines:
                engine.runner.restore_state()
        self.asleep -= waking

    @property
    def sleep_state(self) -> str:
        """ "awake", "weights_offloaded" to the host, "discard_all", or "waking" while only a part is back."""
        if not self.asleep:
            return "awake"
        if self.asleep != frozenset(MEMORY):
            return "waking"
        return "discard_all" if None in self._params_on_host else "weights_offloaded"

    def check_awake(self) -> None:
        """RequestError while the engine sleeps."""
        if self.asleep:
            raise RequestError(f"The engine sleeps ({', '.join(sorted(self.asleep))}): call wake_up first.", "asleep")

    def reset_mm_cache(self) -> None:
        """Empty the caches of processed media and of their embeddings."""
        self.input_processor.cache.clear()
        for engine in self.engines:
            engine.encoder_cache.clear()

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache. Returns False, and does nothing, while requests run."""
        return all([engine.block_pool.reset_prefix_cache() for engine in self.engines])
