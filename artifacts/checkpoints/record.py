"""What a checkpoint says of itself: names and types of its arrays, and a record that is sealed."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from artifacts.checkpoints.digest import combined
from artifacts.checkpoints.errors import CorruptCheckpoint
from common.files import text_digest

Leaves = dict[str, Array]
HOLE = ocp.PLACEHOLDER  # stands for an array that is not read
PART = 256 << 20  # bytes for each process that are read at a time, at least
PARTS = 16  # at most


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: the canonical names of a checkpoint."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


LOCAL = ("momentum", "replicas", "guards")  # of replicas that step alone
OPTIONAL = ("guard", *LOCAL)  # what a run goes on without, or with another number of replicas


def trees_of(state: Any) -> dict[str, Any]:
    """What a checkpoint holds, by item, of a state with these trees (`training.state.TrainState`)."""
    trees = {"params": state.params, "opt_state": state.opt_state}
    if state.ema is not None:
        trees["ema"] = state.ema
    if state.frozen is not None:
        trees["frozen"] = state.frozen
    if state.guard is not None:
        trees["guard"] = state.guard
    local = state.local or {}
    assert set(local) <= set(LOCAL), "a state is saved in canonical form"
    return trees | local


def items_of(state: Any) -> dict[str, Leaves]:
    """The same, flat within each item."""
    return {item: named_leaves(tree) for item, tree in trees_of(state).items()}


def flat(items: Mapping[str, Leaves]) -> Leaves:
    """All leaves under `item.name`."""
    return {f"{item}.{name}": leaf for item, leaves in items.items() for name, leaf in leaves.items()}


def types_of(items: Mapping[str, Leaves]) -> dict[str, str]:
    """Dtype and shape by full name, as in `float32[8, 16]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat(items).items()}


def in_parts(wanted: Mapping[str, Leaves]) -> Iterator[dict[str, Leaves]]:
    """The same arrays in several portions, with holes for the others; a small state in one."""
    sizes = {name: math.prod(x.shape) * x.dtype.itemsize for name, x in flat(wanted).items()}
    limit = max(PART * jax.process_count(), sum(sizes.values()) // PARTS)
    portions: list[set[str]] = [set()]
    held = 0
    for name, size in sizes.items():
        if held >= limit:
            portions.append(set())
            held = 0
        portions[-1].add(name)
        held += size
    for portion in portions:
        trees = {
            item: {name: x if f"{item}.{name}" in portion else HOLE for name, x in leaves.items()}
            for item, leaves in wanted.items()
        }
        yield {i: tree for i, tree in trees.items() if any(x is not HOLE for x in tree.values())}


def without_holes(asked: Mapping[str, Leaves], read: Mapping[str, Leaves]) -> dict[str, Leaves]:
    """What was read of what was asked for."""
    return {i: {n: x for n, x in leaves.items() if asked[i][n] is not HOLE} for i, leaves in read.items()}


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
    return {"record": text, "sha256": text_digest(text)}


def unseal(sealed: Mapping[str, str]) -> dict[str, Any]:
    """The record again. Raises CorruptCheckpoint where its text was altered."""
    text = sealed["record"]
    if text_digest(text) != sealed["sha256"]:
        raise CorruptCheckpoint("the record of digests was altered")
    return json.loads(text)


def state_digest(record: Mapping[str, Any]) -> str:
    """The digest by which one run names another's checkpoint."""
    return combined(record["digests"])
