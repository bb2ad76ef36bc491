"""`LLM`: takes prompts, and returns their outputs."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mmjax.chat import ChatOptions, RenderedChat, load_template, split
from mmjax.config import EngineArgs, env
from mmjax.engine.loaded_model import LoadedModel
from mmjax.entrypoints.batch_job import BatchJob, Prepare, Start, UseTqdm
from mmjax.entrypoints.load_model import load_model
from mmjax.entrypoints.metrics import EngineMetrics
from mmjax.inputs import parse
from mmjax.inputs.input_processor import EngineInput
from mmjax.inputs.params import check_count
from mmjax.outputs.pooling import as_embeddings, check_pairs, score_pairs
from mmjax.outputs.request import GenerateRequest, PoolingRequest
from mmjax.types import (
    EmbeddingRequestOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestOutput,
    SamplingParams,
    ScoringRequestOutput,
)
from mmjax.types.metrics import Metric

if TYPE_CHECKING:
    from mmjax.entrypoints.llm_engine import LLMEngine

logger = logging.getLogger(__name__)
Output = TypeVar("Output", RequestOutput, PoolingRequestOutput)


def _unsupported(method: str, advice: str) -> Callable[..., NoReturn]:
    """A method of vLLM's `LLM` that mmjax does not have."""

    def refuse(self: LLM, *args: Any, **kwargs: Any) -> NoReturn:
        raise RequestError(f"LLM.{method}() is not supported: {advice}.", "unsupported")

    refuse.__doc__ = f"Not supported: {advice}."
    return refuse


class LLM:
    """A loaded model, ready for prompts.

    `model` is a local directory in Hugging Face layout, one that `mmjax convert` wrote, or a hub id; every other
    argument is a keyword of `mmjax.config.EngineArgs`. Raises TypeError for an unknown keyword, ValueError for a bad
    value or a checkpoint that cannot be loaded.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self._start(EngineArgs.of(str(model), **kwargs), compile_behind=False)

    @classmethod
    def for_server(cls, model: str, **kwargs: Any) -> LLM:
        """As the constructor, but ready sooner, except on a GPU: with the programs that any request can use.

        Faster ones for small requests are compiled meanwhile, so the same prompt may be rounded otherwise in the first
        minute.
        """
        llm = cls.__new__(cls)
        llm._start(EngineArgs.of(str(model), **kwargs), compile_behind=True)
        return llm

    def _start(self, args: EngineArgs, *, compile_behind: bool) -> None:
        self.args = args
        self.model: LoadedModel = load_model(args, compile_behind=compile_behind)
        self.workers = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="inputs")
        self.metrics = EngineMetrics(self.model, self.args.model)
        self._queued: list[Prepare[RequestOutput]] = []  # by `enqueue`

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """The LLM with these arguments."""
        return cls(**vars(engine_args))

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate outputs for one prompt or many, in their order.

        A prompt is a string, a list of token ids, or a dict with `prompt` or `prompt_token_ids` and optionally
        `multi_modal_data`, `mm_processor_kwargs`, `multi_modal_uuids`, `cache_salt`; or, with enable_prompt_embeds, a
        dict with `prompt_embeds` [T, D]. sampling_params: None = the model's defaults; one for all prompts; or one per
        prompt. priority: per prompt, lower first. Raises TypeError for an object that is not a prompt, ValueError for a
        prompt that cannot be processed; the engine stays usable.
        """
        prepares = self._generate_prepares(prompts, sampling_params, lora_request, tokenization_kwargs)
        _check_priority(len(prepares), priority)
        return self._run(prepares, use_tqdm, priority)

    def enqueue(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[str]:
        """Queue prompts as `generate` takes them, for `wait_for_completion`. Returns their numbers in the queue."""
        prepares = self._generate_prepares(prompts, sampling_params, lora_request, tokenization_kwargs)
        _check_priority(len(prepares), priority)
        first = len(self._queued)
        self._queued += prepares
        return [str(first + i) for i in range(len(prepares))]

    def wait_for_completion(self, output_type: Any = None, *, use_tqdm: UseTqdm = True) -> list[RequestOutput]:
        """Run the prompts that `enqueue` has queued. Returns their outputs in the order of the queue."""
        prepares, self._queued = self._queued, []
        return self._run(prepares, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Generate outputs for one conversation (a list of messages) or many (a list of those), in their order.

        A message is {"role": ..., "content": ...}, its content a string or a list of parts: text, image_url,
        image_pil, input_audio, audio_url, video_url, and image_embeds, video_embeds, audio_embeds. chat_template: a
        file, Jinja text or the name of a stored template. continue_final_message: continue the last message; needs
        add_generation_prompt=False. Raises as `generate` does. All messages are checked before any media are fetched.
        """
        options = ChatOptions(
            chat_template=load_template(chat_template, self.model.chat.stored),
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            media_io_kwargs=media_io_kwargs,
        )
        conversations = split(messages)
        params = self._sampling_params(sampling_params, len(conversations))
        check_adapters(len(conversations), lora_request)
        rendered = [self.model.chat.render(conversation, options) for conversation in conversations]

        def process(chat: RenderedChat) -> EngineInput:
            return self.model.process_chat(self.model.chat.fetch(chat), tokenization_kwargs)

        processes = [functools.partial(process, chat) for chat in rendered]
        return self._run(list(map(self._prepare_generate, processes, params)), use_tqdm)

    # -- embeddings --------------------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Any,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, in their order: the final hidden state of the last token, of length 1.

        Prompts are those of `generate`, media included. Raises as `generate` does, and RequestError unless the model
        was loaded with runner="pooling".
        """
        self.model.params_checker.check_pooling("embed")
        return as_embeddings(
            self.encode(
                prompts,
                pooling_params,
                use_tqdm=use_tqdm,
                lora_request=lora_request,
                priority=priority,
                pooling_task="embed",
                tokenization_kwargs=tokenization_kwargs,
            )
        )

    def encode(
        self,
        prompts: Any,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """`embed` with NumPy arrays. pooling_task: "embed" (unless the parameters say otherwise), or "token_embed" for
        the final hidden states of all tokens [T, D]."""
        self.model.params_checker.check_pooling("encode")
        batch = parse.split_prompts(prompts)
        params = self.model.params_checker.pooling_params(pooling_params, len(batch), pooling_task)
        check_adapters(len(batch), lora_request)
        _check_priority(len(batch), priority)
        processes = self._parse(batch, tokenization_kwargs)
        return self._run(list(map(self._prepare_pooling, processes, params)), use_tqdm, priority)

    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike prompts are: the cosine of the vectors of `embed`, for each pair of the two lists. One prompt in
        data_1 is compared with every prompt of data_2. Raises as `embed` does.
        """
        self.model.params_checker.check_pooling("score")
        if chat_template is not None:
            raise RequestError("chat_template is only supported for cross-encoder models.", "no_cross_encoder")
        first, second = parse.split_prompts(data_1), parse.split_prompts(data_2)
        check_pairs(len(first), len(second))
        vectors = self.encode(
            [*first, *second],
            pooling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            pooling_task="embed",
            tokenization_kwargs=tokenization_kwargs,
        )
        return score_pairs(vectors[: len(first)], vectors[len(first) :], self.model.tokenizer)

    # -- running -----------------------------------------------------------------------------------------------------

    def _parse(
        self, prompts: Sequence[Any], tokenization_kwargs: dict[str, Any] | None
    ) -> list[Callable[[], EngineInput]]:
        """Check the form of every prompt. Returns a function per prompt that processes it."""
        input_processor = self.model.input_processor
        parsed = [input_processor.parse(prompt) for prompt in prompts]
        return [functools.partial(input_processor.process, prompt, tokenization_kwargs) for prompt in parsed]

    def _generate_prepares(
        self, prompts: Any, sampling_params: Any, lora_request: Any, tokenization_kwargs: dict[str, Any] | None
    ) -> list[Prepare[RequestOutput]]:
        """Check the arguments of `generate`. Returns a function per prompt that processes it."""
        batch = parse.split_prompts(prompts)
        params = self._sampling_params(sampling_params, len(batch))
        check_adapters(len(batch), lora_request)
        processes = self._parse(batch, tokenization_kwargs)
        return list(map(self._prepare_generate, processes, params))

    def _prepare_generate(self, process: Callable[[], EngineInput], params: SamplingParams) -> Prepare[RequestOutput]:
        def prepare() -> Start[RequestOutput]:
            engine_input, grammar = process(), self.model.compile_grammar(params)
            return lambda: GenerateRequest(self.model, engine_input, params, grammar)

        return prepare

    def _prepare_pooling(
        self, process: Callable[[], EngineInput], params: PoolingParams
    ) -> Prepare[PoolingRequestOutput]:
        def prepare() -> Start[PoolingRequestOutput]:
            engine_input = process()
            return lambda: PoolingRequest(self.model, engine_input, params)

        return prepare

    def _run(
        self, prepares: Sequence[Prepare[Output]], use_tqdm: UseTqdm, priority: Sequence[int] | None = None
    ) -> list[Output]:
        """Run prompts to completion. Returns the outputs in the order of the prompts."""
        self.model.check_awake()
        count = len(prepares)
        order = sorted(range(count), key=lambda i: priority[i]) if priority is not None else range(count)
        with BatchJob[Output](self.model.engines, self.workers, use_tqdm, count) as job:
            for i in order:
                job.submit(i, prepares[i])
            outputs = job.run()
        for output in outputs.values():
            self.metrics.record(output)
        if not self.args.disable_log_stats:
            logger.info("after %d prompts: %s", count, self.counters())
        return [outputs[i] for i in range(count)]

    def _sampling_params(self, given: Any, count: int) -> list[SamplingParams]:
        """Checked parameters, one per prompt; the defaults if none are given."""
        defaults = self.get_default_sampling_params() if given is None else given
        return self.model.params_checker.sampling_params(defaults, count)

    # -- the model and its caches ------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model."""
        if self.model.tokenizer is None:
            raise RequestError("Unable to get the tokenizer because skip_tokenizer_init is True", "no_tokenizer")
        return self.model.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that `generate` uses if none are given, from the model's generation_config.json."""
        return self.model.default_sampling_params()

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of devices; without include_dp, those of one copy of the model."""
        return self.args.tensor_parallel_size * (self.args.data_parallel_size if include_dp else 1)

    def get_metrics(self) -> list[Metric]:
        """The metrics of the server's `/metrics` route, as objects: see `mmjax.types.metrics`."""
        return self.metrics.snapshot()

    def counters(self) -> dict[str, float]:
        """Counters since start, by name: engine work, times in seconds, compilations, cache queries and hits."""
        return self.model.counters()

    def reset_mm_cache(self) -> None:
        """Empty the caches of processed media and of their embeddings."""
        self.model.reset_mm_cache()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix cache. Returns False, and does nothing, while requests run. The arguments have no effect: no
        request runs between calls, and there is no connector."""
        return self.model.reset_prefix_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the devices' memory until `wake_up`: the KV cache, and the weights, which level 1 copies to the host and
        level 2 discards. mode: has no effect, as no request runs between calls."""
        self.model.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Allocate what `sleep` has freed. tags: "weights", "kv_cache", or None for both. Weights that were discarded
        are read from the checkpoint again. Nothing is compiled again."""
        self.model.wake_up(tags)

    # -- the engine --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def llm_engine(self) -> LLMEngine:
        """The same LLM as `LLMEngine`, of which scripts for vLLM read attributes."""
        from mmjax.entrypoints.llm_engine import LLMEngine

        return LLMEngine(self)

    @property
    def model_config(self) -> Any:
        """What scripts for vLLM read of the model: `model`, `max_model_len`, `dtype`, `seed`."""
        return self.llm_engine.model_config

    # -- profiling ---------------------------------------------------------------------------------------------------

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Start a profile of the device and the host, to be read with XProf or Perfetto. It is written to the directory
        `torch_profiler_dir` of profiler_config, else to that of MMJAX_TORCH_PROFILER_DIR; profile_prefix: a folder in
        it. RuntimeError while a profile runs."""
        import jax

        config = self.args.profiler_config or {}
        directory = Path(config.get("torch_profiler_dir") or env("TORCH_PROFILER_DIR", "mmjax-profile")).expanduser()
        jax.profiler.start_trace(str(directory / (profile_prefix or "")))

    def stop_profile(self) -> None:
        """End the profile, and write it. RuntimeError unless one runs."""
        import jax

        jax.profiler.stop_trace()

    # -- what vLLM's LLM has, and mmjax has not ----------------------------------------------------------------------

    classify = _unsupported("classify", "no model here has a classification head")
    reward = _unsupported("reward", "no model here has a reward head; `encode` returns the hidden states")
    beam_search = _unsupported("beam_search", "use `generate` with n > 1 and a temperature")
    apply_model = _unsupported("apply_model", "the model is no torch module; its parameters are on the devices")
    collective_rpc = _unsupported("collective_rpc", "one process drives all devices, so there are no workers")
    init_weight_transfer_engine = _unsupported(
        "init_weight_transfer_engine", "start an engine with the new weights, or use `sleep(level=2)` and `wake_up`"
    )
    update_weights = _unsupported("update_weights", "write a checkpoint, and use `sleep(level=2)` and `wake_up`")


def check_adapters(count: int, lora_request: Any) -> None:
    """RequestError for LoRA adapters, which are not supported."""
    if isinstance(lora_request, Sequence):
        check_count("lora_request", lora_request, count)
    if lora_request is not None:
        raise RequestError("LoRA is not supported: pass lora_request=None.", "lora_unsupported")


def _check_priority(count: int, priority: Sequence[int] | None) -> None:
    """RequestError unless there is one priority per prompt."""
    if isinstance(priority, Sequence):
        check_count("priority", priority, count)
