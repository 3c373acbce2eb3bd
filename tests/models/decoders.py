"""Small decoders of every family, batches for them, and an independent float64 decoder in numpy loops."""

import math
from functools import partial

import jax
import numpy as np

from models.config import ModelConfig, MultipliersConfig, RopeScaling
from models.ops import Ops
from models.transformer import Model

SMALL = dict(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
GEMMA = dict(norm_unit_offset=True, post_norms=True, activation="geglu", embed_scale=True, window=3)


def family(**values) -> ModelConfig:
    return ModelConfig(**(SMALL | values))


FAMILIES = {
    "gpt2": family(
        num_kv_heads=4, norm="layernorm", bias=True, position="learned", activation="gelu", max_seq_len=32
    ),
    "llama2": family(num_kv_heads=4, tie_embeddings=False),
    "llama3": family(
        tie_embeddings=False,
        rope_theta=500.0,
        rope_scaling=RopeScaling("llama3", 8.0, 16),
    ),
    "mistral": family(tie_embeddings=False, window=4, window_pattern=["local"]),
    "qwen2": family(qkv_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 64)),
    "qwen3": family(qk_norm=True, rope_theta=1e6),
    "gemma2": family(
        window_pattern=["local", "global"],
        attention_softcap=5.0,
        logit_softcap=3.0,
        attention_scale=0.2,
        **GEMMA,
    ),
    "gemma3": family(
        num_layers=5,
        window_pattern=["local", "local", "global"],
        qk_norm=True,
        rope_theta=1e6,
        rope_local_theta=1e4,
        rope_scaling=RopeScaling("linear", 8.0),
        **GEMMA,
    ),
    "olmo3": family(
        tie_embeddings=False,
        post_norms="only",
        qk_norm="joint",
        rope_fraction=0.5,
        rope_scaling=RopeScaling("yarn", 4.0, 16, attention_factor=1.3, truncate=False),
        biases=["o", "mlp"],
        multipliers=MultipliersConfig(embedding=3.0, residual=0.7, logits=1.5),
        window=4,
        window_pattern=["local", "nope"],
    ),
    "gpt_oss": family(
        attention_sinks=True,
        activation="clamped_swiglu",
        qkv_bias=True,
        biases=["o", "norm"],
        norm="layernorm",
        window=4,
        window_pattern=["local", "global"],
    ),
    "modern": family(
        activation="relu2", qk_norm=True, logit_softcap=15.0, tie_embeddings=False, position="none"
    ),
}


def slope(function, inputs: list[np.ndarray], place: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """A random direction of one input, and the float64 derivative of `function(*inputs)` along it."""
    direction = np.random.default_rng(seed).normal(size=inputs[place].shape)

    def moved(step: float) -> float:
        return function(*(x + step * direction if i == place else x for i, x in enumerate(inputs)))

    return direction, (moved(1e-5) - moved(-1e-5)) / 2e-5


def make_batch(documents: list[list[int]], length: int, vocab_size: int = 64, seed: int = 0) -> dict:
    """Random tokens in rows packed with documents of the given lengths; what is left of a row is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(documents), length)
    batch = {
        "tokens": rng.integers(0, vocab_size, shape).astype(np.int32),
        "targets": rng.integers(0, vocab_size, shape).astype(np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
    }
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, 1):
            batch["positions"][row, start : start + size] = np.arange(size)
            batch["segment_ids"][row, start : start + size] = number
            start += size
    weights = rng.uniform(0.5, 1.5, shape) * (batch["segment_ids"] > 0)
    return {**batch, "loss_weights": weights.astype(np.float32)}


def lively(model: Model, seed: int = 0, spread: float = 0.3) -> dict:
    """Parameters far from their initial values, so that every scale, bias and projection matters."""
    rng = np.random.default_rng(seed)

    def draw(info) -> jax.Array:
        centre = info.init is jax.nn.initializers.ones
        return jax.numpy.asarray(rng.normal(centre, spread, info.shape), "float32")

    return jax.tree.map(draw, model.info)


def decoded(model: Model, params: dict, tokens: np.ndarray, prompt: int, **arguments) -> jax.Array:
    """Logits of a decoder from position `prompt` on, token by token; those up to there are given at once."""
    ops, rows = Ops(**arguments), tokens.shape[0]
    decode = jax.jit(partial(model.decode, ops=ops))
    params, cache, logits = model.unstack(params, ops), model.init_cache(rows, tokens.shape[1] + 3, ops), []
    for cut in (slice(0, prompt + 1), *(slice(t, t + 1) for t in range(prompt + 1, tokens.shape[1]))):
        last, cache = decode(params, tokens[:, cut], cache)
        logits.append(last)
    assert cache["lengths"].tolist() == [tokens.shape[1]] * rows
    return jax.numpy.stack(logits, axis=1)


class LoopDecoder:
    """A decoder in float64, one query at a time, written from the papers and not from models/."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def loss(self, params: dict, batch: dict) -> float:
        logits = self.logits(params, batch)
        shifted = logits - logits.max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return float(-(picked * batch["loss_weights"]).sum())

    def logits(self, params: dict, batch: dict) -> np.ndarray:
        config = self.config
        x = params["embed"]["table"][batch["tokens"]]
        if config.embed_scale:
            x = x * math.sqrt(config.d_model)
        if config.multipliers is not None:
            x = x * config.multipliers.embedding
        if config.position == "learned":
            x = x + params["embed"]["positions"][batch["positions"]]
        for number, layer in enumerate(self.layers(params)):
            x = self.layer(layer, x, batch, config.window_pattern[number % len(config.window_pattern)])
        x = self.norm(params["final_norm"], x, config.norm)
        table = params["embed"]["table"] if config.tie_embeddings else params["head"]["table"]
        divisor = config.multipliers.logits if config.multipliers else 1.0
        return self.cap(x @ table.T / divisor, config.logit_softcap)

    def layers(self, params: dict) -> list[dict]:
        """The layers in order: segment by segment, each turn of a period before the next."""
        found = []
        for s in sorted(params["segments"], key=int):
            places = params["segments"][s]
            for turn in range(len(jax.tree.leaves(places)[0])):
                for p in sorted(places, key=int):
                    found.append(jax.tree.map(lambda leaf, turn=turn: leaf[turn], places[p]))
        return found

    def layer(self, layer: dict, x: np.ndarray, batch: dict, kind: str) -> np.ndarray:
        config = self.config
        share = config.multipliers.residual if config.multipliers else 1.0

        def normed(name: str, x: np.ndarray) -> np.ndarray:
            return self.norm(layer[name], x, config.norm) if name in layer else x

        mixed = self.attention(layer["attention"], normed("attention_norm", x), batch, kind)
        x = x + share * normed("attention_post_norm", mixed)
        return x + share * normed("mlp_post_norm", self.feed_forward(layer["mlp"], normed("mlp_norm", x)))

    def norm(self, weights: dict, x: np.ndarray, kind: str, eps: float | None = None) -> np.ndarray:
        if weights["scale"].ndim == 2:  # of all heads at once
            joined = {"scale": weights["scale"].reshape(-1)}
            return self.norm(joined, x.reshape(*x.shape[:-2], -1), kind, eps).reshape(x.shape)
        eps = eps or self.config.norm_eps
        if kind == "layernorm":
            y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        else:
            y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return y * (weights["scale"] + self.config.norm_unit_offset) + weights.get("bias", 0.0)

    def attention(self, weights: dict, x: np.ndarray, batch: dict, kind: str) -> np.ndarray:
        config = self.config
        size = config.head_dim
        q = np.einsum("btd,dnh->btnh", x, weights["q"]) + weights.get("q_bias", 0.0)
        pair = np.einsum("btd,dckh->btckh", x, weights["kv"]) + weights.get("kv_bias", 0.0)
        k, v = pair[:, :, 0], pair[:, :, 1]
        if config.qk_norm:
            q, k = self.norm(weights["q_norm"], q, "rmsnorm"), self.norm(weights["k_norm"], k, "rmsnorm")
        if config.position == "rope" and kind != "nope":
            q, k = self.rotate(q, batch["positions"], kind), self.rotate(k, batch["positions"], kind)
        scale = config.attention_scale or 1 / math.sqrt(size)
        window = config.window if kind == "local" else None
        sinks = weights.get("sinks")
        out = loop_attention(q, k, v, batch, window, config.attention_softcap, scale, sinks)
        return np.einsum("btnh,nhd->btd", out, weights["o"]) + weights.get("o_bias", 0.0)

    def rotate(self, x: np.ndarray, positions: np.ndarray, kind: str) -> np.ndarray:
        frequencies, amplitude = loop_frequencies(self.config, kind)
        half = len(frequencies)
        out = x.copy()
        for i, frequency in enumerate(frequencies):
            angle = (positions * frequency)[:, :, None]
            a, b = x[..., i], x[..., i + half]
            out[..., i] = amplitude * (a * np.cos(angle) - b * np.sin(angle))
            out[..., i + half] = amplitude * (a * np.sin(angle) + b * np.cos(angle))
        return out

    def feed_forward(self, weights: dict, x: np.ndarray) -> np.ndarray:
        activation = self.config.activation
        if activation in ("swiglu", "geglu", "clamped_swiglu"):
            bias = weights.get("up_bias", np.zeros((2, 1)))
            gate, up = x @ weights["up"][:, 0] + bias[0], x @ weights["up"][:, 1] + bias[1]
        if activation == "clamped_swiglu":
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        elif activation in ("swiglu", "geglu"):
            hidden = (gate / (1 + np.exp(-gate)) if activation == "swiglu" else self.gelu(gate)) * up
        else:
            up = x @ weights["up"] + weights.get("up_bias", 0.0)
            hidden = self.gelu(up) if activation == "gelu" else np.maximum(up, 0) ** 2
        return hidden @ weights["down"] + weights.get("down_bias", 0.0)

    @staticmethod
    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    @staticmethod
    def cap(x: np.ndarray, cap: float | None) -> np.ndarray:
        return x if cap is None else cap * np.tanh(x / cap)


def loop_attention(q, k, v, batch, window, softcap, scale, sinks=None):
    """One query and head at a time over the keys it may see, and over a key that says nothing."""
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    positions, segments = np.asarray(batch["positions"]), np.asarray(batch["segment_ids"])
    rows = []
    for b in range(B):
        for t in range(T):
            seen = []
            for s in range(T):
                distance = positions[b, t] - positions[b, s]
                together = segments[b, t] == segments[b, s] != 0
                if together and distance >= 0 and (window is None or distance < window):
                    seen.append(s)
            for n in range(N):
                if not seen:
                    rows.append(np.zeros(q.shape[-1], q.dtype))
                    continue
                keys, values = k[b, np.array(seen), n // group], v[b, np.array(seen), n // group]
                scores = keys @ q[b, t, n] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                top = max(scores.max(), -np.inf if sinks is None else sinks[n])
                weights = np.exp(scores - top)
                silent = 0.0 if sinks is None else np.exp(sinks[n] - top)
                rows.append(weights @ values / (weights.sum() + silent))
    return np.stack(rows).reshape(q.shape)


def loop_frequencies(config: ModelConfig, kind: str) -> tuple[list[float], float]:
    """Radians per position of each plane, one at a time, and the amplitude, from the papers' formulas."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind == "local" and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, None
    size = round(config.head_dim * config.rope_fraction)
    if scaling is None:
        return [1.0 / theta ** (2 * i / size) for i in range(size // 2)], 1.0
    factor, old = scaling.factor, scaling.original_length
    found = []
    for i in range(size // 2):
        plain = 1.0 / theta ** (2 * i / size)
        wavelength = 2 * math.pi / plain
        if scaling.kind == "linear":
            plain = plain / factor
        elif scaling.kind == "llama3":
            long, short = old / scaling.low_freq_factor, old / scaling.high_freq_factor
            if wavelength > long:
                plain = plain / factor
            elif wavelength >= short:
                smooth = old / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                plain = (1 - smooth) * plain / factor + smooth * plain
        else:
            plain = yarn_frequency(scaling, size, theta, i, plain)
        found.append(plain)
    own = scaling.attention_factor or 0.1 * math.log(factor) + 1
    return found, own if scaling.kind == "yarn" else 1.0


def yarn_frequency(scaling: RopeScaling, head_dim: int, theta: float, i: int, plain: float) -> float:
    def plane_with(turns: float) -> float:
        """The (fractional) plane that makes so many turns in the old context."""
        wanted = 2 * math.pi * turns / scaling.original_length
        return -math.log(wanted) / math.log(theta) * head_dim / 2

    down, up = (math.floor, math.ceil) if scaling.truncate else (float, float)
    first = max(0, down(plane_with(scaling.beta_fast)))
    last = min(head_dim - 1, up(plane_with(scaling.beta_slow)))
    ramp = 0.0 if i <= first else 1.0 if i >= last else (i - first) / (last - first)
    return plain * (1 - ramp) + plain / scaling.factor * ramp
