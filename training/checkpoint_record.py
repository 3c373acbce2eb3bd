"""What a checkpoint says of itself: names and types of its arrays, and a record that is sealed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from training.checkpoint_errors import CorruptCheckpoint
from training.digest import combined
from training.state import TrainState

Leaves = dict[str, Array]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: the canonical names of a checkpoint."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


OPTIONAL = ("momentum", "replicas")  # what a run goes on without, or with another number of replicas


def trees_of(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds, by item."""
    trees = {"params": state.params, "opt_state": state.opt_state}
    if state.ema is not None:
        trees["ema"] = state.ema
    local = state.local or {}
    assert set(local) <= set(OPTIONAL), "a state is saved in canonical form"
    return trees | local


def items_of(state: TrainState) -> dict[str, Leaves]:
    """The same, flat within each item."""
    return {item: named_leaves(tree) for item, tree in trees_of(state).items()}


def flat(items: Mapping[str, Leaves]) -> Leaves:
    """All leaves under `item.name`."""
    return {f"{item}.{name}": leaf for item, leaves in items.items() for name, leaf in leaves.items()}


def types_of(items: Mapping[str, Leaves]) -> dict[str, str]:
    """Dtype and shape by full name, as in `float32[8, 16]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat(items).items()}


def leaf_of(kind: str, sharding: Any) -> jax.ShapeDtypeStruct:
    """What `types_of` wrote, read again."""
    dtype, _, shape = kind.partition("[")
    return jax.ShapeDtypeStruct(tuple(json.loads(f"[{shape}")), jnp.dtype(dtype), sharding=sharding)


def like(tree: Any, leaves: Leaves) -> Any:
    """Named leaves in the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


def seal(body: Mapping[str, Any]) -> dict[str, str]:
    """A record with the sha256 of its text."""
    text = json.dumps(body, sort_keys=True)
    return {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: Mapping[str, str]) -> dict[str, Any]:
    """The record again. Raises CorruptCheckpoint where its text was altered."""
    text = sealed["record"]
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise CorruptCheckpoint("the record of digests was altered")
    return json.loads(text)


def state_digest(record: Mapping[str, Any]) -> str:
    """The digest by which one run names another's checkpoint."""
    return combined(record["digests"])
