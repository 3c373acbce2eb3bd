"""The fastest matrix product that XLA makes here of a dtype: the roof under which a step's speed is read.

M rows, K contracted, N columns. Forms are named as BLAS does: NN is [M,K] x [K,N]; NT's right side lies
[N,K]; TN's left side lies [K,M].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import timed

FORMS = {"NN": "MK,KN->MN", "NT": "MK,NK->MN", "TN": "KM,KN->MN"}
SIZES = {"cpu": (1024, 2048)}
OTHER_SIZES = (4096, 8192, 16384)
TRIES = 7


def product(form: str, size: int, dtype: Any, out: Any) -> Callable[[], float]:
    """A function that gives the seconds of one product of [size, size] matrices, compiled and warm."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    multiply = jax.jit(lambda a, b: jnp.einsum(FORMS[form], a, b, preferred_element_type=out))
    multiply(x, x).block_until_ready()
    return lambda: timed(lambda: multiply(x, x).block_until_ready())


def results_of(dtype: Any) -> tuple[Any, ...]:
    """Element types that a product of this dtype may have: its own, and float32 where that is another."""
    dtype = jnp.dtype(dtype)
    return (dtype,) if dtype == jnp.float32 else (dtype, jnp.dtype(jnp.float32))


def matmul_peak(dtype: Any, platform: str) -> tuple[float, str]:
    """FLOP/s of one device in its best product with operands of this dtype, and which that was."""
    best, how = 0.0, ""
    for size in SIZES.get(platform, OTHER_SIZES):
        for out in results_of(dtype):
            seconds = product("NN", size, dtype, out)
            speed = 2 * size**3 / min(seconds() for _ in range(TRIES))
            if speed > best:
                best, how = speed, f"{jnp.dtype(dtype).name} to {out.name}, {size} x {size}"
    return best, how
