"""Weights that are more than an array compute what the array that they stand for computes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.einsum import plain_einsum
from kernels.einsum_cpu import fast_einsum
from kernels.names import PROJECTIONS
from models.ops import Ops
from models.param import ParamInfo
from models.transformer import build_model
from models.weights import (
    Adapters,
    LowRank,
    QTensor,
    dequantize,
    low_rank,
    merge,
    merged,
    quantizable,
    quantize,
    quantized_info,
)
from tests.models.decoders import FAMILIES, family, make_batch
from tests.models.mixtures import MIXTURES
from tests.models.test_gated_delta import HYBRID

NAMES = (*PROJECTIONS, "experts")
FORMS = {
    "int8": (8, None, 0),
    "int4": (4, 4, 0),
    "lora": (None, None, 2),
    "qlora": (4, 2, 2),
}


def matrix(shape, reduction, output, *, axes=None, project="q", role="matrix"):
    axes = axes or (None,) * len(shape)
    init = jax.nn.initializers.normal(1.0)
    return ParamInfo(shape, jnp.float32, axes, reduction, output, role, True, init, project)


def drawn(info, seed=0):
    return jax.random.normal(jax.random.key(seed), info.shape)


def dress(model, params, form, seed=1):
    """The parameters in a form of FORMS; the factors b drawn, since zeros would show nothing."""
    bits, group, rank = FORMS[form]
    if rank:
        tree = Adapters(rank, 0.5, NAMES, bits, group).make(model.info, params, jax.random.key(seed))
    else:

        def of(info, w):
            return quantize(info, w, bits, group) if quantizable(info) else w

        tree = jax.tree.map(of, model.info, params)

    def draw(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        return dataclasses.replace(leaf, b=0.1 * jax.random.normal(jax.random.key(seed), leaf.b.shape))

    return jax.tree.map(draw, tree, is_leaf=lambda leaf: isinstance(leaf, LowRank))


def close(a, b, limit=1e-6):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max()), np.abs(a - b).max()


# -- the grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 2, 16])
def test_rounding_is_to_the_nearest_level_of_its_block(bits, symmetric, group):
    info = matrix((3, 4, 8, 5), (1, 2), (3,))
    w = drawn(info).at[0, :, :, 0].set(0.0).at[1].add(4.0)
    packed = quantize(info, w, bits, group, symmetric=symmetric)
    assert (packed.shape, packed.ndim, packed.dtype) == (w.shape, 4, jnp.float32)
    assert packed.q.nbytes == w.size * bits // 8
    scales = jnp.repeat(
        jnp.repeat(packed.scale, 4 // packed.scale.shape[1], 1), 8 // packed.scale.shape[2], 2
    )
    error = jnp.abs(dequantize(packed) - w) / scales
    assert float(error.max()) <= 0.5 + 1e-4
    assert packed.scale.size == w.size // (group or 32)
    np.testing.assert_array_equal(dequantize(packed)[0, :, :, 0], 0.0)  # zero is a level
    certificates = quantized_info(info, bits, group, symmetric=symmetric)
    for made, said in zip(jax.tree.leaves(packed), jax.tree.leaves(certificates), strict=True):
        assert (made.shape, made.dtype) == (said.shape, said.dtype) and not said.trained
    again = quantize(info, dequantize(packed), bits, group, symmetric=symmetric)
    close(dequantize(again), dequantize(packed))


def test_four_bits_hold_every_level_two_in_a_byte():
    info = matrix((14, 3), (0,), (1,))
    w = jnp.tile(jnp.arange(-7.0, 7.0)[:, None], (1, 3)).at[0].set(-7.0)
    packed = quantize(info, w, 4)
    assert packed.q.shape == (7, 3) and packed.q.dtype == jnp.uint8
    np.testing.assert_array_equal(packed.levels(), w)


@pytest.mark.parametrize(
    ("info", "bits", "group", "said"),
    [
        (matrix((8, 4), (0,), (1,)), 7, None, "bits=7 is not one of 8, 6"),
        (
            matrix((8, 4), (0,), (1,)),
            8,
            3,
            r"group=3 does not divide .* \[8\] of a weight; use one of 2, 4, 8",
        ),
        (matrix((8, 4), (0,), (1,)), 8, 16, "group=16 does not divide"),
        (matrix((8, 4), (0,), (1,)), 8, 1, "group=1 does not divide"),
        (matrix((4, 6, 2), (0, 1), (2,)), 8, 4, "group=4 does not divide"),
        (matrix((7, 4), (0,), (1,)), 4, None, "bits=4: a reduced dim=7 must be even; use bits=8"),
        (matrix((8,), (), (), project=None, role="vector"), 8, None, "vector .* cannot be quantized"),
        (matrix((8, 4), (0,), (1,), project=None), 8, None, "without a projection cannot be quantized"),
    ],
)
def test_what_has_no_grid_is_refused(info, bits, group, said):
    with pytest.raises(ValueError, match=said):
        quantize(info, drawn(info), bits, group)


def test_weights_of_other_forms_and_other_indices_are_refused():
    info = matrix((8, 4), (0,), (1,))
    w = drawn(info)
    packed, factors = quantize(info, w, 4), low_rank(info, w, 2, jax.random.key(0))
    for weight in (packed, factors):
        with pytest.raises(ValueError, match="is no array to be quantized; merge it first"):
            quantize(info, weight, 8)
        with pytest.raises(TypeError, match=r"is read by \[...\] or \[number\].*merge it first"):
            weight[1:3]
        with pytest.raises(TypeError, match="has no entries along the"):
            weight[0]
    with pytest.raises(ValueError, match="has factors already; merge it first"):
        low_rank(info, factors, 2, jax.random.key(0))
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank={rank} of a matrix \[8, 4\] must be from 1 to 4"):
            low_rank(info, w, rank, jax.random.key(0))
    table = matrix((8, 4), (), (), project=None, role="embedding")
    with pytest.raises(ValueError, match="a embedding .* without a projection has no factors"):
        low_rank(table, w, 2, jax.random.key(0))
    with pytest.raises(ValueError, match="adapter projection=kvv is not one of .*did you mean kv?"):
        Adapters(2, names=("kvv",))


# -- products ----------------------------------------------------------------------------------------------

SPECS = {
    "q": ("BTD,DNH->BTNH", (6, 2, 4), (0,), (1, 2)),
    "kv": ("BTD,DCKH->BTCKH", (6, 2, 2, 4), (0,), (2, 3)),
    "o": ("BTNH,NHD->BTD", (2, 4, 6), (0, 1), (2,)),
    "down": ("BTF,FD->BTD", (6, 4), (0,), (1,)),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("einsum", [plain_einsum, fast_einsum])
@pytest.mark.parametrize(("bits", "dora"), [(None, False), (8, False), (4, False), (None, True), (8, True)])
def test_a_projection_is_that_of_the_merged_weight_and_only_the_factors_learn(name, einsum, bits, dora):
    spec, shape, reduction, output = SPECS[name]
    info = matrix(shape, reduction, output, project=name)
    w, keys = drawn(info), jax.random.split(jax.random.key(2), 3)
    base = w if bits is None else quantize(info, w, bits)
    weight = low_rank(info, base, 2, keys[0], 0.5, dora=dora)
    np.testing.assert_array_equal(merge(weight), merge(base))  # b begins at zero, magnitudes at the norms
    weight = dataclasses.replace(weight, b=jax.random.normal(keys[1], weight.b.shape))
    if dora:
        weight = dataclasses.replace(weight, m=2.0 * weight.m)
        lengths = jnp.sqrt(jnp.sum(jnp.square(merge(weight)), reduction))
        close(lengths, 2.0 * jnp.sqrt(jnp.sum(jnp.square(merge(base)), reduction)), 1e-5)
    x = 0.3 * jax.random.normal(keys[2], (2, 3, *(shape[d] for d in reduction)))
    project = dataclasses.replace(Ops().project, plain=einsum)
    close(project(name, spec, x, weight), jnp.einsum(spec, x, merge(weight), precision="highest"))

    def by_factors(a, b, m, product):
        return jnp.sum(jnp.sin(product(dataclasses.replace(weight, a=a, b=b, m=m))))

    factors = (weight.a, weight.b, weight.m)
    ours = jax.grad(by_factors, (0, 1, 2))(*factors, partial(project, name, spec, x))
    theirs = jax.grad(by_factors, (0, 1, 2))(
        *factors, lambda w: jnp.einsum(spec, x, merge(w), precision="highest")
    )
    jax.tree.map(close, ours, theirs)
    if bits is None:
        slope = jax.grad(lambda w: jnp.sum(project(name, spec, x, w)))(weight)
        assert not np.any(slope.w) and np.any(slope.a) and np.any(slope.b)


@pytest.mark.parametrize(
    ("form", "dora"), [("int8", False), ("lora", False), ("qlora", False), ("lora", True)]
)
def test_an_entry_of_a_weight_is_that_of_the_merged_one(form, dora):
    """As the layer for further tokens takes the two halves of its product, along a dim that is reduced."""
    info = matrix((2, 4, 6), (0, 1), (2,))
    bits, _, rank = FORMS[form]
    weight = drawn(info) if bits is None else quantize(info, drawn(info), bits)
    if rank:
        weight = low_rank(info, weight, rank, jax.random.key(3), dora=dora)
        weight = dataclasses.replace(weight, b=jax.random.normal(jax.random.key(4), weight.b.shape))
    x = jax.random.normal(jax.random.key(5), (1, 3, 4))
    for i in range(2):
        close(merge(weight[i]), merge(weight)[i])
        close(plain_einsum("BTD,DE->BTE", x, weight[i]), x @ merge(weight)[i])


# -- models ------------------------------------------------------------------------------------------------

MODELS = [
    *(("llama", FAMILIES["llama3"], form) for form in FORMS),
    ("gpt2", FAMILIES["gpt2"], "int4"),  # a table of positions, and one table for both ends
    ("hybrid", family(**HYBRID), "qlora"),
    ("deepseek", MIXTURES["deepseek"], "qlora"),  # experts, latents, layers for further tokens
]


@pytest.mark.parametrize(
    ("config", "form"), [pytest.param(*case[1:], id=f"{case[0]}-{case[2]}") for case in MODELS]
)
def test_a_model_is_that_of_its_merged_weights(config, form):
    """Through scan and nnx.merge: logits, the loss and log-probabilities."""
    model = build_model(config)
    batch = {k: jnp.asarray(v) for k, v in make_batch([[5, 3]], 8).items()}

    def outputs(params):
        x, _ = model._layers(params, model.embed(params, batch, Ops()), batch, Ops(), None)
        ends = (model.head, model.logprobs)
        return model.logits(params, x, Ops()), *(end(params, x, batch, Ops()) for end in ends)

    @jax.jit
    def both(key):
        params = dress(model, model.init(key), form)
        return outputs(params), outputs(merged(params))

    jax.tree.map(close, *both(jax.random.key(0)))


PLAIN = family(num_layers=1, tie_embeddings=False)
DECODED = [
    *((PLAIN, form, False) for form in FORMS),
    (PLAIN, "int4", True),
    (FAMILIES["gpt2"], "int8", True),  # one table for both ends
    (MIXTURES["mixtral"], "int8", True),
]


@pytest.mark.parametrize(("config", "form", "packed"), DECODED)
def test_decoding_gives_the_logits_of_a_forward_pass(config, form, packed):
    model = build_model(config)
    batch = {k: jnp.asarray(v) for k, v in make_batch([[6]], 6).items()}
    tokens, kept = batch["tokens"], list[int]()

    def is_grid(leaf):
        return isinstance(leaf, QTensor)

    @jax.jit
    def both(key):
        params = dress(model, model.init(key), form)
        ready = model.unstack(params, Ops(), packed=packed)
        kept.append(sum(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(ready, is_leaf=is_grid)))
        first, cache = model.decode(ready, tokens[:, :5], model.init_cache(1, 6, Ops()), Ops())
        last, _ = model.decode(ready, tokens[:, 5:], cache, Ops())
        return jnp.stack([first, last], axis=1), model.apply(merged(params), batch, Ops())[:, 4:]

    close(*both(jax.random.key(0)))
    assert kept[0] > 2 if packed else kept[0] == (form != "lora")  # a table is read by rows


def test_adapters_name_their_parts_by_what_they_are():
    model = build_model(FAMILIES["llama3"])
    adapters = Adapters(2, names=("kv",), bits=8)
    info = adapters.info(model.info)
    made = jax.eval_shape(
        partial(adapters.make, model.info), model.init(jax.random.key(0)), jax.random.key(1)
    )
    said, found = (jax.tree_util.tree_leaves_with_path(tree) for tree in (info, made))
    for (path, leaf), (other, array) in zip(said, found, strict=True):
        assert path == other and (leaf.shape, leaf.dtype) == (array.shape, array.dtype), path
    kv = info["segments"]["0"]["0"]["attention"]["kv"]
    assert kv.a.axes == ("layers", "embed", None, None) and kv.b.axes == (
        "layers",
        None,
        None,
        "kv_heads",
        "head_dim",
    )
    assert (kv.a.reduction, kv.a.output) == ((1,), (3,)) and (kv.b.reduction, kv.b.output) == ((1,), (3, 4))
    trained = [jax.tree_util.keystr(path) for path, leaf in said if leaf.trained]
    assert len(trained) == 2 and trained[0].endswith(".a") and trained[1].endswith(".b")
    assert isinstance(info["embed"]["table"], QTensor)
