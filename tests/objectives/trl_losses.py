"""TRL's own losses and their slopes by log-probabilities, for an environment that has TRL.

    .venv-torch/bin/python tests/objectives/trl_losses.py FILE.npz OUT.npz

FILE: arrays [B, T] of `tests.objectives.test_formulas`, B in pairs. Trainers are not made: their methods are
called on what they read of themselves. A model's vocabulary has two tokens, the text's and all others
together.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.kto import KTOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
)


def trainer(**values):
    """What a trainer's loss reads of it."""
    metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    values["_total_train_tokens"] = 0
    return SimpleNamespace(
        accelerator=HERE,
        model=SimpleNamespace(training=False),
        _metrics=metrics,
        label_smoothing=0.0,
        **values,
    )


def halves(x):
    """(chosen, rejected) of rows that alternate."""
    return x[0::2], x[1::2]


def direct(given, logprobs, kind, beta):
    """DPO's and IPO's, through a model that gives these log-probabilities."""
    order = torch.cat([torch.arange(0, len(logprobs), 2), torch.arange(1, len(logprobs), 2)])
    weights = given["loss_weights"][order]

    def model(values):
        logits = torch.stack([values, torch.log1p(-torch.exp(values))], -1)[order]
        ahead = torch.zeros_like(logits[:, :1])  # the last token's, which predicts nothing
        return lambda **kw: SimpleNamespace(logits=torch.cat([logits, ahead], 1))

    first = torch.zeros(len(order), 1)
    inputs = {
        "input_ids": torch.zeros(len(order), weights.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(order), weights.shape[1] + 1),
        "completion_mask": torch.cat([first, weights], 1),
    }
    reference = (given["reference_logprobs"] * given["loss_weights"]).sum(1)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = halves(reference)
    own = trainer(
        beta=beta,
        loss_types=[kind],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _truncate_inputs=lambda *arrays: arrays,
    )
    return DPOTrainer._compute_loss(own, model(logprobs), inputs, False)


def means(given, logprobs):
    """Of each text, over what counts."""
    return (logprobs * given["loss_weights"]).sum(1) / given["loss_weights"].sum(1)


def simpo(given, logprobs, beta, margin):
    """CPO's trainer without its cross-entropy."""
    own = trainer(beta=beta, simpo_gamma=margin, alpha=0.0, loss_type="simpo")
    return CPOTrainer.cpo_loss(own, *halves(means(given, logprobs)))[0].mean()


def orpo(given, logprobs, beta):
    """The chosen texts' cross-entropy, less the odds: as its trainer puts them together."""
    ratio = ORPOTrainer.odds_ratio_loss(trainer(beta=beta), *halves(means(given, logprobs)))[0]
    weights = given["loss_weights"][0::2]
    return -(logprobs[0::2] * weights).sum() / weights.sum() - ratio.mean()


def kto(given, logprobs, beta, wanted, unwanted):
    """Rows: an answer, then another's for the KL."""
    own, others = halves((logprobs * given["loss_weights"]).sum(1))
    base, others_base = halves((given["reference_logprobs"] * given["loss_weights"]).sum(1))
    good = given["labels"][0::2].sum(1) > 0
    self = trainer(
        beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=wanted, undesirable_weight=unwanted
    )
    arrays = (own[good], own[~good], others, base[good], base[~good], others_base)
    return KTOTrainer.kto_loss(self, *arrays)[0].mean()


def grpo(given, logprobs, kind, clip, clip_high, kl, most):
    """Per-token ratios, clipped, with the k3 estimate of the KL."""
    weights = given["loss_weights"]
    self = trainer(
        beta=kl,
        loss_type=kind,
        epsilon_low=clip,
        epsilon_high=clip_high,
        max_completion_length=most,
        tools=None,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs)),
    )
    none = torch.zeros(len(weights), 0)
    inputs = {
        **{"prompt_ids": none, "prompt_mask": none, "completion_ids": weights, "completion_mask": weights},
        **{"advantages": given["advantages"], "old_per_token_logps": given["behaviour_logprobs"]},
        "ref_per_token_logps": given["reference_logprobs"],
    }
    return GRPOTrainer._compute_loss(self, None, inputs)


CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dpo": (direct, ("sigmoid", 0.1)),
    "ipo": (direct, ("ipo", 0.2)),
    "simpo": (simpo, (2.5, 0.7)),
    "orpo": (orpo, (0.3,)),
    "kto": (kto, (0.1, 1.0, 1.0)),
    "kto weighted": (kto, (0.4, 1.5, 0.5)),
    "grpo clipped": (grpo, ("bnpo", 0.2, 0.28, 0.0, 64)),
    "grpo near its reference": (grpo, ("grpo", 0.1, 0.1, 0.3, 64)),
    "grpo by a constant": (grpo, ("dr_grpo", 0.2, 0.28, 0.0, 20)),
}


def main(source: str, output: str) -> None:
    """Every case's value and slope."""
    torch.set_default_dtype(torch.float64)
    given = {name: torch.tensor(x, dtype=torch.float64) for name, x in np.load(source).items()}
    found = {}
    for name, (loss, settings) in CASES.items():
        logprobs = given["logprobs"].clone().requires_grad_()
        own = dict(given) if "kto" in name else {**given, "labels": None}
        value = loss(own, logprobs, *settings)
        value.backward()
        found[f"{name}/value"], found[f"{name}/slope"] = value.detach().numpy(), logprobs.grad.numpy()
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
