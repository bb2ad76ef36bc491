"""The device programs of a step, not yet compiled: pure functions of parameters, state and inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from mmjax.batch import Batch, KVCache, nest
from mmjax.engine import sampler
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.sampling_state import SAMPLING_FIELDS
from mmjax.models.base import CrossModel, Model
from mmjax.nn.weight import WeightValue
from mmjax.spec import EncoderSpec, ModelSpec

Array = jax.Array
Params = list[WeightValue]
LOGPROB_BLOCK = 128  # hidden states per block of prompt log-probabilities; bounds the memory for logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Everything that stays on the device between steps. It is donated to every program that changes it.

    mm_embeds: [M, W], embeddings of media. last_token: i32[R] and stopped: bool[R], each row's newest token and whether
    it was a stop. token_counts: i32[R, V] and logit_bias: f32[R, V], see `sampler`.
    """

    kv_cache: KVCache
    mm_embeds: Array
    last_token: Array
    stopped: Array
    token_counts: Array
    logit_bias: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The results of a prefill or decode program, on the device.

    sampled: if the engine generates; after a decode its arrays have a leading axis of steps. last_hidden: f32[S, D], if
    the engine pools: the hidden states at the ends of prompts. hidden: [T, D], after a prefill.
    """

    sampled: sampler.SamplerOutput | None = None
    last_hidden: Array | None = None
    hidden: Array | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A device program for one bucket. args: arrays or their shapes, with shardings. outs: shardings of the results.
    donate: positions of the arguments whose memory the program may reuse."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    outs: Any
    donate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The functions that programs run. paths: the parameters' names, in order. stops_early: whether a decode loop ends
    as soon as every row has stopped, instead of running its full length."""

    graph: nnx.GraphDef[Any]
    paths: tuple[str, ...]
    spec: ModelSpec
    buckets: BucketConfig
    replicated: NamedSharding
    stops_early: bool

    def _model(self, params: Params) -> Model:
        model: Model = nnx.merge(self.graph, nest(dict(zip(self.paths, params, strict=True))))
        return model

    @jax.named_scope("sampler")
    def _sample(
        self, model: Model, hidden: Array, f: Mapping[str, Array], state: DeviceState, active: Array
    ) -> tuple[DeviceState, sampler.SamplerOutput]:
        """Sample one token from hidden [S, D] for each row where active bool[S] is set."""
        logits = jax.lax.with_sharding_constraint(model.logits(hidden), self.replicated)
        metadata = sampler.SamplingMetadata(
            **{name: f[name] for name, _ in SAMPLING_FIELDS}, seed=f["seed"], stop_ids=f["stop_ids"]
        )
        sampled = sampler.sample(
            logits, metadata, state.token_counts, state.logit_bias, num_logprobs=self.buckets.max_logprobs
        )
        state = self._record(state, f, sampled.token_ids, active)
        counts = sampler.count_tokens(state.token_counts, metadata, sampled.token_ids, active)
        return dataclasses.replace(state, token_counts=counts), sampled

    @jax.named_scope("sampler")
    def _sample_greedy(
        self, model: Model, hidden: Array, f: Mapping[str, Array], state: DeviceState, active: Array
    ) -> tuple[DeviceState, Array]:
        """`_sample` where no row asks for more than its likeliest token i32[S]."""
        token_ids = sampler.greedy(jax.lax.with_sharding_constraint(model.logits(hidden), self.replicated))
        return self._record(state, f, token_ids, active), token_ids

    def _record(self, state: DeviceState, f: Mapping[str, Array], token_ids: Array, active: Array) -> DeviceState:
        """Note the newest token of each active row, and whether it is a stop."""
        row = jnp.where(active, f["row"], self.buckets.num_rows - 1)
        stopped = jnp.any(f["stop_ids"] == token_ids[:, None], axis=1)
        return dataclasses.replace(
            state, last_token=state.last_token.at[row].set(token_ids), stopped=state.stopped.at[row].set(stopped)
        )

    def prefill(
        self, params: Params, state: DeviceState, vector: Array, *, tokens: int
    ) -> tuple[DeviceState, StepOutput]:
        """Run T prompt tokens, and sample one token for each sequence whose prompt ends here. An engine that pools
        returns the hidden states at these ends instead."""
        f = self.buckets.prefill_layout(tokens).unpack(vector)
        block_size, q_block = self.buckets.block_size, self.buckets.q_block_size
        model = self._model(params)
        seq_index = jnp.repeat(f["seq_index"], q_block, total_repeat_length=tokens)
        positions = f["positions"].clip(0)
        slots = f["block_table"][seq_index, positions // block_size] * block_size + positions % block_size
        batch = Batch(
            token_ids=f["token_ids"],
            rope_positions=f["rope_positions"],
            mm_index=f["mm_index"],
            slot_mapping=jnp.where(f["positions"] >= 0, slots, -1),
            seq_index=f["seq_index"],
            q_start=f["q_start"],
            block_table=f["block_table"],
            context_lens=f["context_lens"],
            cross_block_table=f["cross_block_table"],
            cross_context_lens=f["cross_context_lens"],
        )
        hidden, kv_cache = model(batch, state.kv_cache, state.mm_embeds)
        ends = hidden[f["last_token_index"].clip(0)]
        state = dataclasses.replace(state, kv_cache=kv_cache)
        if self.spec.pooling:
            return state, StepOutput(last_hidden=ends.astype(jnp.float32), hidden=hidden)
        state, sampled = self._sample(model, ends, f, state, f["last_token_index"] >= 0)
        return state, StepOutput(sampled=sampled, hidden=hidden)

    def decode(
        self, params: Params, state: DeviceState, vector: Array, *, seqs: int, steps: int, greedy: bool
    ) -> tuple[DeviceState, StepOutput]:
        """Sample up to `steps` tokens for each of S sequences, and feed them back on the device. Tokens are -1 where a
        row had stopped.

        greedy: no row asks for more than its likeliest token.
        """
        f = self.buckets.decode_layout(seqs).unpack(vector)
        model = self._model(params)

        def is_active(step: Array, state: DeviceState) -> Array:
            return (step < f["num_steps"]) & ~state.stopped[f["row"]]

        def any_active(carry: tuple[Array, DeviceState, sampler.SamplerOutput]) -> Array:
            return jnp.any(is_active(carry[0], carry[1]))

        def decode_step(
            carry: tuple[Array, DeviceState, sampler.SamplerOutput],
        ) -> tuple[Array, DeviceState, sampler.SamplerOutput]:
            step, state, out = carry
            active = is_active(step, state)
            batch = self._decode_batch(f, state.last_token, step, active)
            hidden, kv_cache = model(batch, state.kv_cache, state.mm_embeds)
            state = dataclasses.replace(state, kv_cache=kv_cache)
            if greedy:
                state, token_ids = self._sample_greedy(model, hidden, f, state, active)
                new = jnp.where(active, token_ids, -1)
                return step + 1, state, dataclasses.replace(out, token_ids=out.token_ids.at[step].set(new))
            fields = dict(f) | {
                "output_len": f["output_len"] + step,
                "min_tokens_left": (f["min_tokens_left"] - step).clip(0),
            }
            state, sampled = self._sample(model, hidden, fields, state, active)
            sampled = dataclasses.replace(sampled, token_ids=jnp.where(active, sampled.token_ids, -1))
            out = jax.tree.map(lambda steps, new: steps.at[step].set(new), out, sampled)
            return step + 1, state, out

        start = (jnp.int32(0), state, self._empty_output(seqs, steps))
        if self.stops_early:
            _, state, out = jax.lax.while_loop(any_active, decode_step, start)
        else:
            _, state, out = jax.lax.fori_loop(0, steps, lambda _, carry: decode_step(carry), start)
        return state, StepOutput(sampled=out)

    def _decode_batch(self, f: Mapping[str, Array], last_token: Array, step: Array, active: Array) -> Batch:
        """The newest token of each of S sequences, after `step` tokens of this loop. Rows that are not active
        bool[S] neither write keys nor attend."""
        seq_index = jnp.arange(active.shape[0], dtype=jnp.int32)
        positions, block_size = f["positions"] + step, self.buckets.block_size
        slots = f["block_table"][seq_index, positions // block_size] * block_size + positions % block_size
        return Batch(
            token_ids=last_token[f["row"]],
            rope_positions=jnp.broadcast_to(positions + f["rope_delta"], (self.buckets.rope_axes, *seq_index.shape)),
            mm_index=jnp.full_like(seq_index, -1),
            slot_mapping=jnp.where(active, slots, -1),
            seq_index=seq_index,
            q_start=positions,
            block_table=f["block_table"],
            context_lens=jnp.where(active, positions + 1, 0),
            cross_block_table=f["cross_block_table"],
            cross_context_lens=jnp.where(active, f["cross_context_lens"], 0),
        )

    def _empty_output(self, seqs: int, steps: int) -> sampler.SamplerOutput:
        top = self.buckets.max_logprobs
        return sampler.SamplerOutput(
            token_ids=jnp.full((steps, seqs), -1, jnp.int32),
            logprobs=jnp.zeros((steps, seqs), jnp.float32),
            ranks=jnp.zeros((steps, seqs), jnp.int32),
            top_ids=jnp.zeros((steps, seqs, top), jnp.int32),
            top_logprobs=jnp.zeros((steps, seqs, top), jnp.float32),
        )

    def encode(
        self, params: Params, state: DeviceState, features: Mapping[str, Array], dest: Array, *, name: str
    ) -> DeviceState:
        """Encode media, and write the embeddings to the rows `dest` of mm_embeds; for cross attention, write keys and
        values to the slots `dest` of the KV cache."""
        model = self._model(params)
        with jax.named_scope(name):
            encoded = model.encode(name, features)
        if self.spec.is_encoder_decoder:
            kv_cache = cast(CrossModel, model).write_cross_kv(encoded, state.kv_cache, dest)
            return dataclasses.replace(state, kv_cache=kv_cache)
        mm_embeds = state.mm_embeds.at[dest].set(encoded.astype(state.mm_embeds.dtype), mode="drop")
        return dataclasses.replace(state, mm_embeds=mm_embeds)

    def align(self, params: Params, features: Mapping[str, Array], token_ids: Array, *, name: str) -> Array:
        """f32[A, T, U]: the alignment heads' scores of each token of a transcript for each encoder step."""
        model = cast(CrossModel, self._model(params))
        with jax.named_scope(name):
            encoded = model.encode(name, features)
        return model.alignment_scores(encoded, token_ids)

    def write_embeds(self, state: DeviceState, rows: Array, dest: Array) -> DeviceState:
        """Write embeddings that need no encoder to the rows `dest` of mm_embeds."""
        return dataclasses.replace(
            state, mm_embeds=state.mm_embeds.at[dest].set(rows.astype(state.mm_embeds.dtype), mode="drop")
        )

    def prompt_logprobs(self, params: Params, hidden: Array, targets: Array) -> sampler.PromptLogprobs:
        """(logprob [T], rank [T], top ids [T, top], top logprobs [T, top]) of targets i32[T] under hidden [T, D]."""
        model = self._model(params)
        block = min(LOGPROB_BLOCK, hidden.shape[0])

        def of_block(inputs: tuple[Array, Array]) -> sampler.PromptLogprobs:
            logits = jax.lax.with_sharding_constraint(model.logits(inputs[0]), self.replicated)
            return sampler.prompt_logprobs(logits, inputs[1], self.buckets.max_logprobs)

        out = jax.lax.map(of_block, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
        logprobs: sampler.PromptLogprobs = jax.tree.map(lambda x: x.reshape(hidden.shape[0], *x.shape[2:]), out)
        return logprobs

    def set_sampling_row(self, state: DeviceState, row: Array, counts: Array, bias: Array) -> DeviceState:
        """Set one row of the sampling tables."""
        return dataclasses.replace(
            state, token_counts=state.token_counts.at[row].set(counts), logit_bias=state.logit_bias.at[row].set(bias)
        )

    def set_logit_biases(self, state: DeviceState, rows: Array, biases: Array) -> DeviceState:
        """Set the logit biases of some rows."""
        return dataclasses.replace(state, logit_bias=state.logit_bias.at[rows].set(biases))


@dataclasses.dataclass(frozen=True)
class ProgramInputs:
    """The arguments that programs share: parameters and state, or only their shapes and shardings."""

    functions: StepFunctions
    params: Params
    state: DeviceState
    dtype: jnp.dtype

    @property
    def state_sharding(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.state)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        """The shape of an input that is replicated on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.functions.replicated)


class ProgramKey(Protocol):
    """A kind of program and its bucket. Hashable."""

    def program(self, inputs: ProgramInputs) -> Program: ...


@dataclasses.dataclass(frozen=True)
class AllocateState:
    """An allocation of the state."""

    def program(self, inputs: ProgramInputs) -> Program:
        def zeros() -> DeviceState:
            state: DeviceState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs.state)
            return state

        return Program(zeros, (), inputs.state_sharding)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A prefill of `tokens` prompt tokens in all."""

    tokens: int

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        vector = inputs.array((functions.buckets.prefill_layout(self.tokens).size,))
        return Program(
            functools.partial(functions.prefill, tokens=self.tokens),
            (inputs.params, inputs.state, vector),
            (inputs.state_sharding, functions.replicated),
            donate=(1,),
        )


@dataclasses.dataclass(frozen=True)
class Decode:
    """A loop of `steps` decode steps for `seqs` sequences; greedy: of which none asks for more than its likeliest
    token."""

    seqs: int
    steps: int
    greedy: bool = False

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        vector = inputs.array((functions.buckets.decode_layout(self.seqs).size,))
        return Program(
            functools.partial(functions.decode, seqs=self.seqs, steps=self.steps, greedy=self.greedy),
            (inputs.params, inputs.state, vector),
            (inputs.state_sharding, functions.replicated),
            donate=(1,),
        )


@dataclasses.dataclass(frozen=True)
class Encode:
    """An encoding of `num_inputs` inputs by the named encoder."""

    encoder: str
    num_inputs: int

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        encoder = functions.spec.encoders[self.encoder]
        buckets = functions.buckets
        features = _features(inputs, encoder, self.num_inputs)
        dest = inputs.array((self.num_inputs * encoder.keys_per_input or buckets.num_embeds(encoder, self.num_inputs),))
        return Program(
            functools.partial(functions.encode, name=self.encoder),
            (inputs.params, inputs.state, features, dest),
            inputs.state_sharding,
            donate=(1,),
        )


@dataclasses.dataclass(frozen=True)
class Align:
    """Alignment scores of one transcript, padded to the model's length, for one input of the named encoder."""

    encoder: str

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        features = _features(inputs, functions.spec.encoders[self.encoder], 1)
        args = (inputs.params, features, inputs.array((functions.spec.max_positions,)))
        return Program(functools.partial(functions.align, name=self.encoder), args, functions.replicated)


def _features(inputs: ProgramInputs, encoder: EncoderSpec, num_inputs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The input arrays of an encoder."""
    buckets = inputs.functions.buckets
    return {
        field.name: inputs.array((buckets.field_len(field, encoder, num_inputs), *field.shape), jnp.dtype(field.dtype))
        for field in encoder.fields
    }


@dataclasses.dataclass(frozen=True)
class WriteEmbeds:
    """A write of `rows` embeddings that need no encoder."""

    rows: int

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        embeds = inputs.array((self.rows, functions.spec.mm_embed_dim), jnp.float32)
        args = (inputs.state, embeds, inputs.array((self.rows,)))
        return Program(functions.write_embeds, args, inputs.state_sharding, donate=(0,))


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """The log-probabilities of `tokens` prompt tokens, from the hidden states of their prefill."""

    tokens: int

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        hidden = inputs.array((self.tokens, functions.spec.hidden_size), inputs.dtype)
        args = (inputs.params, hidden, inputs.array((self.tokens,)))
        return Program(functions.prompt_logprobs, args, functions.replicated)


@dataclasses.dataclass(frozen=True)
class SetSamplingRow:
    """A write of one row of the sampling tables."""

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        vocab = functions.spec.vocab_size
        args = (inputs.state, inputs.array(()), inputs.array((vocab,)), inputs.array((vocab,), jnp.float32))
        return Program(functions.set_sampling_row, args, inputs.state_sharding, donate=(0,))


@dataclasses.dataclass(frozen=True)
class SetLogitBiases:
    """A write of the logit biases of `rows` rows."""

    rows: int

    def program(self, inputs: ProgramInputs) -> Program:
        functions = inputs.functions
        biases = inputs.array((self.rows, functions.spec.vocab_size), jnp.float32)
        args = (inputs.state, inputs.array((self.rows,)), biases)
        return Program(functions.set_logit_biases, args, inputs.state_sharding, donate=(0,))
