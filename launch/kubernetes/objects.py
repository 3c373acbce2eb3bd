"""The objects of a run in a Kubernetes cluster, as plain dicts: a JobSet and what it needs around it.

Everything here is a function of the checked config; nothing is asked of a cluster. The fields are those of
jobset.x-k8s.io/v1alpha2 (JobSet 0.10 and newer), kueue.x-k8s.io/v1beta2 and Kubernetes 1.31 and newer; the
tests hold them to the published schemas.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from common.errors import Requeue
from launch.kubernetes.config import TASK, KubeConfig, parse_toleration
from parallel.processes import COORDINATOR, JOIN, PROCESS, PROCESSES

HOME = PurePosixPath("/cambrian")  # the code in the image, and its working directory
USER = 10001  # whom the image runs as
BAD_INPUT, AGAIN = 2, Requeue.status  # exit statuses of train.py: see the README
EVICTED = "DisruptionTarget"  # what Kubernetes says of a pod that it takes away
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"  # as JOB_COMPLETION_INDEX
ATTEMPT = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"

Object = dict[str, Any]


@dataclass(frozen=True)
class KubeWorkload:
    """What is rendered: a name, the shape of the job, train.py's words, and the config they compose."""

    name: str
    kube: KubeConfig
    words: tuple[str, ...]
    config: str  # composed, as YAML
    commit: str  # of the code that composed it
    metrics_port: int | None = None  # of logging.prometheus_port

    @property
    def labels(self) -> dict[str, str]:
        """What everything of this run can be found by."""
        return {"app.kubernetes.io/name": "cambrian", "app.kubernetes.io/instance": self.name}

    def made(self, version: str, kind: str, name: str, *, labels: dict[str, str] | None = None) -> Object:
        """The head of an object in the run's namespace."""
        metadata = {"name": name, "namespace": self.kube.namespace, "labels": self.labels | (labels or {})}
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    @property
    def account(self) -> str:
        """The name of the job's service account."""
        return self.kube.service_account or self.name


def queue_objects(workload: KubeWorkload) -> list[Object]:
    """Kueue's part: which nodes (a flavour), how much of them (a cluster queue), and the door to it."""
    kube = workload.kube
    if kube.queue is None:
        return []
    nodes = kube.queue_nodes or kube.pods
    quotas = [{"name": name, "nominalQuota": times(one, nodes)} for name, one in kube.asked().items()]
    group = {"coveredResources": list(kube.asked()), "flavors": [{"name": kube.queue, "resources": quotas}]}
    version = "kueue.x-k8s.io/v1beta2"
    flavour: Object = {"apiVersion": version, "kind": "ResourceFlavor", "metadata": {"name": kube.queue}}
    if selector := node_selector(kube):
        flavour["spec"] = {"nodeLabels": selector}
    cluster = {
        "apiVersion": version,
        "kind": "ClusterQueue",
        "metadata": {"name": kube.queue},
        "spec": {
            "namespaceSelector": {},
            "queueingStrategy": "BestEffortFIFO",
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [group],
        },
    }
    local = {
        "apiVersion": version,
        "kind": "LocalQueue",
        "metadata": {"name": kube.queue, "namespace": kube.namespace},
        "spec": {"clusterQueue": kube.queue},
    }
    return [flavour, cluster, local]


def times(quantity: str, count: int) -> str:
    """`64Gi` times 4 is `256Gi`."""
    match = re.fullmatch(r"(\d+)(\D*)", quantity)
    assert match, quantity
    return f"{int(match[1]) * count}{match[2]}"


def access_objects(workload: KubeWorkload) -> list[Object]:
    """The account that pods run as, and leave to see their fellow pods; none where an account was named."""
    if workload.kube.service_account is not None:
        return []
    version, name = "rbac.authorization.k8s.io/v1", f"{workload.name}-pods"
    role = workload.made(version, "Role", name)
    role["rules"] = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    binding = workload.made(version, "RoleBinding", name)
    binding["roleRef"] = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", "name": workload.account, "namespace": workload.kube.namespace}
    binding["subjects"] = [subject]
    return [workload.made("v1", "ServiceAccount", workload.account), role, binding]


def volume_objects(workload: KubeWorkload) -> list[Object]:
    """The claim, where its size says that it is to be made."""
    kube = workload.kube
    if kube.claim is None or kube.claim_size is None:
        return []
    claim = workload.made("v1", "PersistentVolumeClaim", kube.claim)
    mode = "ReadWriteMany" if kube.pods > 1 else "ReadWriteOnce"
    claim["spec"] = {"accessModes": [mode], "resources": {"requests": {"storage": kube.claim_size}}}
    if kube.storage_class is not None:
        claim["spec"]["storageClassName"] = kube.storage_class
    return [claim]


def config_objects(workload: KubeWorkload) -> list[Object]:
    """A record of what runs, for people: the words that train.py gets, and all that they come to."""
    record = workload.made("v1", "ConfigMap", f"{workload.name}-config")
    words = "".join(f"{word}\n" for word in workload.words)
    record["data"] = {"commit": workload.commit, "overrides": words, "config.yaml": workload.config}
    return [record]


def job_objects(workload: KubeWorkload) -> list[Object]:
    """The JobSet: `slices` jobs of `nodes` pods each, restarted as a whole."""
    kube = workload.kube
    queued = {"kueue.x-k8s.io/queue-name": kube.queue} if kube.queue else {}
    jobset = workload.made("jobset.x-k8s.io/v1alpha2", "JobSet", workload.name, labels=queued)
    if kube.slices > 1:  # a slice is a node pool of its own on GKE
        topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        jobset["metadata"]["annotations"] = topology
    spec: Object = {"suspend": True} if kube.queue else {}  # until Kueue admits it
    spec |= {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": workload.name},
        "successPolicy": {"operator": "All"},
        "failurePolicy": failure_policy(kube),
        "replicatedJobs": [{"name": TASK, "replicas": kube.slices, "template": {"spec": job(workload)}}],
    }
    return [jobset | {"spec": spec}]


def failure_policy(kube: KubeConfig) -> Object:
    """What becomes of the whole when a pod has failed: the first rule that matches.

    A failed Job carries no status, only Kubernetes' own sentence: "Container train for pod SPACE/NAME failed
    with exit code 2 matching …" or "Pod SPACE/NAME has condition DisruptionTarget matching …". Were these to
    change, the last rule would hold for all of them: a counted restart.
    """
    return {
        "maxRestarts": kube.max_restarts,
        "restartStrategy": "BlockingRecreate",  # two generations of pods would write into one run
        "rules": [
            _rule("badInput", "FailJobSet", [f"exit code {BAD_INPUT} "]),
            _rule(
                "savedOrEvicted",
                "RestartJobSetAndIgnoreMaxRestarts",
                [f"exit code {AGAIN} ", f"has condition {EVICTED} "],
            ),
            {"name": "fault", "action": "RestartJobSet"},
        ],
    }


def _rule(name: str, action: str, patterns: list[str]) -> Object:
    reasons = {"onJobFailureReasons": ["PodFailurePolicy"], "onJobFailureMessagePatterns": patterns}
    return {"name": name, "action": action, **reasons}


def job(workload: KubeWorkload) -> Object:
    """One slice: a pod a node, none of them replaced alone, since the others would not know the new one."""
    nodes = workload.kube.nodes
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                _on_exit(BAD_INPUT),
                _on_exit(AGAIN),
                {"action": "FailJob", "onPodConditions": [{"type": EVICTED, "status": "True"}]},
            ]
        },
        "template": {"metadata": pod_metadata(workload), "spec": pod(workload)},
    }


def _on_exit(status: int) -> Object:
    codes = {"containerName": TASK, "operator": "In", "values": [status]}
    return {"action": "FailJob", "onExitCodes": codes}


def pod_metadata(workload: KubeWorkload) -> Object:
    """Labels, and where Prometheus finds the numbers of a run that serves them."""
    metadata: Object = {"labels": workload.labels}
    if workload.metrics_port is not None:
        found = {"scrape": "true", "port": str(workload.metrics_port), "path": "/metrics"}
        metadata["annotations"] = {f"prometheus.io/{key}": value for key, value in found.items()}
    return metadata


def pod(workload: KubeWorkload) -> Object:
    """A process with a node's devices; it has `grace_seconds` from SIGTERM to save and exit 75."""
    kube = workload.kube
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": kube.grace_seconds,
        "serviceAccountName": workload.account,
        "securityContext": security(kube),
    }
    if kube.slices > 1:  # traffic between slices goes by the nodes' own addresses
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return spec | placed(kube) | {"containers": [container(workload)], "volumes": volumes(kube)}


def placed(kube: KubeConfig) -> Object:
    """On which nodes a pod may be, before whom, and by whose leave its image is read."""
    spec: Object = {}
    if kube.priority_class is not None:
        spec["priorityClassName"] = kube.priority_class
    if selector := node_selector(kube):
        spec["nodeSelector"] = selector
    if taints := tolerations(kube):
        spec["tolerations"] = taints
    if kube.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in kube.pull_secrets]
    return spec


def security(kube: KubeConfig) -> Object:
    """The image's own user, to whose group volumes are handed; TPU devices on GKE are root's alone."""
    if kube.kind == "tpu":
        return {"runAsUser": 0, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def node_selector(kube: KubeConfig) -> dict[str, str]:
    """Labels that nodes must have."""
    gke = {"gpu": "gke-accelerator", "tpu": "gke-tpu-accelerator"}
    found = dict(kube.node_selector)
    if kube.accelerator is not None and kube.kind in gke:
        found[f"cloud.google.com/{gke[kube.kind]}"] = kube.accelerator
    if kube.topology is not None:
        found["cloud.google.com/gke-tpu-topology"] = kube.topology
    return found


def tolerations(kube: KubeConfig) -> list[dict[str, str]]:
    """The taint that keeps other pods off a node with devices, and those named."""
    found = [parse_toleration(word) for word in kube.tolerations]
    if kube.device_resource is not None:
        found.insert(0, {"key": kube.device_resource, "operator": "Exists", "effect": "NoSchedule"})
    return found


def devices(kube: KubeConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What a pod asks for, and what it may not exceed.

    Devices and memory are granted whole. Cores are a floor: a pod may use what nobody else needs.
    """
    asked = kube.asked()
    return asked, {name: amount for name, amount in asked.items() if name != "cpu"}


def container(workload: KubeWorkload) -> Object:
    """The image's entry point is train.py; `args` are its words."""
    kube = workload.kube
    ports = [{"name": "coordinator", "containerPort": kube.port}]
    if workload.metrics_port is not None:
        ports.append({"name": "metrics", "containerPort": workload.metrics_port})
    asked, limits = devices(kube)
    found: Object = {
        "name": TASK,
        "image": kube.image,
        "args": list(workload.words),
        "env": environment(workload),
        "resources": {"requests": asked, "limits": limits},
        "ports": ports,
        "volumeMounts": mounts(kube),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if kube.kind == "tpu":  # the driver raises its limit of locked memory
        found["securityContext"] = {"capabilities": {"add": ["SYS_RESOURCE"]}}
    if kube.secrets:
        found["envFrom"] = [{"secretRef": {"name": name}} for name in kube.secrets]
    return found


def environment(workload: KubeWorkload) -> list[Object]:
    """Where a process stands in its job, and on which devices it insists.

    On TPUs GKE says it itself (TPU_WORKER_*, MEGASCALE_*), and `parallel.processes` listens to that.
    """
    kube = workload.kube
    values = {"JAX_PLATFORMS": {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}[kube.kind]}
    if kube.kind == "cpu" and kube.devices_per_node > 1:
        values["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={kube.devices_per_node}"
    told = {"JOBSET_RESTART_ATTEMPT": ATTEMPT}  # by the pod's own annotations
    if kube.pods > 1:
        values[JOIN] = str(kube.join_seconds)
    if kube.pods > 1 and kube.kind != "tpu":
        values[COORDINATOR] = f"{workload.name}-{TASK}-0-0.{workload.name}:{kube.port}"
        values[PROCESSES] = str(kube.pods)
        told[PROCESS] = INDEX
    values |= {"JOBSET_NAME": workload.name, "JOBSET_NAMESPACE": kube.namespace} | kube.env
    refs = {name: {"valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in told.items()}
    found: dict[str, Object] = refs | {name: {"value": value} for name, value in values.items()}
    return [{"name": name, **what} for name, what in found.items()]


def volumes(kube: KubeConfig) -> list[Object]:
    """What outlives the pods, and memory that a node's devices share."""
    memory = {"medium": "Memory", "sizeLimit": kube.shared_memory}
    return [
        {"name": "kept", "persistentVolumeClaim": {"claimName": kube.claim}},
        {"name": "shared-memory", "emptyDir": memory},
    ]


def mounts(kube: KubeConfig) -> list[Object]:
    """Runs, and the caches of data and of compiled steps, in the places where train.py looks by default."""
    kept = [
        {"name": "kept", "mountPath": str(HOME / path), "subPath": path.lstrip(".")}
        for path in ("runs", ".cache")
    ]
    return [*kept, {"name": "shared-memory", "mountPath": "/dev/shm"}]
