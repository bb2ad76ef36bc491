"""`LLM`: prompts in, outputs out. Puts the rooms together; has no logic of its own."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.chat import ChatOptions, RenderedChat, load_template, split
from mmjax.config import EngineArgs, env_number
from mmjax.engine.loaded_model import LoadedModel
from mmjax.entrypoints.batch_job import BatchJob, Progress
from mmjax.entrypoints.load_model import load_model
from mmjax.inputs import parse
from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.pooling import as_embeddings, pooling_params
from mmjax.outputs.request import GenerateRequest, PoolingRequest
from mmjax.types import (
    EmbeddingRequestOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestOutput,
    RequestTypeError,
    SamplingParams,
    ValidationError,
)
from mmjax.types.sampling import MAX_N

logger = logging.getLogger(__name__)


class LLM:
    """A model ready to answer.

    `model` is a local directory in Hugging Face layout, one that `mmjax convert` wrote, or a hub id; every other
    argument is a keyword of `mmjax.config.EngineArgs`. Raises TypeError for an unknown keyword, ValueError for a bad
    value or a checkpoint that cannot be loaded.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.args = EngineArgs(str(model), **kwargs)
        self.model: LoadedModel = load_model(self.args)
        self._requests = 0
        self.workers = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="render")

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; the outputs are in the order of the prompts.

        A prompt is a string, a list of token ids, or a dict with `prompt` or `prompt_token_ids` and optionally
        `multi_modal_data`, `mm_processor_kwargs`, `multi_modal_uuids`, `cache_salt`; or, where the engine takes them,
        a dict with the rows of `prompt_embeds` [T, D]. sampling_params: None = the
        model's defaults; one for all; or one per prompt. priority: per prompt, lower first. Raises RequestTypeError
        (a TypeError) for something that is no prompt, RequestError (a ValueError) for one that cannot be served; the
        engine stays usable.
        """
        batch = parse.split_prompts(prompts)
        params = self._params(sampling_params, len(batch))
        self._check_lengths(len(batch), lora_request=lora_request, priority=priority)
        input_processor = self.model.input_processor
        requests = [input_processor.parse(prompt) for prompt in batch]
        work = [functools.partial(input_processor.process, request, tokenization_kwargs) for request in requests]
        return self._answer(work, params, use_tqdm, priority)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
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
        """Answer one conversation (a list of messages) or many (a list of those), in their order.

        A message is {"role": ..., "content": ...}, its content a string or a list of parts: text, image_url,
        image_pil, input_audio, audio_url, video_url, and image_embeds, video_embeds, audio_embeds. chat_template: a
        file, Jinja text or the name of a stored template. continue_final_message: go on with the last message; needs
        add_generation_prompt=False. Raises as `generate` does; no medium is fetched before every message was checked.
        """
        chat = self.model.chat
        options = ChatOptions(
            chat_template=load_template(chat_template, chat.stored),
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
        params = self._params(sampling_params, len(conversations))
        self._check_lengths(len(conversations), lora_request=lora_request)
        rendered_chats = [chat.render(conversation, options) for conversation in conversations]
        # the template has printed the special tokens already
        tokenization = {"add_special_tokens": False, **(tokenization_kwargs or {})}
        input_processor = self.model.input_processor

        def render(rendered: RenderedChat) -> EngineInput:
            return input_processor.process(input_processor.parse(chat.fetch(rendered)), tokenization)

        return self._answer([functools.partial(render, rendered) for rendered in rendered_chats], params, use_tqdm)

    # -- vectors -----------------------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Any,
        *,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, in their order: the final hidden state of the last token, of length 1.

        Prompts are those of `generate`, media included. Raises as `generate` does, and RequestError unless the model
        was loaded with runner="pooling".
        """
        self.check_pooling("embed")
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
        use_tqdm: Progress = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """`embed` with NumPy arrays. pooling_task: "embed" (unless the parameters say otherwise), or "token_embed" for
        the final hidden states of all tokens [T, D]."""
        self.check_pooling("encode")
        batch = parse.split_prompts(prompts)
        params = self.pooling_params(pooling_params, len(batch), pooling_task)
        self._check_lengths(len(batch), lora_request=lora_request, priority=priority)
        input_processor = self.model.input_processor
        requests = [input_processor.parse(prompt) for prompt in batch]
        work = [functools.partial(input_processor.process, request, tokenization_kwargs) for request in requests]
        return self._answer(work, params, use_tqdm, priority)

    def check_pooling(self, method: str) -> None:
        """RequestError unless this engine answers with vectors."""
        if not self.args.pooling:
            raise RequestError(
                f"LLM.{method}() is only supported for pooling models. Try passing `--runner pooling` to use the model "
                "as a pooling model.",
                "wrong_runner",
            )

    def pooling_params(self, given: Any, count: int, task: str | None = None) -> list[PoolingParams]:
        """One set of checked parameters per prompt; RequestError for those this model cannot serve."""
        return pooling_params(given, count, task, self.model.spec.hidden_size)

    def start_pooling(self, engine_input: EngineInput, params: PoolingParams) -> PoolingRequest:
        """Queue one rendered prompt that wants vectors."""
        self._requests += 1
        return PoolingRequest(self.model, str(self._requests - 1), engine_input, params)

    # -- running -----------------------------------------------------------------------------------------------------

    def _answer(
        self,
        work: Sequence[Callable[[], EngineInput]],
        params: Sequence[Any],
        use_tqdm: Progress,
        priority: Sequence[int] | None = None,
    ) -> list[Any]:
        """Run prompts, each still to be rendered, to their ends."""
        order = sorted(range(len(work)), key=lambda i: priority[i]) if priority is not None else range(len(work))
        start = self.start_pooling if self.args.pooling else self.start
        job = BatchJob(self.model, start, self.workers, use_tqdm, len(work))
        try:
            for i in order:
                job.submit(i, work[i], params[i])
            runs = job.run()
        except BaseException:
            job.abort()
            raise
        finally:
            job.close()
        if not self.args.disable_log_stats:
            logger.info("after %d prompts: %s", len(work), self.get_metrics())
        return [runs[i] for i in range(len(work))]

    def _check_lengths(self, count: int, *, lora_request: Any = None, priority: Sequence[int] | None = None) -> None:
        """RequestError for lists that do not match the prompts, and for adapters."""
        for name, values in (("lora_request", lora_request), ("priority", priority)):
            if isinstance(values, Sequence) and len(values) != count:
                raise RequestError(
                    f"The lengths of prompts ({count}) and {name} ({len(values)}) must be the same.", "length_mismatch"
                )
        if lora_request is not None:
            raise RequestError("LoRA is not supported: pass lora_request=None.", "lora_unsupported")

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams) or not isinstance(given, Sequence):
            params = [given] * count  # `verify` refuses what is neither
        else:
            params = list(given)
            if len(params) != count:
                raise RequestError(
                    f"The lengths of prompts ({count}) and params ({len(params)}) must be the same.", "length_mismatch"
                )
        for p in {id(p): p for p in params}.values():
            self.verify(p)
        return params

    def verify(self, params: Any) -> None:
        """RequestError for sampling parameters that this model cannot serve."""
        if self.args.pooling:
            raise RequestError(
                "LLM.generate() is only supported for generative models. Try passing `--runner generate` to use the "
                "model as a generative model.",
                "wrong_runner",
            )
        if not isinstance(params, SamplingParams):
            raise RequestTypeError(f"sampling_params should be SamplingParams, got {type(params).__name__}")
        params.verify(self.model.vocab_size, self.args.max_logprobs)
        if params.n > (most := env_number("MAX_N_SEQUENCES", MAX_N)):
            raise ValidationError(f"n must be at most {most:g}, got {params.n}.", parameter="n", value=params.n)
        if params.stop and self.model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer: do not set skip_tokenizer_init.", "no_tokenizer")

    def start(self, engine_input: EngineInput, params: SamplingParams) -> GenerateRequest:
        """Queue one rendered prompt on the least busy engine."""
        self._requests += 1
        return GenerateRequest(self.model, str(self._requests - 1), engine_input, params)

    # -- what else users ask for -------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model."""
        if self.model.tokenizer is None:
            raise RequestError("Unable to get the tokenizer because skip_tokenizer_init is True", "no_tokenizer")
        return self.model.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without `sampling_params`: the defaults of the model's generation_config.json."""
        return SamplingParams.from_generation_config(self.model.generation_config)

    def get_metrics(self) -> dict[str, float]:
        """Counters since start, by name: engine work and times in seconds, compilations, cache queries and hits."""
        cache = self.model.input_processor.cache
        out: dict[str, float] = {
            "startup_s": self.model.startup_s,
            "compile_s": self.model.compile_s,
            "mm_cache_queries": cache.queries,
            "mm_cache_hits": cache.hits,
        }
        for engine in self.model.engines:
            counted = vars(engine.stats) | {
                "call_s": engine.device.call_s,
                "compiles": engine.runner.compiles,
                "compiles_after_warmup": engine.runner.compiles_after_warmup,
                "preemptions": engine.scheduler.preemptions,
            }
            for name, value in counted.items():
                out[name] = out.get(name, 0) + value
        return out

    def reset_mm_cache(self) -> None:
        """Forget processed media and their embeddings."""
        self.model.input_processor.cache.clear()
        for engine in self.model.engines:
            engine.encoder_cache.clear()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and nothing done, while requests run."""
        return all([engine.block_pool.reset_prefix_cache() for engine in self.model.engines])
