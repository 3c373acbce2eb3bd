"""Optimizers against independent numpy, and the laws that sharding and stacking rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optim.config import AdamWConfig, ConstantConfig, LionConfig, MuonConfig, OptimConfig, SGDConfig
from optim.optimizers import make_optimizer
from optim.schedules import make_schedule

NUM_STEPS = 6
SHAPES = {
    "embed": (12, 8),
    "segments": {"0": {"q": (3, 8, 2, 4), "kv": (3, 8, 2, 1, 4), "gate": (3, 8, 2, 16), "down": (3, 16, 8)}},
    "norm": (8,),
}
MATRICES = {
    "embed": None,
    "segments": {
        "0": {"q": ((1,), (2, 3)), "kv": ((1,), (3, 4)), "gate": ((1,), (3,)), "down": ((1,), (2,))}
    },
    "norm": None,
}
DECAY = {
    "embed": True,
    "segments": {"0": {"q": True, "kv": True, "gate": True, "down": True}},
    "norm": False,
}
CONFIGS = [AdamWConfig(), MuonConfig(), LionConfig(), SGDConfig()]


def schedule():
    return make_schedule(ConstantConfig(warmup_steps=3), num_steps=NUM_STEPS)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes])


def optimizer(config, *, decay=DECAY, matrices=MATRICES):
    return make_optimizer(config, schedule(), decay_mask=decay, matrices=matrices)


def train(tx, params, gradients):
    """Parameters after each of the gradients."""
    state, update, trace = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trace.append(params)
    return trace


def numpy_adamw(p, gradients, rates, *, b1, b2, eps, decay):
    m, v, trace = np.zeros_like(p), np.zeros_like(p), []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
        trace.append(p)
    return trace


def numpy_lion(p, gradients, rates, *, b1, b2, decay):
    m, trace = np.zeros_like(p), []
    for g, rate in zip(gradients, rates, strict=True):
        p = p - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
        trace.append(p)
    return trace


def numpy_sgd(p, gradients, rates, *, momentum, nesterov, decay):
    m, trace = np.zeros_like(p), []
    for g, rate in zip(gradients, rates, strict=True):
        m = momentum * m + g
        p = p - rate * ((g + momentum * m if nesterov else m) + decay * p)
        trace.append(p)
    return trace


def numpy_muon(p, gradients, rates, *, momentum, decay, nesterov=True):
    """One matrix [fan_in, fan_out], with the iteration of Jordan et al. 2024."""
    m, trace = np.zeros_like(p), []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = momentum * m + (1 - momentum) * g
        x = m / (1 - momentum**t)
        if nesterov:
            ahead = momentum * m / (1 - momentum ** (t + 1))
            x = ahead + (1 - momentum) * g / (1 - momentum**t)
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        p = p - rate * (x * np.sqrt(max(1, p.shape[1] / p.shape[0])) + decay * p)
        trace.append(p)
    return trace


def doubles(trees, *path):
    for key in path:
        trees = [tree[key] for tree in trees]
    return [np.asarray(tree, np.float64) for tree in trees]


def rates(peak):
    return [peak * min(1, (s + 1) / 3) for s in range(NUM_STEPS)]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "nesterov", "plain"])
def test_elementwise_optimizers_equal_plain_numpy(name):
    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(NUM_STEPS)]
    if name == "adamw":
        config = AdamWConfig(learning_rate=0.01, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3)
        reference, values = numpy_adamw, {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
    elif name == "lion":
        config = LionConfig(learning_rate=0.01, weight_decay=0.3, b1=0.8, b2=0.9)
        reference, values = numpy_lion, {"b1": 0.8, "b2": 0.9}
    else:
        values = {"momentum": 0.0 if name == "plain" else 0.8, "nesterov": name == "nesterov"}
        config = SGDConfig(learning_rate=0.01, weight_decay=0.3, **values)
        reference = numpy_sgd
    trace = train(optimizer(config), params, gradients)
    for path, decay in ((("embed",), 0.3), (("segments", "0", "gate"), 0.3), (("norm",), 0.0)):
        start, grads = doubles([params], *path)[0], doubles(gradients, *path)
        expected = reference(start, grads, rates(0.01), decay=decay, **values)
        np.testing.assert_allclose(doubles(trace, *path), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_plain_numpy_matrix_by_matrix(nesterov):
    """Layers of a stack, and the two halves of a fused weight, are matrices of their own."""
    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(NUM_STEPS)]
    config = MuonConfig(learning_rate=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov)
    trace = train(optimizer(config), params, gradients)
    views = {
        "q": lambda x, layer, half: x[layer].reshape(8, 8),
        "kv": lambda x, layer, half: x[layer, :, half].reshape(8, 4),
        "gate": lambda x, layer, half: x[layer, :, half],
        "down": lambda x, layer, half: x[layer],
    }
    for name, view in views.items():
        for layer, half in ((0, 0), (2, 1)):
            start, *grads = [
                view(x, layer, half) for x in doubles([params, *gradients], "segments", "0", name)
            ]
            expected = numpy_muon(start, grads, rates(0.02), momentum=0.9, decay=0.3, nesterov=nesterov)
            actual = [view(x, layer, half) for x in doubles(trace, "segments", "0", name)]
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_muon_updates_are_nearly_orthogonal():
    params = jax.tree.map(jnp.zeros_like, random_tree(0))
    tx = make_optimizer(MuonConfig(learning_rate=1.0), lambda _: 1.0, decay_mask=DECAY, matrices=MATRICES)
    updates, _ = tx.update(random_tree(1), tx.init(params), params)
    layers = updates["segments"]["0"]
    for matrix in (layers["q"][1].reshape(8, 8), layers["down"][0], layers["gate"][2, :, 1] / np.sqrt(2)):
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        # The raw gradient's singular values here spread over a factor of 30 and more.
        assert values.min() > 0.3 and values.max() < 1.25, values


def test_muon_takes_adamw_exactly_where_there_is_no_matrix():
    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(NUM_STEPS)]
    muon = MuonConfig(adam_learning_rate=0.01, weight_decay=0.3, adam_b1=0.8, adam_b2=0.9, adam_eps=1e-3)
    adamw = AdamWConfig(learning_rate=0.01, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3)
    ours, theirs = (train(optimizer(config), params, gradients)[-1] for config in (muon, adamw))
    for name in ("embed", "norm"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert not np.array_equal(ours["segments"]["0"]["down"], theirs["segments"]["0"]["down"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_state_holds_moments_like_parameters_and_scalar_counts(config):
    params = random_tree(0)
    state = optimizer(config).init(params)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    moments = set()
    for path, leaf in jax.tree.leaves_with_path(state):
        key = jax.tree_util.keystr(path)
        owner = [name for name in shapes if key.endswith(name)]
        assert (leaf.shape == shapes[owner[0]]) if owner else (leaf.shape == ()), key
        assert all(isinstance(k.key, str) for k in path if isinstance(k, jax.tree_util.DictKey)), key
        moments.update(owner)
    assert moments == set(shapes)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_updates_do_not_depend_on_the_order_or_names_of_the_tree(config):
    """Renaming reverses the order in which pytrees are flattened."""

    def rename(tree):
        if not isinstance(tree, dict):
            return tree
        new = {
            "embed": "z",
            "segments": "y",
            "norm": "a",
            "0": "0",
            "q": "d",
            "kv": "c",
            "gate": "b",
            "down": "a",
        }
        return {new[key]: rename(value) for key, value in tree.items()}

    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(2)]
    plain = train(optimizer(config), params, gradients)[-1]
    tx = optimizer(config, decay=rename(DECAY), matrices=rename(MATRICES))
    renamed = train(tx, rename(params), [rename(g) for g in gradients])[-1]
    jax.tree.map(np.testing.assert_array_equal, rename(plain), renamed)


def test_muon_on_a_mesh_equals_muon_on_one_device():
    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(2)]
    plain = train(optimizer(MuonConfig()), params, gradients)[-1]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "embed": PartitionSpec("fsdp"),
        "segments": {
            "0": {
                "q": PartitionSpec(None, "fsdp", "tensor"),
                "kv": PartitionSpec(None, "fsdp", None, None, "tensor"),
                "gate": PartitionSpec(None, "fsdp", None, "tensor"),
                "down": PartitionSpec(None, "tensor", "fsdp"),
            }
        },
        "norm": PartitionSpec(),
    }

    def place(tree):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    sharded = train(optimizer(MuonConfig()), place(params), [place(g) for g in gradients])[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, sharded)


def test_a_state_comes_back_with_the_types_it_went_in_with():
    """A weak type or a float count in the new state would compile the step a second time."""
    for config in CONFIGS:
        tx, params = optimizer(config), random_tree(0)
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(lambda x: (x.dtype, x.weak_type), state) == jax.tree.map(
            lambda x: (x.dtype, x.weak_type), after
        )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="optim.name=.* is unknown"):
        optimizer(OptimConfig())
    with pytest.raises(ValueError, match="disjoint reduction and output dims"):
        make_optimizer(MuonConfig(), schedule(), decay_mask=True, matrices={"w": ((0,), (0,))})
