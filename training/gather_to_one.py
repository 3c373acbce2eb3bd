"""A trained model on the primary's first device, for what one process does alone at the end: sampling.

The weights are gathered array by array, so the peak on every device is the largest array whole, and on the
primary's first device the whole model in float32. A model that does not fit there is not gathered.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from parallel import processes
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from training.config import Config
from training.program import Program, build_program

ROOM = 0.8  # of what is free on a device; the rest is for the caches of generation


def on_one_device(program: Program, config: Config, params: Any) -> tuple[Program, Any]:
    """(program, parameters) on the primary's first device; the parameters are None elsewhere.

    All processes call it together. None everywhere, and a line that says so, where the device is too small.
    """
    params = program.to_canonical(params)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not processes.from_primary("room for the samples", lambda: _fits(needed)):
        return program, None
    device = jax.local_devices()[0]
    whole = jax.jit(lambda x: x, out_shardings=program.layout.replicated())
    primary = processes.is_primary()

    def gather(leaf: jax.Array) -> Any:
        everywhere = whole(leaf)
        here = np.asarray(everywhere.addressable_data(0)) if primary else None
        everywhere.delete()
        return jax.device_put(here, device) if primary else None

    gathered = jax.tree.map(gather, params)
    if not primary:
        return program, None
    return single(config, device), gathered


def single(config: Config, device: Any) -> Program:
    """The same model's program on one device, layers as checkpoints have them."""
    mesh = MeshConfig(data=1, rules=config.mesh.rules)
    return build_program(replace(config, mesh=mesh), build_layout(mesh, [device]))


def _fits(needed: int) -> bool:
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", np.inf) - stats.get("bytes_in_use", 0)
    if needed <= ROOM * free:
        return True
    print(
        f"no samples: the model's {needed / 2**30:.1f} GiB are more than the {free / 2**30:.1f} GiB free "
        "on one device; use scripts/generate.py with tensor=N"
    )
    return False
