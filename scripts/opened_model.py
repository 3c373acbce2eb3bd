"""A model as scripts ask for one, by a run or by published weights: verified, on the first devices."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.load import LATEST

if TYPE_CHECKING:
    from data.tokens.tokenizer import Tokenizer
    from training.config import Config

PRECISIONS = ("auto", "float32", "bfloat16")
BOS = ("auto", "true", "false")


@dataclass(frozen=True)
class OpenedModel:
    """What a generator or an engine is made of, and what it is called.

    trained: model, parameters, operations, layout. version: of the weights, a step and a digest. add_bos:
    whether a text begins with bos. config: of a run, None for published weights.
    """

    trained: tuple[Any, Any, Any, Any]
    tokenizer: "Tokenizer"
    path: Path
    tokenizer_path: Path
    version: str
    add_bos: bool
    step: int | None = None
    config: "Config | None" = None


def is_run(name: str) -> bool:
    """Whether it is a run rather than published weights; what is neither is refused as no run."""
    from interop.adapted import is_published
    from interop.places import path_of

    return not is_published(path_of(name))


def open_run(
    name: str, *, step: str = LATEST, weights: str = "raw", precision: str = "auto", **split: int
) -> OpenedModel:
    """A run's model at one of its checkpoints. split: fsdp and tensor, devices to split it over.

    Raises ValueError where there is none, RunFault where it is damaged.
    """
    from artifacts.checkpoints.record import state_digest
    from artifacts.load import load, open_saved, steps_until
    from data.pipeline import prepare
    from training.config import from_stored
    from training.samples import trained_model

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


def open_published(name: str, *, precision: str = "auto", **split: int) -> OpenedModel:
    """Weights as others publish them, with the tokenizer beside them. ValueError as above."""
    import yaml

    from configs.groups import CONFIG_DIR
    from data.tokens.tokenizer import load_tokenizer
    from training.config import Config
    from training.initial_weights import PublishedParent, find_parent
    from training.samples import published_model

    parent = find_parent(Config(init_from=name))
    assert isinstance(parent, PublishedParent), name
    beside = parent.tokenizer
    tokenizer = load_tokenizer(beside)
    rules = yaml.safe_load((CONFIG_DIR / "mesh" / "_rules.yaml").read_text("utf-8"))["rules"]
    trained = published_model(parent, rules, precision=precision, **split)
    version = f"published-{parent.facts()['digest'][:9]}"
    return OpenedModel(trained, tokenizer, parent.run.resolve(), beside, version, tokenizer.adds_bos)
