"""A model as programs that JAX alone runs: StableHLO with its weights beside it, quantized as they are.

`jax.export` keeps a program for half a year of compatible releases, and for platforms that are not here. A
directory holds three of them, to be read by `jax.export.deserialize` without a line of ours:

    begin.bin   () -> cache                                      an empty one
    read.bin    (weights, cache, tokens [B, C], counts [B]) -> (logits [B, V], cache)    C tokens of a prompt
    next.bin    the same with tokens [B, 1]

Tokens are int32, `counts` of a row's count from the left, and logits, float32, are of what follows its last.
weights: the arrays of model.safetensors by name. decode.json has the sizes.

B rows, C chunk, V vocabulary.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int

from common.checks import choice, within
from interop.safetensors import Tensors, write_tensors
from interop.write import refuse_taken, whole
from models.ops import Ops
from models.transformer import Model, Tree
from serving.generator import decoding_ops, masters_of

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
CHUNK = 64  # tokens of a prompt at once
ABOUT = "decode.json"


def export_programs(
    output: Path,
    model: Model,
    params: Tree,
    *,
    dtype: Any,
    rows: int = 1,
    max_len: int = 0,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    files: Mapping[str, bytes] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the directory, which gets its name when it is whole and read back; what decode.json says.

    dtype: to compute in. rows: texts at a time. max_len: tokens of the longest; 0: as many as the model was
    made for. files: what lies beside, by name; extra: more for decode.json. ValueError for what cannot be.
    """
    refuse_taken(output)
    require_writer()
    for platform in platforms:
        choice("platforms", platform, PLATFORMS)
    within("rows", rows, 1)
    most = model.config.max_seq_len if model.config.position == "learned" else math.inf
    within("max_len", max_len, 0, most)
    capacity = max_len or model.config.max_seq_len
    chunk = min(CHUNK, capacity)
    # The definitions, not the kernels of this machine: one program for every platform.
    ops = decoding_ops(Ops(compute_dtype=jnp.dtype(dtype)), None)
    tree = jax.jit(partial(model.unstack, ops=ops, masters=masters_of(ops), packed=True))(params)
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in named}

    def begin() -> Tree:
        return model.init_cache(rows, capacity, ops)

    def read(
        weights: dict[str, Array], cache: Tree, tokens: Int[Array, "B C"], counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Tree]:
        leaves = [weights[name] for name in arrays]
        return model.decode(jax.tree.unflatten(treedef, leaves), tokens, cache, ops, counts)

    made = partial(_serialized, platforms=tuple(platforms))
    given = jax.eval_shape(lambda: (arrays, begin()))
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = {"read": chunk, "next": 1}
    programs = {"begin": made(jax.jit(begin))}
    # A cache is written where it lies: what was given is gone.
    step = jax.jit(read, donate_argnums=1)
    for name, count in tokens.items():
        programs[name] = made(step, *given, jax.ShapeDtypeStruct((rows, count), jnp.int32), counts)
    about = {
        "rows": rows,
        "max_len": capacity,
        "chunk": chunk,
        "vocab_size": model.config.vocab_size,
        "dtype": str(jnp.dtype(dtype)),
        "platforms": list(platforms),
        "jax": jax.__version__,
        **(extra or {}),
    }
    host = {name: np.asarray(array) for name, array in arrays.items()}
    with whole(output) as aside:
        shapes = {name: array.shape for name, array in host.items()}
        kinds = {name: array.dtype for name, array in host.items()}
        write_tensors(aside, shapes, host.items(), kinds)
        contents = {f"{name}.bin": bytes(program) for name, program in programs.items()}
        contents[ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
        for name, content in {**contents, **(files or {})}.items():
            (aside / name).write_bytes(content)
        back = Tensors(aside)
        for name, array in host.items():
            if not np.array_equal(back[name], array):
                raise ValueError(f"{output}: {name} was not written as it is; is the disk sound?")
    return about


def require_writer() -> None:
    """Raise ValueError where what JAX writes programs with is not installed."""
    if find_spec("flatbuffers") is None:
        raise ValueError(
            "format=stablehlo needs flatbuffers, which is not here; pip install -e '.[stablehlo]'"
        )


def _serialized(function: Any, *arguments: Any, platforms: tuple[str, ...]) -> bytearray:
    return export.export(function, platforms=platforms)(*arguments).serialize()
