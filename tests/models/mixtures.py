"""Decoders with experts, latent attention and further tokens in float64 loops, written from the papers."""

import math
from typing import Any

import numpy as np

from models.config import MLAConfig, ModelConfig, MoEConfig, MTPConfig
from tests.models.decoders import LoopDecoder, family, loop_attention


def mixture(moe: dict | None = None, **values) -> ModelConfig:
    """A small decoder whose layers have experts."""
    return family(
        moe=MoEConfig(**({"num_experts": 6, "experts_per_token": 2, "d_expert": 8} | (moe or {}))), **values
    )


def latent(mla: dict | None = None, **values) -> ModelConfig:
    """A small decoder with latent attention."""
    sizes = {
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    return family(**({"num_kv_heads": 4, "head_dim": 10, "mla": MLAConfig(**(sizes | (mla or {})))} | values))


DEEPSEEK: dict[str, Any] = {
    "score": "sigmoid",
    "num_experts": 8,
    "num_shared_experts": 2,
    "first_dense_layers": 1,
    "num_groups": 4,
    "groups_per_token": 2,
    "gate_scale": 2.5,
    "bias_update_rate": 0.01,
    "router_z_weight": 0.05,
}
MIXTURES = {
    "mixtral": mixture({"router_z_weight": 0.02}, num_layers=1),
    "qwen3": mixture({"experts_per_token": 3, "load_balance_weight": 0.2}, qk_norm=True, num_layers=1),
    "switch": mixture({"experts_per_token": 1, "normalize_gates": False}, activation="relu2", num_layers=1),
    "gpt_oss": mixture(
        {"num_shared_experts": 2, "shared_gate": True},
        activation="clamped_swiglu",
        attention_sinks=True,
        biases=["experts"],
        num_layers=1,
    ),
    "qwen2": mixture({"layer_pattern": ["mlp", "experts"], "router_z_weight": 0.02}, num_layers=4),
    "deepseek": latent(moe=MoEConfig(**({"d_expert": 8} | DEEPSEEK)), mtp=MTPConfig(2, 0.4), num_layers=2),
}


def loop_route(logits: np.ndarray, bias: np.ndarray | float, moe: MoEConfig) -> tuple[list[int], list[float]]:
    """One token's experts, best first, and their gates."""
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    scores = softmax if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + bias
    size = moe.num_experts // moe.num_groups
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(moe.num_groups)]
    groups = sorted(range(moe.num_groups), key=lambda g: -worth[g])[: moe.groups_per_token]
    allowed = [e for e in range(moe.num_experts) if e // size in groups]
    experts = sorted(allowed, key=lambda e: -choice[e])[: moe.experts_per_token]
    gates = scores[experts]
    gates = gates / gates.sum() if moe.normalize_gates else gates
    return experts, list(gates * moe.gate_scale)


class LoopMixture(LoopDecoder):
    """With a call a token: every feed-forward of a chosen expert is a small matrix product of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.extra = 0.0  # what routers add to the objective

    def objective(self, params: dict, batch: dict) -> float:
        """All that is minimized, as a sum."""
        self.extra, self.batch = 0.0, batch
        loss = self.loss(params, batch)
        return loss + self.extra

    def logits(self, params: dict, batch: dict) -> np.ndarray:
        self.batch = batch
        x = params["embed"]["table"][batch["tokens"]]
        for layer in self.layers(params):
            x = self.layer(layer, x, batch, "global")
        x = self.norm(params["final_norm"], x, self.config.norm)
        further = self.further(params, x, batch) if self.config.mtp_depth else 0.0
        self.extra += further  # behind what its routers added
        return self.predict(params, x)

    def predict(self, params: dict, normed: np.ndarray) -> np.ndarray:
        table = params["embed"]["table"] if self.config.tie_embeddings else params["head"]["table"]
        return normed @ table.T

    def further(self, params: dict, x: np.ndarray, batch: dict) -> float:
        """Further tokens: position by position, looking the next ones up in the row."""
        settings = self.config.mtp
        assert settings is not None
        total, depths = 0.0, settings.depth
        rows, length = batch["tokens"].shape
        tokens = batch["targets"]
        for depth in range(1, depths + 1):
            part = params["mtp"][str(depth - 1)]
            read = np.zeros((rows, length), int)  # the token `depth` further than the input
            wanted, weights = np.zeros((rows, length), int), np.zeros((rows, length))
            for b in range(rows):
                for t in range(length):
                    read[b, t] = tokens[b, t + depth - 1] if t + depth - 1 < length else 0
                    if (
                        t + depth < length
                        and batch["segment_ids"][b, t + depth] == batch["segment_ids"][b, t]
                    ):
                        wanted[b, t] = tokens[b, t + depth]
                        weights[b, t] = batch["loss_weights"][b, t + depth]
            embedded = params["embed"]["table"][read]
            a = self.norm(part["hidden_norm"], x, self.config.norm) @ part["project"][0]
            x = a + self.norm(part["embed_norm"], embedded, self.config.norm) @ part["project"][1]
            x = self.norm(part["final_norm"], self.layer(part["block"], x, batch, "global"), self.config.norm)
            logits = self.predict(params, x)
            log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            log_probs = log_probs - logits.max(-1, keepdims=True)
            picked = np.take_along_axis(log_probs, wanted[..., None], -1)[..., 0]
            total -= settings.weight / depths * (picked * weights).sum()
        return total

    def feed_forward(self, weights: dict, x: np.ndarray) -> np.ndarray:
        if "experts" not in weights:
            return super().feed_forward(weights, x)
        moe, experts = self.config.moe, weights["experts"]
        assert moe is not None
        out, hits = np.zeros_like(x), np.zeros((*x.shape[:2], moe.num_experts))
        real = self.batch["segment_ids"] > 0
        logits = x @ experts["router"] + experts.get("router_bias", 0.0)
        for b, t in np.ndindex(*x.shape[:2]):
            if not real[b, t]:
                continue
            chosen, gates = loop_route(logits[b, t], experts.get("bias", 0.0), moe)
            for e, gate in zip(chosen, gates, strict=True):
                hits[b, t, e] = 1
                names = ("up", "down", "up_bias", "down_bias")
                one = {name: experts[name][e] for name in names if name in experts}
                out[b, t] += gate * super().feed_forward(one, x[b, t][None])[0]
        self.extra += self.router_loss(logits, hits, real)
        shared = super().feed_forward(weights["shared"], x) if "shared" in weights else 0.0
        if "shared_gate" in weights:
            shared = shared / (1 + np.exp(-x @ weights["shared_gate"]))
        return out + shared

    def router_loss(self, logits: np.ndarray, hits: np.ndarray, real: np.ndarray) -> float:
        moe, total = self.config.moe, 0.0
        assert moe is not None
        weights = self.batch["loss_weights"].astype(np.float64)
        for b in range(len(logits)):
            kept = logits[b][real[b]]
            scores = np.exp(kept) if moe.score == "softmax" else 1 / (1 + np.exp(-kept))
            share = (scores / scores.sum(-1, keepdims=True)).mean(0)
            load = hits[b][real[b]].mean(0) / moe.experts_per_token
            total += moe.load_balance_weight * weights[b].sum() * moe.num_experts * (load * share).sum()
            z = np.log(np.exp(kept).sum(-1)) ** 2
            total += moe.router_z_weight * (weights[b][real[b]] * z).sum()
        return total

    def attention(self, weights: dict, x: np.ndarray, batch: dict, kind: str) -> np.ndarray:
        mla = self.config.mla
        if mla is None:
            return super().attention(weights, x, batch, kind)
        queries = x
        if "q_down" in weights:
            queries = self.norm(weights["q_norm"], x @ weights["q_down"], "rmsnorm", mla.norm_eps)
        q = np.einsum("btr,rnh->btnh", queries, weights["q"])
        small = self.norm(weights["kv_norm"], x @ weights["kv_down"], "rmsnorm", mla.norm_eps)
        k = np.einsum("btr,rnh->btnh", small, weights["k"])
        v = np.einsum("btr,rnh->btnh", small, weights["v"])
        cut = mla.qk_nope_head_dim
        q_rope, k_rope = self.turn(q[..., cut:], batch), self.turn((x @ weights["k_rope"])[:, :, None], batch)
        heads = q.shape[2]
        q = np.concatenate([q[..., :cut], q_rope], -1)
        k = np.concatenate([k, np.repeat(k_rope, heads, axis=2)], -1)
        scale = (cut + mla.qk_rope_head_dim) ** -0.5
        if self.config.rope_scaling is not None:
            scale *= (0.1 * math.log(self.config.rope_scaling.factor) + 1) ** 2
        # Values padded with zeros to the keys' size, for loops that know one size only.
        padded = np.concatenate([v, np.zeros((*v.shape[:3], max(0, k.shape[-1] - v.shape[-1])))], -1)
        out = loop_attention(q, k, padded, batch, None, None, scale)[..., : v.shape[-1]]
        return np.einsum("btnh,nhd->btd", out, weights["o"])

    def turn(self, x: np.ndarray, batch: dict) -> np.ndarray:
        """Rotate plane i, made of elements i and i + half."""
        half, out = x.shape[-1] // 2, np.empty_like(x)
        frequencies = loop_yarn(self.config, half)
        for i in range(half):
            angle = (batch["positions"] * frequencies[i])[:, :, None]
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., i + half] = a * np.sin(angle) + b * np.cos(angle)
        return out


def loop_yarn(config: ModelConfig, half: int) -> list[float]:
    """Frequencies of the rotated part, stretched where the config says yarn (arXiv:2309.00071, 3.2)."""
    plain = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return plain

    def plane(turns: float) -> float:
        ratio = scaling.original_length / (turns * 2 * math.pi)
        return 2 * half * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(plane(scaling.beta_fast)), 0)
    high = min(math.ceil(plane(scaling.beta_slow)), 2 * half - 1)
    found = []
    for i, frequency in enumerate(plain):
        stretched = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        found.append(stretched * frequency / scaling.factor + (1 - stretched) * frequency)
    return found
