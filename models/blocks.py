"""A decoder layer: its token mixer and its feed-forward or experts, as its spec says.

B batch, T query position, D model.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.layers import RESIDUAL, FeedForward, Norm, Sums, residual_init
from models.mixer import Cache, Dim, mixer
from models.moe import Experts
from models.ops import Ops
from models.param import param
from models.spec import LayerSpec, Segment


class Mixture(nnx.Module):
    """Experts, of which a token uses a few, and shared ones that it always uses, as one feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.moe is not None
        width = config.moe.num_shared_experts * config.moe.d_expert
        self.experts = Experts(config, residual_init(config), rngs)
        self.shared = FeedForward(config, width, rngs) if width else None
        # A column of its own, like a router of one expert.
        gate = partial(param, rngs, (config.d_model, 1), ("embed", None), normal(config.init_std))
        self.shared_gate = gate(reduction=(0,), output=(1,)) if config.moe.shared_gate else None

    def __call__(
        self, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops, *, decoding: bool
    ) -> tuple[Float[Array, "B T D"], Sums]:
        """The sum of routed and shared experts' outputs, and what the router reports."""
        y, sums = self.experts(x, batch, ops, decoding=decoding)
        if self.shared is None:
            return y, sums
        shared = self.shared(x, ops)
        if self.shared_gate is not None:
            opening = jnp.einsum("BTD,DC->BTC", x.astype(jnp.float32), self.shared_gate[...])
            shared = shared * jax.nn.sigmoid(opening).astype(shared.dtype)
        return y + shared, sums


class Block(nnx.Module):
    """A decoder layer: token mixer and feed-forward, each normed before (and, for Gemma, after) and added."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config, config.d_model, "embed", config.norm, rngs)

        before = config.post_norms != "only"
        self.attention_norm, self.mlp_norm = (norm() if before else None for _ in range(2))
        # Module names are parameter paths: initial weights are folded from them, and checkpoints hold them.
        # So any token mixer is called what the first one was.
        self.attention = mixer(spec.mixer)(config, rngs)
        self.mlp = Mixture(config, rngs) if spec.moe else FeedForward(config, config.d_ff, rngs)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None
        self.multiplier = config.multipliers.residual if config.multipliers else 1.0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Sums]:
        """The residual stream after this layer, the cache with its keys and values, what it reports."""
        # Scopes name operations in the compiled program: a profile then shows layers and not fusions.
        with jax.named_scope("attention"):
            hidden = x if self.attention_norm is None else self.attention_norm(x)
            hidden, cache = self.attention(hidden, batch, spec, ops, cache)
            x = self.add(x, hidden if self.attention_post_norm is None else self.attention_post_norm(hidden))
        sums: Sums = {}
        with jax.named_scope("mlp"):
            hidden = x if self.mlp_norm is None else self.mlp_norm(x)
            if isinstance(self.mlp, Mixture):
                hidden, sums = self.mlp(hidden, batch, ops, decoding=cache is not None)
            else:
                hidden = self.mlp(hidden, ops)
            x = self.add(x, hidden if self.mlp_post_norm is None else self.mlp_post_norm(hidden))
        # Between blocks the stream may be split over more axes than inside (sequence parallelism): norms and
        # sums need no whole rows.
        return ops.constrain(x, RESIDUAL), cache, sums

    def add(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream with what a half of the layer has to say, times the model's multiplier."""
        return x + y if self.multiplier == 1.0 else x + y * self.multiplier


def model_dims(config: ModelConfig, segments: Sequence[Segment]) -> tuple[Dim, ...]:
    """The sizes that meshes split, with the config keys that say them; a key may stand twice."""
    specs = {spec for segment in segments for spec in segment.period}
    dims = [dim for name in config.mixers for dim in mixer(name).dims(config)]
    dims.append(Dim("model.d_model", config.d_model, ("embed", "act_embed")))
    if not all(spec.moe for spec in specs):
        dims.append(Dim("model.d_ff", config.d_ff, ("mlp", "act_mlp")))
    if config.moe is not None:
        dims.append(Dim("model.moe.num_experts", config.moe.num_experts, ("experts",)))
        # Shared experts are a whole number of times as wide.
        dims.append(Dim("model.moe.d_expert", config.moe.d_expert, ("mlp", "act_mlp")))
        dims.append(Dim("model.d_model", config.d_model, ("expert_embed",)))
    if config.position == "learned":
        dims.append(Dim("model.max_seq_len", config.max_seq_len, ("positions",)))
    return tuple(dict.fromkeys(dims))


class MTPBlock(nnx.Module):
    """DeepSeek-V3's multi-token prediction (arXiv:2412.19437, section 2.2): one layer for one token further.

    h' = W [norm(h); norm(embedding of the token that the layer before predicts)], then a decoder layer and a
    final norm of its own; h is what the head read before, so behind a final norm. Table and head are the
    model's own.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config, config.d_model, "embed", config.norm, rngs)

        D = config.d_model
        self.hidden_norm, self.embed_norm, self.final_norm = norm(), norm(), norm()
        # The pair keeps a dim of its own, as everywhere: nothing sharded is joined or split.
        axes, init = (None, "embed", None), normal(config.init_std)
        self.project = param(rngs, (2, D, D), axes, init, project="further", reduction=(0, 1), output=(2,))
        self.block = Block(config, spec, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        batch: dict[str, Array],
        spec: LayerSpec,
        ops: Ops,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Sums]:
        """The residual stream for the next token further, its cache as a layer's, what the layer reports."""
        project = self.project[...]
        x = ops.project("further", "BTD,DE->BTE", self.hidden_norm(x), project[0])
        x = x + ops.project("further", "BTD,DE->BTE", self.embed_norm(embedded), project[1])
        return self.block(ops.constrain(x, RESIDUAL), batch, spec, ops, cache)
