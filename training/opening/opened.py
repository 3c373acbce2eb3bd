"""A model as its users ask for it, by a run or by published weights: verified, on the first devices."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from artifacts.checkpoints.record import state_digest
from artifacts.load import LATEST, LoadedRun, load, open_saved, steps_until
from data.pipeline import prepare
from data.tokens.tokenizer import Tokenizer, load_tokenizer
from interop.adapted import is_published
from interop.places import path_of
from models.ops import Ops
from models.transformer import Model, build_model
from parallel.axes import Layout
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from training.config import Config, TrainingConfig, from_stored, with_vocab
from training.opening.initial_weights import PublishedParent, find_parent, run_weights
from training.param_layout import abstract_params
from training.program import build_ops


@dataclass(frozen=True)
class OpenedModel:
    """What a generator or an engine is made of, and what it is called.

    trained: model, parameters, operations, layout. version: of the weights, a step and a digest. add_bos:
    whether a text begins with bos. config: of a run, None for published weights.
    """

    trained: tuple[Any, Any, Any, Any]
    tokenizer: Tokenizer
    path: Any  # here, or in a bucket
    tokenizer_path: Path
    version: str
    add_bos: bool
    step: int | None = None
    config: Config | None = None


def is_run(name: str) -> bool:
    """Whether it is a run rather than published weights; what is neither is refused as no run."""
    return not is_published(path_of(name))


def open_model(name: str, rules: dict[str, list[str]], **options: Any) -> OpenedModel:
    """A run, or published weights split by these rules of a mesh; ValueError, RunFault as either."""
    return open_run(name, **options) if is_run(name) else open_published(name, rules, **options)


def open_run(
    name: str, *, step: str = LATEST, weights: str = "raw", precision: str = "auto", **split: int
) -> OpenedModel:
    """A run's model at one of its checkpoints. split: fsdp and tensor, devices to split it over.

    Raises ValueError where there is none, RunFault where it is damaged.
    """
    loaded = load(name, from_stored)
    config = loaded.config
    if precision != "auto":
        config = replace(config, training=replace(config.training, precision=precision))
        loaded = replace(loaded, config=config)
    tokenizer = loaded.tokenizer(lambda: prepare(config.data, config.tokenizer, progress=False).tokenizer)
    saved = open_saved(loaded.path)
    at = steps_until(saved, step)[-1]
    trained = trained_model(loaded, tokenizer.vocab_size, step=str(at), weights=weights, **split)
    kind = "" if weights == "raw" else f"-{weights}"
    version = f"{at}{kind}-{state_digest(saved.record(at))[:9]}"
    beside = loaded.path / "tokenizer.json"
    return OpenedModel(trained, tokenizer, loaded.path, beside, version, True, at, config)


def open_published(
    name: str, rules: dict[str, list[str]], *, precision: str = "auto", **split: int
) -> OpenedModel:
    """Weights as others publish them, with the tokenizer beside them, split by these rules of a mesh.

    Raises ValueError as above.
    """
    parent = find_parent(Config(init_from=name))
    assert isinstance(parent, PublishedParent), name
    beside = parent.tokenizer
    tokenizer = load_tokenizer(beside)
    trained = published_model(parent, rules, precision=precision, **split)
    version = f"published-{parent.facts()['digest'][:9]}"
    return OpenedModel(trained, tokenizer, parent.run.resolve(), beside, version, tokenizer.adds_bos)


def trained_model(
    run: LoadedRun[Config],
    tokenizer_size: int,
    *,
    fsdp: int = 1,
    tensor: int = 1,
    step: str = LATEST,
    weights: str = "raw",
) -> tuple[Model, Any, Ops, Layout]:
    """What a `Generator` is made of: a run's model and verified parameters, over the first devices.

    Raises ValueError where there is no such checkpoint or not so many devices, RunFault where it is damaged.
    """
    config = with_vocab(run.config, tokenizer_size)
    model, layout = _over_devices(config, fsdp, tensor)
    abstract, mean_of = abstract_params(model.info, layout), config.checkpoint.average_last
    params = run_weights(run, model, abstract, step=step, weights=weights, mean_of=mean_of)
    return model, params, build_ops(config, layout), layout


def published_model(
    parent: PublishedParent,
    rules: dict[str, list[str]],
    *,
    fsdp: int = 1,
    tensor: int = 1,
    precision: str = "auto",
) -> tuple[Model, Any, Ops, Layout]:
    """The same of weights that others publish, split by these rules of a mesh; ValueError as above.

    What is packed there stays so: a QTensor.
    """
    training, mesh = TrainingConfig(precision=precision), MeshConfig(rules=rules)
    config = Config(model=parent.published.config, training=training, mesh=mesh)
    model, layout = _over_devices(config, fsdp, tensor)
    abstract = abstract_params(parent.published.infos(model), layout)
    return model, parent.weights(abstract, model), build_ops(config, layout), layout


def _over_devices(config: Config, fsdp: int, tensor: int) -> tuple[Model, Layout]:
    wanted = f"fsdp={fsdp} tensor={tensor}" if fsdp > 1 else f"tensor={tensor}"
    if fsdp * tensor > len(jax.devices()):
        raise ValueError(f"{wanted} is more than the {len(jax.devices())} devices here; use fewer")
    mesh = MeshConfig(data=1, fsdp=fsdp, tensor=tensor, rules=config.mesh.rules)
    layout = build_layout(mesh, jax.devices()[: fsdp * tensor])
    return build_model(config.model), layout
