"""What `kube.*` tells `scripts/kubernetes.py`: a job's shape in a cluster."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from common.checks import choice, did_you_mean, require, within

KINDS = ("gpu", "tpu", "cpu")
DEVICES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}  # as which resource they are asked for
OptionsT = TypeVar("OptionsT")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
TASK = "train"  # the replicated job, and its container
NAME_LIMIT = 63  # of a DNS label, which every pod's name must be
LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_QUANTITY = r"[1-9][0-9]*(m|k|M|G|T|Ki|Mi|Gi|Ti)?"


@dataclass
class KubeConfig:
    """Nodes, devices, image, queue and volume of a run; a pod is one process and has a node's devices."""

    nodes: int = 1  # pods, each on a node of its own; of TPUs, in a slice
    devices_per_node: int = 8  # GPUs or TPU chips of a node; of kind=cpu, simulated devices
    slices: int = 1  # TPU slices
    kind: str = "gpu"  # gpu | tpu | cpu
    accelerator: str | None = (
        None  # GKE's name for it: nvidia-h100-80gb, tpu-v5p-slice; null: any node will do
    )
    topology: str | None = None  # chips of a TPU slice, such as 4x4 or 2x2x4
    node_selector: dict[str, str] = field(default_factory=dict)  # further labels that nodes must have
    tolerations: list[str] = field(
        default_factory=list
    )  # taints to accept, as kubectl writes: KEY=VALUE:EFFECT
    image: str = ""  # what Dockerfile makes, by name and tag
    pull_secrets: list[str] = field(default_factory=list)  # names of secrets that the registry asks for
    name: str | None = None  # of the JobSet; null: run.name in letters that Kubernetes takes
    namespace: str = "default"  # where everything but the queue's parts lives
    service_account: str | None = None  # an existing one, bound to a cloud identity; null renders one
    queue: str | None = None  # Kueue's LocalQueue; null: started at once, without a queue
    queue_nodes: int | None = (
        None  # nodes that the rendered queue may hand out; null: as many as this job has
    )
    priority_class: str | None = None  # an existing PriorityClass
    claim: str | None = None  # PersistentVolumeClaim for runs/ and the caches, the same for all nodes
    claim_size: str | None = None  # such as 500Gi: render the claim; null: it exists
    storage_class: str | None = None  # of a rendered claim; null: the cluster's default
    cpu: str = "8"  # cores that a pod asks for
    memory: str = "64Gi"  # that a pod may use, shared memory included
    shared_memory: str = "16Gi"  # /dev/shm, which NCCL needs between a node's devices
    resources: dict[str, str] = field(
        default_factory=dict
    )  # further ones, such as {vpc.amazonaws.com/efa: 32}
    env: dict[str, str] = field(default_factory=dict)  # in plain sight: no secrets
    secrets: list[str] = field(default_factory=list)  # names of secrets whose keys become variables
    port: int = 55527  # where process 0 meets the others
    join_seconds: int = 1800  # that it waits for them: images take a while to arrive
    max_restarts: int = 10  # after faults; restarts after a notice to leave are not counted
    grace_seconds: int = 600  # from SIGTERM to SIGKILL: a step, a save, and the upload of it
    output: str | None = None  # directory for the manifests; null: stdout

    def __post_init__(self) -> None:
        """Each value by itself. ValueError in one line."""
        choice("kube.kind", self.kind, KINDS)
        for key in ("nodes", "devices_per_node", "slices", "join_seconds", "grace_seconds"):
            within(f"kube.{key}", getattr(self, key), 1)
        within("kube.max_restarts", self.max_restarts, 0)
        within("kube.port", self.port, 1024, 65535)
        ok = self.queue_nodes is None or self.queue_nodes >= self.pods
        require(ok, "kube.queue_nodes", self.queue_nodes, f"{self.pods} or more: this job's nodes")
        self._check_words()

    def _check_words(self) -> None:
        require(
            bool(self.image),
            "kube.image",
            "(nothing)",
            "the image to run, as in kube.image=REGISTRY/cambrian:cuda",
        )
        for key in ("name", "namespace", "service_account", "queue", "claim"):
            value = getattr(self, key)
            ok = value is None or (re.fullmatch(LABEL, value) is not None and len(value) <= NAME_LIMIT)
            require(ok, f"kube.{key}", value, "a DNS label: lower-case letters, digits and -, at most 63")
        quantities = {key: getattr(self, key) for key in ("cpu", "memory", "shared_memory", "claim_size")}
        quantities |= {f"resources.{key}": value for key, value in self.resources.items()}
        for key, value in quantities.items():
            ok = value is None or re.fullmatch(_QUANTITY, value) is not None
            require(ok, f"kube.{key}", value, "a quantity such as 8, 500m or 64Gi")
        ok = self.topology is None or re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", self.topology) is not None
        require(ok, "kube.topology", self.topology, "chips along each side, such as 4x4 or 2x2x4")
        for word in self.tolerations:
            parse_toleration(word)

    @property
    def pods(self) -> int:
        """Processes of the whole job, one a pod."""
        return self.nodes * self.slices

    @property
    def devices(self) -> int:
        """Devices of the whole job, over its pods."""
        return self.pods * self.devices_per_node

    @property
    def device_resource(self) -> str | None:
        """What a node's devices are called; None for a CPU."""
        return DEVICES.get(self.kind)

    def asked(self) -> dict[str, str]:
        """Every resource that a pod asks for, which is also what a queue has to count."""
        asked = {"cpu": self.cpu, "memory": self.memory, **self.resources}
        return asked | ({self.device_resource: str(self.devices_per_node)} if self.device_resource else {})


def parse_toleration(word: str) -> dict[str, str]:
    """`KEY=VALUE:EFFECT`, `KEY:EFFECT` or `KEY` as a pod's toleration. ValueError for anything else."""
    match = re.fullmatch(r"(?P<key>[\w./-]+)(=(?P<value>[\w.-]*))?(:(?P<effect>\w+))?", word)
    if match is None or (match["effect"] or EFFECTS[0]) not in EFFECTS:
        raise ValueError(
            f"kube.tolerations={word} must be KEY=VALUE:EFFECT, KEY:EFFECT or KEY, with an EFFECT of "
            f"{', '.join(EFFECTS)}"
        )
    found = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
    found |= {key: match[key] for key in ("value", "effect") if match[key]}
    return found


def parse_kube(words: Sequence[str]) -> KubeConfig:
    """`kube.KEY=VALUE` words, values in YAML, as a checked KubeConfig. ValueError in one line."""
    return parse_words(words, "kube.", KubeConfig)


def parse_words(words: Sequence[str], prefix: str, kind: type[OptionsT], **given: Any) -> OptionsT:
    """`PREFIX.KEY=VALUE` words over the defaults and `given`, checked. ValueError in one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    types = {item.name: item.type for item in fields(kind) if item.name not in given}  # type: ignore[arg-type]
    config = OmegaConf.structured(kind)
    for key, value in given.items():
        config[key] = value
    for word in words:
        name, equals, text = word.partition("=")
        key, _, below = name.removeprefix(prefix).partition(".")
        if not equals:
            raise ValueError(f"{word} is no KEY=VALUE; give one, as in {prefix}{next(iter(types))}=4")
        if key not in types:
            raise ValueError(f"{name} is no key of kubernetes.py; {did_you_mean(key, types)}")
        try:
            # Labels have dots of their own, so all that is below a key is one key.
            config[key] = {**config[key], below: text} if below else _value(text)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            called = getattr(types[key], "__name__", "") if types[key] in (int, str) else types[key]
            raise ValueError(
                f"{word} is not of type {called}; --help says where each key is explained"
            ) from error
    made = OmegaConf.to_object(config)
    assert isinstance(made, kind)
    return made


def _value(text: str) -> Any:
    """Text, or a list or mapping of texts: YAML's own guesses would make `true` of an `on`."""
    import yaml

    try:
        value = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(text)
    return None if value in ("null", "~") else value or ""
