"""Distillation: a teacher's distribution of every token, of which K outcomes lie beside the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import choice, require
from data.batch import TEXT, Field
from training.objectives.base import Batch, Figures, LogprobObjective, Score

SUPPORTS = ("top", "sampled")
DIVERGENCES = ("forward", "reverse", "skew")
LEAST = 1e-6  # of a probability whose logarithm is taken: a difference of numbers near 1 has no more digits


@dataclass
class Distill(LogprobObjective):
    """(1 - hard_weight) D(teacher, model) + hard_weight * the text's own cross-entropy, a mean over tokens.

    support=top: of the K likeliest tokens each its probability, all others together one more outcome. What is
    compared are K + 1 probabilities, so D is least, and 0, where they agree; cut off and scaled up to 1, the
    K alone would teach a sharper distribution than the teacher's (arXiv:2503.16870).
    support=sampled: K tokens drawn by the teacher, 1 / K each: an unbiased estimate of the cross-entropy with
    all of the vocabulary (same paper), forward alone.
    forward: KL(p, q) of teacher p and model q; reverse: KL(q, p); skew: KL(p, skew p + (1 - skew) q)
    (DistiLLM, arXiv:2402.03898).
    """

    name: str = "distill"
    teacher: str | None = None  # a run, or a directory of published weights, with the same tokenizer
    support: str = "top"  # top | sampled
    targets: int = 16  # K
    divergence: str = "forward"  # forward | reverse | skew
    skew: float = 0.1  # the teacher's share of the mixture
    hard_weight: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        choice("objective.support", self.support, SUPPORTS)
        choice("objective.divergence", self.divergence, DIVERGENCES)
        require(self.targets >= 1, "objective.targets", self.targets, "1 or more, such as 16")
        require(0 < self.skew < 1, "objective.skew", self.skew, "between 0 and 1, such as 0.1")
        hard = self.hard_weight
        require(
            0 <= hard <= 1, "objective.hard_weight", hard, "from 0 (the teacher alone) to 1 (the text alone)"
        )
        if self.support == "sampled" and self.divergence != "forward":
            raise ValueError(
                f"objective.divergence={self.divergence} needs the teacher's probabilities, which "
                "objective.support=sampled does not keep; use support=top, or divergence=forward"
            )

    @property
    def fields(self) -> Mapping[str, Field]:
        """Texts, K outcomes of each target, and the teacher's log-probabilities of them."""
        return {**TEXT, **teacher_fields(self.targets)}

    def prepare(self, batch: Batch, score: Score) -> tuple[Batch, Figures]:
        """The batch with K + 1 targets a position, the last of them the text's own."""
        own = batch["targets"][..., None]
        return super().prepare({**batch, "targets": jnp.concatenate([batch["soft_targets"], own], -1)}, score)

    def value(self, logprobs: Float[Array, "B T K1"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """The mean over the positions that count; `divergence` and `nll` are its two parts."""
        share = batch["loss_weights"] / self.weight(batch)
        apart = jnp.sum(share * self.apart(logprobs[..., :-1], batch["teacher_logprobs"]))
        nll = -jnp.sum(share * logprobs[..., -1])
        value = (1 - self.hard_weight) * apart + self.hard_weight * nll
        return value, {"divergence": apart, "nll": nll}

    def apart(self, q: Float[Array, "B T K"], p: Float[Array, "B T K"]) -> Float[Array, "B T"]:
        """D of each position, of log-probabilities by the model and by the teacher."""
        if self.support == "sampled":
            return -jnp.mean(q, axis=-1)
        q, p = with_rest(q), with_rest(p)
        if self.divergence == "reverse":
            return jnp.sum(jnp.exp(q) * (q - p), axis=-1)
        if self.divergence == "skew":
            q = jnp.logaddexp(p + jnp.log(self.skew), q + jnp.log1p(-self.skew))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def with_rest(logprobs: Float[Array, "B T K"]) -> Float[Array, "B T K1"]:
    """The log-probabilities, and that of anything else."""
    rest = 1 - jnp.sum(jnp.exp(logprobs), axis=-1, keepdims=True)
    return jnp.concatenate([logprobs, jnp.log(jnp.maximum(rest, LEAST))], axis=-1)


def teacher_fields(count: int) -> dict[str, Field]:
    """What a batch has from a teacher: outcomes of each target and their log-probabilities."""
    dims = ("batch", "length", count)
    return {"soft_targets": Field("int32", dims), "teacher_logprobs": Field("float32", dims)}
