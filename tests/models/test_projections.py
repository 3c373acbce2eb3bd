"""A projection has one name, where it is born and where it is called; unknown names are refused."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kernels.einsum import Projector
from kernels.names import LOGICAL_AXES, PROJECTIONS, dims_of, product_name
from models.config import MIXERS
from models.mixer import Mixer, mixer
from models.ops import Ops
from models.param import param
from models.transformer import build_model
from parallel.axes import Layout
from tests.models.decoders import FAMILIES, family, make_batch
from tests.models.mixtures import MIXTURES
from tests.models.test_gated_delta import HYBRID

MODELS = FAMILIES | MIXTURES | {"hybrid": family(**HYBRID)}


def called(model):
    """Name, shape and dtype of the weight of each projection that one layer of each kind calls."""
    found = []

    def project(name, spec, x, w):
        found.append((name, w.shape))
        return Projector()(name, spec, x, w)

    ops = dataclasses.replace(Ops(), project=project)
    batch = {name: jnp.asarray(x) for name, x in make_batch([[5, 3]], 8).items()}
    x = jax.ShapeDtypeStruct((*batch["tokens"].shape, model.config.d_model), jnp.float32)
    for s, segment in enumerate(model.segments):
        for p, spec in enumerate(segment.period):
            layer = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
                model.info["segments"][str(s)][str(p)],
            )
            jax.eval_shape(
                lambda params, x, spec=spec: model.layer(spec, params, x, batch, None, ops)[0], layer, x
            )
    return Counter(found)


def born(model):
    leaves = jax.tree.leaves(model.info["segments"])
    return Counter((leaf.projection, leaf.shape[1:]) for leaf in leaves if leaf.projection)


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_born_for_the_projections_that_call_them(name):
    model = build_model(MODELS[name])
    assert called(model) == born(model)
    # What is a matrix and no projection is the experts', which come by another way, or the gate of the shared
    # ones, which is a product in float32 in any precision, as a router's is.
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.info["segments"]):
        if leaf.role == "matrix" and leaf.projection is None:
            name = jax.tree_util.keystr(path)
            assert "experts" in name or "shared_gate" in name


def test_an_unknown_projection_is_refused_where_it_is_born_and_where_it_is_called():
    with pytest.raises(ValueError, match="projection=kvv is not one of q, kv, .*; did you mean kv?"):
        param(nnx.Rngs(0), (2, 2), ("embed", None), nnx.initializers.zeros, project="kvv")
    with pytest.raises(ValueError, match="projection=kvv is not one of"):
        Ops().project("kvv", "BTD,DF->BTF", jnp.ones((1, 1, 2)), jnp.ones((2, 2)))


def test_an_unknown_logical_axis_is_refused_wherever_dims_are_named():
    with pytest.raises(ValueError, match="logical axis=embedd is not one of .*did you mean embed?"):
        param(nnx.Rngs(0), (2, 2), ("embedd", None), nnx.initializers.zeros)
    with pytest.raises(AssertionError, match="lenght"):
        Ops().constrain(jnp.ones((1, 2)), ("batch", "lenght"))
    layout = Layout(jax.make_mesh((1,), ("data",)), {})
    with pytest.raises(ValueError, match="logical axis=lenght is not one of"):
        layout.spec(("batch", "lenght"), (1, 2))


def test_every_projection_names_dims_that_rules_know():
    for known in PROJECTIONS.values():
        assert {*known.x, *known.y} <= {None, *LOGICAL_AXES}
    assert len({product_name(name) for name in PROJECTIONS}) == len(PROJECTIONS)
    assert dims_of(("act_mlp",), 4) == ("batch", "length", None, "act_mlp")
    assert len(set(LOGICAL_AXES)) == len(LOGICAL_AXES)


def test_an_unknown_mixer_is_refused_in_the_config_and_where_it_is_built():
    with pytest.raises(ValueError, match="model.mixer_pattern=latnt is not one of .*did you mean latent?"):
        family(mixer_pattern=["attention", "latnt"])
    with pytest.raises(ValueError, match="mixer=latnt is not one of"):
        mixer("latnt")
    with pytest.raises(ValueError, match="latent layers but model.mla=null"):
        family(mixer_pattern=["latent"])
    with pytest.raises(ValueError, match=r"mixer_pattern=\[\] must list at least one"):
        family(mixer_pattern=[])


@pytest.mark.parametrize("name", MIXERS)
def test_every_file_of_mixers_answers_for_itself(name):
    assert issubclass(mixer(name), Mixer)
    for question in ("cache_arrays", "flops", "activations", "dims"):
        assert getattr(mixer(name), question) is not getattr(Mixer, question)
