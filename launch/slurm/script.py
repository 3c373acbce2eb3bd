"""The batch script of a job on Slurm: what a person would write, and can read, change and submit again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from common.errors import Requeue
from common.text import counted
from launch.slurm.config import SlurmConfig

# Seconds that tasks have to come to the same end once one has ended: as long as a dead one is waited for.
ENDING_SECONDS = 60
RECORDED = (
    "recorded='CUDA_|JAX_|XLA_|NCCL_|LIBTPU_INIT_ARGS=|OMP_NUM_THREADS=|PATH=|LD_LIBRARY_PATH=|LOADEDMODULES='",
    "recorded+='|VIRTUAL_ENV=|SLURM_(ARRAY_|JOB_|NNODES=|NODELIST=|NTASKS|CPUS_|GPUS|RESTART_COUNT=)'",
)

HEAD = """\
#!/bin/bash
# {title}
# Submitted by: {command}
# {again} Code and configuration as they were then: {here}
{directives}
"""

BEGIN = """
# Nothing here traps SIGTERM: when a person cancels the job, Slurm ends this shell and so nobody requeues it.
set -u
here={here}
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
echo "job $job, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), on $SLURM_JOB_NODELIST"
"""

# A fixed port could be another job's on a shared node; these lie below those that the system gives away.
FREE_PORT = """\
port=$((20000 + RANDOM % 12000))
while (: < "/dev/tcp/localhost/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
"""

RUN = """
# Process 0 runs where this shell does, on the first node.
{port}export CAMBRIAN_COORDINATOR=$(hostname):$port
export CAMBRIAN_PROCESSES=$SLURM_NTASKS
# What matters of the environment, by name: all of it would hold secrets.
{recorded}
env | grep -E "^($recorded)" | sort > "$here/environment-$job.txt"

# Where a task ends with 1 or 2 it says so here: of several statuses srun tells the highest alone.
export CAMBRIAN_VERDICT=$here/verdict-$job.txt
rm -f "$CAMBRIAN_VERDICT"

# A task that ends does not end the others at once: they are saving, too, and come to the same end.
srun --kill-on-bad-exit=0 --wait={ending} --distribution=block{srun} \\
    bash -c 'CAMBRIAN_PROCESS=$SLURM_PROCID exec "$@"' task \\
    {python} "$here/code/train.py" "${{words[@]}}"
status=$?
"""

# One process on one node, at a port of its own; its URL has the node's name.
SERVE = """
url={url}
{recorded}
env | grep -E "^($recorded)" | sort > "$here/environment-$job.txt"
rm -f "$url"
srun --nodes=1 --ntasks=1{srun} \\
    {python} "$here/code/scripts/serve.py" "${{words[@]}}" host=0.0.0.0 port={port} url_file="$url"
status=$?
ready=
[ "$url" -nt "$here/environment-$job.txt" ] && ready=yes
rm -f "$url"  # of one that was killed: who looks for it now is to wait for the next start
"""

# Told to leave before Python could listen, a task ends by USR1's default: nothing was under way.
AGAIN = f"""
# 75: saved and to be started again. 138: told to leave while Python was still starting. Above 128 (a task was
# killed, hung or aborted): where this start had come to the run's directory, as run.max_restarts ends rows of
# it. Anything else is for a person to look at, and so is a job that somebody has ended meanwhile.
again=
case $status in
    {Requeue.status} | 138) again=yes ;;
    129 | 1[3-9]? | 2??) [ "$run/manifest.json" -nt "$here/environment-$job.txt" ] && again=yes ;;
esac
if [ -s "$CAMBRIAN_VERDICT" ]; then
    again='' status=$(head -n 1 "$CAMBRIAN_VERDICT")
fi
"""

SERVE_AGAIN = f"""
# 75: all is answered, to be started again. 138: told to leave while Python was still starting. Above 128 (it
# was killed or aborted): where this start had come to serve. Anything else is for a person to look at.
again=
case $status in
    {Requeue.status} | 138) again=yes ;;
    129 | 1[3-9]? | 2??) again=$ready ;;
esac
"""

REQUEUE = """
if [ "$again" ]; then
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
        scontrol requeue "$job" && sleep 60  # within which Slurm ends this shell
    fi
fi
"""


@dataclass(frozen=True)
class Element:
    """One run of a job: its name, its directory, and the words of train.py's command line."""

    name: str
    directory: str
    words: Sequence[str]


@dataclass(frozen=True)
class Submission:
    """What is known when a job is submitted. here: the directory of this submission, absolute."""

    name: str
    here: Path
    directory: Path
    command: Sequence[str]
    elements: Sequence[Element]
    environment: Mapping[str, str]
    python: str
    mesh: str
    url: Path | None = None  # of a server, where its URL will stand; None trains

    @property
    def log(self) -> str:
        """The file that the job prints to, in Slurm's pattern."""
        return str(self.here / ("log-%A_%a.txt" if len(self.elements) > 1 else "log-%j.txt"))


def render(submission: Submission, slurm: SlurmConfig) -> str:
    """The whole batch script of a submission."""
    directives = "\n".join(
        line for why, options in _asked(submission, slurm) for line in _lines(why, options)
    )
    return "".join(
        [
            HEAD.format(
                title=", ".join(filter(None, [f"{submission.name}: {_size(slurm)}", submission.mesh])),
                command=" ".join(map(quote, submission.command)).replace("\n", "\\n"),
                again="The same command again goes on where the run stopped."
                if submission.url is None
                else f"While it serves, its URL stands in {submission.url}.",
                here=submission.here,
                directives=directives,
            ),
            BEGIN.format(here=quote(str(submission.here))),
            _setup(submission, slurm),
            _words(submission),
            _run(submission, slurm),
            (SERVE_AGAIN if submission.url else AGAIN) + REQUEUE.lstrip("\n") if slurm.requeue else "\n",
            "exit $status\n",
        ]
    )


def _run(submission: Submission, slurm: SlurmConfig) -> str:
    """The step of the job, up to its status: all processes of a run, or the one that serves."""
    shared = {
        "recorded": "\n".join(RECORDED),
        "srun": _srun(submission, slurm),
        "python": quote(submission.python),
    }
    if submission.url is not None:
        return SERVE.format(url=quote(str(submission.url)), port=slurm.port, **shared)
    port = f"port={slurm.port}\n" if slurm.port else FREE_PORT
    return RUN.format(port=port, ending=ENDING_SECONDS, **shared)


def _asked(submission: Submission, slurm: SlurmConfig) -> list[tuple[str, list[str]]]:
    """The options of sbatch by the reason for them."""
    place = [
        o
        for key in ("partition", "account", "qos", "constraint", "exclude")
        for o in _option(key, getattr(slurm, key))
    ]
    do = "answer what they have" if submission.url else "save"
    limit = f"{slurm.signal_seconds} s before the limit the tasks are told to {do} and leave"
    again = "Slurm starts it again after preemption or a node's failure, and we after status 75"
    names = [
        *(f"--job-name={submission.name}", f"--chdir={submission.directory}"),
        *(f"--output={submission.log}", "--open-mode=append"),
    ]
    return [
        ("size: a task is one process of the run", _sizes(slurm)),
        ("place", place),
        (limit, [f"--time={slurm.time}", f"--signal=USR1@{slurm.signal_seconds}"]),
        (again, ["--requeue"]) if slurm.requeue else ("not started again by itself", ["--no-requeue"]),
        _one_or_many(len(submission.elements), slurm),
        ("one log over all starts", names),
        ("slurm.options", list(slurm.options)),
    ]


def _sizes(slurm: SlurmConfig) -> list[str]:
    return [
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={slurm.tasks_per_node}",
        *_option("gpus-per-node", slurm.gpus_per_node or None),
        *_option("cpus-per-task", slurm.cpus_per_task),
        *_option("mem", slurm.memory),
        *(["--exclusive"] if slurm.exclusive else []),
    ]


def _one_or_many(count: int, slurm: SlurmConfig) -> tuple[str, list[str]]:
    if count == 1:
        return "a second submission waits for the first and then goes on", ["--dependency=singleton"]
    at_once = f"%{slurm.array_limit}" if slurm.array_limit else ""
    return "one run for each element", [f"--array=0-{count - 1}{at_once}"]


def _lines(why: str, options: Sequence[str]) -> list[str]:
    return [f"# {why}", *(f"#SBATCH {_directive(option)}" for option in options)] if options else []


def _directive(option: str) -> str:
    """Quoted where it has to be: sbatch splits these lines by spaces outside of quotes."""
    return f'"{option}"' if any(char.isspace() for char in option) else option


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name}={value}"]


def _size(slurm: SlurmConfig) -> str:
    each = (
        counted(slurm.gpus_per_node, "GPU") if slurm.gpus_per_node else counted(slurm.tasks_per_node, "task")
    )
    return f"{counted(slurm.nodes, 'node')} with {each} each, {counted(slurm.devices, 'device')}"


def _setup(submission: Submission, slurm: SlurmConfig) -> str:
    """Lines of the user's, and the flags that the submitting shell had."""
    flags = dict(submission.environment)
    if not slurm.gpus_per_node:
        flags.setdefault("JAX_PLATFORMS", "cpu")
    lines = [*slurm.setup, *(f"export {name}={quote(value)}" for name, value in sorted(flags.items()))]
    return "".join(f"{line}\n" for line in ["", *lines]) if lines else ""


def _words(submission: Submission) -> str:
    """The run's directory, and the command line of train.py, a word a line."""
    if len(submission.elements) == 1:
        return "\n" + _element(submission.elements[0], "")
    cases = [f"{i})\n{_element(element, '    ')}    ;;\n" for i, element in enumerate(submission.elements)]
    return "\ncase $SLURM_ARRAY_TASK_ID in\n" + "".join(cases) + "esac\n"


def _element(element: Element, indent: str) -> str:
    words = (f"    {quote(word)}" for word in element.words)
    lines = (f"run={quote(element.directory)}", "words=(", *words, ")")
    return "".join(f"{indent}{line}\n" for line in lines)


def _srun(submission: Submission, slurm: SlurmConfig) -> str:
    """Options of the step: GPUs that tasks of one node divide, and the container."""
    options: list[str] = []
    if slurm.gpus_per_node and slurm.tasks_per_node > 1:
        options.append(f"--gpus-per-task={slurm.gpus_per_node // slurm.tasks_per_node}")
    if slurm.cpus_per_task is not None:  # which srun no longer takes from the job
        options.append(f"--cpus-per-task={slurm.cpus_per_task}")
    if slurm.container is not None:
        places = [f"{submission.directory}:{submission.directory}", f"{submission.here}:{submission.here}"]
        options += [
            f"--container-image={slurm.container}",
            f"--container-mounts={','.join([*places, *slurm.mounts])}",
            f"--container-workdir={submission.directory}",
        ]
    return "".join(f" \\\n    {quote(option)}" for option in options)
