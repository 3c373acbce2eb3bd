"""The attention that a run computes: what `training.attention` asks for, on these devices, for this model.

What each backend can do stands in `kernels.backends`, the one table; here are the functions behind names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Array

from kernels.attention import chunked_attention, reference_attention, xla_attention
from kernels.attention_cpu import fused_attention
from kernels.attention_cudnn import cudnn_attention
from kernels.attention_splash import splash_attention
from kernels.backends import Choice, choose, documents_of, facts_of, wanted_of
from parallel.attention.context import context_attention, splash_of_parts, uses_zigzag
from parallel.attention.sharded import sharded_cudnn, sharded_splash
from parallel.axes import Layout

# Of arrays on one device, or of global ones: XLA partitions these by itself.
PLAIN: dict[str, Callable[..., Array]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "fused": fused_attention,
    "xla": xla_attention,
}


def choose_attention(config: Any, layout: Layout, dtype: Any) -> Choice:
    """The backend for a resolved config on these devices, and why; dtype: of the compute.

    Raises ValueError, in one line, where one asked for by name cannot do it.
    """
    context = layout.mesh.shape["context"]
    facts = {**facts_of(layout.mesh.devices.flat[0]), "dtype": dtype.name, "devices": layout.mesh.size}
    return choose(config.training.attention, wanted_of(config, context, **facts))


def build_attention(name: str, config: Any, layout: Layout) -> Callable[..., Array]:
    """The function with the signature of `Ops.attention`: a backend, and its way over devices."""
    context, kind = layout.mesh.shape["context"], config.context.attention
    documents = documents_of(config)
    if context == 1 and name == "cudnn":
        return sharded_cudnn(layout, documents)
    if context == 1 and name == "splash":
        return sharded_splash(layout)
    zigzag = uses_zigzag(kind, config.context.zigzag)
    local: dict[str, Callable[..., Array]] = {
        **PLAIN,
        "cudnn": partial(cudnn_attention, max_documents=documents),
        "splash": splash_of_parts(context, zigzag=zigzag) if kind == "allgather" else splash_attention,
        "ring": reference_attention,  # not called
    }
    return context_attention(kind, layout, local[name], zigzag=config.context.zigzag)
