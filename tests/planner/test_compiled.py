"""The planner compiles what `train.py` compiles."""

import pickle
import re

import jax
import pytest

from parallel.hardware import machine_of
from parallel.mesh import build_layout
from planner.analytic import estimate
from planner.compiled import DoesNotFit, compile_step, planned_program, refused
from planner.fixes import fixes
from tests.compilers import skip_without
from tests.configs.composing import config
from tests.planner.test_hardware import hardware
from training.config import with_vocab
from training.program import build_program

MESHES = [
    ["mesh.data=1", "mesh.fsdp=4"],
    ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"],
    ["mesh.data=2", "mesh.pipeline=2", "pipeline.microbatches=2"],
]

HYBRID = ("model=hybrid_1b", "data.seq_len=4096", "training.global_batch_size=32", "mesh=fsdp")


def text(program):
    """The traced step, without the addresses of functions."""
    traced = jax.make_jaxpr(program.train_step)(program.state, program.batch)
    return re.sub(r"0x[0-9a-f]+", "0x", str(traced))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_plan_is_of_the_program_that_trains(mesh):
    asked = with_vocab(config("run.name=planned", "+experiment=debug", *mesh))
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
    asked = with_vocab(config("run.name=planned", "hardware=h100", *words))
    machine = machine_of(hardware("h100", nodes=nodes))
    try:
        compiled = compile_step(asked, machine)
    except ImportError as error:
        skip_without(error)
    return asked, machine, compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["mesh=fsdp"],
        ["mesh=fsdp_tensor", "mesh.tensor=4"],
        ["training.remat=dots"],
        [*HYBRID, "training.remat=full"],
        [*HYBRID, "training.remat=dots"],
    ],
)
def test_the_model_is_near_the_compiler(words):
    words = ("training.global_batch_size=16", *words)
    asked, machine, compiled = described("+experiment=llama3_8b", *words)
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
    found = fixes(asked, machine, count=2)
    assert len(found) == 2
    for fix in found:
        assert fix.verified and fix.evaluated.work.how == "compiled"
        assert fix.evaluated.work.memory.total <= machine.memory_bytes


def test_a_refusal_comes_home_from_another_process():
    error = pickle.loads(pickle.dumps(DoesNotFit(3 * 2**30, 2**30, "v5e")))
    assert (error.needed, error.limit, error.name) == (3 * 2**30, 2**30, "v5e")
    assert "3.00 GiB of the 1.00 GiB of a v5e" in str(error)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: HLO temporaries (250.5G) exceeds available HBM (15.75G)", 250.5),
        ("RESOURCE_EXHAUSTED: Used 41.9G of 15.75G hbm. Exceeded hbm capacity", 41.9),
    ],
)
def test_what_the_compiler_refuses_is_read(message, gib):
    program = build_program(
        with_vocab(config("run.name=planned", "+experiment=debug", "mesh=single")),
        build_layout(config("run.name=planned", "mesh=single").mesh, jax.devices()[:1]),
    )
    error = refused(message, program, "v5e")
    assert error is not None
    assert error.needed / 2**30 == pytest.approx(gib, abs=0.01)
    assert error.limit / 2**30 == pytest.approx(15.75)
    assert refused("INTERNAL: something else", program, "v5e") is None
