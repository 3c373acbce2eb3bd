"""A parameter tree in two of its structure, what trains and what is frozen: None where the other has it."""

from typing import Any

import jax


def _absent(leaf: Any) -> bool:
    return leaf is None


def join(params: Any, frozen: Any) -> Any:
    """The whole tree. frozen: None where all of it trains, and then it is `params` itself."""
    if frozen is None:
        return params
    return jax.tree.map(lambda p, f: f if p is None else p, params, frozen, is_leaf=_absent)


def apart(params: Any, tree: Any) -> tuple[Any, Any]:
    """Of a tree of the whole structure the leaves that `params` has, and what `join` makes them whole with.

    params: what trains, of any values; None where all of it does.
    """
    if params is None:
        return tree, None
    return jax.tree.map(lambda p, leaf: None if p is None else leaf, params, tree, is_leaf=_absent), tree
