"""The analytic model: exact where it says so, the same laws as the program, and no device needed."""

from dataclasses import replace

import jax
import pytest

from parallel.hardware import machine_of
from parallel.mesh import build_layout
from planner.analytic import estimate
from planner.sizes import abstract_layout, model_of, state_bytes
from tests.configs.composing import config
from tests.planner.test_hardware import hardware
from training.config import with_vocab
from training.preflight import bytes_on_device
from training.program import build_program

MESHES = {
    "fsdp": ["mesh.data=1", "mesh.fsdp=8"],
    "fsdp_tensor": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "pipeline": ["mesh.data=4", "mesh.pipeline=2", "pipeline.microbatches=2"],
    "context": ["mesh.data=4", "mesh.context=2"],
}


def planned(*words):
    return with_vocab(config("run.name=planned", *words))


def work(*words, name="h100"):
    asked = planned(*words)
    return estimate(asked, machine_of(replace(hardware(name), nodes=asked.hardware.nodes)))


@pytest.mark.parametrize("optim", ["adamw", "muon", "lion", "sgd"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_state_is_counted_to_the_byte(mesh, optim):
    asked = planned("+experiment=debug", f"optim={optim}", *MESHES[mesh], "training.ema_decay=0.9")
    program = build_program(asked, build_layout(asked.mesh, jax.devices()[:8]))
    parameters = bytes_on_device(program.state.params)
    found = state_bytes(asked, model_of(asked.model), abstract_layout(asked.mesh, 8))
    assert found == (parameters, bytes_on_device(program.state) - parameters)


BIG = ("+experiment=llama3_8b", "hardware=h100", "training.global_batch_size=64", "hardware.nodes=8")


def test_work_does_not_depend_on_how_it_is_split():
    plain = work(*BIG).flops["bfloat16"]
    for words in (["mesh.tensor=8"], ["mesh.data=4"], ["mesh=long_context"]):
        assert work(*BIG, *words).flops["bfloat16"] == pytest.approx(plain)


def test_rematerialization_trades_memory_for_work():
    steps = [work(*BIG, f"training.remat={policy}") for policy in ("none", "dots", "attention", "full")]
    memory = [step.memory.temporaries for step in steps]
    flops = [step.flops["bfloat16"] for step in steps]
    assert memory == sorted(memory, reverse=True)
    assert flops == sorted(flops)


def test_microbatches_shrink_what_is_kept():
    whole, parts = (
        work(*BIG, "training.global_batch_size=512"),
        work(*BIG, "training.global_batch_size=512", "training.accumulation_steps=8"),
    )
    assert parts.memory.temporaries < whole.memory.temporaries
    assert parts.flops == pytest.approx(whole.flops)


def test_more_devices_hold_less_each():
    parts = [
        work(*BIG, f"hardware.nodes={nodes}", "training.global_batch_size=512").memory for nodes in (1, 2, 8)
    ]
    for fewer, more in zip(parts, parts[1:], strict=False):
        assert more.parameters < fewer.parameters and more.total < fewer.total


def test_collectives_carry_what_the_axes_split():
    def by_kind(*words):
        return {(t.kind, t.axes): t.bytes for t in work(*BIG, *words).traffic}

    fsdp = by_kind()
    weights = 2 * 2 * 8.03e9  # twice, two bytes each
    assert fsdp["all-gather", ("fsdp",)] == pytest.approx(weights, rel=0.1)
    tensor = by_kind("mesh.tensor=8")
    assert ("all-reduce", ("tensor",)) in tensor
    assert tensor["all-gather", ("fsdp",)] == pytest.approx(fsdp["all-gather", ("fsdp",)] / 8, rel=0.1)
    assert ("all-to-all", ("context",)) in by_kind("mesh=long_context")
    assert ("all-reduce", ("data",)) in by_kind("mesh.data=8")
    experts = ("+experiment=qwen3_30b_a3b", "hardware.nodes=32")
    assert ("all-to-all", ("expert",)) in {(t.kind, t.axes) for t in work(*experts).traffic}


def test_a_pipeline_has_a_bubble_and_sends_between_stages():
    words = ("+experiment=llama3_70b", "hardware.nodes=64", "mesh=3d", "mesh.pipeline=4", "mesh.tensor=8")
    step = work(*words, "training.global_batch_size=512", "pipeline.microbatches=16")
    assert step.bubble == pytest.approx(3 / 19, abs=0.02)
    assert ("collective-permute", ("pipeline",)) in {(t.kind, t.axes) for t in step.traffic}


def test_a_hundred_thousand_devices_are_no_more_work():
    words = (
        "+experiment=llama3_70b",
        "mesh=3d",
        "mesh.pipeline=8",
        "mesh.tensor=8",
        "pipeline.microbatches=16",
    )
    step = work(*words, "hardware.nodes=16384", "training.global_batch_size=32768")
    assert step.memory.total < 80 * 2**30
