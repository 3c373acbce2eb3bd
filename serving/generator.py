"""Text from a model: one compiled loop for prompts of any lengths. Letters: B batch, L tokens of a text."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from common.checks import within
from kernels.attention import reference_attention
from kernels.grouped_experts import run_experts
from models.config import ModelConfig
from models.ops import identity_constrain
from serving.sampling import Sampling, sample, sample_keys

PREFILL_STEP = 16  # prompts are prefilled in whole multiples of this, and texts padded to multiples of
LENGTH_STEP = 64  # that: few shapes, so few compilations


def generate(
    model: Any,
    params: Any,
    ops: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt and without the closing eos_id.

    A list is shorter than max_new_tokens exactly where eos_id ended it. sample_ids are the numbers that the
    samples' random keys are folded from, 0.. by default: a sample with the same number, prompt and seed comes
    out the same in any batch. vocab_size: the tokenizer's, where the model's is padded. The parameters may
    lie on any mesh; ops.constrain is not used, since the rows need not divide over it.
    A second call with the same model, ops, sampling and nearly the same lengths does not compile again.
    Raises ValueError for an empty prompt, an id outside the vocabulary, a count below 1, or a text longer
    than a learned position table.
    """
    if not prompts:
        return []
    sampling = Sampling(temperature, top_k, top_p, vocab_size)
    tokens, lengths = _pack(model.config, prompts, max_new_tokens)
    # The first token that is fed alone has to be the last of the shortest prompt or an earlier one.
    prefill = (int(lengths.min()) - 1) // PREFILL_STEP * PREFILL_STEP
    ids = np.arange(len(prompts)) if sample_ids is None else np.asarray(sample_ids)
    eos = np.int32(-1 if eos_id is None else eos_id)
    decode = _compiled(_Program(model, ops), sampling, prefill, _replicated(params))
    texts = decode(
        params, tokens, lengths, ids.astype(np.int32), np.int32(max_new_tokens), eos, np.int32(seed)
    )
    return [
        _until(row[n : n + max_new_tokens], int(eos))
        for row, n in zip(np.asarray(texts), lengths, strict=True)
    ]


def _pack(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts at the left of int32[B, L], with room for what is to come, and their lengths int32[B]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    room = _room(config, int(lengths.min()), int(lengths.max()), max_new_tokens)
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"a prompt holds a token outside 0..{config.vocab_size - 1}, the model's vocabulary; "
            f"use the tokenizer that the model was trained with"
        )
    return tokens, lengths


def _room(config: ModelConfig, shortest: int, longest: int, max_new_tokens: int) -> int:
    """Tokens that the longest text may come to, rounded up."""
    within("max_new_tokens", max_new_tokens, 1)
    if shortest == 0:
        raise ValueError("a prompt of 0 tokens has nothing to go on from; begin it with the tokenizer's bos")
    needed = longest + max_new_tokens
    if config.position != "learned":
        return -(-needed // LENGTH_STEP) * LENGTH_STEP
    if needed > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds "
            f"model.max_seq_len={config.max_seq_len} learned positions; "
            f"use at most {config.max_seq_len - longest}"
        )
    return min(-(-needed // LENGTH_STEP) * LENGTH_STEP, config.max_seq_len)


def _until(row: np.ndarray, eos: int) -> list[int]:
    ends = np.flatnonzero(row == eos)
    return row[: ends[0] if len(ends) else len(row)].tolist()


class _Program:
    """A model and its ops as one static argument: the same two objects, the same executable."""

    def __init__(self, model: Any, ops: Any) -> None:
        self.model, self.ops = model, ops

    def __hash__(self) -> int:
        return hash((id(self.model), id(self.ops)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.model is other.model and self.ops is other.ops


def _replicated(params: Any) -> NamedSharding | None:
    """Where the texts go: to every device of the parameters' mesh, so that every host can read them."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@lru_cache(maxsize=16)
def _compiled(program: _Program, sampling: Sampling, prefill: int, sharding: NamedSharding | None) -> Any:
    return jax.jit(partial(_decode, program.model, program.ops, sampling, prefill), out_shardings=sharding)


def _decode(
    model: Any,
    ops: Any,
    sampling: Sampling,
    prefill: int,
    params: Any,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    sample_ids: Int[Array, " B"],
    max_new_tokens: Int[Array, ""],
    eos: Int[Array, ""],
    seed: Int[Array, ""],
) -> Int[Array, "B L"]:
    """Prompts at the left of `tokens`, completed in place; what follows an eos or max_new_tokens is noise.

    All rows stand at the same position. A row whose prompt is longer than the position feeds its prompt on, a
    shorter one what it drew: different lengths need neither padding inside a text nor masks.
    """
    # One device, and queries beside a cache of keys: not what a kernel for training is made for.
    ops = replace(ops, constrain=identity_constrain, experts=run_experts, attention=reference_attention)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1], ops.compute_dtype)
    if prefill:
        _, cache = model.decode(params, tokens[:, :prefill], cache, ops)
    ends = lengths + max_new_tokens

    def unfinished(carry: tuple[Any, ...]) -> Array:
        return ~jnp.all(carry[-1])

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        position, tokens, cache, done = carry
        current = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        logits, cache = model.decode(params, current, cache, ops)
        position = position + 1
        drawn = sample(logits[:, 0], sample_keys(seed, sample_ids, position), sampling)
        given = jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False)
        is_new = position >= lengths
        tokens = tokens.at[:, position].set(jnp.where(is_new, drawn, given))
        done = done | (is_new & (drawn == eos)) | (position + 1 >= ends)
        return position, tokens, cache, done

    start = (jnp.int32(prefill), tokens, cache, jnp.zeros(tokens.shape[0], bool))
    return jax.lax.while_loop(unfinished, advance, start)[1]
