"""Train on Slurm: `python scripts/slurm.py +experiment=NAME slurm.nodes=4 slurm.gpus_per_node=8 mesh=fsdp`.

Takes the overrides that `train.py` takes, and `slurm.*` for the job; or `serve RUN` and the words of
scripts/serve.py, for a server of that run. Writes a batch script that a person can
read, with a copy of code and configuration beside it, submits it and stays until it has ended.
"""

import inspect
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import split
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import command

from artifacts.load import RUNS, find_run
from launch.slurm.config import SlurmConfig, check_devices, split_words
from launch.slurm.follow import client, follow
from launch.slurm.script import Element, Submission, render
from launch.slurm.snapshot import snapshot
from scripts.command import refuse, run

if TYPE_CHECKING:
    from training.config import Config

ON_THE_NODE = ("CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR")  # Slurm's to say; and Hydra's, while it calls us
COMMAND = ("python", "scripts/slurm.py")
OWN_WORDS = ("host", "port", "url_file")  # of scripts/serve.py, which the job says itself
PURPOSE = """\
Train on Slurm: write a batch script (runs/NAME.slurm/), submit it, follow it; the run is that of train.py.
Preempted, requeued or at its time limit it saves and goes on by itself: docs/slurm.md.

  slurm.KEY=VALUE           what is asked of Slurm:
{keys}"""


SERVE = "serve"
SERVE_PURPOSE = """\
Serve on Slurm: write a batch script (runs/NAME.server/), submit it, follow it; other words are those of
scripts/serve.py. The URL stands in runs/NAME.server/url while there is one: docs/serving-deploy.md.

  python scripts/slurm.py serve RUN slurm.gpus_per_node=1 slurm.time=24:00:00 slots=64 follow=true

  slurm.KEY=VALUE           what is asked of Slurm:
{keys}"""


def purpose(of: str = PURPOSE) -> str:
    """What `--help` says of us: every key with its default and, from the source, its comment."""
    comments = _comments()
    lines = [
        f"    {f'{key}={_typed(value)}':24} {comments[key]}" for key, value in asdict(SlurmConfig()).items()
    ]
    return of.format(keys="\n".join(lines))


def _typed(value: object) -> str:
    """A default as one would type it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _comments() -> dict[str, str]:
    lines = inspect.getsource(SlurmConfig).splitlines()
    pairs = (line.partition("  # ") for line in lines)
    return {code.split(":")[0].strip(): comment for code, mark, comment in pairs if mark}


def main(argv: Sequence[str]) -> int:
    """Exit status: the job's where it is followed, 0 where it is submitted or written, 2 for bad input."""
    if argv[:1] == [SERVE]:
        return run(serve, argv[1:], purpose(SERVE_PURPOSE) + "\n")
    from hydra.errors import HydraException

    from configs.cli import main as compose

    try:
        slurm, words = split_words(argv)
        words, elements = elements_of(slurm, words)
    except (ValueError, OSError, HydraException) as error:
        return refuse(str(error).splitlines()[0])

    def task(config: "Config") -> int:
        submission, configs = prepare(config, slurm, words, elements, [*COMMAND, *argv])
        return submit(submission, configs, slurm)

    # Composed with the first element, without which the run may have no name.
    return compose(task, [*words, *elements[0]], script=" ".join(COMMAND), purpose=purpose())


def elements_of(slurm: SlurmConfig, words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The words that all runs of the job share, and of each run its own; one run has none of its own.

    `-m` sweeps all words, as it does for train.py, so that its runs have the names that they have there.
    """
    from configs.cli import sweep_jobs

    multirun = [word for word in words if word in ("-m", "--multirun")]
    if multirun and slurm.array:
        raise ValueError(f"slurm.array={slurm.array} and {multirun[0]} both make an array; use one of them")
    if multirun:
        return [], sweep_jobs([word for word in words if word not in multirun])
    return list(words), sweep_jobs(split(slurm.array)) if slurm.array else [[]]


def serve(argv: Sequence[str]) -> int:
    """Submit a server; the exit status as of a run. Raises ValueError, OSError."""
    slurm, words = split_words(argv)
    submission = server(slurm, words, [*COMMAND, SERVE, *argv])
    return submit(submission, [], slurm)


def server(slurm: SlurmConfig, words: Sequence[str], command: Sequence[str]) -> Submission:
    """The job of one process that serves, checked; nothing is written. Raises ValueError in one line.

    It is a job of its own name: one that trains the run may go on beside it.
    """
    from artifacts.manifest import recorded_environment

    for key in ("nodes", "tasks_per_node"):
        if (count := getattr(slurm, key)) > 1:
            raise ValueError(f"slurm.{key}={count}, but a server is one process on one node; submit several")
    if slurm.array is not None:
        raise ValueError(f"slurm.array={slurm.array} is of runs; submit a server for each model")
    for word in words:
        if word.partition("=")[0] in OWN_WORDS:
            raise ValueError(
                f"{word} is the job's to say: the node's name, slurm.port, and where its URL stands"
            )
    model = next((word for word in words if "=" not in word), None)
    if model is None:
        raise ValueError("serve is without a model; the first word behind it is a run's name")
    path = Path(model) if Path(model).is_dir() else find_run(model)
    name = f"{path.resolve().name}.server"
    parent = Path(os.path.abspath(RUNS / name))
    return Submission(
        name=name,
        here=next_directory(parent),
        directory=Path.cwd(),
        command=command,
        elements=[Element(name, str(path), words)],
        environment={k: v for k, v in recorded_environment().items() if k not in ON_THE_NODE},
        python=_python(slurm),
        mesh="",
        url=parent / "url",
    )


def _python(slurm: SlurmConfig) -> str:
    return slurm.python or ("python" if slurm.setup or slurm.container else sys.executable)


def prepare(
    config: "Config",
    slurm: SlurmConfig,
    words: Sequence[str],
    swept: Sequence[Sequence[str]],
    command: Sequence[str],
) -> tuple[Submission, list["Config"]]:
    """The job and the configuration of each of its runs, checked; nothing is written.

    swept: of each element the words that make it another run, and its name. Raises ConfigError.
    """
    from artifacts.manifest import recorded_environment
    from common.checks import ConfigError
    from configs.cli import job_config

    configs = [config] if not swept[0] else [job_config([*words, *own], own) for own in swept]
    for one in configs:
        check_devices(one, slurm)
    elements = [_element(one, words, own) for one, own in zip(configs, swept, strict=True)]
    directories = [element.directory for element in elements]
    if twice := next((d for d in directories if directories.count(d) > 1), None):
        raise ConfigError(f"two elements of this array would share {twice}; name a value once")
    submission = Submission(
        name=config.run.name,
        here=next_directory(Path(f"{os.path.abspath(config.run.dir)}.slurm")),
        directory=Path.cwd(),
        command=command,
        elements=elements,
        environment={k: v for k, v in recorded_environment().items() if k not in ON_THE_NODE},
        python=_python(slurm),
        mesh=_mesh(config, slurm),
    )
    return submission, configs


def _element(config: "Config", words: Sequence[str], own: Sequence[str]) -> Element:
    name = [f'run.name="{config.run.name}"'] if own else []
    return Element(config.run.name, config.run.dir, [*words, *own, *name])


def _mesh(config: "Config", slurm: SlurmConfig) -> str:
    from parallel.config import mesh_shape

    sizes = mesh_shape(config.mesh, slurm.devices)
    return ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)


def next_directory(parent: Path) -> Path:
    """One for each submission, 1 and up: an earlier one's code may still be running."""
    taken = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()]
    return parent / str(max(taken, default=0) + 1)


def submit(submission: Submission, configs: Sequence["Config"], slurm: SlurmConfig) -> int:
    """Write, submit and follow, as far as that is asked. Raises OSError where Slurm refuses."""
    if slurm.submit:
        client("sbatch", "--version")  # before anything is written
    try:
        code = write(submission, configs, slurm)
        script = submission.here / "job.sh"
        print(f"{script}: code is {code}", flush=True)
        if not slurm.submit:
            print(script.read_text("utf-8"), end="")
            return 0
        job = client("sbatch", "--parsable", str(script)).strip().split(";")[0]
    except OSError:
        shutil.rmtree(submission.here, ignore_errors=True)  # what Slurm refused leaves nothing
        raise
    (submission.here / "job").write_text(job + "\n", "utf-8")
    print(f"job {job}, printing to {submission.log.replace('%j', job).replace('%A', job)}", flush=True)
    return stay(job, submission) if slurm.follow else 0


def write(submission: Submission, configs: Sequence["Config"], slurm: SlurmConfig) -> str:
    """Code, configuration and script, in the submission's directory; what the code is, in words."""
    import yaml

    submission.here.mkdir(parents=True)
    code = snapshot(submission.here / "code")
    for i, config in enumerate(configs):
        name = "config.yaml" if len(configs) == 1 else f"config-{i}.yaml"
        (submission.here / name).write_text(yaml.safe_dump(asdict(config), sort_keys=False), "utf-8")
    (submission.here / "job.sh").write_text(render(submission, slurm), "utf-8")
    (submission.here / "job.sh").chmod(0o755)
    return code


def stay(job: str, submission: Submission) -> int:
    """Follow the job to its end. Leaving does not end it."""

    def log(element: str) -> Path:
        task = element.partition("_")[2]
        return Path(submission.log.replace("%A", job).replace("%a", task).replace("%j", job))

    try:
        return follow(job, log)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"job {job} goes on by itself; scancel {job} ends it") from None


if __name__ == "__main__":
    command.start(main)
