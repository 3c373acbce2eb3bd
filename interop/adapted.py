"""Weights that a path or a URL names: published ones, or an adapter of PEFT's merged into its base."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from interop.peft import CONFIG, WEIGHTS, Adapted, read_adapter
from interop.places import Place, path_of, size_of
from interop.read import Published
from interop.rules import Slot, Stacked
from models.weights import Adapters, LowRank


def is_published(path: Place) -> bool:
    """Whether weights of others lie there: a directory that is no run of ours, an adapter, a GGUF file."""
    if path.suffix == ".gguf" and path.is_file():
        return True
    there = any((path / name).is_file() for name in ("config.json", CONFIG))
    return there and not (path / "config.yaml").is_file()


def published(path: Place) -> Published:
    """What lies there, of which `is_published` holds. Raises ValueError for what is not supported."""
    return AdaptedWeights(path) if (path / CONFIG).is_file() else Published(path)


class AdaptedWeights(Published):
    """The weights that adapter_config.json names, with the adapter's products added to them."""

    def __init__(self, path: Place):
        """Raises ValueError where the base is not here, or is of a kind that is not supported."""
        super().__init__(_base_of(path))
        self.source = path

    def slots(self, model: Stacked) -> list[Slot]:
        """Of the base; the adapter is checked too."""
        read_adapter(self.source, model, self.family.rules(self.config))
        return super().slots(model)

    def infos(self, model: Stacked) -> Any:
        """Of arrays, which sums are, also where the base is packed."""
        return model.info

    def weights(self, abstract: Any, model: Stacked) -> Any:
        """Parameters as `abstract` says, each sum made in float32 and rounded once."""
        params = super().weights(abstract, model)
        adapters, factors = read_adapter(self.source, model, self.family.rules(self.config))

        def leaf(weight: Any, like: Any) -> Any:
            if not isinstance(weight, LowRank):
                return weight
            # A leaf at a time, so that two copies of one parameter are all that is needed.
            return jax.jit(partial(_merged, like.dtype), out_shardings=like.sharding)(weight)

        whole = factors.applied(model, adapters, params)
        return jax.tree.map(leaf, whole, abstract, is_leaf=lambda x: isinstance(x, LowRank))

    def base_weights(self, abstract: Any, model: Stacked) -> Any:
        """Those that the adapter stands on, as they are."""
        return super().weights(abstract, model)

    def check(self, model: Stacked, wanted: Adapters) -> Adapted:
        """Its factors, unread; ValueError where other ones are `wanted`."""
        theirs, factors = read_adapter(self.source, model, self.family.rules(self.config))
        wanted = replace(wanted, names=tuple(sorted(wanted.names)))
        keys = {"rank": "rank", "scale": "alpha / adapter.rank", "names": "targets", "dora": "kind=dora"}
        for name, key in keys.items():
            if (mine := getattr(wanted, name)) != (there := getattr(theirs, name)):
                raise ValueError(
                    f"adapter.{key} is {mine} and in {self.source} {there}; take that, or adapter=null, "
                    "which merges it into its base"
                )
        return factors

    def factors(self, model: Stacked, wanted: Adapters) -> Any:
        """The factors alone, None in the place of all else."""
        return self.check(model, wanted).alone(model, replace(wanted, bits=None, group=None))

    def facts(self) -> dict[str, Any]:
        """Of the base, and the adapter's path, files and what says its kind."""
        adapter = {"path": str(self.source), "bytes": size_of(self.source / WEIGHTS)}
        return {**super().facts(), "adapter": {**adapter, "config": _values(self.source)}}


def _merged(dtype: Any, weight: LowRank) -> jax.Array:
    return weight.astype(jnp.float32).astype(dtype)


def _values(path: Place) -> dict[str, Any]:
    try:
        return dict(json.loads((path / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} cannot be read ({error}); write it again") from error


def _base_of(path: Place) -> Place:
    """The published weights that an adapter belongs to: by the path it names, within it, or beside it."""
    name = str(_values(path).get("base_model_name_or_path") or "")
    candidates: list[Place] = []
    if name:
        candidates = [path_of(name), path / name] if isinstance(path, Path) else [path_of(name)]
        candidates.append(path.parent / Path(name).name)
    for candidate in candidates:
        if is_published(candidate) and not (candidate / CONFIG).is_file():
            return candidate
    raise ValueError(
        f"{path / CONFIG}: base_model_name_or_path={name or 'null'} is no published model here; put it "
        f"beside {path.name}, or write its directory there"
    )
