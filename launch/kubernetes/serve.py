"""The objects of a served model in a Kubernetes cluster: replicas, the door to them, and how many there are.

A replica is one pod with a node's devices. The fields are those of Kubernetes 1.31 and newer,
monitoring.coreos.com/v1 (Prometheus' operator), keda.sh/v1alpha1 (KEDA 2) and
inference.networking.k8s.io/v1 (the gateway's inference extension); nothing is asked of a cluster.
"""

import re
from dataclasses import dataclass

from common.checks import choice, require, within
from launch.kubernetes.config import LABEL, NAME_LIMIT, KubeConfig
from launch.kubernetes.objects import HOME, KubeWorkload, Object, devices, mounts, placed, security, volumes

ENGINES = ("cambrian", "vllm")
SERVER = "serve"  # the container
WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
KEY_DIRECTORY = "/run/secrets/cambrian"
SECONDS = 15  # between two looks at a replica's figures


@dataclass
class KubeServeConfig:
    """Engine, replicas and what makes them more; a replica's devices and volume are those of `kube.*`."""

    model: str  # cambrian: a run's name; vllm: a directory below runs/, as scripts/export.py writes it
    engine: str = "cambrian"  # cambrian | vllm
    min: int = 1  # replicas that are always there
    max: int = 1  # replicas at a peak; more than min renders a ScaledObject
    waiting: int = 4  # requests that may wait for each replica before there is one more
    running: int | None = None  # requests under way on each that call for one more too; null: none do
    calm_seconds: int = 300  # that fewer were enough before one goes
    prometheus: str = "http://prometheus-operated.monitoring:9090"  # where KEDA asks for the figures
    port: int = 8000  # where a replica answers
    start_seconds: int = 900  # that weights may load and programs compile before it counts as hung
    api_key: str | None = None  # a Secret whose `api-key` holds the keys, one a line (vllm: one key)
    picker: str | None = None  # Service of the endpoint picker: renders an InferencePool; null: none
    picker_port: int = 9002  # where the picker listens

    def __post_init__(self) -> None:
        """Each value by itself, and a maximum against its minimum. ValueError in one line."""
        choice("serve.engine", self.engine, ENGINES)
        least = {"min": 1, "waiting": 1, "running": 1, "calm_seconds": 0, "start_seconds": 1}
        for key, limit in least.items():
            within(f"serve.{key}", getattr(self, key), limit)
        for key in ("port", "picker_port"):
            within(f"serve.{key}", getattr(self, key), 1024, 65535)
        require(self.max >= self.min, "serve.max", self.max, f"serve.min={self.min} or more")
        for key in ("api_key", "picker"):
            value = getattr(self, key)
            ok = value is None or (re.fullmatch(LABEL, value) is not None and len(value) <= NAME_LIMIT)
            require(ok, f"serve.{key}", value, "a DNS label: lower-case letters, digits and -, at most 63")
        if self.engine == "vllm":
            inside = self.model.startswith("runs/") and ".." not in self.model.split("/")
            require(inside, "model", self.model, "below runs/, which is what the volume holds, for vllm")


def check_served(serve: KubeServeConfig, kube: KubeConfig) -> None:
    """Raise ValueError where `kube.*` asks for what a server does not have."""
    alone = {"nodes": "serve.max=N for more replicas", "slices": "one slice of one node"}
    for key, remedy in alone.items():
        if (count := getattr(kube, key)) > 1:
            raise ValueError(f"kube.{key}={count}, but a replica is one process on one node; use {remedy}")
    if kube.queue is not None:
        raise ValueError(f"kube.queue={kube.queue} is of jobs that end; leave it out for a server")
    if kube.claim is None:
        raise ValueError(
            "kube.claim is missing: the volume that has the model in its runs/; give kube.claim=NAME"
        )
    if kube.claim_size is not None:
        raise ValueError(
            f"kube.claim_size={kube.claim_size} would make an empty volume; leave it out, the model's exists"
        )
    if serve.engine == "vllm" and kube.kind == "tpu":
        raise ValueError(
            "kube.kind=tpu with serve.engine=vllm needs an image and options of its own; use gpu"
        )


@dataclass(frozen=True)
class Served:
    """What is rendered: a workload whose words are the server's own, and how it is served."""

    workload: KubeWorkload
    serve: KubeServeConfig

    @property
    def name(self) -> str:
        """Of the Deployment and all around it."""
        return self.workload.name


def served_name(model: str, kube: KubeConfig) -> str:
    """The Deployment's name: kube.name, or the model's last part in DNS's letters with `-server`. ValueError.

    Not the run's own name: a job that trains it has that one, and its pods must not be taken for servers.
    """
    made = re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    name = kube.name or f"{made}-server"
    room = NAME_LIMIT - len("-1234567890-abcde")  # what a ReplicaSet and its pod add
    if not re.fullmatch(LABEL, name) or len(name) > room:
        raise ValueError(f"{name} is no DNS label of at most {room} letters; give another kube.name=")
    return name


def account_objects(served: Served) -> list[Object]:
    """The account that the pods run as, which may do nothing in the cluster; none where one was named."""
    workload = served.workload
    if workload.kube.service_account is not None:
        return []
    return [workload.made("v1", "ServiceAccount", workload.account) | {"automountServiceAccountToken": False}]


def deployment_objects(served: Served) -> list[Object]:
    """The replicas. A new one answers before an old one goes, so a change of model takes nothing away."""
    workload, serve = served.workload, served.serve
    spec: Object = {
        "selector": {"matchLabels": workload.labels},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "progressDeadlineSeconds": serve.start_seconds + 600,  # an image takes a while to arrive
        "template": {"metadata": {"labels": workload.labels}, "spec": server_pod(served)},
    }
    if serve.max == serve.min:  # else KEDA's to say: a number here would undo it at each `kubectl apply`
        spec["replicas"] = serve.min
    return [workload.made("apps/v1", "Deployment", served.name) | {"spec": spec}]


def server_pod(served: Served) -> Object:
    """A process that has `grace_seconds` from SIGTERM to answer what it has taken on, and exits 0."""
    kube, serve = served.workload.kube, served.serve
    spec: Object = {
        "terminationGracePeriodSeconds": kube.grace_seconds,
        "serviceAccountName": served.workload.account,
        "automountServiceAccountToken": False,
        "securityContext": security(kube),
        **placed(kube),
    }
    rooms = [*volumes(kube), {"name": "scratch", "emptyDir": {}}]
    if serve.api_key is not None and serve.engine == "cambrian":
        rooms.append({"name": "api-key", "secret": {"secretName": serve.api_key}})
    return spec | {"containers": [server(served)], "volumes": rooms}


def server(served: Served) -> Object:
    """The engine's command, its probes, and a root that nobody can write to."""
    workload, serve = served.workload, served.serve
    requests, limits = devices(workload.kube)
    inside = [
        mount | {"readOnly": True} if mount["mountPath"].endswith("/runs") else mount
        for mount in mounts(workload.kube)
    ]
    inside.append({"name": "scratch", "mountPath": "/tmp"})
    if serve.api_key is not None and serve.engine == "cambrian":
        inside.append({"name": "api-key", "mountPath": KEY_DIRECTORY, "readOnly": True})
    rights: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if workload.kube.kind == "tpu":  # the driver raises its limit of locked memory
        rights = {"capabilities": {"add": ["SYS_RESOURCE"]}}
    found: Object = {
        "name": SERVER,
        "image": workload.kube.image,
        **command_line(served),
        "env": environment(served),
        "resources": {"requests": requests, "limits": limits},
        "ports": [{"name": "http", "containerPort": serve.port}],
        **probes(serve),
        "volumeMounts": inside,
        "securityContext": rights | {"readOnlyRootFilesystem": True},
    }
    if workload.kube.secrets:
        found["envFrom"] = [{"secretRef": {"name": name}} for name in workload.kube.secrets]
    return found


def command_line(served: Served) -> Object:
    """What starts the engine: scripts/serve.py in our image, `vllm serve` in vLLM's."""
    serve, words = served.serve, list(served.workload.words)
    if serve.engine == "vllm":
        where = [str(HOME / serve.model), "--host=0.0.0.0", f"--port={serve.port}"]
        return {"command": ["vllm", "serve"], "args": [*where, f"--served-model-name={served.name}", *words]}
    key = [f"api_key_file={KEY_DIRECTORY}/api-key"] if serve.api_key is not None else []
    # tini as in the image: a process 1 without a handler would not hear a SIGTERM in its first seconds.
    start = ["tini", "--", "python", "scripts/serve.py"]
    return {"command": start, "args": [serve.model, "host=0.0.0.0", f"port={serve.port}", *key, *words]}


def environment(served: Served) -> list[Object]:
    """On which devices it insists; of vLLM, where it may write and which key it asks for."""
    kube, serve = served.workload.kube, served.serve
    if serve.engine == "cambrian":
        values = {"JAX_PLATFORMS": {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}[kube.kind]}
    else:  # the root is read-only, and the user has no home in an image that is not ours
        cache = str(HOME / ".cache")
        values = {
            "HOME": "/tmp",
            "XDG_CACHE_HOME": cache,
            "VLLM_CACHE_ROOT": f"{cache}/vllm",
            "HF_HUB_OFFLINE": "1",
        }
    found: list[Object] = [{"name": name, "value": value} for name, value in (values | kube.env).items()]
    if serve.engine == "vllm" and serve.api_key is not None:
        reference = {"secretKeyRef": {"name": serve.api_key, "key": "api-key"}}
        found.append({"name": "VLLM_API_KEY", "valueFrom": reference})
    return found


def probes(serve: KubeServeConfig) -> Object:
    """Ready: compiled, and not about to leave. Alive: it answers, once it has had the time to start.

    A server that drains is alive and not ready: it gets no new requests and keeps those it has. vLLM has one
    address for both.
    """

    def at(path: str, **timing: int) -> Object:
        return {"httpGet": {"path": path, "port": "http"}, **timing}

    ready = "/ready" if serve.engine == "cambrian" else "/health"
    tries = -(-serve.start_seconds // 5)
    return {
        "startupProbe": at("/health", periodSeconds=5, failureThreshold=tries, timeoutSeconds=5),
        "readinessProbe": at(ready, periodSeconds=2, failureThreshold=1, timeoutSeconds=5),
        "livenessProbe": at("/health", periodSeconds=10, failureThreshold=6, timeoutSeconds=10),
    }


def door_objects(served: Served) -> list[Object]:
    """The Service that shares requests out over ready replicas, and where Prometheus finds their figures."""
    workload, serve = served.workload, served.serve
    service = workload.made("v1", "Service", served.name)
    port = {"name": "http", "port": serve.port, "targetPort": "http"}
    service["spec"] = {"selector": workload.labels, "ports": [port]}
    monitor = workload.made("monitoring.coreos.com/v1", "PodMonitor", served.name)
    scraped = {"port": "http", "path": "/metrics", "interval": f"{SECONDS}s"}
    monitor["spec"] = {"selector": {"matchLabels": workload.labels}, "podMetricsEndpoints": [scraped]}
    return [service, monitor]


def scale_objects(served: Served) -> list[Object]:
    """How many replicas there are, by what waits for them; none where their number is fixed."""
    workload, serve = served.workload, served.serve
    if serve.max == serve.min:
        return []
    pods = f'namespace="{workload.kube.namespace}", pod=~"{served.name}-.*"'
    limits = {WAITING: serve.waiting} | ({RUNNING: serve.running} if serve.running else {})
    scaled = workload.made("keda.sh/v1alpha1", "ScaledObject", served.name)
    scaled["spec"] = {
        "scaleTargetRef": {"name": served.name},
        "minReplicaCount": serve.min,
        "maxReplicaCount": serve.max,
        "pollingInterval": SECONDS,
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": serve.calm_seconds}}
            }
        },
        "triggers": [
            {
                "type": "prometheus",
                "metricType": "AverageValue",  # the sum over the replicas that there are
                "metadata": {
                    "serverAddress": serve.prometheus,
                    "query": f"sum({name}{{{pods}}})",
                    "threshold": str(limit),
                },
            }
            for name, limit in limits.items()
        ],
    }
    return [scaled]


def pool_objects(served: Served) -> list[Object]:
    """The replicas as a gateway's endpoint picker knows them; none where no picker was named."""
    workload, serve = served.workload, served.serve
    if serve.picker is None:
        return []
    pool = workload.made("inference.networking.k8s.io/v1", "InferencePool", served.name)
    pool["spec"] = {
        "selector": {"matchLabels": workload.labels},
        "targetPorts": [{"number": serve.port}],
        "endpointPickerRef": {"name": serve.picker, "port": {"number": serve.picker_port}},
    }
    return [pool]
