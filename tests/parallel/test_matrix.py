"""Every mesh axis alone, every legal pair, triples, schedules and kinds: each equals one device.

`make test-matrix` runs all of it and prints the table; `make test` a sample.
Loss and every gradient of a packed batch, five optimizer steps and an evaluation, for a dense model and for a
mixture of experts.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from models.config import DeltaConfig, MoEConfig
from tests.parallel import small
from training.legal.nearest import legal

DENSE_AXES = ("replica", "pipeline", "data", "fsdp", "context", "tensor")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {
        "moe": MoEConfig(
            num_experts=8,
            experts_per_token=2,
            d_expert=32,
            num_shared_experts=1,
            load_balance_weight=0.01,
            router_z_weight=0.001,
        )
    },
    # The gated delta rule beside attention, experts in both; no context, which it cannot split.
    "hybrid": {
        "num_layers": 8,
        "mixer_pattern": ["gated_delta", "attention"],
        "delta": DeltaConfig(8, 16, 8, 4, chunk=8),
        "output_gate": True,
        "rope_fraction": 0.5,
        "moe": MoEConfig(num_experts=8, experts_per_token=2, d_expert=32),
    },
}
SEQUENCE = {"act_length": ["context", "tensor"]}


@dataclass(frozen=True)
class Case:
    """A mesh of 8 devices and how it is used."""

    model: str
    mesh: dict[str, int]
    how: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = [
            str(v)
            for part in self.how.values()
            for v in (part.values() if isinstance(part, dict) else [part])
        ]
        return "-".join([self.model, *(f"{a}{n}" for a, n in self.mesh.items()), *how]).replace(" ", "")


def axes(model: str) -> tuple[str, ...]:
    names = DENSE_AXES if model == "dense" else (*DENSE_AXES, "expert")
    return tuple(name for name in names if model != "hybrid" or name != "context")


def all_cases() -> list[Case]:
    cases = []
    for model in MODELS:
        names = axes(model)
        cases += [Case(model, {a: 4 if a == "pipeline" else 8}) for a in names]
        cases += [Case(model, {a: 2, b: 4}) for a, b in itertools.combinations(names, 2)]
        cases += [Case(model, dict.fromkeys(triple, 2)) for triple in TRIPLES[model]]
    cases += [Case("dense", mesh, {"pipeline": how}) for mesh, how in SCHEDULES]
    cases += [Case("moe", {"pipeline": 2, "expert": 2, "tensor": 2}, {"pipeline": INTERLEAVED})]
    cases += [Case("moe", {"pipeline": 2, "fsdp": 2, "expert": 2}, {"pipeline": {"schedule": "zero_bubble"}})]
    cases += [Case(model, mesh, {"context": how}) for model, mesh, how in CONTEXTS]
    cases += [
        Case(model, mesh, {"rules": SEQUENCE}) for model in ("dense", "moe") for mesh in SEQUENCE_MESHES
    ]
    cases += [Case("hybrid", mesh, {"pipeline": how}) for mesh, how in HYBRIDS]
    cases += [Case("moe", {"data": 2, "expert": 4}, {"dispatch": "capacity"})]
    cases += [Case("moe", {"expert": 2, "context": 2, "pipeline": 2}, {"dispatch": "capacity"})]
    return cases


TRIPLES = {
    "dense": [
        ("pipeline", "fsdp", "tensor"),
        ("pipeline", "data", "context"),
        ("pipeline", "context", "tensor"),
        ("replica", "pipeline", "fsdp"),
        ("data", "fsdp", "tensor"),
        ("fsdp", "context", "tensor"),
        ("replica", "data", "context"),
    ],
    "moe": [
        ("pipeline", "expert", "tensor"),
        ("pipeline", "fsdp", "expert"),
        ("pipeline", "expert", "context"),
        ("fsdp", "expert", "tensor"),
        ("data", "expert", "context"),
        ("replica", "expert", "tensor"),
    ],
    "hybrid": [
        ("pipeline", "fsdp", "tensor"),
        ("pipeline", "fsdp", "expert"),
        ("pipeline", "expert", "tensor"),
        ("data", "fsdp", "tensor"),
        ("fsdp", "expert", "tensor"),
        ("replica", "fsdp", "tensor"),
    ],
}
HYBRIDS = [
    ({"pipeline": 2, "fsdp": 2}, {"schedule": "zero_bubble"}),
    ({"pipeline": 2, "tensor": 2}, {"schedule": "interleaved_1f1b", "virtual_stages": 2}),
]
INTERLEAVED = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
SCHEDULES = [
    ({"pipeline": 4, "data": 2}, {"schedule": "gpipe"}),
    ({"pipeline": 4, "fsdp": 2}, {"schedule": "gpipe", "microbatches": 8}),
    ({"pipeline": 2, "fsdp": 2, "tensor": 2}, INTERLEAVED),
    ({"pipeline": 2, "context": 4}, INTERLEAVED),
    ({"pipeline": 4, "fsdp": 2}, {"schedule": "zero_bubble"}),
    ({"pipeline": 2, "context": 2, "tensor": 2}, {"schedule": "zero_bubble"}),
    ({"pipeline": 4}, {"schedule": "1f1b", "microbatches": 2}),
]
CONTEXTS = [
    ("dense", {"context": 8}, {"attention": "ring"}),
    ("dense", {"context": 8}, {"attention": "allgather"}),
    ("dense", {"context": 4, "tensor": 2}, {"attention": "ring", "zigzag": False}),
    ("dense", {"pipeline": 2, "context": 4}, {"attention": "ring"}),
    ("dense", {"fsdp": 2, "context": 4}, {"attention": "allgather", "zigzag": False}),
    ("moe", {"expert": 2, "context": 4}, {"attention": "ring"}),
]
SEQUENCE_MESHES = [{"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"pipeline": 2, "fsdp": 2, "tensor": 2}]
CASES = all_cases()
SAMPLE = {
    "dense-pipeline2-fsdp2-tensor2",
    "dense-pipeline4",
    "dense-pipeline2-fsdp2-tensor2-interleaved_1f1b-2",
    "dense-pipeline4-fsdp2-zero_bubble",
    "dense-fsdp2-tensor4-['context','tensor']",
    "moe-pipeline2-expert2-tensor2",
    "hybrid-fsdp2-expert2-tensor2",
}


def model_of(case: Case) -> dict[str, Any]:
    values = dict(MODELS[case.model])
    if dispatch := case.how.get("dispatch"):
        values["moe"] = replace(values["moe"], dispatch=dispatch, capacity_factor=1.0)
    return values


def config_of(case: Case):
    how = {key: value for key, value in case.how.items() if key != "dispatch"}
    return small.make_config(case.mesh, model=model_of(case), **how)


REFERENCES: dict[str, small.Outcome] = {}


def reference(case: Case) -> small.Outcome:
    """One device, once a process."""
    key = case.model + str(case.how.get("dispatch", ""))
    if key not in REFERENCES:
        REFERENCES[key] = small.run(small.make_config(model=model_of(case)))
    return REFERENCES[key]


def marked(case: Case):
    return pytest.param(case, id=str(case), marks=() if str(case) in SAMPLE else pytest.mark.matrix)


@pytest.mark.slow
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_equals_one_device(case, record_property):
    config = config_of(case)
    devices = 1
    for size in case.mesh.values():
        devices *= size
    assert legal(config, devices) is None
    outcome, expected = small.run(config), reference(case)
    loss, grads, steps = small.distance(outcome, expected)
    record_property("matrix", f"{case!s:<62} {loss:8.1e} {grads:8.1e} {steps:8.1e}")
    assert loss < 1e-5 and steps < 1e-5 and grads < 1e-4


def test_the_matrix_is_whole():
    """Every axis and every pair of axes is in it; the sample is a part of it."""
    names = {str(case) for case in CASES}
    assert len(names) == len(CASES) and names >= SAMPLE
    for model in MODELS:
        meshes = [set(case.mesh) for case in CASES if case.model == model and not case.how]
        for count in (1, 2):
            for combination in itertools.combinations(axes(model), count):
                assert set(combination) in meshes
        assert sum(len(mesh) == 3 for mesh in meshes) >= 6
