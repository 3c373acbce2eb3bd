"""A server's manifests: would the API server take them, who gets requests, what is refused."""

import re

import pytest
import yaml

from scripts.kubernetes import run
from tests.launch.kubernetes_schemas import problems
from tests.launch.test_kubernetes import changed, fields

OURS = ["quickstart", "kube.image=reg/cambrian:cuda", "kube.devices_per_node=1", "kube.claim=runs"]
VLLM = ["runs/exported", "kube.image=vllm/vllm:1", "serve.engine=vllm", "kube.claim=runs"]
EVERYTHING = [
    *OURS,
    *("serve.max=4", "serve.running=6", "serve.picker=epp", "serve.api_key=keys", "kube.secrets=[more]"),
    *("kube.accelerator=nvidia-h100-80gb", "kube.pull_secrets=[registry]", "kube.env={A: 1e5}"),
    *("kube.priority_class=high", "slots=64", "follow=true"),
]
SHAPES = {
    "ours": OURS,
    "everything": EVERYTHING,
    "on a cpu": [*OURS, "kube.kind=cpu"],
    "on a tpu": [*OURS, "kube.kind=tpu", "kube.accelerator=tpu-v5e", "kube.topology=1x1"],
    "by vllm": [*VLLM, "serve.api_key=key", "--tensor-parallel-size=2"],
}


def rendered(words, capsys):
    assert run(["serve", *words]) == 0, capsys.readouterr().err
    return {item["kind"]: item for item in yaml.safe_load_all(capsys.readouterr().out)}


def pod(found):
    return found["Deployment"]["spec"]["template"]["spec"]


def container(found):
    return pod(found)["containers"][0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_api_server_would_take_every_object(shape, capsys):
    found = rendered(SHAPES[shape], capsys)
    assert {kind: problems(item) for kind, item in found.items() if problems(item)} == {}


def is_label(item, path):
    """Whether the last word of a path may be any: labels, and what a trigger of KEDA's is told."""
    above = path[:-1]
    return (
        "matchLabels" in above
        or (item["kind"] == "Service" and "selector" in above)
        or ("triggers" in above and "metadata" in above)
    )


def test_a_misspelt_field_is_refused_wherever_it_stands(capsys):
    found = rendered(EVERYTHING, capsys)
    wanted = {"ServiceAccount", "Deployment", "Service", "PodMonitor", "ScaledObject", "InferencePool"}
    assert set(found) == wanted
    tried = [(item, path) for item in found.values() for path in fields(item) if not is_label(item, path)]
    assert len(tried) > 100
    passed = [(item["kind"], p) for item, p in tried if not problems(changed(item, p, key=f"{p[-1]}s"))]
    assert passed == []


def test_a_list_that_is_a_map_has_each_key_once(capsys):
    item = rendered(OURS, capsys)["Deployment"]
    env = item["spec"]["template"]["spec"]["containers"][0]["env"]
    env.append(dict(env[0]))
    assert [line for line in problems(item) if "twice" in line]


def test_all_look_at_the_same_pods_and_ports_and_never_at_those_that_train(capsys):
    found = rendered(EVERYTHING, capsys)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "quickstart-server"  # a JobSet's pods have the run's name
    selectors = [found[kind]["spec"]["selector"] for kind in ("Deployment", "PodMonitor", "InferencePool")]
    assert all(selector == {"matchLabels": labels} for selector in selectors)
    assert found["Service"]["spec"]["selector"] == labels
    assert container(found)["ports"] == [{"name": "http", "containerPort": 8000}]
    assert found["InferencePool"]["spec"]["targetPorts"] == [{"number": 8000}]
    assert "port=8000" in container(found)["args"]
    assert found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]


def test_a_pod_that_drains_gets_no_more_and_is_not_killed_for_it(capsys):
    found = rendered([*OURS, "kube.grace_seconds=90"], capsys)
    paths = {name: container(found)[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")}
    assert paths == {"readinessProbe": "/ready", "livenessProbe": "/health"}
    assert pod(found)["terminationGracePeriodSeconds"] == 90 and "lifecycle" not in container(found)
    startup = container(rendered([*OURS, "serve.start_seconds=61"], capsys))["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 61


def test_a_change_takes_no_replica_away(capsys):
    strategy = rendered(OURS, capsys)["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_what_waits_makes_more_replicas_and_nobody_else_says_how_many(capsys):
    found = rendered(EVERYTHING, capsys)
    assert "replicas" not in found["Deployment"]["spec"]
    scaled = found["ScaledObject"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 4)
    queries = {t["metadata"]["query"]: t["metadata"]["threshold"] for t in scaled["triggers"]}
    names = {re.match(r"sum\(([\w:]+)\{", query)[1]: limit for query, limit in queries.items()}
    assert names == {"vllm:num_requests_waiting": "4", "vllm:num_requests_running": "6"}
    pods = re.search(r'pod=~"([^"]+)"', next(iter(queries)))[1]
    assert re.fullmatch(pods, "quickstart-server-7d9c5-x2k4p")
    fixed = rendered([*OURS, "serve.min=3", "serve.max=3"], capsys)
    assert "ScaledObject" not in fixed and fixed["Deployment"]["spec"]["replicas"] == 3


def test_nobody_writes_to_the_root_or_to_the_runs(capsys):
    found = rendered(EVERYTHING, capsys)
    assert container(found)["securityContext"]["readOnlyRootFilesystem"] is True
    written = [m["mountPath"] for m in container(found)["volumeMounts"] if not m.get("readOnly")]
    assert written == ["/cambrian/.cache", "/dev/shm", "/tmp"]
    assert {m["name"] for m in container(found)["volumeMounts"]} == {v["name"] for v in pod(found)["volumes"]}


def test_keys_are_read_from_a_secret_and_never_shown(capsys):
    args = container(rendered(EVERYTHING, capsys))["args"]
    assert args[0] == "quickstart" and "api_key_file=/run/secrets/cambrian/api-key" in args
    assert args[-2:] == ["slots=64", "follow=true"]
    variables = {v["name"]: v for v in container(rendered(SHAPES["by vllm"], capsys))["env"]}
    assert variables["VLLM_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "key", "key": "api-key"}}


def test_vllm_serves_the_exported_directory(capsys):
    found = container(rendered(SHAPES["by vllm"], capsys))
    assert found["command"] == ["vllm", "serve"]
    assert found["args"][0] == "/cambrian/runs/exported" and found["args"][-1] == "--tensor-parallel-size=2"
    assert "--served-model-name=exported-server" in found["args"]
    assert found["readinessProbe"]["httpGet"]["path"] == "/health"


def test_files_say_what_made_them_and_what_to_type(tmp_path, capsys):
    assert run(["serve", *EVERYTHING, f"kube.output={tmp_path}/out"]) == 0
    assert f"kubectl apply -f {tmp_path}/out" in capsys.readouterr().out
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    parts = ("1-account", "2-deployment", "3-door", "4-scale", "5-pool")
    assert names == [f"{part}.yaml" for part in parts]
    assert "scripts/kubernetes.py serve quickstart" in (tmp_path / "out/1-account.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "serve is without a model"),
        (["slots=4", *OURS[1:]], "serve is without a model"),
        (OURS[:-1], "kube.claim is missing: the volume that has the model"),
        ([*OURS, "serve.engin=vllm"], "serve.engin is no key of kubernetes.py; did you mean engine?"),
        ([*OURS, "serve.model=x"], "serve.model is no key"),
        ([*OURS, "serve.engine=sglang"], "serve.engine=sglang is not one of cambrian, vllm"),
        ([*OURS, "serve.min=0"], "serve.min=0 must be 1 or more"),
        ([*OURS, "serve.min=3", "serve.max=2"], "serve.max=2 must be serve.min=3 or more"),
        ([*OURS, "serve.picker=My_Picker"], "serve.picker=My_Picker must be a DNS label"),
        ([*OURS, "kube.nodes=2"], "kube.nodes=2, but a replica is one process on one node"),
        ([*OURS, "kube.queue=q"], "kube.queue=q is of jobs that end"),
        ([*OURS, "kube.claim_size=1Ti"], "would make an empty volume"),
        ([*OURS, "kube.name=" + "x" * 47], "is no DNS label of at most 46 letters"),
        (["/models/a", *VLLM[1:]], "model=/models/a must be below runs/"),
        ([*VLLM, "kube.kind=tpu"], "kube.kind=tpu with serve.engine=vllm"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(words, said, capsys):
    assert run(["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not out


def test_help_shows_every_key(capsys):
    assert run(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert "serve.waiting=4" in text and "kube.image=IMAGE" in text and "serve.model" not in text
