"""Where `init_from` points: another run's weights, with which a new run begins."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts.checkpoints.location import open_checkpoints_of, place
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import state_digest
from artifacts.directory import RunDirectory, stored_config
from artifacts.load import stored_checkpoints
from data.config import TokenizerConfig
from data.tokens.tokenizer import load_tokenizer
from models.config import MTPConfig, regrouped
from training.config import Config


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

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: path and digest."""
        record = self.checkpoints.record(self.step)
        return {"path": str(self.checkpoints.directory), "step": self.step, "digest": state_digest(record)}


def find_parent(config: Config, only_step: int | None = None) -> Parent | None:
    """The checkpoint that `init_from` names: a run beside this one, a run's directory, or one step's."""
    if config.init_from is None:
        return None
    asked = Path(config.init_from)
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
        f"init_from={config.init_from} is no run and no checkpoint; give a run's name "
        f"(beside {config.run.dir}), its directory, or its checkpoints/STEP"
    )


def same_parent(config: Config, run: RunDirectory) -> Parent | None:
    """The parent of an earlier start, killed before its first checkpoint: it may have trained on since."""
    if (earlier := run.parent) is None:
        return None
    parent = find_parent(config, earlier["step"])
    if parent is None or parent.facts()["digest"] != earlier["digest"]:
        raise ValueError(
            f"{run.path} began from step {earlier['step']} of {earlier['path']}, which is not there any "
            f"more; remove {run.path} to begin anew"
        )
    return parent


def check_tokenizer(parent: Parent, digest: str) -> None:
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


def tokenizer_config(config: Config, run: RunDirectory | None, parent: Parent | None) -> TokenizerConfig:
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
