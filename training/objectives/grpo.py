"""Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300; without a critic)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from common.checks import choice, require
from data.batch import REFERENCE, ROLLOUT, TEXT, Field
from training.objectives.base import Batch, Figures, LogprobObjective, Score

MEANS = ("tokens", "answers", "constant")


@dataclass
class GRPO(LogprobObjective):
    """-min(ratio A, clip(ratio) A) of every token an answer has, and kl_weight times the divergence (k3).

    A is an answer's reward minus its group's mean (`scale`: over its deviation), ratio the probability of a
    token over that by the weights that drew it. Where answers are drawn for one update the ratio is 1, and
    without a divergence the gradient is -A's: then no forward pass goes before the step's own.
    """

    name: str = "grpo"
    reward: str = "number"  # number | text | program | reasoning_gym: see `training.rollouts.rewards`
    group: int = 8  # answers drawn for a prompt
    max_new_tokens: int = 64  # of an answer
    temperature: float = 1.0  # they are drawn at; neither top_k nor top_p, which would bias the ratio
    attempts: int = 4  # draws of further prompts in the place of groups of equal reward
    updates: int = 1  # steps that the answers of one draw serve
    clip: float = 0.2  # the ratio is kept within 1 - clip and 1 + clip_high
    clip_high: float = 0.28  # above `clip` as in DAPO (arXiv:2503.14476)
    kl_weight: float = 0.0  # of the divergence from the weights that the run began with
    scale: bool = False  # advantages over the group's deviation; off as in Dr. GRPO (arXiv:2503.20783)
    mean: str = (
        "tokens"  # tokens: of all answers | answers: of each, then their mean | constant: max_new_tokens
    )

    formats: ClassVar[tuple[str, ...]] = ("chat", "completion")
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """ValueError for what has no meaning."""
        choice("objective.mean", self.mean, MEANS)
        for key, least in {"group": 2, "max_new_tokens": 1, "attempts": 1, "updates": 1}.items():
            require(getattr(self, key) >= least, f"objective.{key}", getattr(self, key), f"{least} or more")
        require(self.temperature > 0, "objective.temperature", self.temperature, "above 0, such as 1")
        require(0 < self.clip < 1, "objective.clip", self.clip, "between 0 and 1, such as 0.2")
        require(self.clip_high > 0, "objective.clip_high", self.clip_high, "above 0, such as 0.28")
        require(self.kl_weight >= 0, "objective.kl_weight", self.kl_weight, "0 (none) or more")

    @property
    def fields(self) -> Mapping[str, Field]:
        """Texts, the advantage of each token, and what it had by the weights that drew it."""
        return {**TEXT, **ROLLOUT, **(REFERENCE if self.kl_weight else {})}

    def share(self, batch: Batch) -> Float[Array, "B T"]:
        """What each token counts in the mean: the answers' tokens sum to 1, but for `constant`."""
        weights = batch["loss_weights"]
        if self.mean == "tokens":
            return weights / jnp.maximum(jnp.sum(weights), 1.0)
        if self.mean == "constant":
            return weights / (weights.shape[0] * self.max_new_tokens)
        return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0) / weights.shape[0]

    def value(self, logprobs: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, ""], Figures]:
        """The mean over the answers' tokens; `clipped`: the share of those beyond the ratio's bounds."""
        share, advantages = self.share(batch), batch["advantages"]
        ratio = jnp.exp(logprobs - batch["behaviour_logprobs"])
        kept = jnp.clip(ratio, 1 - self.clip, 1 + self.clip_high)
        gain = jnp.minimum(ratio * advantages, kept * advantages)
        clipped = jnp.sum(share * (kept * advantages < ratio * advantages))
        value, figures = -jnp.sum(share * gain), {"clipped": clipped, **drawn(batch)}
        if self.kl_weight:
            behind = batch["reference_logprobs"] - logprobs
            kl = jnp.sum(share * (jnp.expm1(behind) - behind))
            value, figures = value + self.kl_weight * kl, {**figures, "kl": kl}
        return value, figures

    def prepare(self, batch: Batch, score: Score) -> tuple[Batch, Figures]:
        """As any function of log-probabilities; drawn for one update, by the ratio of 1 that it has then."""
        if self.updates > 1 or self.kl_weight:
            return super().prepare(batch, score)
        share, advantages = self.share(batch), batch["advantages"]
        signed = share * advantages * self.weight(batch)
        return {**batch, "signed_weights": signed}, {"loss": -jnp.sum(share * advantages), **drawn(batch)}


def drawn(batch: Batch) -> Figures:
    """The mean reward of what was drawn, the share of rows learnt from, and their answers' tokens."""
    weights = batch["loss_weights"]
    rows = jnp.sum(jnp.max(weights, axis=1))
    return {
        "reward": jnp.mean(batch["drawn_reward"]),
        "answer_tokens": jnp.sum(weights) / jnp.maximum(rows, 1.0),
        "kept": rows / weights.shape[0],
    }
