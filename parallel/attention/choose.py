"""The attention that a run computes: what `training.attention` asks for, on these devices, for this model.

What each backend can do stands in `kernels.backends`, the one table; here are the functions behind names.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Array

from kernels.attention import chunked_attention, reference_attention, xla_attention
from kernels.attention_cpu import fused_attention
from kernels.attention_cudnn import cudnn_attention
from kernels.attention_splash import splash_attention
from kernels.backends import Choice, Wanted, choose, facts_of
from parallel.attention.context import context_attention, splash_of_parts
from parallel.attention.sharded import sharded_cudnn, sharded_splash
from parallel.axes import Layout
from parallel.config import ContextConfig

# Of arrays on one device, or of global ones: XLA partitions these by itself.
PLAIN: dict[str, Callable[..., Array]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "fused": fused_attention,
    "xla": xla_attention,
}


def choose_attention(asked: str, wanted: Wanted, layout: Layout, dtype: Any) -> Choice:
    """The backend that attention runs with on these devices, and why.

    asked: training.attention; wanted: what the run needs, whatever it runs on; dtype: of the compute. Raises
    ValueError, in one line, where one asked for by name cannot do it.
    """
    facts = {**facts_of(layout.mesh.devices.flat[0]), "dtype": dtype.name, "devices": layout.mesh.size}
    return choose(asked, replace(wanted, **facts))


def build_attention(name: str, layout: Layout, split: ContextConfig, documents: int) -> Callable[..., Array]:
    """The function with the signature of `Ops.attention`: a backend, and its way over devices.

    split: how rows cross devices where mesh.context is above 1; documents: in a row, at most.
    """
    context, kind, zigzag = layout.mesh.shape["context"], split.attention, split.zigzags
    # Kernels that XLA cannot partition need a shard_map even where rows are whole: heads and rows lie on
    # several devices all the same.
    if context == 1 and name == "cudnn":
        return sharded_cudnn(layout, documents)
    if context == 1 and name == "splash":
        return sharded_splash(layout)
    local: dict[str, Callable[..., Array]] = {
        **PLAIN,
        "cudnn": partial(cudnn_attention, max_documents=documents),
        "splash": splash_of_parts(context, zigzag=zigzag) if kind == "allgather" else splash_attention,
        "ring": reference_attention,  # not called
    }
    return context_attention(kind, layout, local[name], zigzag=split.zigzag)
