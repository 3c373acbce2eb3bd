"""Manifests: would the API server take them, what becomes of a job whose pods fail, and what is refused."""

import copy
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import yaml

from launch.kubernetes.check import metrics_port
from launch.kubernetes.config import KubeConfig, parse_kube
from launch.kubernetes.objects import KubeWorkload, times
from parallel.processes import place_in
from scripts.kubernetes import PARTS, documents, run
from tests.configs.composing import config as composed
from tests.launch.kubernetes_schemas import problems

GPU = ["kube.image=reg/cambrian:cuda", "kube.nodes=4", "kube.devices_per_node=2", "kube.claim=runs"]
TPU = [
    *(
        "kube.image=reg/cambrian:tpu",
        "kube.kind=tpu",
        "kube.accelerator=tpu-v5p-slice",
        "kube.topology=2x2x4",
    ),
    *("kube.devices_per_node=4", "kube.nodes=4", "kube.claim=runs"),
]
EVERYTHING = [
    *GPU,
    *("kube.claim_size=500Gi", "kube.storage_class=filestore", "kube.queue=research", "kube.queue_nodes=16"),
    *("kube.accelerator=nvidia-h100-80gb", "kube.node_selector.topology.kubernetes.io/zone=us-east1-b"),
    *("kube.tolerations=[team=ours:NoSchedule, spot:NoExecute, any]", "kube.pull_secrets=[registry]"),
    *("kube.priority_class=high", "kube.resources={vpc.amazonaws.com/efa: 32}", "kube.env={A: 1e5, B: on}"),
    "kube.secrets=[hf-token, wandb]",
]
SHAPES = {
    "gpus": GPU,
    "everything": EVERYTHING,
    "one cpu": [
        "kube.image=i",
        "kube.kind=cpu",
        "kube.devices_per_node=1",
        "kube.claim=c",
        "kube.claim_size=1Gi",
    ],
    "cpus": ["kube.image=i", "kube.kind=cpu", "kube.nodes=2", "kube.claim=c"],
    "a slice": TPU,
    "two slices": [*TPU, "kube.slices=2", "kube.queue=tpus", "kube.service_account=bucket-reader"],
}


def request(words, **changes):
    given = {
        "name": "quick-1",
        "words": ("+experiment=debug", "seed=1"),
        "config": "a: 1\nb: 2\n",
        "commit": "c0",
    }
    return KubeWorkload(kube=parse_kube(words), **(given | changes))


def objects(asked):
    return [item for _, make, _ in PARTS for item in make(asked)]


def jobset(asked):
    return next(item for item in objects(asked) if item["kind"] == "JobSet")


def job(asked):
    return jobset(asked)["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(asked):
    return job(asked)["template"]["spec"]["containers"][0]


# -- the schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_api_server_would_take_every_object(shape):
    asked = request(SHAPES[shape], metrics_port=9100)
    found = objects(asked)
    assert {item["kind"] for item in found} >= {"ConfigMap", "JobSet"}
    assert {item["kind"]: problems(item) for item in found if problems(item)} == {}


def test_everything_renders_every_kind():
    kinds = [item["kind"] for item in objects(request(EVERYTHING))]
    queue = ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    assert kinds == [
        *queue,
        *("ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "ConfigMap", "JobSet"),
    ]


FREE = (
    "labels",
    "annotations",
    "nodeSelector",
    "nodeLabels",
    "requests",
    "limits",
    "data",
)  # any key will do


def fields(value, path=()):
    """The paths of all keys that a schema names."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key)
            if key not in FREE:
                yield from fields(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from fields(part, (*path, index))


def changed(item, path, key=None, value=None):
    """A copy whose field at `path` has another name or another value."""
    made = copy.deepcopy(item)
    room = made
    for step in path[:-1]:
        room = room[step]
    old = room.pop(path[-1])
    room[key or path[-1]] = old if key else value
    return made


def test_a_misspelt_field_is_refused_wherever_it_stands():
    """Which is what makes the test above one that can fail: each of some 150 fields, one at a time."""
    shapes = [request(EVERYTHING, metrics_port=9100), request(SHAPES["two slices"])]
    tried = [(item, path) for asked in shapes for item in objects(asked) for path in fields(item)]
    assert len(tried) > 200
    passed = [
        (item["kind"], path) for item, path in tried if not problems(changed(item, path, key=f"{path[-1]}s"))
    ]
    assert passed == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "suspend"), "true"),
        (("spec", "failurePolicy", "maxRestarts"), "10"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "replicas"), 1.5),
        (("metadata", "labels", "app.kubernetes.io/name"), 1),
    ],
)
def test_a_wrong_value_is_refused(path, value):
    item = jobset(request(EVERYTHING))
    assert not problems(item) and problems(changed(item, path, value=value))


def test_a_list_that_is_a_map_has_each_key_once():
    item = jobset(request(GPU))
    containers = item["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    containers[0]["env"].append({"name": "CAMBRIAN_PROCESS", "value": "0"})
    assert [line for line in problems(item) if "twice" in line]
    own = container(request([*GPU, "kube.env.JAX_PLATFORMS=cuda"]))["env"]
    assert [var["value"] for var in own if var["name"] == "JAX_PLATFORMS"] == ["cuda"]


# -- what becomes of a job -----------------------------------------------------------------------------------


def outcome(asked, status=None, condition=None):
    """What the Job controller and then JobSet's make of a pod that ended so: their rules, in order.

    The sentences are those of Kubernetes' pod_failure_policy.go.
    """
    template = job(asked)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert template["backoffLimit"] == 0 and template["template"]["spec"]["restartPolicy"] == "Never"
    for index, rule in enumerate(template["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes and status in codes["values"]:
            assert codes["containerName"] == container(asked)["name"] and codes["operator"] == "In"
            said = f"Container train for pod default/x-abcde failed with exit code {status}"
        elif condition and {"type": condition, "status": "True"} in rule.get("onPodConditions", []):
            said = f"Pod default/x-abcde has condition {condition}"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{said} matching {rule['action']} rule at index {index}"
        break
    return jobset_action(asked, reason, message)


def jobset_action(asked, reason, message):
    """JobSet's: the first rule whose reasons and message patterns fit, all of them where none are given."""
    for rule in jobset(asked)["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(
            re.search(p, message) for p in patterns
        ):
            return rule["action"]
    raise AssertionError(reason)


@pytest.mark.parametrize(
    ("how", "action"),
    [
        ({"status": 2}, "FailJobSet"),
        ({"status": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"status": 137, "condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"status": 2, "condition": "DisruptionTarget"}, "FailJobSet"),
        *(({"status": status}, "RestartJobSet") for status in (1, 20, 22, 127, 134, 137, 139, 143, 255)),
    ],
)
def test_exit_status_decides(how, action):
    assert outcome(request(GPU), **how) == action


def test_in_unknown_words_a_failure_is_a_restart_that_counts():
    assert (
        jobset_action(request(GPU), "PodFailurePolicy", "quite another sentence, about 75") == "RestartJobSet"
    )


def test_a_pod_is_told_in_time_and_none_is_replaced_alone():
    asked = request([*GPU, "kube.grace_seconds=900", "kube.max_restarts=3"])
    assert job(asked)["template"]["spec"]["terminationGracePeriodSeconds"] == 900
    assert jobset(asked)["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert jobset(asked)["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert job(asked)["podReplacementPolicy"] == "Failed"


# -- who finds whom ------------------------------------------------------------------------------------------


def test_every_pod_finds_its_place():
    asked = request(GPU)
    found = jobset(asked)
    template, network = job(asked), found["spec"]["network"]
    assert template["completionMode"] == "Indexed" and network["enableDNSHostnames"]
    # JobSet's hostnames: <jobset>-<replicated job>-<job>-<pod>.<subdomain>
    job_name = f"{found['metadata']['name']}-{found['spec']['replicatedJobs'][0]['name']}-0"
    hosts = [f"{job_name}-{index}.{network['subdomain']}" for index in range(template["completions"])]
    assert template["completions"] == template["parallelism"] == 4
    for index in range(4):
        values = {var["name"]: var.get("value", str(index)) for var in container(asked)["env"]}
        place = place_in(values)
        assert (place.coordinator, place.count, place.index) == (f"{hosts[0]}:55527", 4, index)
    told = {
        var["name"]: var["valueFrom"]["fieldRef"]["fieldPath"]
        for var in container(asked)["env"]
        if "valueFrom" in var
    }
    assert "job-completion-index" in told["CAMBRIAN_PROCESS"]
    assert {"name": "coordinator", "containerPort": 55527} in container(asked)["ports"]


@pytest.mark.parametrize("shape", ["one cpu", "a slice", "two slices"])
def test_alone_or_on_tpus_the_job_does_not_say_who_is_who(shape):
    names = {var["name"] for var in container(request(SHAPES[shape]))["env"]}
    assert not names & {"CAMBRIAN_COORDINATOR", "CAMBRIAN_PROCESSES", "CAMBRIAN_PROCESS"}


def test_slices_are_jobs_on_node_pools_of_their_own():
    asked = request(SHAPES["two slices"])
    found = jobset(asked)
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert found["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"].endswith(
        "nodepool"
    )
    selector = job(asked)["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert container(asked)["resources"]["limits"]["google.com/tpu"] == "4"


# -- queue, volume, environment ------------------------------------------------------------------------------


def test_the_queue_counts_all_that_a_pod_asks_for_and_has_room_for_the_job():
    asked = request(EVERYTHING)
    found = {item["kind"]: item for item in objects(asked)}
    group = found["ClusterQueue"]["spec"]["resourceGroups"][0]
    requests = container(asked)["resources"]["requests"]
    assert set(group["coveredResources"]) == set(requests) >= {"cpu", "memory", "nvidia.com/gpu"}
    quotas = {each["name"]: each["nominalQuota"] for each in group["flavors"][0]["resources"]}
    assert quotas == {name: times(amount, 16) for name, amount in requests.items()}
    assert found["JobSet"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert found["LocalQueue"]["metadata"]["namespace"] == found["JobSet"]["metadata"]["namespace"]
    assert found["JobSet"]["spec"]["suspend"] is True
    assert found["ResourceFlavor"]["spec"]["nodeLabels"] == job(asked)["template"]["spec"]["nodeSelector"]
    assert "suspend" not in jobset(request(GPU))["spec"]


def test_many_nodes_share_a_volume_that_all_write_to():
    sized = [*GPU, "kube.claim_size=1Ti"]
    claim = next(item for item in objects(request(sized)) if item["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {mount["mountPath"]: mount for mount in container(request(sized))["volumeMounts"]}
    assert set(mounts) == {"/cambrian/runs", "/cambrian/.cache", "/dev/shm"}
    assert "PersistentVolumeClaim" not in [item["kind"] for item in objects(request(GPU))]  # it exists


def test_secrets_are_named_and_never_shown():
    found = container(request(EVERYTHING))
    assert found["envFrom"] == [{"secretRef": {"name": "hf-token"}}, {"secretRef": {"name": "wandb"}}]


def test_prometheus_is_told_where_a_run_serves_its_numbers():
    template = job(request(GPU, metrics_port=9100))["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "9100"
    assert "annotations" not in job(request(GPU))["template"]["metadata"]
    for port, found in ((None, None), (9100, 9100)):
        assert (
            metrics_port(SimpleNamespace(logging=SimpleNamespace(prometheus_port=port)), parse_kube(GPU))
            == found
        )
    for port in (0, 55527):
        with pytest.raises(ValueError, match=f"logging.prometheus_port={port} is .*; give another"):
            metrics_port(SimpleNamespace(logging=SimpleNamespace(prometheus_port=port)), parse_kube(GPU))


@pytest.mark.parametrize(
    ("word", "made"),
    [
        ("a", {"key": "a", "operator": "Exists"}),
        ("a.b/c:NoExecute", {"key": "a.b/c", "operator": "Exists", "effect": "NoExecute"}),
        ("a=b:NoSchedule", {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}),
    ],
)
def test_tolerations_are_written_as_taints_are(word, made):
    assert made in job(request([*GPU, f"kube.tolerations=[{word}]"]))["template"]["spec"]["tolerations"]


# -- the command ---------------------------------------------------------------------------------------------


def rendered(words, capsys):
    assert run(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_same_words_train_and_render(capsys):
    words = ["+experiment=debug", "mesh.fsdp=8", "training.num_steps=7", "run.name=My_Run.2"]
    text = rendered([words[0], *GPU, *words[1:]], capsys)
    found = {item["kind"]: item for item in yaml.safe_load_all(text)}
    assert found["JobSet"]["metadata"]["name"] == "my-run-2"
    template = found["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["spec"]["containers"][0]["args"] == words
    record = found["ConfigMap"]["data"]
    assert record["overrides"].splitlines() == words
    assert yaml.safe_load(record["config.yaml"]) == asdict(composed(*words))
    assert all(not problems(item) for item in found.values())


def test_files_say_what_made_them_and_what_to_type(tmp_path, capsys):
    text = rendered(["+experiment=debug", *GPU, f"kube.output={tmp_path}/out"], capsys)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["2-access.yaml", "4-config.yaml", "5-jobset.yaml"]
    assert f"kubectl apply -f {tmp_path}/out" in text
    first = files[0].read_text("utf-8")
    assert "kube.nodes=4" in first and "kubectl" in first
    assert all(path.read_text("utf-8").startswith("# ") for path in files)
    assert all(len(line) <= 120 for path in files for line in path.read_text("utf-8").splitlines())


def test_what_reads_as_a_number_is_quoted():
    """PyYAML takes a bare 1e5 for text, Kubernetes for a number, which it refuses as a variable's value."""
    text = documents(PARTS, request(EVERYTHING), "")["5-jobset.yaml"]
    assert "value: '1e5'" in text and "value: 'on'" in text
    values = {var["name"]: var.get("value") for var in container(request(EVERYTHING))["env"]}
    assert (values["A"], values["B"]) == ("1e5", "on")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "kube.image=(nothing) must be the image to run"),
        (
            ["kube.image=i"],
            "kube.claim is missing: without a volume for runs/ a restart would begin at step 0",
        ),
        ([*GPU, "kube.nods=3"], "kube.nods is no key of kubernetes.py; did you mean nodes?"),
        ([*GPU, "kube.nodes=many"], "kube.nodes=many is not of type int"),
        ([*GPU, "kube.nodes=0"], "kube.nodes=0 must be 1 or more"),
        ([*GPU, "kube.kind=gpus"], "kube.kind=gpus is not one of gpu, tpu, cpu; did you mean gpu?"),
        ([*GPU, "kube.env={A: {B: c}}"], "kube.env={A: {B: c}} is not of type dict[str, str]"),
        ([*GPU, "kube.memory=64GB"], "kube.memory=64GB must be a quantity such as 8, 500m or 64Gi"),
        ([*GPU, "kube.claim=My_Claim"], "kube.claim=My_Claim must be a DNS label"),
        ([*GPU, "kube.tolerations=[a:Never]"], "kube.tolerations=a:Never must be KEY=VALUE:EFFECT"),
        ([*GPU, "kube.queue_nodes=3"], "kube.queue_nodes=3 must be 4 or more: this job's nodes"),
        ([*GPU, "kube.slices=2"], "kube.slices=2 is of TPUs, and kube.kind=gpu; use kube.nodes"),
        ([*GPU, "kube.name=" + "x" * 48], "kube.name=" + "x" * 48 + " has 48 letters; pods' names leave 47"),
        ([*GPU, "run.name=7"], "run.name=7 makes no DNS label (7); give kube.name="),
        ([*GPU, "run.dir=/tmp/x"], "run.dir=/tmp/x lies outside of the volume; keep it below runs/"),
        ([*GPU, "mesh.fsdp=5"], "kube.nodes=4 * kube.devices_per_node=2 is 8 devices: mesh.fsdp=5"),
        ([*GPU, "mesh.data=4"], "is 8 devices: mesh.data=4 is 4 devices but 8 are here"),
        ([*GPU, "training.num_step=7"], "training.num_step is not a key; did you mean training.num_steps?"),
        ([*GPU, "-m", "seed=0,1"], "-m: a manifest is of one run"),
        (
            [*TPU, "kube.topology=4x4x4"],
            "kube.topology=4x4x4 is 64 chips, but kube.nodes=4 * kube.devices_per_node=4",
        ),
        ([*TPU, "kube.accelerator=null"], "kube.accelerator is missing: kube.kind=tpu needs it"),
        ([*TPU, "kube.slices=2"], "kube.slices=2, but mesh.dcn crosses 1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(words, said, capsys):
    assert run(["+experiment=debug", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not out


def test_the_longest_name_still_fits_a_pod(capsys):
    """JobSet's webhook: <jobset>-<job>-<index>-<pod>-<5 letters> is a DNS label of 63 at most."""
    wide = ["kube.nodes=16", "training.global_batch_size=32"]
    text = rendered(["+experiment=debug", *GPU, *wide, "kube.name=" + "x" * 46], capsys)
    assert len(f"{'x' * 46}-train-0-15-abcde") == 63 and "x" * 46 in text
    assert run(["+experiment=debug", *GPU, *wide, "kube.name=" + "x" * 47]) == 2


def test_help_shows_every_key(capsys):
    text = rendered(["--help"], capsys)
    assert all(f"kube.{key}=" in text for key in asdict(KubeConfig(image="i")))
