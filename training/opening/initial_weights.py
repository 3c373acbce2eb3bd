"""Where `init_from` points: another run's weights or published ones, with which a new run begins."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts.checkpoints.location import open_checkpoints_of, place
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import state_digest
from artifacts.directory import RunDirectory, stored_config
from artifacts.load import stored_checkpoints
from data.config import TokenizerConfig
from data.tokens.tokenizer import CONFIG, load_tokenizer
from interop.adapted import is_published, published
from interop.config_out import difference
from interop.gguf import GGUF
from interop.gguf_tokenizer import write_tokenizer
from interop.places import Place, local_folder, path_of
from interop.read import Published
from models.config import ModelConfig, MTPConfig, regrouped
from models.transformer import Model
from training.config import Config, from_stored

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
        return self.checkpoints.restore_weights(self.step, abstract)

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
    parent, step = find_parent(config, earlier.get("step")), earlier.get("step")
    if parent is None or parent.facts()["digest"] != earlier["digest"]:
        raise ValueError(
            f"{run.path} began from {f'step {step} of ' if step else ''}{earlier['path']}, which is not "
            f"there any more; remove {run.path} to begin anew"
        )
    return parent


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
