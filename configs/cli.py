"""From a command line to a checked `Config`: help, one-line errors, sweeps. For `train.py` and every script.

Hydra composes; what it says when something is wrong fills several lines and names no remedy, so the
words are ours.
"""

import argparse
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from common.errors import Requeue
from configs.groups import CONFIG_DIR, groups, options

Task = Callable[[Any], int]

PURPOSE = """\
Cambrian trains language models on whatever is there: two CPU cores, one GPU, a pod.
The same command again goes on where the run stopped; what it writes is in runs/NAME/."""
HELP = """\
{purpose}

  {script} +experiment=NAME               take a named experiment
  {script} +experiment=NAME KEY=VALUE     and change a value: training.num_steps=50
  {script} +experiment=NAME GROUP=NAME    and change a part: optim=lion
  {script} +experiment=NAME --cfg job     print the whole config, every key; run nothing
  {script} +experiment=NAME -m seed=0,1   run every combination, each in its own directory

Experiments (+experiment=NAME):
{experiments}

Parts (GROUP=NAME):
{groups}

Exit status: 0 done, 1 fault in mid-run, 2 bad input (HYDRA_FULL_ERROR=1 shows the traceback),
75 stopped by a signal (SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2) and saved: the same command goes on.
"""


def main(
    task: Task,
    argv: Sequence[str] | None = None,
    *,
    script: str = "python train.py",
    purpose: str = PURPOSE,
    faults: tuple[type[Exception], ...] = (),
    join: Callable[[], None] | None = None,
    prints_error: Callable[[str], bool] = lambda line: True,
) -> int:
    """Run `task(config)` for what the command line asks and return the exit status.

    Bad input (ValueError, OSError, Hydra's and OmegaConf's errors) is one line on stderr and status 2;
    `faults` are one line and their own `status`, else 1; anything else is a defect of ours and keeps its
    traceback.

    Where several processes run one command, `join` unites them before anything is read, and
    `prints_error(line)` says whether this one prints the line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_page(script, purpose), end="")
        return 0
    trace = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")

    def report(message: str, status: int) -> int:
        return _report(message, status, trace, prints_error)

    def guard(action: Callable[[], int]) -> int:
        return _guarded(action, faults, report)

    def launch() -> int:
        if join is not None:
            join()
        return _launch(task, argv, script, guard, join)

    return guard(launch)


def _guarded(
    action: Callable[[], int], faults: tuple[type[Exception], ...], report: Callable[[str, int], int]
) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return action()
    except KeyboardInterrupt as error:
        return report(str(error) or "interrupted", getattr(error, "status", 130))
    except faults as error:
        return report(str(error), getattr(error, "status", 1))
    except (HydraException, OmegaConfBaseException) as error:
        from configs.explain import explain

        return report(explain(error), 2)
    except (ValueError, OSError) as error:
        return report(str(error), 2)


def _report(message: str, status: int, trace: bool, prints_error: Callable[[str], bool]) -> int:
    if trace:
        traceback.print_exc()
    if prints_error(message):
        line = re.sub(r"(?<=[,;:.])\s*\n\s*", " ", message.strip())
        word = "stopped: " if status == Requeue.status else "error: "
        print(word + re.sub(r"\s*\n\s*", "; ", line), file=sys.stderr, flush=True)
    return status


def _launch(
    task: Task,
    argv: list[str],
    script: str,
    guard: Callable[[Callable[[], int]], int],
    join: Callable[[], None] | None,
) -> int:
    import hydra

    from configs import schema
    from configs.explain import check_overrides
    from configs.optional_groups import opened
    from configs.swept_job import EndedElsewhere, check_launcher, end_elsewhere, refusal_of
    from configs.text_words import as_typed
    from training.config import Config

    args = _parse(argv)
    schema.register()
    if not (args.shell_completion or args.info or args.hydra_help):
        # Another config directory may bring groups and options that these files do not list.
        check_overrides(
            as_typed(args.overrides, Config),
            CONFIG_DIR,
            strict=not (args.config_dir or args.config_path),
        )
    # Hydra's parser takes all overrides in one piece, after the flags.
    argv = [word for word in argv if word not in args.overrides] + opened(args.overrides, Config)
    check_launcher(args.overrides)
    if args.multirun:
        _check_sweep(args.overrides)
    if args.cfg == "job" and not args.resolve:
        argv = ["--resolve", *argv]
    statuses: list[int] = []
    defects: list[Exception] = []

    home = (os.uname().nodename, os.getpid())

    def job(cfg: Any) -> None:
        if home != (os.uname().nodename, os.getpid()):  # a launcher's, and these lists are copies
            end_elsewhere(guard(lambda: _joined(join, task, cfg)))
            return
        # Hydra adds lines of its own to whatever leaves a job, so nothing does.
        try:
            statuses.append(guard(lambda: task(_configure(cfg))))
        except Exception as error:
            defects.append(error)

    with TemporaryDirectory() as scratch:
        # For Hydra's own record of a sweep, which would lie beside the runs; a launcher needs one that stays.
        given = any(word.lstrip("+").startswith(("hydra.sweep.dir", "hydra/launcher")) for word in argv)
        own = [] if given else [f"hydra.sweep.dir={scratch}"]
        with _as_command([script, *argv, *own]):
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(job)()
            except EndedElsewhere as ended:
                statuses.append(ended.status)
            except RuntimeError as failed:
                if (said := refusal_of(failed)) is None:
                    raise
                raise ValueError(said) from failed
    for error in defects:
        raise error
    return max(statuses, default=0)


def _joined(join: Callable[[], None] | None, task: Task, cfg: Any) -> int:
    """A job in a process of its own, which is part of a job of several where its launcher started more."""
    if join is not None:
        join()
    return task(_configure(cfg))


def _parse(argv: list[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    from common.checks import ConfigError

    def refuse(message: str) -> NoReturn:
        # Most programs take --key value, and so a stranger types it.
        if "unrecognized arguments: -" in message:
            message += "; keys stand without dashes, as +experiment=NAME or KEY=VALUE"
        raise ConfigError(f"{message}; --help lists what there is")

    parser = get_args_parser()
    parser.allow_abbrev = False  # `--experiment` would be Hydra's --experimental-rerun
    parser.error = refuse  # type: ignore[method-assign]  # argparse would print its usage as well
    return parser.parse_intermixed_args(argv)


@contextmanager
def _as_command(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and hands on exceptions only under HYDRA_FULL_ERROR; both are put back."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before
        del os.environ["HYDRA_FULL_ERROR"]
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def _configure(cfg: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    swept = hydra_config.mode == RunMode.MULTIRUN
    return _finish(cfg, list(hydra_config.overrides.task) if swept else [])


def _finish(cfg: Any, overrides: list[str]) -> Any:
    """The checked Config of one job; a job of a sweep, which has overrides, takes them into its name."""
    from configs.schema import from_hydra
    from training.legal.check import check

    suffix = override_suffix(overrides)
    if suffix and cfg.run.name is not None:
        cfg.run.name = f"{cfg.run.name}-{suffix}"
    config = from_hydra(cfg)
    check(config, None)
    return config


def override_suffix(overrides: Sequence[str]) -> str:
    """What tells a sweep's jobs apart, as part of a directory name: `optim.learning_rate=0.1,seed=1`.

    run.name is left out, and so is the experiment, whose name run.name already is unless it was given.
    """
    from configs.optional_groups import GROUP
    from configs.text_words import unquoted

    given = {word.lstrip("+").split("=", 1)[0] for word in overrides}
    hidden = {GROUP, "run.name"} if "run.name" in given else {GROUP, "experiment"}
    kept = [
        unquoted(word.lstrip("+")) for word in overrides if word.lstrip("+").split("=", 1)[0] not in hidden
    ]
    text = ",".join(kept)
    clean = re.sub(r"[^A-Za-z0-9_.,=+@-]+", "_", text)
    if clean == text and len(clean) <= 120:
        return clean
    # Two values may look alike once cleaned or cut; the digest keeps them apart.
    return f"{clean[:111]}-{sha256(text.encode()).hexdigest()[:8]}"


def _check_sweep(overrides: list[str]) -> None:
    """Refuse a sweep before it starts where a job is malformed or two would share a directory."""
    from common.checks import ConfigError

    words = [word.lstrip("+") for word in overrides]
    if any(word.startswith(("hydra/sweeper", "hydra.sweeper", "hydra.mode")) for word in words):
        return  # another sweeper chooses its jobs as it goes
    own = [word for word in overrides if not word.lstrip("+").startswith(("hydra/", "hydra."))]
    directories: set[str] = set()
    for job in sweep_jobs(own):
        config = job_config(job, job)
        if config.run.dir in directories:
            raise ConfigError(f"two jobs of this sweep would share {config.run.dir}; name a value once")
        directories.add(config.run.dir)


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The words of each job of a sweep, in Hydra's order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from configs.text_words import as_typed
    from training.config import Config

    parsed = OverridesParser.create().parse_overrides(as_typed(overrides, Config))
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def job_config(words: Sequence[str], swept: Sequence[str]) -> Any:
    """The checked Config of these words, of which those that are swept go into the run's name."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from configs.optional_groups import opened
    from training.config import Config

    GlobalHydra.instance().clear()  # that of a task we may be called in, which has its config
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return _finish(compose("config", overrides=opened(list(words), Config)), list(swept))


def help_page(script: str, purpose: str = PURPOSE) -> str:
    """What a stranger needs, read from the files' first comments: no heavy import, and never out of date."""
    experiments = [f"  {name:12} {_summary('experiment', name)}" for name in options("experiment")]
    parts = [
        textwrap.fill(
            ", ".join(options(group)), 108, initial_indent=f"  {group:10} ", subsequent_indent=" " * 13
        )
        for group in groups()
        if group != "experiment"
    ]
    return HELP.format(
        script=script, purpose=purpose, experiments="\n".join(experiments), groups="\n".join(parts)
    )


def _summary(group: str, name: str) -> str:
    lines = (CONFIG_DIR / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @"))
    return next(comments, "")
