"""One run that moves: a checkpoint of any mesh and schedule goes on in any other, same bits and losses."""

import numpy as np
import pytest

from artifacts.checkpoints.digest import differing, digests
from artifacts.checkpoints.manager import Checkpoints
from artifacts.checkpoints.record import flat, items_of
from artifacts.config import CheckpointConfig
from tests.parallel import small
from tests.parallel.test_matrix import INTERLEAVED, MODELS

CHAINS = {
    "dense": [
        ({"pipeline": 4}, {}),
        ({"fsdp": 4, "tensor": 2}, {}),
        ({"pipeline": 2, "context": 2, "fsdp": 2}, {"pipeline": INTERLEAVED}),
        ({"pipeline": 2, "tensor": 4}, {"pipeline": {"schedule": "zero_bubble"}}),
        ({"data": 8}, {}),
    ],
    "moe": [
        ({"expert": 4, "pipeline": 2}, {}),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {}),
        ({"context": 8}, {"context": {"attention": "ring"}}),
    ],
}


def steps(program, train, state, first, count):
    losses = []
    for i in range(first, first + count):
        state, metrics = train(state, small.place(program, small.packed_batch(i)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", pytest.param("moe", marks=pytest.mark.matrix)])
def test_a_run_goes_on_anywhere(model, tmp_path):
    chain = [({}, {}), *CHAINS[model]]
    values = {"model": MODELS[model], "num_steps": len(chain)}
    losses = []
    for at, (mesh, how) in enumerate(chain):
        program = small.make_program(small.make_config(mesh, **how, **values))
        checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
        if at == 0:
            state = program.init_state(0)
        else:
            found = checkpoints.restore_newest(program.canonical)
            assert found is not None and found[1]["step"] == at and found[2] == []
            state = program.from_canonical(found[0])
            laid = digests(flat(items_of(program.to_canonical(state))))
            assert differing(found[1]["digests"], laid) == [] and int(state.step) == at
        train = program.compile_train()
        if at == 0:
            alone = program, train
        state, more = steps(program, train, state, at, 1)
        losses += more
        checkpoints.save(at + 1, program.to_canonical(state), {})
        checkpoints.close()
    _, expected = steps(*alone, alone[0].init_state(0), 0, len(chain))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
