"""How many nodes to ask for at the next start of a run: `python scripts/autoscale.py RUN` prints the number.

    RUN                     a run's name under runs/, or its directory
    --devices-per-node D    by default what the run's last start had on each host
    --devices N             instead say what a start that finds N devices would do
    --queue DEPTH           take this depth of the queue for autoscale.queue's (policy queue)

Why is said on stderr. Submit with it: `sbatch --nodes=$(python scripts/autoscale.py RUN) ...`.
No device is touched. Exit status: 0, or 2 for bad input.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.terminal import steady_streams


def main(argv: list[str]) -> int:
    """Print the number of nodes, or what a start would do; the exit status."""
    from artifacts.directory import last_facts
    from training.autoscale.policy import TooFew

    parser = argparse.ArgumentParser(
        prog="python scripts/autoscale.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run")
    parser.add_argument("--devices-per-node", type=int, default=None)
    parser.add_argument("--devices", type=int, default=None)
    parser.add_argument("--queue", type=int, default=None)
    asked = parser.parse_args(argv)
    try:
        for name in ("devices_per_node", "devices"):
            if (value := getattr(asked, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} must be 1 or more")
        return answer(asked, last_facts)
    except (ValueError, OSError, TooFew) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def answer(asked: argparse.Namespace, last_facts: Any) -> int:
    """What was asked about the run, printed."""
    from artifacts.load import load
    from training.autoscale.apply import nodes_wanted, settled
    from training.config import from_stored

    run = load(asked.run, from_stored)
    config = run.config
    if config.autoscale is None:
        raise ValueError(f"{run.path} was not started with autoscale; add autoscale=nodes or queue to it")
    facts = last_facts(run.manifest())
    last = facts["mesh"]
    if asked.devices is not None:
        print("\n".join(settled(config, asked.devices, last, asked.queue).lines))
        return 0
    per_node = asked.devices_per_node or max(1, facts["devices"]["count"] // max(1, len(facts["hosts"])))
    nodes, decision = nodes_wanted(config, per_node, last, asked.queue)
    print("\n".join(decision.lines), file=sys.stderr)
    print(f"{nodes} nodes of {per_node} devices", file=sys.stderr)
    print(nodes)
    return 0


if __name__ == "__main__":
    steady_streams()
    sys.exit(main(sys.argv[1:]))
