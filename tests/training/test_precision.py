"""Training in eight bits: close to float32, the same on any mesh, and refused where nothing multiplies so."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops import Ops
from parallel.schedules.accumulate import POLICIES
from planner.described_devices import GPUS
from tests.parallel.small import distance, make_config, make_program, run
from training.config import TrainingConfig
from training.precision import build_projector, compute_dtype, precision_problem, precision_row

ROUGH = Ops(compute_dtype=jnp.dtype("bfloat16"))


def device(platform, kind, capability=None):
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


ONCE = functools.partial(run, steps=1, evaluate=False)


@pytest.fixture(scope="module")
def exact():
    return run(make_config(), evaluate=False)


@pytest.fixture(scope="module")
def fp8():
    return run(make_config(precision="fp8"), evaluate=False)


def test_fp8_learns_what_float32_learns(fp8, exact):
    assert distance(fp8, exact)[0] < 1e-3
    np.testing.assert_allclose(fp8.losses[:, 0], exact.losses[:, 0], rtol=5e-3)
    assert (fp8.losses != exact.losses).any()


def test_int8_learns_what_float32_learns(exact):
    assert 0 < distance(ONCE(make_config(precision="int8")), exact)[0] < 1e-3


def test_a_tensor_split_over_devices_has_one_scale(fp8):
    """Were each shard's own maximum taken, digits at the bottom of the range would differ by device."""
    loss, grads, _ = distance(ONCE(make_config({"fsdp": 4, "tensor": 2}, precision="fp8")), fp8)
    assert loss < 1e-6 and grads < 1e-2, (loss, grads)


@pytest.mark.slow
def test_stages_and_a_backward_in_two_parts(fp8):
    config = make_config({"pipeline": 2}, pipeline={"schedule": "zero_bubble"}, precision="fp8")
    loss, grads, _ = distance(ONCE(config), fp8)
    assert loss < 1e-4 and grads < 3e-2, (loss, grads)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_dots_keeps_a_product_once_in_the_activations_dtype(kind):
    """Kept as int32, or made again, projections would cost twice the memory, or a third of the time."""
    config = make_config(precision=kind, remat="dots")
    project = build_projector(config.training, jax.devices()[0])

    def layer(x, w):
        return jnp.sum(jnp.sin(project("up", "BTD,DF->BTF", jnp.sin(x), w)))

    x, w = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((16, 32))
    kept = jax.checkpoint(layer, policy=POLICIES["dots"])
    products = str(jax.make_jaxpr(jax.grad(kept, argnums=(0, 1)))(x, w)).count("dot_general[")
    assert products == 3
    shapes = jax.eval_shape(lambda x, w: jax.vjp(kept, x, w)[1], x, w)
    wide = [(s.shape, s.dtype.name) for s in jax.tree.leaves(shapes) if s.shape == (2, 4, 32)]
    assert wide == [((2, 4, 32), "bfloat16")]


def test_full_precision_reaches_the_projections_it_names():
    made = make_program(make_config(precision="fp8", full_precision=["o", "down"]))
    assert made.ops.project.keep == ("o", "down")
    with pytest.raises(ValueError, match="training.full_precision=dwon is not one of .*did you mean down"):
        TrainingConfig(precision="fp8", full_precision=["dwon"])
    with pytest.raises(ValueError, match="no effect under training.precision=auto; use fp8 or int8"):
        build_projector(TrainingConfig(full_precision=["o"]), jax.devices()[0])


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "fits"),
    [
        *(("gpu", g.kind, "{}.{}".format(*g.capability), g.capability > (8, 0)) for g in GPUS.values()),
        ("cuda", "NVIDIA L4", "8.9", True),
        ("cuda", "NVIDIA A10", "8.6", False),
        ("gpu", "AMD Instinct MI300X", "gfx942", False),
        ("tpu", "TPU v5p", None, False),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU7x", None, True),
        ("cpu", "cpu", None, True),
    ],
)
def test_fp8_is_refused_where_nothing_multiplies_it(platform, kind, capability, fits):
    problem = precision_problem("fp8", device(platform, kind, capability))
    assert (problem is None) == fits, problem
    if not fits:
        words = ["training.precision=fp8", kind, "use training.precision=int8 or bfloat16"]
        assert all(word in problem for word in words) and "\n" not in problem
        with pytest.raises(ValueError, match="training.precision=fp8"):
            build_projector(TrainingConfig(precision="fp8"), device(platform, kind, capability))
    assert precision_problem("int8", device(platform, kind, capability)) is None


def test_the_row_at_start_up_says_what_multiplies_in_what():
    assert compute_dtype("fp8", "gpu") == compute_dtype("int8", "tpu") == jnp.bfloat16
    assert compute_dtype("fp8", "cpu") == jnp.float32
    assert precision_row(TrainingConfig(), ROUGH, "gpu") == "bfloat16 compute, float32 masters"
    row = precision_row(TrainingConfig(precision="fp8", full_precision=["o"]), Ops(), "cpu")
    assert row.startswith("fp8 projections, emulated on the CPU; float32 activations, o, experts, head")
    factors = Ops(compute_dtype=jnp.dtype("float32"), factor_dtype=jnp.dtype("bfloat16"))
    row = precision_row(TrainingConfig(precision="bfloat16"), factors, "cpu")
    assert row == "bfloat16 products, float32 activations and masters"
    assert "emulated" not in precision_row(TrainingConfig(precision="fp8"), ROUGH, "gpu")
