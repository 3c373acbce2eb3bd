"""Back to a checkpoint from before the trouble, and past the batches that brought it.

Where `guard.max_skips` updates in a row were skipped, skipping is no remedy. PaLM (Chowdhery et al. 2022,
arXiv:2204.02311, 5.1) went back about 100 steps before a spike and left out 200 to 500 batches, so that the
batches seen around it were not seen again. `guard.rollback_batches` does the same: the newest verified
checkpoint before the first of those skips is restored, and the next N batches are left out.

The manifest's `rollbacks` decide: they are written first, and a start that finds them removes checkpoints and
rows of the steps that they undid, whatever a crash has left of these. Checkpoints keep the list as well.
"""

from typing import Any

from common.errors import RunFault
from parallel import processes
from training.safety.skip_updates import Trouble, none_in_a_row
from training.setup import Run, fresh_state, open_log, positioned_loader, say
from training.state import TrainState

MOST = 3  # rollbacks in a row that get no further than the trouble before


def go_back(run: Run, trouble: Trouble) -> tuple[TrainState, int]:
    """The state to go on from, and the steps behind it; rows and checkpoints of later steps are gone.

    Every process calls this after the same step. Raises RunFault where the run was taken back too often.
    """
    setup, checkpoints = run.setup, run.checkpoints
    program, directory, batches = setup.program, setup.directory, setup.config.guard.rollback_batches
    checkpoints.wait()
    found = checkpoints.restore_newest(program.canonical, most=trouble.began)
    if found is None:  # none is so old: one from within has the same weights
        found = checkpoints.restore_newest(program.canonical, most=trouble.step)
    first = found[1]["step"] if found else 0
    entry = {"at_step": trouble.step, "to_step": first, "batches": batches, "reason": trouble.reason}
    if in_a_row([*directory.rollbacks, entry]) > MOST:
        raise RunFault(f"{trouble}; {MOST} rollbacks got no further; {remedy(run)}")
    directory.rollbacks.append(entry)
    processes.from_primary("the run's manifest", directory.write_manifest)
    processes.from_primary("undone checkpoints", lambda: checkpoints.forget_after(first))
    checkpoints.reload()

    tokens, run.position = 0, None
    if found is None:
        state = fresh_state(setup)
    else:
        stored, record, _ = found
        tokens, run.position = record["tokens"], record["data"]
        state = program.from_canonical(none_in_a_row(program.with_guard(stored)))
    run.loader = positioned_loader(setup, run.position)
    run.recorder.go_back(tokens, *open_log(setup, first, run.outputs))
    say(f"{trouble}; going on from step {first} without the next {batches} batches")
    return state, first


def in_a_row(rollbacks: list[dict[str, Any]]) -> int:
    """How many of the last rollbacks got no further than to where the one before had its trouble."""
    count = 0
    for before, entry in zip([None, *rollbacks], rollbacks, strict=False):
        count = count + 1 if before is not None and entry["to_step"] <= before["at_step"] else 1
    return count


def ended_by(run: Run, trouble: Trouble) -> RunFault:
    """What ends a run that is not to be taken back."""
    return RunFault(f"{trouble}; {remedy(run)}, or set guard.rollback_batches to leave out the batches there")


def remedy(run: Run) -> str:
    """What helps where skipping does not."""
    rate = run.recorder.last["learning_rate"]
    return f"in a new run.name=, lower optim.learning_rate ({rate:.3g} at that step) or set optim.grad_clip"
