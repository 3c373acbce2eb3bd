"""A decoder-only transformer as pure functions over its parameter tree; the configuration makes it a family.

B batch, T position, S cache position, D model, V vocabulary, L layers.
The tree is {"embed", "segments": {segment: {place in the period: stacked [count, ...]}}, "final_norm",
"head", "mtp": {depth: ...}}; "head" is absent where the token table is tied, "mtp" where nothing further than
the next token is predicted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from kernels.token_losses import LOGIT_AXES, chunked_cross_entropy, chunked_logprobs, softcap_logits
from models.blocks import Block, MTPBlock
from models.config import ModelConfig, check_model
from models.layers import WHOLE, Embedding, FinalNorm, Head
from models.mixer import CacheArray, kept, mixer
from models.moe import LOAD
from models.mtp import next_targets
from models.ops import Ops
from models.param import ParamInfo, info_of, init_leaf, init_stacked
from models.spec import LayerSpec, Segment, make_segments
from models.weights import LowRank, QTensor, merge

Tree = dict[str, Any]


def build_model(config: ModelConfig) -> "Model":
    """The model that `config` describes, without a single array. ValueError for values that make no model."""
    check_model(config)
    if config.vocab_size < 1:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} must be positive when a model is built; "
            "take the tokenizer's size rounded up to a multiple of 128"
        )
    segments = make_segments(config)
    last = segments[-1].period[-1]
    kinds = {block_name(spec): spec for segment in segments for spec in segment.period}
    parts: dict[str, Callable[..., nnx.Module]] = {
        "embed": partial(Embedding, config),
        "final_norm": partial(FinalNorm, config),
        **{name: partial(Block, config, spec) for name, spec in kinds.items()},
    }
    if not config.tie_embeddings:
        parts["head"] = partial(Head, config)
    if config.mtp_depth:
        # A layer for a further token is one more of the last layer's kind, experts included.
        parts["mtp"] = partial(MTPBlock, config, last)
    # nnx is the notation only: a module is split once into structure and parameters, and from here on
    # parameters are a plain tree that any JAX transformation takes.
    graphs, info = {}, {}
    for name, make in parts.items():
        graphs[name], info[name] = describe(make)
    # A block is described once, whatever the number of layers: in the tree it appears stacked, by segment and
    # place in the period.
    blocks = {name: info.pop(name) for name in kinds}
    info["segments"] = {str(s): stack_info(blocks, segment) for s, segment in enumerate(segments)}
    if config.mtp_depth:
        # Not stacked: there are one or two, each run by itself.
        info["mtp"] = {str(depth): info["mtp"] for depth in range(config.mtp_depth)}
    return Model(config, segments, info, graphs)


def block_name(spec: LayerSpec) -> str:
    """The name of the module that such a layer is: specs of one name differ in no parameter."""
    return f"{spec.mixer}_and_{'experts' if spec.moe else 'mlp'}"


def stack_info(blocks: Tree, segment: Segment) -> Tree:
    """The ParamInfo of a segment's layers: one stacked tree a place in its period."""
    return {
        str(p): jax.tree.map(lambda leaf: leaf.stacked(segment.count), blocks[block_name(spec)])
        for p, spec in enumerate(segment.period)
    }


def describe(make: Callable[..., nnx.Module]) -> tuple[Any, Tree]:
    """A module's structure and the ParamInfo of each of its parameters, without computing any."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state, info_of)


@dataclass(frozen=True, eq=False)
class Model:
    """What `parallel` composes and `training` drives. Holds no arrays; methods are pure and may be traced.

    A batch is a dict of [B, T] arrays: tokens, targets, positions, segment_ids (int32), loss_weights (f32),
    and order (int32), the index of each position in its row's text, where they do not lie in order.
    """

    config: ModelConfig
    segments: tuple[Segment, ...]
    info: Tree  # ParamInfo leaves, in the shape of the parameter tree
    graphs: dict[str, Any] = field(repr=False)  # structure of each nnx module, to merge parameters into

    def init(
        self, key: Key[Array, ""], arrange: Callable[[int, Array], Array] = lambda segment, layers: layers
    ) -> Tree:
        """Float32 parameters. A leaf's key depends on its name and layer alone, not on sharding or order.

        `arrange(segment, layers [count])` may give a segment's layer numbers another shape, in which its
        parameters are then stacked.
        """
        tree = {
            name: jax.tree_util.tree_map_with_path(partial(init_leaf, key, name), infos)
            for name, infos in self.info.items()
            if name != "segments"
        }
        tree["segments"], first = {}, 0
        for s, segment in enumerate(self.segments):
            places = tree["segments"][str(s)] = {}
            for p in range(len(segment.period)):
                # Layer p of every repetition: counted over the whole model, so that a layer's initial values
                # do not hang on how the pattern folds.
                layers = first + p + len(segment.period) * jnp.arange(segment.count)
                make = partial(init_stacked, key, arrange(s, layers))
                places[str(p)] = jax.tree_util.tree_map_with_path(make, self.info["segments"][str(s)][str(p)])
            first += segment.count * len(segment.period)
        return tree

    @jax.named_scope("embed")
    def embed(self, params: Tree, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T D"]:
        """Token (and learned position) embeddings, in the compute dtype."""
        return self._module("embed", params["embed"])(batch, ops)

    def layer(
        self,
        spec: LayerSpec,
        params: Tree,
        x: Float[Array, "B T D"],
        batch: dict[str, Array],
        key: Any,
        ops: Ops,
    ) -> tuple[Float[Array, "B T D"], Tree]:
        """One layer with its own (unstacked) parameters, and what it reports; `key` is for random layers."""
        del key
        # Merging a module costs tracing time alone: structure is static, so the program sees bare arrays.
        x, _, sums = self._block(spec, params)(x, batch, spec, ops)
        return x, self._mean_over_layers(sums)

    @jax.named_scope("head")
    def head(
        self, params: Tree, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Weighted sum of losses in nats, and its parts (sums): `nll`, the loss to report, and `z_loss`.

        With further tokens also `mtp_nll`, the mean of their losses over depths, and what their layers
        report.
        """
        normed = self._module("final_norm", params["final_norm"])(x)
        # The table never meets [B, T, V]: `chunked_cross_entropy` makes logits for a few positions at a time.
        loss, sums = self._loss(params, normed, batch["targets"], batch["loss_weights"], ops, ops.z_loss)
        if self.config.mtp is None:
            return loss, sums
        stream = normed if self.config.mtp.normed_stream else x
        further, reports = self._mtp_loss(params, stream, batch, ops)
        return loss + further, {**sums, **reports}

    @jax.named_scope("head")
    def cross_entropy(
        self,
        params: Tree,
        x: Float[Array, "B T D"],
        targets: Int[Array, "B T *K"],
        weights: Float[Array, "B T *K"],
        counts: Float[Array, "B T"],
        ops: Ops,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """As `head`, of any targets: several a position, and weights that have a sign; no further tokens.

        counts: how much a position counts where no sign is wanted, in z-loss.
        """
        normed = self._module("final_norm", params["final_norm"])(x)
        return self._loss(params, normed, targets, weights, ops, ops.z_loss, counts)

    @jax.named_scope("head")
    def logprobs(
        self, params: Tree, x: Float[Array, "B T D"], batch: dict[str, Array], ops: Ops
    ) -> Float[Array, "B T *K"]:
        """Log-probabilities of a batch's targets in float32 nats, of the stream after the last layer."""
        return chunked_logprobs(
            ops.constrain(self._module("final_norm", params["final_norm"])(x), WHOLE),
            self._output_table(params),
            batch["targets"],
            chunk=ops.loss_chunk,
            parts=ops.parts,
            softcap=self.config.logit_softcap,
            constrain=ops.constrain,
            dtype=ops.factor_dtype,
        )

    def _loss(
        self,
        params: Tree,
        x: Array,
        targets: Array,
        weights: Array,
        ops: Ops,
        z_loss: float,
        counts: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        return chunked_cross_entropy(
            ops.constrain(x, WHOLE),
            self._output_table(params),
            targets,
            weights,
            counts,
            chunk=ops.loss_chunk,
            parts=ops.parts,
            softcap=self.config.logit_softcap,
            z_loss=z_loss,
            constrain=ops.constrain,
            contract_rows=ops.contract_rows,
            dtype=ops.factor_dtype,
        )

    def _mtp_loss(
        self, params: Tree, x: Array, batch: dict[str, Array], ops: Ops
    ) -> tuple[Array, dict[str, Array]]:
        """mtp_weight times the mean loss over depths d of predicting token t+1+d, and what to report.

        Depth d reads the token t+d, which depth d-1 was to predict, beside what the head reads at depth d-1:
        the stream behind that depth's own final norm; depth 1, behind the model's, which is `x`. A depth's
        loss is the sum over the positions whose document goes on that far, over the same total weight as the
        main loss.
        """
        spec, settings = self.segments[-1].period[-1], self.config.mtp
        assert settings is not None
        totals: Tree = {}
        loss = nll = jnp.zeros((), jnp.float32)
        # Targets shift by one a depth; where a document ends their weight becomes 0, so no depth predicts
        # across it.
        ahead = dict(batch)

        @jax.checkpoint  # outside of the schedule's rematerialization, its scores would outweigh all layers
        def deepen(params: Tree, tokens: Array, x: Array, mtp: Tree) -> tuple[Array, Array, Tree]:
            embedded = self.embed(params, {**batch, "tokens": tokens}, ops)
            module = self._module("mtp", mtp)
            x, _, sums = module(x, embedded, batch, spec, ops)
            return x, module.final_norm(x), sums

        for depth in range(settings.depth):
            stream, normed, sums = deepen(params, ahead["targets"], x, params["mtp"][str(depth)])
            x = normed if settings.normed_stream else stream
            ahead["targets"], ahead["loss_weights"] = next_targets(ahead)
            part, parts = self._loss(params, normed, ahead["targets"], ahead["loss_weights"], ops, 0.0)
            sums = self._mean_over_layers(sums)
            # What routers of these layers add to the objective is theirs whole, as in every other layer.
            loss = loss + settings.weight / settings.depth * part + sums.pop("loss", 0.0)
            nll = nll + parts["nll"] / settings.depth
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        return loss, {"mtp_nll": nll, **totals}

    def _mean_over_layers(self, sums: Tree) -> Tree:
        """What one layer's router reports, as its share of the mean over layers; counts and losses stay."""
        # Known statically, so every layer can report its share at once: a pipeline's stages never compare
        # notes.
        routers = self.config.mtp_depth + sum(
            s.count * sum(spec.moe for spec in s.period) for s in self.segments
        )
        return {name: s if name in ("loss", LOAD) else s / routers for name, s in sums.items()}

    def logits(self, params: Tree, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T V"]:
        """Float32 next-token logits of the residual stream after the last layer."""
        return self._logits(params, self._module("final_norm", params["final_norm"])(x), ops)

    def _logits(self, params: Tree, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T V"]:
        # Summed in float32 from factors in the compute dtype, as in the loss: sampling compares logits that
        # differ in their last bits.
        table = self._output_table(params)
        if ops.contract_last is not None:
            logits = ops.contract_last(x, table)
        else:
            logits = jnp.einsum("BTD,VD->BTV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        return softcap_logits(ops.constrain(logits, LOGIT_AXES), self.config.logit_softcap)

    def apply(self, params: Tree, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T V"]:
        """Logits of a plain forward pass: needs tokens, positions and segment_ids."""
        return self.logits(params, self.hidden(params, batch, ops), ops)

    def hidden(self, params: Tree, batch: dict[str, Array], ops: Ops) -> Float[Array, "B T D"]:
        """The residual stream after the last layer, of stacked parameters or of `unstack`'s."""
        return self._layers(params, self.embed(params, batch, ops), batch, ops, None)[0]

    def unstack(
        self,
        params: Tree,
        ops: Ops,
        masters: Collection[str] = (),
        *,
        packed: bool = False,
        further: bool = False,
    ) -> Tree:
        """Parameters as `decode` takes them: a tree for each layer, its products' in the compute dtype.

        Done once, where a step would do it for every token. masters: projections whose weights stay in
        float32, because what multiplies them rounds by itself. What only predicts further tokens is left out
        unless `further`.
        A token table is read in float32 and rounded behind its factor, so it stays; tied, it is there twice.
        packed: what is quantized stays so, and is dequantized by every product: fewer bytes, more work.
        """

        def ready(info: ParamInfo, leaf: Array) -> Array:
            cast = info.role == "head" or "experts" in info.axes
            cast = cast or (info.projection is not None and info.projection not in masters)
            if isinstance(leaf, QTensor | LowRank) and (not cast or (packed and isinstance(leaf, QTensor))):
                return leaf  # several arrays, each where it lies
            # What an activation is rounded to where it is multiplied, its weight is here, once.
            factor = None if "experts" in info.axes else ops.factor_dtype
            dtype = factor or ops.compute_dtype
            return ops.constrain(leaf.astype(dtype) if cast else leaf, info.axes)

        def layer(info: ParamInfo, stack: Array, i: int) -> Array:
            return ready(replace(info, axes=info.axes[1:]), stack[i])

        names = set(params) - ({"segments"} if further else {"segments", "mtp"})
        tree = {name: jax.tree.map(ready, self.info[name], params[name]) for name in names}
        if self.config.tie_embeddings:
            info = replace(self.info["embed"]["table"], role="head")
            tree["head"] = {"table": ready(info, params["embed"]["table"])}
        tree["segments"] = {}
        for s, segment in enumerate(self.segments):
            trees = self.info["segments"][str(s)], params["segments"][str(s)]
            layers = [jax.tree.map(partial(layer, i=i), *trees) for i in range(segment.count)]
            tree["segments"][str(s)] = layers
        return tree

    def init_cache(self, batch_size: int, capacity: int, ops: Ops) -> Tree:
        """An empty cache for rows of at most `capacity` tokens: how many each has, int32 [B], their places
        [S], and of each layer what its mixer keeps.
        """
        grown = partial(CacheArray.grown, x=None, rows=batch_size, ops=ops)
        segments = jax.tree.map(grown, self.cache_arrays(capacity, ops.cache_bits))
        lengths = jnp.zeros(batch_size, jnp.int32)
        return {"lengths": lengths, "places": jnp.arange(capacity, dtype=jnp.int32), "segments": segments}

    def grow(self, cache: Tree, capacity: int, ops: Ops) -> Tree:
        """The cache with room for `capacity` tokens, at least as many as it had."""
        grown = partial(CacheArray.grown, rows=len(cache["lengths"]), ops=ops)
        segments = jax.tree.map(grown, self.cache_arrays(capacity, ops.cache_bits), cache["segments"])
        return {**cache, "places": jnp.arange(capacity, dtype=jnp.int32), "segments": segments}

    def cache_arrays(self, capacity: int, bits: int | None = None) -> Tree:
        """What each layer keeps of a row of `capacity` tokens (`models.mixer.kept`), of `CacheArray`s."""

        def of(segment: Segment) -> Tree:
            return {str(p): self._kept(spec, capacity, bits) for p, spec in enumerate(segment.period)}

        return {str(s): [of(segment)] * segment.count for s, segment in enumerate(self.segments)}

    def further_arrays(self, capacity: int, bits: int | None = None) -> Tree:
        """The same of the first layer for further tokens."""
        return self._kept(self.segments[-1].period[-1], capacity, bits)

    def _kept(self, spec: LayerSpec, capacity: int, bits: int | None) -> dict[str, CacheArray]:
        return kept(mixer(spec.mixer).cache_arrays(self.config, spec, capacity), bits)

    def decode(
        self,
        params: Tree,
        tokens: Int[Array, "B T"],
        cache: Tree,
        ops: Ops,
        counts: Int[Array, " B"] | None = None,
        *,
        every: bool = False,
    ) -> tuple[Float[Array, "*B V"], Tree]:
        """Logits behind the last of each row's next tokens, or behind `every` one, and the cache with them.

        params: as `unstack` gives them. counts: how many of the T tokens are a row's, at the left, by default
        all; the rest is padding, and the logits of a row of 0 are noise. Rows may be of any lengths. The
        caller keeps them within the cache's capacity (and, with learned positions, max_seq_len): what is
        beyond is lost.
        """
        counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32) if counts is None else counts
        x, cache = self.extend(params, tokens, cache, ops, counts)
        if every:
            return self.logits(params, x, ops), cache
        return self.logits(params, _last(x, counts), ops)[:, 0], cache

    def extend(
        self, params: Tree, tokens: Int[Array, "B T"], cache: Tree, ops: Ops, counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Tree]:
        """The residual stream after the last layer of each row's next tokens, and the cache with them."""
        batch, filled = self._behind(tokens, cache, counts)
        x = self.embed(params, batch, ops)
        x, segments = self._layers(params, x, batch, ops, cache["segments"])
        return x, {**cache, "lengths": filled, "segments": segments}

    def further_input(self, params: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Of the stream after the last layer, what the first layer for further tokens reads."""
        assert self.config.mtp is not None
        return self._module("final_norm", params["final_norm"])(x) if self.config.mtp.normed_stream else x

    @jax.named_scope("further")
    def further(
        self,
        params: Tree,
        x: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        cache: Tree,
        ops: Ops,
        counts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B 1 D"], Tree]:
        """What the first layer for further tokens expects, by the tokens that `decode` reads next.

        x: of the next positions of each row, `further_input`; tokens: that follow each in the text. Returns
        the logits of the token behind the last of a row's `counts`, what the same layer reads to go on from
        there as if it were right, and the cache, in which `further` is as `further_arrays` says.
        """
        spec, settings = self.segments[-1].period[-1], self.config.mtp
        assert settings is not None
        batch, filled = self._behind(tokens, cache, counts)
        module = self._module("mtp", params["mtp"]["0"])
        x, arrays, _ = module(x, self.embed(params, batch, ops), batch, spec, ops, cache["further"])
        x = _last(x, counts)
        normed = module.final_norm(x)
        logits = self._logits(params, normed, ops)[:, 0]
        return (
            logits,
            normed if settings.normed_stream else x,
            {**cache, "lengths": filled, "further": arrays},
        )

    def _behind(
        self, tokens: Int[Array, "B T"], cache: Tree, counts: Int[Array, " B"]
    ) -> tuple[dict[str, Array], Int[Array, " B"]]:
        """The batch of tokens that follow what the cache has, and how many it has with them."""
        rows, size = tokens.shape
        lengths, filled = cache["lengths"], cache["lengths"] + counts
        # A place in the cache is the position of its token: a row begins at 0. There is one static number of
        # places, so that every token of a text runs the same program; those not yet filled are segment 0.
        places = jnp.broadcast_to(cache["places"], (rows, cache["places"].shape[0]))
        batch = {
            "tokens": tokens,
            "positions": lengths[:, None] + jnp.arange(size),
            "segment_ids": (jnp.arange(size) < counts[:, None]).astype(jnp.int32),
            "kv_positions": places,
            "kv_segment_ids": (places < filled[:, None]).astype(jnp.int32),
            **{name: cache[name] for name in ("pages",) if name in cache},
        }
        return batch, filled

    def num_params(self) -> dict[str, int]:
        """How many parameters: all, without embedding tables and head, those that a token passes through.

        `mtp`, where there are any, are those that only serve to predict further tokens in training: part of
        `total` and `non_embedding`, not of `active`.
        """
        leaves = jax.tree.leaves(self.info)
        # Without tables: scaling laws count what multiplies, and a vocabulary would outweigh a small model.
        body = [leaf for leaf in leaves if leaf.role not in ("embedding", "head")]
        further = jax.tree.leaves(self.info.get("mtp", {}))
        active = sum(map(self._active, leaves)) - sum(map(self._active, further))
        counts = {"total": sum(map(_size, leaves)), "non_embedding": sum(map(_size, body)), "active": active}
        return counts | ({"mtp": sum(map(_size, further))} if further else {})

    def _active(self, info: ParamInfo) -> int:
        """Parameters that one token meets: of experts, the chosen ones."""
        if "experts" not in info.axes or self.config.moe is None:
            return _size(info)
        # Of E experts a token meets k.
        return _size(info) // self.config.moe.num_experts * self.config.moe.experts_per_token

    def flops_per_token(self, seq_len: int) -> dict[str, float]:
        """Operations of a forward pass per token of a `seq_len` row; training takes three times that.

        `matmul`: two a weight that a token meets, with the head (once more for each further token);
        `attention_full`: what mixers do beyond their weights, such as scores and values over all positions
        that a window allows; `attention_causal`: over those of them that are not in the future, on average.
        """
        config = self.config
        # From what parameters are, not from a second list of layers: a new matrix is counted without a word
        # here. Tables are looked up, not multiplied, and the head is added by hand since it may be the table.
        weights = [leaf for leaf in jax.tree.leaves(self.info) if leaf.role == "matrix"]
        heads = (1 + config.mtp_depth) * config.vocab_size * config.d_model
        matmul = 2 * (sum(map(self._active, weights)) + heads)
        layers = [(segment.count, spec) for segment in self.segments for spec in segment.period]
        layers.append((config.mtp_depth, self.segments[-1].period[-1]))
        full = causal = 0.0
        for count, spec in layers:
            all_positions, past = mixer(spec.mixer).flops(config, spec, seq_len)
            full, causal = full + count * all_positions, causal + count * past
        return {"matmul": float(matmul), "attention_full": full, "attention_causal": causal}

    def _module(self, name: str, params: Tree) -> Any:
        return nnx.merge(self.graphs[name], params)

    def _block(self, spec: LayerSpec, params: Tree) -> Any:
        return self._module(block_name(spec), params)

    def _output_table(self, params: Tree) -> Float[Array, "V D"]:
        # A tied table is there twice only in `unstack`'s tree, where the head's is in the compute dtype. A
        # quantized one is dequantized once, not chunk by chunk: the loss casts the whole of any as well.
        return merge(params["head" if "head" in params else "embed"]["table"])

    def _layers(
        self, params: Tree, x: Array, batch: dict[str, Array], ops: Ops, caches: Tree | None
    ) -> tuple[Array, Tree]:
        """All layers in order: by one scan a segment or, where they are unstacked, one by one.

        With caches they are: a scan would hand these on as new arrays, a copy of them all for each token.
        """
        filled: Tree = {}
        for s, segment in enumerate(self.segments):

            def period(x: Array, stacked: Any, segment: Segment = segment) -> tuple[Array, Any]:
                params, cache = stacked
                out = {}
                for p, spec in enumerate(segment.period):
                    block = self._block(spec, params[str(p)])
                    x, out[str(p)], _ = block(x, batch, spec, ops, cache and cache[str(p)])
                return x, out

            stacked = params["segments"][str(s)]
            if not isinstance(stacked, list):
                # One layer in the program, however many there are: compile time does not grow with depth.
                x, _ = jax.lax.scan(period, x, (stacked, None))
                continue
            filled[str(s)] = []
            for i, layer in enumerate(stacked):
                # Unrolled: compiled once per shape and run for every token, so what a step costs comes first.
                x, out = period(x, (layer, caches and caches[str(s)][i]))
                filled[str(s)].append(out)
        return x, filled


def _last(x: Float[Array, "B T D"], counts: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    # One row of the head for each text, and not T: only behind the last token is anything drawn.
    return jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)


def _size(info: ParamInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))
