"""Back to a checkpoint from before the trouble, and past the batches that brought it.

Where `guard.max_skips` updates in a row were skipped, skipping is no remedy. PaLM (Chowdhery et al. 2022,
arXiv:2204.02311, 5.1) went back about 100 steps before a spike and left out 200 to 500 batches, so that the
batches seen around it were not seen again. `guard.rollback_batches` does the same: the newest verified
checkpoint before the first of those skips is restored, and the next N batches are left out.

The manifest's `rollbacks` decide: they are written first, and a start that finds them removes checkpoints and
rows of the steps that they undid, whatever a crash has left of these. Checkpoints keep the list as well.
"""

from collections.abc import Mapping
from typing import Any

from common.errors import RunFault
from training.safety.skip_updates import Trouble

MOST = 3  # rollbacks in a row that get no further than the trouble before


def in_a_row(rollbacks: list[dict[str, Any]]) -> int:
    """How many of the last rollbacks got no further than to where the one before had its trouble."""
    count = 0
    for before, entry in zip([None, *rollbacks], rollbacks, strict=False):
        count = count + 1 if before is not None and entry["to_step"] <= before["at_step"] else 1
    return count


def ended_by(trouble: Trouble, row: Mapping[str, Any]) -> RunFault:
    """What ends a run that is not to be taken back; row: the last one that was written."""
    return RunFault(f"{trouble}; {remedy(row)}, or set guard.rollback_batches to leave out the batches there")


def remedy(row: Mapping[str, Any]) -> str:
    """What helps where skipping does not; row: the last one that was written."""
    rate = row["learning_rate"]
    return f"in a new run.name=, lower optim.learning_rate ({rate:.3g} at that step) or set optim.grad_clip"
