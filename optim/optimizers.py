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
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from optim.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig, SGDConfig

# f(x) = a x + b x^3 + c x^5, steepest at zero rather than exact at one: singular values come out within
# about 0.7 .. 1.2 after five rounds, which trains as well as ones (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
EVEN = 1e-5  # of the layer's largest imbalance: what counts as none


def make_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    *,
    decay_mask: Any,
    matrices: Any,
    balance: Any = None,
    balance_rate: float = 0.0,
) -> optax.GradientTransformation:
    """The named optimizer; its updates are to be added to the parameters. Global-norm clipping is not inside.

    schedule: multiplier of the learning rates by the number of updates made. decay_mask: bools over the
    parameter tree. matrices: over the same tree, None where Muon does not apply, else (reduction dims, output
    dims); the dims in neither are batch, so a stack [n, D, 2, F] with ((1,), (3,)) is 2n matrices [D, F].
    Only Muon reads matrices. balance: bools over the same tree, True for the biases by which a router's
    choices are balanced; these move by balance_rate against their gradient's sign, whatever the schedule.
    Raises ValueError for an unknown optimizer or dims that are no matrix.
    """
    decay: optax.GradientTransformation = optax.identity()
    if config.weight_decay > 0:
        decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    if isinstance(config, MuonConfig):
        direction, learning_rate = _muon(config, matrices)
    else:
        direction, learning_rate = _elementwise(config), optax.scale(-config.learning_rate)
    chain = optax.named_chain(
        ("direction", direction),
        ("decay", decay),
        ("learning_rate", learning_rate),
        ("schedule", optax.scale_by_schedule(schedule)),
    )
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
    config: MuonConfig, matrices: Any
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Direction and learning rate, each split between Muon's matrices and AdamW's rest."""
    labels = _map_matrices(lambda dims: "adamw" if dims is None else "muon", matrices)
    # optax.partition hides the other group behind MaskedNode, and the dims have to match what it leaves.
    dims = _map_matrices(lambda d: optax.MaskedNode() if d is None else _dimension_numbers(d), matrices)
    muon = scale_by_muon(
        NEWTON_SCHULZ,
        config.ns_steps,
        config.momentum,
        nesterov=config.nesterov,
        weight_dimension_numbers=dims,
    )
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    direction = optax.partition(
        {"muon": optax.chain(_stateless_coefficients(muon), _scale_by_width(dims)), "adamw": adam}, labels
    )
    rates = {"muon": optax.scale(-config.learning_rate), "adamw": optax.scale(-config.adam_learning_rate)}
    return direction, optax.partition(rates, labels)


def _map_matrices(function: Any, matrices: Any) -> Any:
    return jax.tree.map(function, matrices, is_leaf=lambda x: x is None or isinstance(x, tuple))


def _dimension_numbers(dims: tuple[tuple[int, ...], tuple[int, ...]]) -> MuonDimensionNumbers:
    reduction, output = (tuple(d) for d in dims)
    if not reduction or not output or set(reduction) & set(output):
        raise ValueError(
            f"Muon needs disjoint reduction and output dims of a matrix, not {reduction} and {output}"
        )
    return MuonDimensionNumbers(reduction, output)


def _stateless_coefficients(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon without the iteration's constants in its state: they belong to the code, not to checkpoints."""

    def init(params: Any) -> Any:
        return muon.init(params)._replace(ns_coeffs=None)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        constants = jnp.asarray(NEWTON_SCHULZ, jnp.float32)
        updates, state = muon.update(updates, state._replace(ns_coeffs=constants), params)
        return updates, state._replace(ns_coeffs=None)

    return optax.GradientTransformation(init, update)


def _scale_by_width(dims: Any) -> optax.GradientTransformation:
    """Times sqrt(max(1, fan_out / fan_in)), see MuonConfig."""

    def scale(update: Any, dim_numbers: MuonDimensionNumbers) -> Any:
        fan_in, fan_out = (math.prod(update.shape[d] for d in group) for group in dim_numbers)
        return update * math.sqrt(max(1.0, fan_out / fan_in))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, dims))
