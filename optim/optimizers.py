"""AdamW, Muon, Lion and SGD as optax chains of the same four links.

direction -> weight decay -> times minus the peak learning rate -> times the schedule. The chain's links are
named, so that a state's path reads `direction/mu/...`. Moments have exactly the shapes and paths of their
parameters, and nothing else in a state has more than zero dims: training shards a moment like its parameter.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig, SGDConfig
from optim.moments import keep_in_bfloat16
from optim.muon import Matrix, MatrixSharing, Unsharded, scale_by_muon

EVEN = 1e-5  # of the layer's largest imbalance: what counts as none


def make_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    *,
    decay_mask: Any,
    matrices: Any,
    balance: Any = None,
    balance_rate: float = 0.0,
    parts: MatrixSharing | None = None,
    muon_dtype: Any = jnp.float32,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The named optimizer; its updates are to be added to the parameters. Global-norm clipping is not inside.

    schedule: multiplier of the learning rates by the number of updates made. decay_mask: bools over the
    parameter tree. matrices: over the same tree, None where Muon does not apply, else a `Matrix` or what
    makes one, (reduction dims, output dims). parts: how devices share Muon's matrices, by where each `Matrix`
    says that it is placed; None leaves it to the compiler. muon_dtype: of the iteration's products. Only Muon
    reads these three. balance: bools over the same tree, True for the biases by which a router's choices are
    balanced; these move by balance_rate against their gradient's sign, whatever the schedule. seed: of the
    rounding of moments in bfloat16.
    Raises ValueError for an unknown optimizer or dims that are no matrix.
    """
    decay: optax.GradientTransformation = optax.identity()
    if config.weight_decay > 0:
        decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    if isinstance(config, MuonConfig):
        direction, learning_rate = _muon(config, matrices, parts or Unsharded(), muon_dtype)
    else:
        direction, learning_rate = _elementwise(config), optax.scale(-config.learning_rate)
    chain = optax.named_chain(
        ("direction", direction),
        ("decay", decay),
        ("learning_rate", learning_rate),
        ("schedule", optax.scale_by_schedule(schedule)),
    )
    if config.moment_dtype == "bfloat16":
        chain = keep_in_bfloat16(chain, seed=seed, counter="schedule")
    balanced = balance is not None and any(jax.tree.leaves(balance))
    return _balancing(chain, balance, balance_rate) if balanced else chain


def _balancing(
    chain: optax.GradientTransformation, balance: Any, rate: float
) -> optax.GradientTransformation:
    """The chain, with a rule of its own for balance leaves (Wang et al. 2024, arXiv:2408.15664).

    A bias's gradient is its experts' load minus the mean. What is left of it where loads are even is the
    rounding of a sum over microbatches, which must not choose a direction.
    """

    def step(gradient: Any) -> Any:
        size = jnp.abs(gradient)
        uneven = size > EVEN * jnp.max(size, axis=-1, keepdims=True)
        return jnp.where(uneven, -rate * jnp.sign(gradient), 0.0)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        others = jax.tree.map(lambda b, g: jnp.zeros_like(g) if b else g, balance, gradients)
        updates, state = chain.update(others, state, params)
        return jax.tree.map(lambda b, u, g: step(g) if b else u, balance, updates, gradients), state

    return optax.GradientTransformation(chain.init, update)


def _elementwise(config: OptimConfig) -> optax.GradientTransformation:
    match config:
        case AdamWConfig():
            return optax.scale_by_adam(config.b1, config.b2, config.eps)
        case LionConfig():
            return optax.scale_by_lion(config.b1, config.b2)
        case SGDConfig(momentum=0.0):
            return optax.identity()
        case SGDConfig():
            return optax.trace(config.momentum, config.nesterov)
    raise ValueError(f"optim.name={config.name} is unknown; use adamw, muon, lion or sgd")


def _muon(
    config: MuonConfig, matrices: Any, parts: MatrixSharing, dtype: Any
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Direction and learning rate, each split between Muon's matrices and AdamW's rest."""
    labels = _map_matrices(lambda dims: "adamw" if dims is None else "muon", matrices)
    # optax.partition hides the other group behind MaskedNode, and the matrices have to match what it leaves.
    found = _map_matrices(lambda d: optax.MaskedNode() if d is None else _matrix(*d), matrices)
    muon = scale_by_muon(
        found,
        momentum=config.momentum,
        nesterov=config.nesterov,
        steps=config.ns_steps,
        dtype=dtype,
        parts=parts,
    )
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    direction = optax.partition({"muon": optax.chain(muon, _scale_by_width(found)), "adamw": adam}, labels)
    rates = {"muon": optax.scale(-config.learning_rate), "adamw": optax.scale(-config.adam_learning_rate)}
    return direction, optax.partition(rates, labels)


def _map_matrices(function: Any, matrices: Any) -> Any:
    return jax.tree.map(function, matrices, is_leaf=lambda x: x is None or isinstance(x, tuple))


def _matrix(reduction: Any, output: Any, placed: Any = None) -> Matrix:
    matrix = Matrix(tuple(reduction), tuple(output), placed)
    if not matrix.reduction or not matrix.output or set(matrix.reduction) & set(matrix.output):
        raise ValueError(
            f"Muon needs disjoint reduction and output dims of a matrix, not {reduction} and {output}"
        )
    return matrix


def _scale_by_width(matrices: Any) -> optax.GradientTransformation:
    """Times sqrt(max(1, fan_out / fan_in)), see MuonConfig."""

    def scale(update: Any, matrix: Matrix) -> Any:
        fan_in, fan_out = (math.prod(update.shape[d] for d in dims) for dims in matrix[:2])
        return update * math.sqrt(max(1.0, fan_out / fan_in))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, matrices))
