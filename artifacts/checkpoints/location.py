"""Where a run's checkpoints are: in its directory, in another, or sent from there to a bucket."""

from pathlib import Path

from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.remote import Remote
from artifacts.config import CheckpointConfig
from common.buckets import is_remote
from common.errors import RunFault


def place(run: Path, directory: str | None) -> Path:
    """The directory of this machine that holds them, or from which they are sent."""
    return run / "checkpoints" if directory is None or is_remote(directory) else Path(directory)


def open_checkpoints_of(
    run: Path, config: CheckpointConfig, *, read_only: bool = False, bucket: bool = True
) -> Checkpoints:
    """The checkpoints of the run in that directory, wherever `config.directory` puts them.

    bucket: look there as well, where it is one. Raises ValueError where its URL cannot be spoken, RunFault
    where its server refuses.
    """
    remote = Remote(config.directory) if bucket and config.directory and is_remote(config.directory) else None
    return Checkpoints(place(run, config.directory), config, read_only=read_only, remote=remote)


def refuse_occupied(run: Path, config: CheckpointConfig) -> None:
    """Raise ValueError where a new run would write among another's checkpoints, or could not be heard.

    Of a run whose own directory was lost, these may be the checkpoints: then they are worth more than it.
    """
    if config.directory is None:
        return
    try:
        steps = _steps(config.directory)
        if is_remote(config.directory) and not steps:
            Remote(config.directory).probe()
    except RunFault as error:
        raise ValueError(str(error)) from error
    if steps:
        remedy = "choose another checkpoint.directory="
        if is_remote(config.directory):
            remedy += f", or get that run back: python scripts/checkpoint.py fetch {config.directory} {run}"
        raise ValueError(
            f"checkpoint.directory={config.directory} has a checkpoint of step {steps[-1]}, but {run} is "
            f"new; {remedy}"
        )


def _steps(directory: str) -> list[int]:
    if is_remote(directory):
        return Remote(directory).steps()
    path = Path(directory)
    names = [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())
