"""A run as Kubernetes manifests: `python scripts/kubernetes.py +experiment=NAME kube.image=IMAGE …`.

`python scripts/kubernetes.py serve NAME kube.image=IMAGE …` renders a server of it instead. Of a run, all
words but `kube.*` are train.py's command line, composed and checked here as train.py does, against as many
devices as the cluster gives. The YAML goes to stdout, or with kube.output=DIR into files; nothing is sent to
a cluster. docs/kubernetes.md and docs/serving-deploy.md explain what is rendered and why.
"""

import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if __name__ == "__main__":
    import command

import yaml

from common.text import counted
from launch.kubernetes import objects, serve
from launch.kubernetes.check import check_job, job_name, metrics_port
from launch.kubernetes.config import KubeConfig, parse_kube, parse_words
from launch.kubernetes.objects import KubeWorkload, Object
from launch.kubernetes.serve import KubeServeConfig, Served
from scripts.command import refuse
from scripts.command import run as commanded

if TYPE_CHECKING:
    from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
AskedT = TypeVar("AskedT", KubeWorkload, Served)
# File, what makes its objects, and what a person who reads it should know.
PARTS: tuple[tuple[str, Callable[[KubeWorkload], list[Object]], str], ...] = (
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
SERVE_PARTS: tuple[tuple[str, Callable[[Served], list[Object]], str], ...] = (
    (
        "1-account",
        serve.account_objects,
        "The account that the pods run as. It may do nothing in the cluster.",
    ),
    (
        "2-deployment",
        serve.deployment_objects,
        "The replicas. One that is asked to leave is no longer ready, answers what it has taken on, and "
        "exits 0; it has terminationGracePeriodSeconds for that. Programs are compiled before it is ready.",
    ),
    (
        "3-door",
        serve.door_objects,
        "The Service in front of the ready replicas, and where Prometheus' operator finds their figures.",
    ),
    (
        "4-scale",
        serve.scale_objects,
        "How many replicas there are. KEDA asks Prometheus how many requests wait, and has the Deployment "
        "grow where there are more for each replica than the threshold.",
    ),
    (
        "5-pool",
        serve.pool_objects,
        "The same replicas for a gateway with an endpoint picker, which looks at each one's queue and cache "
        "instead of taking them in turn.",
    ),
)
SERVE = "serve"
SERVE_PURPOSE = """\
Render a server as Kubernetes manifests: a Deployment, its Service and account, a PodMonitor; a ScaledObject
where serve.max > serve.min, an InferencePool where serve.picker is given. Nothing is sent to a cluster:

  python scripts/kubernetes.py serve RUN kube.image=REGISTRY/cambrian:cuda kube.devices_per_node=1 \\
      kube.claim=runs serve.max=4 slots=64 follow=true | kubectl apply -f -
  python scripts/kubernetes.py serve runs/exported kube.image=vllm/vllm-openai:TAG serve.engine=vllm \\
      kube.devices_per_node=2 kube.claim=runs --tensor-parallel-size=2 | kubectl apply -f -

Other words are the engine's own: scripts/serve.py's, or those of `vllm serve`.

{keys}"""
PURPOSE = """\
Render a run as Kubernetes manifests: a JobSet, its account, volume and queue, and a record of its config.
Other words are train.py's, and are checked as it would. Nothing is sent to a cluster:

  python scripts/kubernetes.py +experiment=llama_1b mesh=fsdp kube.image=REGISTRY/cambrian:cuda \\
      kube.nodes=4 kube.claim=runs | kubectl apply -f -

{keys}"""


def render(config: "Config", *, kube: KubeConfig, words: Sequence[str], command: Sequence[str]) -> int:
    """Check the run against the cluster, and write the manifests."""
    check_job(config, kube)
    workload = KubeWorkload(
        name=job_name(config, kube),
        kube=kube,
        words=tuple(words),
        config=yaml.safe_dump(asdict(config), sort_keys=False),
        commit=commit(),
        metrics_port=metrics_port(config, kube),
    )
    files = documents(PARTS, workload, head(workload, command))
    return write(files, kube, next_steps(workload))


def render_server(words: Sequence[str], command: Sequence[str]) -> int:
    """Check a server against the cluster, and write the manifests. Raises ValueError in one line."""
    ours = [word for word in words if word.startswith("serve.")]
    model, *rest = [word for word in words if not word.startswith(("kube.", "serve."))] or [""]
    if not model or "=" in model or model.startswith("-"):
        raise ValueError(
            "serve is without a model; the first word behind it is a run's name, as in serve quickstart"
        )
    kube = parse_kube([word for word in words if word.startswith("kube.")])
    config = parse_words(ours, "serve.", KubeServeConfig, model=model)
    serve.check_served(config, kube)
    served = Served(KubeWorkload(serve.served_name(model, kube), kube, tuple(rest), "", commit()), config)
    head = titled(f"{served.name}: {config.engine} serves {model}", command, server_steps(served))
    return write(documents(SERVE_PARTS, served, head), kube, server_steps(served))


def write(files: dict[str, str], kube: KubeConfig, steps: str) -> int:
    """To stdout, or into kube.output with what to type next; the exit status."""
    if kube.output is None:
        print("---\n".join(files.values()), end="")
        return 0
    folder = Path(kube.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}/: {', '.join(files)}\n{steps}")
    return 0


def documents(
    parts: Sequence[tuple[str, Callable[[AskedT], list[Object]], str]], asked: AskedT, head: str
) -> dict[str, str]:
    """File name → YAML with comments; a part that is not needed has no file."""
    files = {}
    for name, make, about in parts:
        if objects := make(asked):
            texts = [yaml.dump(item, Dumper=Readable, sort_keys=False, width=110) for item in objects]
            files[f"{name}.yaml"] = comment(about) + "---\n".join(texts)
    first = next(iter(files))
    files[first] = head + files[first]
    return files


def head(workload: KubeWorkload, command: Sequence[str]) -> str:
    """What made a run's manifests, and what to type next."""
    kube = workload.kube
    devices = f"{counted(kube.pods, 'node')}, {counted(kube.devices, 'device')}"
    return titled(f"{workload.name}: {devices} ({kube.kind})", command, next_steps(workload))


def titled(what: str, command: Sequence[str], steps: str) -> str:
    """The comment above it all: what it is, the command that made it, what to type next."""
    lines = [""]
    for word in map(shlex.quote, command):
        if len(lines[-1]) + len(word) > 96:
            lines.append("   ")
        lines[-1] += f" {word}"
    typed = " \\\n#  ".join(lines)
    return f"# {what}, made by\n#\n#  {typed}\n#\n{textwrap.indent(steps, '#   ', lambda line: True)}\n#\n"


def server_steps(served: Served) -> str:
    """The commands that start, watch, try and stop a server."""
    kube, name = served.workload.kube, served.name
    space = f"-n {kube.namespace}"
    lines = {
        "start it, or change it while it answers": f"apply -f {kube.output or '-'}",
        "see how it goes": f"{space} rollout status deployment/{name}",
        "try it from here": f"{space} port-forward service/{name} {served.serve.port}",
        "stop it": f"{space} delete deployment,service,podmonitor,scaledobject,inferencepool "
        f"-l app.kubernetes.io/instance={name} --ignore-not-found",
    }
    return "\n".join(f"{why}:\n    kubectl {words}" for why, words in lines.items())


def next_steps(workload: KubeWorkload) -> str:
    """The commands that start, watch, stop and resume the job."""
    space, name = f"-n {workload.kube.namespace}", workload.name
    mine, first = f"-l app.kubernetes.io/instance={name}", "batch.kubernetes.io/job-completion-index=0"
    lines = {
        "start it; after a stop, go on from what it saved": f"apply -f {workload.kube.output or '-'}",
        "see how it goes": f"{space} get jobset,pods {mine}",
        "read along": f"{space} logs -f {mine},{first}",
        "stop it; what it saved stays": f"{space} delete jobset {name}",
    }
    if workload.kube.queue:
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


def key_table(kind: type[KubeConfig] | type[KubeServeConfig], prefix: str, **shown: str) -> str:
    """Every key with its default; its meaning stands on its line in the file where they are."""
    words = [
        f"{prefix}{item.name}={_default(item, shown)}".replace(" ", "")
        for item in fields(kind)
        if item.name != "model"
    ]
    file = f"{kind.__module__.replace('.', '/')}.py"
    table = textwrap.fill(
        " ".join(words), 108, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    return f"{table}\n  ({file} says what each means)"


def _default(item: Field[Any], shown: dict[str, str]) -> object:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return shown.get(item.name, "null" if value is None else value)


def run(argv: Sequence[str]) -> int:
    """Do what a command line asks; return the exit status."""
    from configs.cli import main

    script = "python scripts/kubernetes.py"
    if argv[:1] == [SERVE]:
        tables = (key_table(KubeServeConfig, "serve."), key_table(KubeConfig, "kube.", image="IMAGE"))
        render_words = partial(render_server, command=[*script.split(), *argv])
        return commanded(
            render_words, argv[1:], SERVE_PURPOSE.format(keys="".join(f"{table}\n" for table in tables))
        )
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
    return main(
        task, words, script=script, purpose=PURPOSE.format(keys=key_table(KubeConfig, "kube.", image="IMAGE"))
    )


if __name__ == "__main__":
    command.start(run)
