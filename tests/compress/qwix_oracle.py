"""Make the golden of test_solve.py, where qwix 0.1.8 is installed: `python qwix_oracle.py golden.npz`.

Its own GPTQ core on random weights and second moments; nothing of ours is imported here or imports it.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix._src.core import qarray
from qwix.contrib import gptq_core

INPUTS, OUTPUTS, ROWS = 24, 6, 64


def main(path: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    x = (rng.normal(size=(INPUTS, INPUTS)) @ rng.normal(size=(INPUTS, ROWS))).astype(np.float32)
    h = np.asarray(gptq_core.compute_hessian(jnp.asarray(x)))
    found: dict[str, Any] = {"w": w, "h": h}
    for name, kind in (("int8", jnp.int8), ("int4", jnp.int4)):
        how = qarray.HowToQuantize(qtype=kind, channelwise_axes=[0])
        with jax.default_matmul_precision("highest"):
            q, _ = gptq_core.quantize_weight(jnp.asarray(w), jnp.asarray(h), how, blocksize=8)
        found |= {
            f"{name}_levels": np.asarray(q.qvalue.astype(jnp.int8)),
            f"{name}_scale": np.asarray(q.scale),
        }
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
