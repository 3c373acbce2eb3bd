"""A run as Kubernetes manifests: `python scripts/kubernetes.py +experiment=NAME kube.image=IMAGE …`.

Everything but `kube.*` is train.py's command line, composed and checked here as train.py does, against as
many devices as the cluster gives. The YAML goes to stdout, or with kube.output=DIR into files; nothing is
sent to a cluster. docs/kubernetes.md explains what is rendered and why.
"""

import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

import yaml

from common.text import counted
from launch.kubernetes import objects
from launch.kubernetes.config import KubeConfig, check_job, job_name, metrics_port, parse_kube
from launch.kubernetes.objects import Object, Request
from scripts.command import refuse

if TYPE_CHECKING:
    from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
# File, what makes its objects, and what a person who reads it should know.
PARTS: tuple[tuple[str, Callable[[Request], list[Object]], str], ...] = (
    (
        "1-queue",
        objects.queue_objects,
        "The queue, made once by an administrator: which nodes, how much of them, and the door to it in this "
        "namespace. Leave it out where a queue of this name exists.",
    ),
    (
        "2-access",
        objects.access_objects,
        "The account that the pods run as. It may look at pods in this namespace, and nothing else.",
    ),
    (
        "3-volume",
        objects.volume_objects,
        "The volume with runs/ and the caches. Every node writes to it; it outlives the job.",
    ),
    (
        "4-config",
        objects.config_objects,
        "A record of what was asked for: train.py's words, the config that they compose, and the commit that "
        "composed it. Nothing reads it.",
    ),
    (
        "5-jobset",
        objects.job_objects,
        "The job: one pod a node, one process a pod. A pod that exits 75 (saved at a notice to leave) or is "
        "evicted restarts all of them from the last checkpoint, as often as it happens; one that exits 2 "
        "(bad input) ends the job; any other failure restarts it, up to maxRestarts times.",
    ),
)
PURPOSE = """\
Render a run as Kubernetes manifests: a JobSet, its account, volume and queue, and a record of its config.
Other words are train.py's, and are checked as it would. Nothing is sent to a cluster:

  python scripts/kubernetes.py +experiment=llama_1b mesh=fsdp kube.image=REGISTRY/cambrian:cuda \\
      kube.nodes=4 kube.claim=runs | kubectl apply -f -

{keys}"""


def render(config: "Config", *, kube: KubeConfig, words: Sequence[str], command: Sequence[str]) -> int:
    """Check the run against the cluster, and write the manifests."""
    check_job(config, kube)
    request = Request(
        name=job_name(config, kube),
        kube=kube,
        words=tuple(words),
        config=yaml.safe_dump(asdict(config), sort_keys=False),
        commit=commit(),
        metrics_port=metrics_port(config, kube),
    )
    files = documents(request, command)
    if kube.output is None:
        print("---\n".join(files.values()), end="")
        return 0
    folder = Path(kube.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}/: {', '.join(files)}")
    print(next_steps(request))
    return 0


def documents(request: Request, command: Sequence[str]) -> dict[str, str]:
    """File name → YAML with comments; a part that this run does not need has no file."""
    files = {}
    for name, make, about in PARTS:
        if objects := make(request):
            texts = [yaml.dump(item, Dumper=Readable, sort_keys=False, width=110) for item in objects]
            files[f"{name}.yaml"] = comment(about) + "---\n".join(texts)
    first = next(iter(files))
    files[first] = head(request, command) + files[first]
    return files


def head(request: Request, command: Sequence[str]) -> str:
    """What made these, and what to type next."""
    kube, lines = request.kube, [""]
    for word in map(shlex.quote, command):
        if len(lines[-1]) + len(word) > 96:
            lines.append("   ")
        lines[-1] += f" {word}"
    typed = " \\\n#  ".join(lines)
    devices = f"{counted(kube.pods, 'node')}, {counted(kube.devices, 'device')}"
    steps = textwrap.indent(next_steps(request), "#   ", lambda line: True)
    return f"# {request.name}: {devices} ({kube.kind}), made by\n#\n#  {typed}\n#\n{steps}\n#\n"


def next_steps(request: Request) -> str:
    """The commands that start, watch, stop and resume the job."""
    space, name = f"-n {request.kube.namespace}", request.name
    mine, first = f"-l app.kubernetes.io/instance={name}", "batch.kubernetes.io/job-completion-index=0"
    lines = {
        "start it; after a stop, go on from what it saved": f"apply -f {request.kube.output or '-'}",
        "see how it goes": f"{space} get jobset,pods {mine}",
        "read along": f"{space} logs -f {mine},{first}",
        "stop it; what it saved stays": f"{space} delete jobset {name}",
    }
    if request.kube.queue:
        lines["its place in the queue"] = f"{space} get workloads"
    return "\n".join(f"{why}:\n    kubectl {words}" for why, words in lines.items())


def comment(text: str) -> str:
    """The text as YAML comments."""
    return textwrap.fill(text, 108, initial_indent="# ", subsequent_indent="# ") + "\n"


class Readable(yaml.SafeDumper):
    """Texts of several lines as blocks, and lists indented under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below its key."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Labels are shared dicts here; in a file each is written out."""
        return True


# PyYAML leaves `1e5` bare, and Kubernetes reads a number, where only texts may stand.
_NUMBER = re.compile(r"[-+.\d][-+.\w]*")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if _NUMBER.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Readable.add_representer(str, _text)


def commit() -> str:
    """The commit of this code, `-dirty` where it was changed since; "unknown" outside of a checkout."""
    from artifacts.manifest import git_state

    state = git_state(ROOT)
    if state is None or state["sha"] is None:
        return "unknown"
    return state["sha"] + ("-dirty" if state["diff"] else "")


def key_table() -> str:
    """Every key of `kube.*` with its default; its meaning stands on its line in
    launch/kubernetes/config.py.
    """
    shown = {item.name: getattr(KubeConfig(image="?"), item.name) for item in fields(KubeConfig)}
    shown["image"] = "IMAGE"
    words = [
        f"kube.{key}={'null' if value is None else value}".replace(" ", "") for key, value in shown.items()
    ]
    return (
        textwrap.fill(
            " ".join(words), 108, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
        + "\n  (launch/kubernetes/config.py says what each means)"
    )


def run(argv: Sequence[str]) -> int:
    """Do what a command line asks; return the exit status."""
    from configs.cli import main

    script = "python scripts/kubernetes.py"
    ours = [word for word in argv if word.startswith("kube.")]
    words = [word for word in argv if word not in ours]
    try:
        if {"-m", "--multirun"} & set(words):
            raise ValueError("-m: a manifest is of one run; render each run of a sweep by itself")
        helps = bool({"-h", "--help"} & set(words))
        kube = KubeConfig(image="?") if helps else parse_kube(ours)
    except ValueError as error:
        return refuse(error)
    task = partial(render, kube=kube, words=words, command=[*script.split(), *argv])
    return main(task, words, script=script, purpose=PURPOSE.format(keys=key_table()))


if __name__ == "__main__":
    command.start(run)
