"""Small states for tests of checkpoints, and what is done to checkpoints there."""

import jax
import jax.numpy as jnp
import numpy as np

from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import named_leaves
from artifacts.config import CheckpointConfig
from training.state import TrainState

RECORD = {"data": {"mode": "cached", "step": 3}, "tokens": 96}
SHAPES = {"table": (16, 8), "layers": (2, 8, 12), "scale": (8,)}


def make_state(seed=0, ema=True):
    rng = np.random.default_rng(seed)

    def tree():
        leaves = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        return {"embed": {"table": leaves["table"]}, "rest": {k: leaves[k] for k in ("layers", "scale")}}

    opt_state = ({"count": jnp.asarray(seed, jnp.int32), "mu": tree(), "nu": tree()}, ())
    return TrainState(jnp.asarray(seed, jnp.int32), tree(), opt_state, tree() if ema else None)


def few_leaves(seed=3):
    """A checkpoint of few files, of which one is mostly an array that Orbax itself does not check."""
    layers = np.random.default_rng(seed).normal(size=(2, 64, 128))
    rest = {"layers": jnp.asarray(layers, jnp.float32), "scale": make_state(seed).params["rest"]["scale"]}
    count = jnp.asarray(seed, jnp.int32)
    return TrainState(count, rest, {"count": count}, None)


def abstract(state, sharding=None):
    place = sharding or (lambda leaf: leaf.sharding)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state
    )


def assert_equal(a, b):
    for (name, x), y in zip(named_leaves(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def written(path, *states, remote=None, **config):
    """Checkpoints of these states under their own `step`, committed, hashed and sent."""
    checkpoints = Checkpoints(path, CheckpointConfig(**config), remote=remote)
    for state in states:
        checkpoints.save(int(state.step), state, RECORD)
        checkpoints.wait()
    checkpoints.close()
    return Checkpoints(path, CheckpointConfig(**config), remote=remote)


def pick(files, rng):
    """One of the files: half of the time each as likely, half of the time each byte."""
    sizes = np.asarray([file.stat().st_size for file in files], np.float64)
    return files[rng.choice(len(files), p=0.5 / len(files) + 0.5 * sizes / sizes.sum())]


def flip(raw, rng):
    """The same bytes but for one bit."""
    damaged = bytearray(raw)
    damaged[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    return bytes(damaged)
