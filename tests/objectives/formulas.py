"""The objectives' formulae in numpy's float64, as TRL writes them, and derivatives by differences."""

import numpy as np

WIDTH = 1e-6


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sums(logprobs, batch):
    return (logprobs * batch["loss_weights"]).sum(1)


def means(logprobs, batch):
    return sums(logprobs, batch) / batch["loss_weights"].sum(1)


def dpo(logprobs, batch, beta=0.1, label_smoothing=0.0):
    ratios = sums(logprobs, batch) - sums(batch["reference_logprobs"], batch)
    h = beta * (ratios[0::2] - ratios[1::2])
    return np.mean(-log_sigmoid(h) * (1 - label_smoothing) - log_sigmoid(-h) * label_smoothing)


def ipo(logprobs, batch, beta=0.1):
    ratios = means(logprobs, batch) - means(batch["reference_logprobs"], batch)
    return np.mean((ratios[0::2] - ratios[1::2] - 1 / (2 * beta)) ** 2)


def simpo(logprobs, batch, beta=2.0, margin=1.0):
    own = means(logprobs, batch)
    return np.mean(-log_sigmoid(beta * (own[0::2] - own[1::2] - margin / beta)))


def orpo(logprobs, batch, beta=0.1):
    own = means(logprobs, batch)
    chosen, rejected = own[0::2], own[1::2]
    odds = (chosen - rejected) - (np.log1p(-np.exp(chosen)) - np.log1p(-np.exp(rejected)))
    weights = batch["loss_weights"][0::2]
    nll = -(logprobs[0::2] * weights).sum() / weights.sum()
    return nll - np.mean(beta * log_sigmoid(odds))


def kto(logprobs, batch, beta=0.1, wanted_weight=1.0, unwanted_weight=1.0, kl=None):
    ratios = sums(logprobs, batch) - sums(batch["reference_logprobs"], batch)
    judged = ratios[0::2]
    wanted = batch["labels"][0::2].sum(1) > 0
    kl = max(ratios[1::2].mean(), 0.0) if kl is None else kl
    losses = np.where(
        wanted,
        wanted_weight * (1 - 1 / (1 + np.exp(-beta * (judged - kl)))),
        unwanted_weight * (1 - 1 / (1 + np.exp(-beta * (kl - judged)))),
    )
    return losses.mean()


def grpo(logprobs, batch, clip=0.2, clip_high=0.28, kl_weight=0.0, mean="tokens", max_new_tokens=64):
    weights, advantages = batch["loss_weights"], batch["advantages"]
    ratio = np.exp(logprobs - batch["behaviour_logprobs"])
    gain = np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip_high) * advantages)
    behind = batch["reference_logprobs"] - logprobs
    token = -gain + kl_weight * (np.exp(behind) - behind - 1)
    if mean == "tokens":
        return (token * weights).sum() / weights.sum()
    if mean == "answers":
        return ((token * weights).sum(1) / weights.sum(1)).mean()
    return (token * weights).sum() / (len(weights) * max_new_tokens)


def slope(value, logprobs):
    """d value / d logprobs by central differences: to about 1e-9 of values near 1."""
    found = np.zeros_like(logprobs)
    for place in np.ndindex(*logprobs.shape):
        moved = [logprobs.copy(), logprobs.copy()]
        moved[0][place] += WIDTH
        moved[1][place] -= WIDTH
        found[place] = (value(moved[0]) - value(moved[1])) / (2 * WIDTH)
    return found
