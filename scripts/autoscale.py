"""How many nodes to ask for at the next start of a run: `python scripts/autoscale.py RUN` prints the number.

    RUN                     a run's name under runs/, or its directory
    devices_per_node=D      by default what the run's last start had on each host
    devices=N               instead say what a start that finds N devices would do
    queue=DEPTH             take this depth of the queue for autoscale.queue's (policy queue)

Why is said on stderr. Submit with it: `sbatch --nodes=$(python scripts/autoscale.py RUN) ...`.
No device is touched. Exit status: 0, or 2 for bad input.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

if __name__ == "__main__":
    import command

from common.checks import within
from scripts.command import parse, run


@dataclass(frozen=True)
class AutoscaleOptions:
    """The command line; see the module's docstring."""

    run: str
    devices_per_node: int | None = None
    devices: int | None = None
    queue: int | None = None


def answer(arguments: Sequence[str]) -> int:
    """Print the number of nodes, or what a start would do. Raises ValueError."""
    asked = parse(arguments, AutoscaleOptions)
    within("devices_per_node", asked.devices_per_node, 1)
    within("devices", asked.devices, 1)

    from artifacts.directory import last_facts
    from artifacts.load import load
    from training.autoscale.apply import nodes_wanted, settled
    from training.autoscale.policy import TooFew
    from training.config import from_stored

    loaded = load(asked.run, from_stored)
    config = loaded.config
    if config.autoscale is None:
        raise ValueError(f"{loaded.path} was not started with autoscale; add autoscale=nodes or queue to it")
    facts = last_facts(loaded.manifest())
    last = facts["mesh"]
    try:
        if asked.devices is not None:
            print("\n".join(settled(config, asked.devices, last, asked.queue).lines))
            return 0
        each = asked.devices_per_node or max(1, facts["devices"]["count"] // max(1, len(facts["hosts"])))
        nodes, decision = nodes_wanted(config, each, last, asked.queue)
    except TooFew as error:
        raise ValueError(str(error)) from error
    print("\n".join(decision.lines), file=sys.stderr)
    print(f"{nodes} nodes of {each} devices", file=sys.stderr)
    print(nodes)
    return 0


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(answer, argv, __doc__)


if __name__ == "__main__":
    command.start(main)
