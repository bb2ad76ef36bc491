"""`LLMEngine`: runs requests step by step, for scripts that were written for vLLM's class of this name."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from mmjax.config import EngineArgs
from mmjax.entrypoints.llm import LLM, check_adapters
from mmjax.outputs.request import EngineRequest, GenerateRequest, PoolingRequest
from mmjax.types import PoolingParams, PoolingRequestOutput, RequestError, RequestOutput, SamplingParams


class LLMEngine:
    """An LLM whose caller adds requests and makes its steps. Do not call the LLM's other methods while requests run."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._requests: dict[str, EngineRequest[RequestOutput] | EngineRequest[PoolingRequestOutput]] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> LLMEngine:
        """Load a model. The other arguments of vLLM's method have no effect."""
        return cls(LLM.from_engine_args(engine_args))

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        *,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Queue one prompt as `LLM.generate`, or with PoolingParams `LLM.encode`, takes it. The other arguments of
        vLLM's method have no effect. RequestError if a request with this id runs."""
        check_adapters(1, lora_request)
        if request_id in self._requests:
            raise RequestError(f"A request with the id {request_id!r} is already running.", "id_in_use")
        model = self.llm.model
        if isinstance(params, PoolingParams):
            model.params_checker.check_pooling("encode")
            [checked] = model.params_checker.pooling_params(params, 1)
            self._requests[request_id] = PoolingRequest(model, model.process(prompt, tokenization_kwargs), checked)
            return
        model.params_checker.check_sampling(params)
        engine_input, grammar = model.process(prompt, tokenization_kwargs), model.compile_grammar(params)
        self._requests[request_id] = GenerateRequest(model, engine_input, params, grammar)

    def step(self) -> list[RequestOutput | PoolingRequestOutput]:
        """Make one step of every engine. Returns the outputs that changed, with everything so far."""
        changed: dict[int, None] = {}
        for engine in self.llm.model.engines:
            if engine.has_work:
                changed |= {state.seq.seq_id: None for state in engine.step()}
        outputs: list[RequestOutput | PoolingRequestOutput] = []
        for request_id, request in list(self._requests.items()):
            new = [state for state in request.states if state.seq.seq_id in changed]
            if not new:
                continue
            if request.finished:
                del self._requests[request_id]
            request.check()
            for state in new:
                request.record_times(state)
            if request.finished or isinstance(request, GenerateRequest):
                output = request.output()
                output.request_id = request_id
                outputs.append(output)
                if output.finished:
                    self.llm.metrics.record(output)
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """End requests by their ids. Unknown ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                request.abort()

    def has_unfinished_requests(self) -> bool:
        """Whether requests are queued or running."""
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        """The number of requests that are queued or running."""
        return len(self._requests)

    def get_tokenizer(self) -> Any:
        """`LLM.get_tokenizer`."""
        return self.llm.get_tokenizer()

    @property
    def tokenizer(self) -> Any:
        """`LLM.get_tokenizer`."""
        return self.llm.get_tokenizer()

    @property
    def model_config(self) -> types.SimpleNamespace:
        """What scripts read of the model: `model`, `max_model_len`, `dtype`, `seed`."""
        args = self.llm.args
        length = self.llm.model.max_model_len
        return types.SimpleNamespace(model=args.model, max_model_len=length, dtype=args.dtype, seed=args.seed)

    @property
    def engine_core(self) -> LLMEngine:
        """This engine: vLLM's runs in a process of its own, which scripts shut down."""
        return self

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing: an LLM that nothing refers to frees its memory."""
