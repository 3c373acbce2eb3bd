"""Where a run writes, and what it keeps of its checkpoints."""

import os
import re
from dataclasses import dataclass

from common.buckets import SCHEMES
from common.checks import require


@dataclass
class RunConfig:
    """One run, one directory, found again by name."""

    name: str = "???"  # the directory under runs/; the same name resumes
    dir: str = "runs/${run.name}"  # where everything the run writes goes
    compile_cache: str | None = ".cache/xla"  # null turns the persistent compile cache off
    max_restarts: int = 5  # starts in a row that get no further, after which the run refuses

    def __post_init__(self) -> None:
        """A name that is one directory, on every file system, and a limit that is one."""
        # A shell leaves the tilde of `run.dir=~/runs/a` as it is.
        self.dir = os.path.expanduser(self.dir)
        self.compile_cache = self.compile_cache and os.path.expanduser(self.compile_cache)
        require(self.max_restarts >= 0, "run.max_restarts", self.max_restarts, "0 or more")
        if self.name == "???":  # not given yet: Hydra's own mark
            return
        ok = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@-]{0,199}", self.name) is not None
        limit = "a directory name: at most 200 of letters, digits and _ . , = + @ -, not starting with . or -"
        require(ok, "run.name", repr(self.name), limit)


@dataclass
class CheckpointConfig:
    """Steps between saves (`every`) and how many to `keep`; `average_last=K` adds the mean of the last K."""

    every: int = 200  # steps
    keep: int = 3  # newest checkpoints on disk
    average_last: int = 0  # 0: off
    directory: str | None = None  # null: checkpoints/ of the run; else a path, or s3://, gs:// to send to

    def __post_init__(self) -> None:
        """Each value by itself."""
        require(self.every >= 1, "checkpoint.every", self.every, "1 step or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more, so that a run can resume")
        require(self.average_last >= 0, "checkpoint.average_last", self.average_last, "0 (off) or more")
        self.directory = self.directory and os.path.expanduser(self.directory)
        scheme, url, below = (self.directory or "").partition("://")
        ok = self.directory is None or (bool(scheme) and (not url or (scheme in SCHEMES and bool(below))))
        limit = f"null, a path, or a URL of {', '.join(SCHEMES)} such as s3://bucket/run"
        require(ok, "checkpoint.directory", self.directory, limit)
