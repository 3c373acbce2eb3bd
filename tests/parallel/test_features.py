"""Features of layers on a mesh of eight: the loss and every gradient are those of one device."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np

from models.ops import Ops
from models.transformer import build_model
from parallel.schedules.accumulate import GradientAccumulation
from tests.models.decoders import FAMILIES, lively, make_batch
from tests.parallel.test_experts import layout, parts_of
from training.objectives.next_token import NextToken
from training.state import is_info


def test_norms_over_all_heads_sinks_and_biases_on_a_mesh_equal_one_device():
    """K/V heads repeated, since tensor=4 has more devices than there are of them."""
    model = build_model(replace(FAMILIES["olmo3"], attention_sinks=True, activation="clamped_swiglu"))
    params, batch = lively(model, spread=0.2), make_batch([[12], [5, 7], [3, 1, 6], [12]], 12)

    def step(ops):
        def means_and_gradients(params, batch):
            schedule = GradientAccumulation(remat="full")
            return schedule.value_and_grad(NextToken(), model, params, batch, jax.random.key(0), ops)

        return jax.jit(means_and_gradients)

    means, grads = step(Ops())(params, batch)
    place = layout(fsdp=2, tensor=4)
    spread = {n: jax.device_put(x, place.sharding(("batch", "length"), x.shape)) for n, x in batch.items()}
    ops = Ops(constrain=place.constrain, parts=parts_of(place), repeat_kv=2)
    got, slopes = step(ops)(jax.device_put(params, place.tree(model.info, is_info)), spread)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), got, means)
    for mine, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(mine - want) <= 1e-4 * np.linalg.norm(want)
