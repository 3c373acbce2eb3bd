"""What a teacher says of every token: the K likeliest ones, or K drawn from its distribution."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from common.checks import ConfigError
from data.tokens.tokenizer import Tokenizer
from models.transformer import Model
from training.config import Config
from training.objectives.distill import Distill

CHUNK = 256  # positions of all rows whose logits exist at once


def open_teacher(
    config: Config, objective: Distill, tokenizer: Tokenizer, open_model: Callable[..., Any]
) -> Any:
    """The teacher, split over this process's devices. ConfigError where it does not know these tokens."""
    name = objective.teacher
    if name is None:
        raise ConfigError(
            "objective=distill needs objective.teacher=RUN, or a directory of published weights"
        )
    devices, precision = len(jax.local_devices()), config.training.precision
    opened = open_model(name, config.mesh.rules, precision=precision, fsdp=devices)
    # By what each number stands for: a file that was exported and read again may frame texts otherwise.
    if opened.tokenizer.pieces() != tokenizer.pieces():
        raise ConfigError(
            f"objective.teacher={name} knows other tokens than this run, and would speak of others; "
            f"use tokenizer=file tokenizer.path={opened.tokenizer_path}"
        )
    return opened


def teacher_scorer(teacher: Any, objective: Distill, seed: int) -> Callable[[Any], Any]:
    """A function from a batch [B, T] to `soft_targets` and `teacher_logprobs` [K, B, T].

    teacher: a `training.opening.opened.OpenedModel`.
    """
    model, params, ops, layout = teacher.trained
    count, sampled = objective.targets, objective.support == "sampled"
    assert isinstance(model, Model)

    def outcomes(logits: Array, key: Array) -> tuple[Array, Array]:
        if not sampled:
            logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), count)
            return ids, logprobs
        ids = jax.random.categorical(key, logits[..., None, :], shape=(*logits.shape[:-1], count))
        return ids, jnp.full(ids.shape, -np.log(count), jnp.float32)

    @partial(jax.jit, compiler_options=layout.compiler_options)
    def ask(params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        x = model.hidden(params, {n: batch[n] for n in ("tokens", "positions", "segment_ids")}, ops)
        length = x.shape[1]
        size = next(n for n in range(max(1, min(length, CHUNK // x.shape[0])), 0, -1) if length % n == 0)
        stretches = jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[2]), 1, 0)

        def step(number: Array, stretch: Array) -> tuple[Array, Any]:
            logits = model.logits(params, stretch, ops).astype(jnp.float32)
            return number + 1, outcomes(logits, jax.random.fold_in(key, number))

        _, found = jax.lax.scan(step, jnp.zeros((), jnp.int32), stretches)
        # [T / size, B, size, K] as [K, B, T].
        return jax.tree.map(lambda a: a.transpose(3, 1, 0, 2).reshape(count, x.shape[0], length), found)

    drawn = iter(range(2**31))

    def of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(batch["tokens"])
        padded = {n: np.pad(x, ((0, -rows % layout.ways("batch")), (0, 0))) for n, x in batch.items()}
        key = jax.random.fold_in(jax.random.key(seed), next(drawn))
        ids, logprobs = jax.device_get(ask(params, padded, key))
        return {"soft_targets": ids[:, :rows], "teacher_logprobs": logprobs[:, :rows]}

    return of
