"""What a config becomes before there is an array, and what refuses one that fits no devices."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from models.config import ModelConfig, padded_vocab
from parallel.axes import kv_repeats
from parallel.config import MeshConfig
from parallel.mesh import build_layout, mesh_shape
from tests.parallel.small import make_config, make_program
from training.config import Config, with_vocab
from training.precision import compute_dtype
from training.program import build_ops


def layout_of(rules, **sizes):
    """A layout over the first devices, as many as the sizes multiply to."""
    config = MeshConfig(rules=rules, **{"data": 1, **sizes})
    return build_layout(config, jax.devices()[: math.prod(sizes.values())])


def names(error, *words):
    """The message is one line that names all of the words."""
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (50257, 50304)])
def test_vocabulary_is_padded_to_the_next_multiple_of_128(size, padded):
    assert padded_vocab(size) == padded


@pytest.mark.parametrize(
    ("precision", "platform", "dtype"),
    [
        ("auto", "cpu", jnp.float32),
        ("auto", "gpu", jnp.bfloat16),
        ("auto", "tpu", jnp.bfloat16),
        ("bfloat16", "cpu", jnp.bfloat16),
        ("float32", "tpu", jnp.float32),
    ],
)
def test_precision_is_the_platforms_unless_it_is_given(precision, platform, dtype):
    assert compute_dtype(precision, platform) == dtype


@pytest.mark.parametrize(("given", "taken"), [(-1, 384), (257, 257), (300, 300)])
def test_vocabulary_is_the_tokenizers_unless_it_is_given(given, taken):
    config = Config(model=ModelConfig(vocab_size=given))
    resolved = with_vocab(config, 257)
    assert resolved.model.vocab_size == taken
    assert config.model.vocab_size == given  # the run's own config stays as it was typed


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused():
    with pytest.raises(ValueError) as error:
        with_vocab(Config(model=ModelConfig(vocab_size=256)), 257)
    names(error, "model.vocab_size=256", "257", "model.vocab_size=-1", "384")


def test_dims_are_split_as_the_rules_say():
    layout = layout_of({"batch": ["data", "fsdp"], "mlp": ["tensor"]}, data=2, fsdp=2, tensor=2)
    assert layout.spec(("batch", "length", "mlp"), (8, 5, 6)) == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
    assert layout.spec((None, "mlp"), (3, 2)) == PartitionSpec(None, "tensor")


def test_axes_of_one_device_split_nothing():
    """A dim of any size fits where the mesh axes of its rule are 1."""
    layout = layout_of({"mlp": ["tensor"], "heads": ["tensor"]}, data=2)
    assert layout.spec(("mlp", "heads"), (7, 5)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "sizes", "words"),
    [
        (["tensor"], {"tensor": 4}, ["mesh.tensor=4"]),
        (
            ["fsdp", "tensor"],
            {"fsdp": 2, "tensor": 2},
            ["mesh.fsdp=2 * mesh.tensor=2", "mlp=6", "1, 2, 3, 6"],
        ),
    ],
)
def test_a_dim_that_does_not_divide_is_refused(axes, sizes, words):
    layout = layout_of({"mlp": axes}, **sizes)
    with pytest.raises(ValueError) as error:
        layout.spec((None, "mlp"), (32, 6), "up")
    names(error, "up: ", *words, "cannot split mlp=6; use one of 1, 2, 3, 6")


def test_two_dims_on_one_mesh_axis_are_refused():
    layout = layout_of({"embed": ["fsdp"], "mlp": ["tensor", "fsdp"]}, fsdp=2, tensor=2)
    with pytest.raises(ValueError) as error:
        layout.spec(("embed", "mlp"), (8, 8), "up")
    names(error, "up: ", "'embed'", "'mlp'", "mesh.fsdp", "another mesh axis in mesh.rules")


def test_an_error_in_a_tree_names_the_parameter():
    layout = layout_of({"mlp": ["tensor"]}, tensor=4)
    info = {"block": {"up": SimpleNamespace(axes=("mlp",), shape=(6,))}}
    with pytest.raises(ValueError) as error:
        layout.tree(info, lambda leaf: hasattr(leaf, "axes"))
    names(error, "block/up: ", "mesh.tensor=4", "mlp=6")


def test_a_rule_for_no_mesh_axis_is_refused():
    with pytest.raises(ValueError) as error:
        layout_of({"embed": ["fdsp"]})
    names(error, "mesh.rules.embed", "fdsp", "use one of replica", "tensor")


def test_what_is_left_goes_to_the_free_axis():
    assert mesh_shape(MeshConfig(tensor=2), 8)["data"] == 4
    assert mesh_shape(MeshConfig(data=2, fsdp=-1), 8)["fsdp"] == 4
    assert mesh_shape(MeshConfig(data=2, tensor=4), 8)["pipeline"] == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 1, "tensor": 4}, ["mesh.tensor=4", "8 devices", "must be 8", "mesh.data=-1"]),
        ({"data": 1}, ["every mesh axis is 1", "8 devices", "must be 8", "mesh.data=-1"]),
        ({"data": 2, "fsdp": 8}, ["mesh.data=2 * mesh.fsdp=8", "8 devices", "must be 8"]),
        ({"data": -1, "tensor": 3}, ["mesh.tensor=3", "8 devices", "must divide 8"]),
        ({"data": -1, "tensor": 16}, ["mesh.tensor=16", "8 devices", "must divide 8"]),
        ({"data": -1, "fsdp": -1}, ["mesh.data=-1", "mesh.fsdp=-1", "only one", "set one of them"]),
    ],
)
def test_sizes_that_are_not_the_devices_are_refused(sizes, words):
    with pytest.raises(ValueError) as error:
        mesh_shape(MeshConfig(**sizes), 8)
    names(error, *words)


@pytest.mark.parametrize(
    ("tensor", "kv_heads", "repeats"),
    [(1, 4, 1), (2, 4, 1), (4, 4, 1), (8, 4, 2), (8, 1, 8), (8, 2, 4)],
)
def test_each_device_has_a_key_and_value_head(tensor, kv_heads, repeats):
    """Fewer heads than devices are repeated until each device has one, and stored whole on each."""
    layout = layout_of({"kv_heads": ["tensor"], "act_kv_heads": ["tensor"]}, tensor=tensor)
    assert kv_repeats(kv_heads, layout) == repeats
    assert kv_heads * repeats % tensor == 0
    stored = layout.spec(("kv_heads",), (kv_heads,))
    assert stored == PartitionSpec("tensor" if 1 < tensor <= kv_heads else None)
    config = Config(model=ModelConfig(num_heads=8, num_kv_heads=kv_heads))
    assert build_ops(config, layout).repeat_kv == repeats


def test_heads_that_no_repetition_can_split_are_refused():
    layout = layout_of({"kv_heads": ["tensor"], "act_kv_heads": ["tensor"]}, tensor=8)
    assert kv_repeats(3, layout) == 1
    with pytest.raises(ValueError) as error:
        layout.spec(("kv_heads",), (3,), "kv")
    names(error, "kv: ", "mesh.tensor=8", "kv_heads=3", "1, 3")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_unrolled_layers_are_made_again_too(scan_layers):
    """Outside of a loop XLA merges a second computation with the first, unless a barrier keeps them apart."""
    made = make_program(make_config(remat="dots", scan_layers=scan_layers))
    params, batch = made.state.params, made.batch

    def loss(params, batch):
        def end(params, x, batch):
            return made.model.head(params, x, batch, made.ops)[0]

        return made.strategy.forward(end, made.model, params, batch, jax.random.key(0), made.ops)[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(params, batch))
    assert f"prevent_cse={not scan_layers}" in text and f"prevent_cse={scan_layers}" not in text
