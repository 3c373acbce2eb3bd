"""Where `init_from` points: another run's weights or published ones, with which a new run begins.

A run with adapters, or with `freeze`, keeps of its weights only what trains, and the name and the digest of
its parent: whoever reads it reads the parent again, and gets arrays, adapters merged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from artifacts.checkpoints.digest import combined, digests
from artifacts.checkpoints.location import open_checkpoints_of, place
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import named_leaves, state_digest
from artifacts.directory import RunDirectory, stored_config
from artifacts.load import LATEST, LoadedRun, open_saved, steps_until, stored_checkpoints
from data.config import TokenizerConfig
from data.tokens.tokenizer import CONFIG, load_tokenizer
from interop.adapted import AdaptedWeights, is_published, published
from interop.config_out import difference
from interop.gguf import GGUF
from interop.gguf_tokenizer import write_tokenizer
from interop.places import Place, local_folder, path_of
from interop.read import Published
from models.config import ModelConfig, MTPConfig, regrouped
from models.transformer import Model
from models.weights import Adapters, LowRank, QTensor, quantizable
from parallel.partition import join
from training.config import Config, from_stored
from training.param_layout import ParamLayout, param_layout
from training.state import split

TOKENIZER_FILES = ("tokenizer.json", CONFIG, "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Parent:
    """The checkpoints of another run and the step to take."""

    run: Path
    checkpoints: Checkpoints
    step: int

    @property
    def tokenizer(self) -> Path:
        """The other run's own copy."""
        return self.run / "tokenizer.json"

    def weights(self, abstract: Any, model: Model) -> Any:
        """Verified parameters, layers stacked, placed as `abstract` says."""

        def read(like: Any) -> Any:
            return self.checkpoints.restore_weights(self.step, like)

        config = from_stored(stored_config(self.run, "init_from"))
        return joined_weights(self.run, config, self.checkpoints, self.step, read, abstract, model)

    def base(self, abstract: Any, model: Model, adapters: Adapters | None) -> tuple[Any, dict[str, Any]]:
        """The weights below a run's adapters, and what a checkpoint keeps of where they come from."""
        return self.weights(abstract, model), self.facts()

    def check_adapters(self, model: Model, adapters: Adapters | None) -> None:
        """Any will do: a run's own are merged into its weights."""

    def factors(self, model: Model, adapters: Adapters | None) -> Any:
        """Factors to begin with: None, since a run's are merged into its weights."""
        return None

    def check_model(self, config: ModelConfig) -> None:
        """Layers for further tokens go on with the stream that they were trained on: mtp.normed_stream."""
        check_further_tokens(self, config.mtp)

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: path and digest."""
        record = self.checkpoints.record(self.step)
        return {"path": str(self.checkpoints.directory), "step": self.step, "digest": state_digest(record)}


@dataclass(frozen=True)
class PublishedParent:
    """A directory as Hugging Face's transformers write one, an adapter of PEFT's, or a GGUF file."""

    published: Published
    cache: Path  # where a tokenizer lies that came in one file with the weights, or from a bucket

    @property
    def run(self) -> Place:
        """The directory, or the file."""
        return self.published.source

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that lies beside the adapter or the weights, or is made of the file's values."""
        published = self.published
        if not (published.source / "tokenizer.json").is_file() and isinstance(published.tensors, GGUF):
            return write_tokenizer(published.tensors.metadata, self.cache, str(published.path))
        own = (published.source / "tokenizer.json").is_file()
        folder = published.source if own else published.path
        return local_folder(folder, TOKENIZER_FILES, self.cache) / "tokenizer.json"

    def weights(self, abstract: Any, model: Model) -> Any:
        """Parameters, layers stacked, placed as `abstract` says; each device reads what it holds."""
        return self.published.weights(abstract, model)

    def base(self, abstract: Any, model: Model, adapters: Adapters | None) -> tuple[Any, dict[str, Any]]:
        """The weights below a run's adapters, and what a checkpoint keeps of where they come from.

        Their files say nothing of their numbers, so `weights` does: a digest over every array.
        """
        merges = isinstance(self.published, AdaptedWeights) and adapters is None
        if isinstance(self.published, AdaptedWeights) and adapters is not None:
            params = self.published.base_weights(abstract, model)
        else:
            params = self.published.weights(abstract, model)
        # Sums that were made here have other last bits elsewhere.
        said = {} if merges else {"weights": combined(digests(named_leaves(params)))}
        return params, {**self.facts(), **said}

    def check_adapters(self, model: Model, adapters: Adapters | None) -> None:
        """Raise ValueError where `adapter.*` asks for other ones than the files hold."""
        if adapters is not None and isinstance(self.published, AdaptedWeights):
            self.published.check(model, adapters)

    def factors(self, model: Model, adapters: Adapters | None) -> Any:
        """Those of an adapter of PEFT's, which goes on learning; None where none are, or merged ones."""
        if adapters is None or not isinstance(self.published, AdaptedWeights):
            return None
        return self.published.factors(model, adapters)

    def check_model(self, config: ModelConfig) -> None:
        """Raise ValueError where the run's model would compute something else with these weights."""
        if differs := difference(config, self.published.config):
            raise ValueError(
                f"{differs} is not what {self.published.says} says; use model=parent, which takes every "
                "value from there"
            )

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: path, files and a digest of their tables."""
        return self.published.facts()


AnyParent = Parent | PublishedParent


def with_parent_model(config: Config) -> Config:
    """A config whose `model=parent` has become the model of `init_from`, the coefficients of its own kept."""
    if config.model.name != "parent":
        return config
    if config.init_from is None:
        raise ValueError(
            "model=parent is that of init_from, which is null; give init_from=NAME or a directory"
        )
    parent = find_parent(config)
    if isinstance(parent, PublishedParent):
        return replace(config, model=parent.published.config)
    assert parent is not None  # or it would have been refused
    stored = stored_config(parent.run, "init_from")
    return replace(config, model=from_stored(stored).model)


def find_parent(config: Config, only_step: int | None = None) -> AnyParent | None:
    """What `init_from` names: a run beside this one, a run's directory, one step's, or published weights."""
    if config.init_from is None:
        return None
    asked = path_of(config.init_from)
    if is_published(asked):
        return PublishedParent(published(asked), Path(config.data.cache_dir) / "gguf")
    if not isinstance(asked, Path):
        raise ValueError(
            f"init_from={config.init_from} holds no config.json and no adapter_config.json, and is no "
            "FILE.gguf; fetch a run of a bucket first (python scripts/checkpoint.py fetch URL RUN)"
        )
    candidates = [Path(config.run.dir).parent / asked, asked, asked.parent.parent]
    for candidate in candidates:
        where = stored_checkpoints(candidate, config.checkpoint)
        if place(candidate, where.directory).is_dir():
            checkpoints = open_checkpoints_of(candidate, where, read_only=True, bucket=False)
            steps = checkpoints.steps()
            if candidate == asked.parent.parent:
                steps = [s for s in steps if str(s) == asked.name]
            if only_step is not None:
                steps = [s for s in steps if s == only_step]
            if steps:
                return Parent(candidate, checkpoints, steps[-1])
    raise ValueError(
        f"init_from={config.init_from} is no run, no checkpoint and no published model; give a run's name "
        f"(beside {config.run.dir}), its directory, its checkpoints/STEP, a directory with a config.json, or "
        "a FILE.gguf"
    )


def same_parent(config: Config, run: RunDirectory) -> AnyParent | None:
    """The parent of an earlier start, killed before its first checkpoint: it may have trained on since."""
    if (earlier := run.parent) is None:
        return None
    parent = find_parent(config, earlier.get("step"))
    if parent is None or parent.facts()["digest"] != earlier["digest"]:
        raise ValueError(
            f"{run.path} began from {_named(earlier)}, which is not there any more; remove {run.path} to "
            "begin anew"
        )
    return parent


def _named(facts: Mapping[str, Any]) -> str:
    return f"step {facts['step']} of {facts['path']}" if facts.get("step") else str(facts["path"])


# -- runs of which a part trains ---------------------------------------------------------------------------


def below(run: Path, config: Config, record: Mapping[str, Any], abstract: Any, model: Model) -> Any:
    """The weights that a run's checkpoint stands on: its parent's, verified; ValueError for any others."""
    earlier = record["parent"]
    here = replace(config, run=replace(config.run, dir=str(run)))  # it may have been moved since
    try:
        parent = find_parent(here, earlier.get("step"))
    except ValueError as error:
        raise ValueError(f"{run} holds only what trains beside {_named(earlier)}; {error}") from error
    assert parent is not None  # or it would have no parent
    placement = param_layout(config, model)
    found: dict[str, Any] = parent.facts()
    if found["digest"] == earlier["digest"]:
        params, found = parent.base(abstract, model, placement.adapters)
    for name in ("digest", "weights"):
        if name in earlier and found.get(name) != earlier[name]:
            raise ValueError(
                f"{run} stands on {_named(earlier)} with {name} {earlier[name][:9]}, and "
                f"{found['path']} has {str(found.get(name))[:9]}; put the former back"
            )
    return params


def joined_weights(
    run: Path,
    config: Config,
    checkpoints: Checkpoints,
    step: int,
    read: Callable[[Any], Any],
    abstract: Any,
    model: Model,
) -> Any:
    """A run's weights as arrays, placed as `abstract` says: what it trained, joined with what it did not.

    read: what trains, as an abstract tree asks for it. Adapters are merged, each sum made in float32.
    """
    placement = param_layout(config, model)
    trained, frozen = split(placement.info, placement.info)
    if frozen is None:
        return read(abstract)
    if placement.adapters is None:
        mine, theirs = split(placement.info, abstract)
        if not placement.inherits:
            return join(read(mine), checkpoints.restore_weights(step, theirs, item="frozen"))
        params = below(run, config, checkpoints.record(step), abstract, model)
        return join(read(mine), split(placement.info, params)[1])
    params = below(run, config, checkpoints.record(step), abstract, model)
    return merged_weights(placement, params, read(factors_like(trained, abstract)), abstract)


def factors_like(trained: Any, abstract: Any) -> Any:
    """Abstract factors beside abstract weights: whole on every device that these lie on, thin as they are."""

    def of(info: Any, like: Any) -> Any:
        if not isinstance(info, LowRank):  # of integers without factors nothing trains
            return None
        place = like.sharding
        if isinstance(place, jax.sharding.NamedSharding):
            place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda i: jax.ShapeDtypeStruct(i.shape, i.dtype, sharding=place), info)

    return jax.tree.map(of, trained, abstract, is_leaf=_is_weight)


def _is_weight(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, LowRank | QTensor)


def merged_weights(placement: ParamLayout, params: Any, trained: Any, abstract: Any) -> Any:
    """Arrays that stand for a base's weights, as adapters leave them, with factors beside them."""
    adapters = placement.adapters
    assert adapters is not None

    def leaf(info: Any, weight: Any, factors: Any, like: Any) -> Any:
        if factors is None and (adapters.bits is None or not quantizable(info)):
            return weight

        def whole(weight: Any, factors: Any) -> Any:
            base = adapters.base(info, weight)
            base = base if factors is None else replace(factors, w=base)
            return base.astype(jnp.float32).astype(like.dtype)

        # A leaf at a time, so that two copies of one parameter are all that is needed.
        return jax.jit(whole, out_shardings=like.sharding)(weight, factors)

    thin = jax.tree.leaves(trained, is_leaf=_is_weight)
    infos, structure = jax.tree.flatten(placement.canonical_plain)
    rows = zip(infos, jax.tree.leaves(params), thin, jax.tree.leaves(abstract), strict=True)
    return jax.tree.unflatten(structure, [leaf(*row) for row in rows])


def run_weights(
    run: LoadedRun[Config],
    model: Model,
    abstract: Any,
    *,
    step: str = LATEST,
    weights: str = "raw",
    mean_of: int = 0,
) -> Any:
    """Verified weights of a finished run as arrays, its adapters merged; see `LoadedRun.weights`."""
    config = run.config

    def read(like: Any) -> Any:
        return run.weights(like, step=step, weights=weights, mean_of=mean_of)

    if config.adapter is None and not config.freeze:
        return read(abstract)
    saved = open_saved(run.path)
    return joined_weights(run.path, config, saved, steps_until(saved, step)[-1], read, abstract, model)


def check_tokenizer(parent: AnyParent, digest: str) -> None:
    """Weights know tokens by number, so a run that starts from them must cut text as their run did."""
    path = parent.tokenizer
    if path.exists() and load_tokenizer(path).digest != digest:
        raise ValueError(
            f"init_from: {path.parent} was trained with another tokenizer; "
            f"use tokenizer=inherit, or tokenizer=file tokenizer.path={path}"
        )


def check_further_tokens(parent: Parent, mtp: MTPConfig | None) -> None:
    """Layers for further tokens go on with the stream that they were trained on: model.mtp.normed_stream."""
    if mtp is None:
        return
    theirs = regrouped(stored_config(parent.run, "init_from").get("model") or {}).get("mtp")
    if theirs is not None and theirs["normed_stream"] != mtp.normed_stream:
        there, here = (str(normed).lower() for normed in (theirs["normed_stream"], mtp.normed_stream))
        raise ValueError(
            f"init_from: model.mtp.normed_stream is {there} in {parent.run} and {here} now: its layers for "
            f"further tokens have learnt from another stream; use model.mtp.normed_stream={there}"
        )


def tokenizer_config(config: Config, run: RunDirectory | None, parent: AnyParent | None) -> TokenizerConfig:
    """`config.tokenizer`, where tokenizer.kind=inherit has become the file of the run or of its parent.

    The chat template beside that file is inherited with it.
    """
    if config.tokenizer.kind != "inherit":
        return config.tokenizer
    if run is not None and run.resuming and (run.path / "tokenizer.json").exists():
        return replace(config.tokenizer, kind="file", path=str(run.path / "tokenizer.json"))
    parent = parent or find_parent(config)
    if parent is None or not parent.tokenizer.exists():
        raise ValueError(
            f"tokenizer.kind=inherit: init_from={config.init_from} has no tokenizer.json; "
            "use tokenizer=file tokenizer.path=FILE"
        )
    return replace(config.tokenizer, kind="file", path=str(parent.tokenizer))
