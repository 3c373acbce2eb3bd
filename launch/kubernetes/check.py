"""Whether a run fits into the cluster that `kube.*` describes, and what its job is called there."""

import math
import re

from launch.kubernetes.config import LABEL, NAME_LIMIT, TASK, KubeConfig
from training.config import Config


def job_name(config: Config, kube: KubeConfig) -> str:
    """The JobSet's name: kube.name, or run.name in small letters with - for what DNS has not.

    Raises ValueError where the longest name that is made of it, a pod's, would not fit.
    """
    made = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")
    name = kube.name or made
    if not re.fullmatch(LABEL, name):
        raise ValueError(f"run.name={config.run.name} makes no DNS label ({name}); give kube.name=")
    room = NAME_LIMIT - len(f"-{TASK}-{kube.slices - 1}-{kube.nodes - 1}-abcde")  # 5 letters from Kubernetes
    if len(name) > room:
        key = "kube.name" if kube.name else "run.name"
        raise ValueError(
            f"{key}={name} has {len(name)} letters; pods' names leave {room}: give a shorter kube.name="
        )
    return name


def check_job(config: Config, kube: KubeConfig) -> None:
    """Raise ValueError where the run and the cluster do not fit each other: devices, slices, what is kept."""
    from common.checks import ConfigError
    from training.legal.check import check

    _check_tpu(config, kube)
    factors = {
        "kube.slices": kube.slices,
        "kube.nodes": kube.nodes,
        "kube.devices_per_node": kube.devices_per_node,
    }
    try:
        check(config, kube.devices)
    except ConfigError as error:
        product = " * ".join(f"{key}={n}" for key, n in factors.items() if n > 1 or key != "kube.slices")
        raise ConfigError(f"{product} is {kube.devices} devices: {error}") from error
    _check_kept(config, kube)


def _check_tpu(config: Config, kube: KubeConfig) -> None:
    if kube.kind == "cpu" and kube.accelerator is not None:
        raise ValueError(f"kube.accelerator={kube.accelerator}, but kube.kind=cpu has none; leave it out")
    if kube.kind != "tpu":
        if kube.slices > 1:
            raise ValueError(
                f"kube.slices={kube.slices} is of TPUs, and kube.kind={kube.kind}; use kube.nodes"
            )
        if kube.topology is not None:
            raise ValueError(
                f"kube.topology={kube.topology} is of TPUs, and kube.kind={kube.kind}; leave it out"
            )
        return
    if kube.accelerator is None or kube.topology is None:
        missing = "accelerator" if kube.accelerator is None else "topology"
        example = {"accelerator": "tpu-v5p-slice", "topology": "2x2x4"}[missing]
        raise ValueError(f"kube.{missing} is missing: kube.kind=tpu needs it, as in kube.{missing}={example}")
    chips, here = math.prod(map(int, kube.topology.split("x"))), kube.nodes * kube.devices_per_node
    if chips != here:
        fitting = chips // kube.devices_per_node
        remedy = f"; use kube.nodes={fitting}" if fitting * kube.devices_per_node == chips else ""
        raise ValueError(
            f"kube.topology={kube.topology} is {chips} chips, but kube.nodes={kube.nodes} * "
            f"kube.devices_per_node={kube.devices_per_node} is {here}{remedy}"
        )
    crossed = math.prod(config.mesh.dcn.values())
    if crossed != kube.slices:
        raise ValueError(
            f"kube.slices={kube.slices}, but mesh.dcn crosses {crossed}; use factors whose product is "
            f"{kube.slices}, as mesh=multi_slice mesh.replica={kube.slices} has"
        )


def _check_kept(config: Config, kube: KubeConfig) -> None:
    """Pods come and go with all that they hold: what a run goes on from lies on a volume that all nodes see.

    A URL as checkpoint.directory gets copies of the checkpoints; they are written in the run's directory.
    """
    if kube.claim is None:
        raise ValueError(
            "kube.claim is missing: without a volume for runs/ a restart would begin at step 0; give "
            "kube.claim=NAME (and kube.claim_size=500Gi to make it)"
        )
    for key, path, room in (
        ("run.dir", config.run.dir, "runs"),
        ("data.cache_dir", config.data.cache_dir, ".cache"),
    ):
        if path.split("/")[0] != room:
            raise ValueError(f"{key}={path} lies outside of the volume; keep it below {room}/")


def metrics_port(config: Config, kube: KubeConfig) -> int | None:
    """Where the run answers Prometheus; None where it does not. ValueError where nobody could find it."""
    port: int | None = getattr(config.logging, "prometheus_port", None)
    if port in (0, kube.port):
        taken = "any free port, which no manifest can name" if port == 0 else "kube.port as well"
        raise ValueError(f"logging.prometheus_port={port} is {taken}; give another, such as 9100")
    return port
