"""The planner compiles what `train.py` compiles."""

import re

import jax
import pytest

from configs.legal import legal
from parallel.hardware import machine_of
from parallel.mesh import build_layout
from tests.compilers import skip_without
from tests.configs.composing import config
from tests.parallel.test_hardware import hardware
from training.plan.analytic import estimate
from training.plan.compiled import compile_step, planned_program, with_vocabulary
from training.plan.fixes import fixes
from training.program import build_program

MESHES = [
    ["mesh.data=1", "mesh.fsdp=4"],
    ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"],
    ["mesh.data=2", "mesh.pipeline=2", "pipeline.microbatches=2"],
]


def text(program):
    """The traced step, without the addresses of functions."""
    traced = jax.make_jaxpr(program.train_step)(program.state, program.batch)
    return re.sub(r"0x[0-9a-f]+", "0x", str(traced))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_plan_is_of_the_program_that_trains(mesh):
    asked = with_vocabulary(config("run.name=planned", "+experiment=debug", *mesh))
    devices = jax.devices()[:4]
    planned = planned_program(asked, devices)
    trained = build_program(asked, build_layout(asked.mesh, devices))
    assert text(planned) == text(trained)
    assert jax.tree.map(lambda x: x.sharding, planned.state) == jax.tree.map(
        lambda x: x.sharding, trained.state
    )
    assert planned.compiler_options == trained.compiler_options  # CPUs are here: nothing takes a place


def described(*words, nodes=1):
    """A step for described GPUs, compiled; skipped where their compiler is missing."""
    asked = with_vocabulary(config("run.name=planned", "hardware=h100", *words))
    machine = machine_of(hardware("h100", nodes=nodes))
    try:
        compiled = compile_step(asked, machine)
    except ImportError as error:
        skip_without(error)
    return asked, machine, compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["mesh=fsdp"], ["mesh=fsdp_tensor", "mesh.tensor=4"], ["training.remat=dots"]]
)
def test_the_model_is_near_the_compiler(words):
    asked, machine, compiled = described("+experiment=llama3_8b", "training.global_batch_size=16", *words)
    computed = estimate(asked, machine)
    assert computed.memory.total == pytest.approx(compiled.work.memory.total, rel=0.1)
    assert sum(computed.flops.values()) == pytest.approx(sum(compiled.work.flops.values()), rel=0.05)
    theirs = {(t.kind, t.axes): t.bytes for t in compiled.work.traffic}
    for ours in computed.traffic:
        if ours.kind == "all-gather" and ours.axes == ("fsdp",):
            assert ours.bytes == pytest.approx(theirs[ours.kind, ours.axes], rel=0.25)


@pytest.mark.slow
def test_fixes_are_verified_by_the_compiler():
    words = ("+experiment=llama3_8b", "training.global_batch_size=16", "training.remat=none")
    asked, machine, compiled = described(*words)
    assert compiled.work.memory.total > machine.memory_bytes
    found = fixes(asked, machine, legal, count=2)
    assert len(found) == 2
    for fix in found:
        assert fix.verified and fix.evaluated.work.how == "compiled"
        assert fix.evaluated.work.memory.total <= machine.memory_bytes
