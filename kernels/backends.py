"""Attention backends: one table of what each can do, one sentence for what it cannot, and the choice of one.

Only numbers and names are compared: `training.legal` asks before devices are known, `parallel.attention`
when they are, and kernels by the shapes that reach them. Masks are exact for packed documents on every
backend, in forward and gradient; the table says for which rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HALF = ("bfloat16", "float16")
LANES = 128  # of a TPU's vector registers: positions come in multiples of them
# The remedy that always works: it computes everything, on everything, at some cost in speed.
ELSE = "or use training.attention=chunked"


@dataclass(frozen=True)
class Backend:
    """What one attention backend supports; an empty tuple stands for any.

    packing: several documents in a row, from `packed_capability` on where NVIDIA GPUs differ. order: of the
    positions that it takes: `any`; `text`, queries and keys by their place in the row, the queries perhaps a
    part of it; `whole`, both the same whole row. sinks: a learned score a head may take weight.
    head_multiple, head_limit: of the size of heads. wide_values: values may be wider or narrower than keys.
    part_multiple: of positions that lie together. one_device: not in a mesh of several. quadratic:
    [B, N, T, S] scores exist at once.
    """

    what: str
    platforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    packing: bool = True
    packed_capability: tuple[int, int] | None = None
    grouped: bool = True
    window: bool = True
    softcap: bool = True
    sinks: bool = False
    head_multiple: int = 1
    head_limit: int | None = None
    wide_values: bool = True
    order: str = "any"
    part_multiple: int = 1
    one_device: bool = False
    quadratic: bool = False


BACKENDS: dict[str, Backend] = {
    "reference": Backend("one masked einsum", sinks=True, quadratic=True),
    "chunked": Backend("the same, a block of queries at a time", sinks=True),
    "fused": Backend(
        "blocks of queries, a row at a time, with a backward of its own",
        platforms=("cpu",),
        sinks=True,
        order="whole",
        one_device=True,
    ),
    "xla": Backend(
        "jax.nn.dot_product_attention",
        dtypes=("float32", *HALF),
        softcap=False,
        wide_values=False,
        quadratic=True,
    ),
    "cudnn": Backend(
        "NVIDIA's fused kernel",
        platforms=("gpu", "cuda"),
        dtypes=HALF,
        packed_capability=(9, 0),  # Hopper: the first whose cuDNN attention takes ragged rows
        softcap=False,
        head_multiple=8,
        head_limit=256,
        wide_values=False,
        order="whole",
    ),
    "splash": Backend(
        "JAX's Pallas kernel for TPUs",
        platforms=("tpu",),
        dtypes=("float32", "bfloat16"),
        head_multiple=8,
        head_limit=256,
        order="text",
        part_multiple=LANES,
    ),
}
# By platform, fastest first; the last can do everything.
# The first that can do what is wanted is taken, so each list ends with one that can do everything: `auto`
# never refuses.
FASTEST = {
    "cpu": ("fused", "reference"),
    "gpu": ("cudnn", "chunked"),
    "cuda": ("cudnn", "chunked"),
    "tpu": ("splash", "chunked"),
}
# Of a platform that nobody has measured: plain XLA operations, and no [T, T] array.
OTHERWISE = ("chunked",)
PLATFORM_NAMES = {"cpu": "a CPU", "gpu": "NVIDIA GPUs", "cuda": "NVIDIA GPUs", "tpu": "TPUs"}


@dataclass(frozen=True)
class Wanted:
    """What attention must be able to do; None where that is not known (and then not checked).

    order: as `Backend.order`, what the rows are that reach the kernel. context: the kind of
    context.attention that splits rows, where one does. part: positions of a row that lie together.
    capability: of an NVIDIA GPU. devices: in the mesh.
    """

    head_dim: int | None = None
    value_dim: int | None = None
    grouped: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: str | None = None
    packed: bool = False
    order: str = "whole"
    context: str | None = None
    part: int | None = None
    platform: str | None = None
    capability: tuple[int, ...] | None = None
    devices: int | None = None
    device: str = "this device"


def facts_of(device: Any) -> dict[str, Any]:
    """The fields of a `Wanted` that a device answers: platform, capability and name."""
    version = str(getattr(device, "compute_capability", None) or "")
    # Compared as numbers: as words, 10.0 would come before 9.0.
    numbers = version.split(".")  # AMD's are words
    capability = tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else None
    return {"platform": device.platform, "capability": capability, "device": device.device_kind}


def problem(name: str, wanted: Wanted) -> str | None:
    """Why this backend cannot do what is wanted, in one sentence with the remedy; None where it can."""
    # The first reason is enough: a user mends one value at a time, and remedies of later rules may be moot by
    # then.
    found = (rule(f"training.attention={name}", BACKENDS[name], wanted) for rule in RULES)
    return next((reason for reason in found if reason is not None), None)


def _ring(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if wanted.context != "ring":
        return None
    return (
        f"{key} has nothing to do under context.attention=ring, which computes for itself; "
        "use training.attention=auto or context.attention=ulysses"
    )


def _order(key: str, backend: Backend, wanted: Wanted) -> str | None:
    # Whole rows are in order of the text in any case: loaders make no others, and zigzag order is of parts
    # alone.
    if backend.order in ("any", wanted.order) or wanted.order == "whole":
        return None
    return (
        f"context.attention={wanted.context} cannot use {key}, whose kernel takes rows in the order of the "
        "text; use context.attention=ulysses or training.attention=chunked"
    )


def _device(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if wanted.platform is None or not backend.platforms:
        return None
    # AMD's devices call their platform gpu as well; only NVIDIA's capability is a number.
    nvidia = wanted.platform in ("gpu", "cuda")
    if wanted.platform not in backend.platforms or (nvidia and wanted.capability is None):
        return (
            f"{key} needs {PLATFORM_NAMES[backend.platforms[0]]}, not {wanted.platform}; "
            "use training.attention=chunked"
        )
    least = backend.packed_capability
    if wanted.packed and least is not None and (wanted.capability or ()) < least:
        needed, has = (".".join(map(str, version)) for version in (least, wanted.capability or ()))
        return (
            f"{key} takes packed documents from compute capability {needed} (H100) on, "
            f"and {wanted.device} has {has}; use training.attention=chunked"
        )
    return None


def _alone(key: str, backend: Backend, wanted: Wanted) -> str | None:
    # Its loop goes over the rows of a batch: were they split over devices, each round would need a row that
    # lies on one of them.
    if not backend.one_device or wanted.devices in (None, 1):
        return None
    return f"{key} runs on one device, not in a mesh of {wanted.devices}; use training.attention=reference"


def _documents(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if backend.packing or not wanted.packed:
        return None
    return f"{key} takes one document a row; use data.packing=none, {ELSE}"


def _heads(key: str, backend: Backend, wanted: Wanted) -> str | None:
    size, multiple, limit = wanted.head_dim, backend.head_multiple, backend.head_limit
    if wanted.grouped and not backend.grouped:
        return f"{key} needs model.num_kv_heads to be model.num_heads; use as many, {ELSE}"
    if size is None or (size % multiple == 0 and (limit is None or size <= limit)):
        return None
    most = f" and at most {limit}" if limit is not None else ""
    return (
        f"{key} needs a model.head_dim that is a multiple of {multiple}{most}, not {size}; "
        f"use {_near_head(size, multiple, limit)}, {ELSE}"
    )


def _near_head(size: int, multiple: int, limit: int | None) -> str:
    # The two nearest sizes that are legal: a head's size is a free choice only before a run.
    below = min(size, limit or size) // multiple * multiple
    sizes = [n for n in (below, below + multiple) if n >= multiple and (limit is None or n <= limit)]
    return " or ".join(map(str, sizes))


def _values(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if backend.wide_values or wanted.value_dim in (None, wanted.head_dim):
        return None
    return (
        f"{key} needs values as wide as keys, but latent attention has {wanted.value_dim} "
        f"and {wanted.head_dim}; use training.attention=chunked"
    )


def _scores(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if wanted.softcap is not None and not backend.softcap:
        cap = f"model.attention_softcap={wanted.softcap}"
        return f"{key} cannot bound scores ({cap}); use model.attention_softcap=null, {ELSE}"
    if wanted.sinks and not backend.sinks:
        return (
            f"{key} has no attention sinks (model.attention_sinks=true); "
            f"use model.attention_sinks=false, {ELSE}"
        )
    if wanted.window is not None and not backend.window:
        return f"{key} has no window (model.window={wanted.window}); use model.window=null, {ELSE}"
    return None


def _dtype(key: str, backend: Backend, wanted: Wanted) -> str | None:
    if wanted.dtype is None or not backend.dtypes or wanted.dtype in backend.dtypes:
        return None
    # A remedy has to be a value that the key takes.
    legal = [dtype for dtype in backend.dtypes if dtype != "float16"]  # no value of training.precision
    return (
        f"{key} computes in {' or '.join(backend.dtypes)}, not {wanted.dtype}; "
        f"use training.precision={legal[0]}, {ELSE}"
    )


def _part(key: str, backend: Backend, wanted: Wanted) -> str | None:
    part, multiple = wanted.part, backend.part_multiple
    if part is None or part % multiple == 0:
        return None
    near = part // multiple * multiple
    sizes = " or ".join(str(n) for n in (near, near + multiple) if n)
    # A row that is cut has its seq_len divided by a mesh: naming the part's size as seq_len would mislead.
    if wanted.order == "whole":
        return (
            f"{key} takes positions in multiples of {multiple}, not data.seq_len={part}; "
            f"use data.seq_len={sizes}, {ELSE}"
        )
    return (
        f"{key} takes positions in multiples of {multiple}, and under context.attention={wanted.context} "
        f"only {part} lie together; use a data.seq_len that makes it {sizes}, {ELSE}"
    )


# In the order in which a person would mend them: what computes at all, then device, rows, heads, precision.
RULES = (_ring, _order, _device, _alone, _documents, _heads, _values, _scores, _dtype, _part)


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why: for the start-up table."""

    name: str
    why: str


def choose(asked: str, wanted: Wanted, fastest: Mapping[str, tuple[str, ...]] = FASTEST) -> Choice:
    """The backend asked for or, for `auto`, the fastest that can do what is wanted on this platform.

    Raises ValueError, with the remedy, where one asked for by name cannot.
    """
    if asked != "auto":
        if (reason := problem(asked, wanted)) is not None:
            raise ValueError(reason)
        return Choice(asked, "training.attention")
    if wanted.context == "ring":
        return Choice("ring", "context.attention=ring computes for itself")
    # What was passed over is said at start-up: a slower backend than the user hoped for is no secret.
    refused: list[str] = []
    for name in fastest.get(wanted.platform or "", OTHERWISE):
        reason = problem(name, wanted)
        if reason is None:
            return Choice(name, "; ".join([f"auto on {wanted.platform}", *refused]))
        refused.append(reason.partition(";")[0].replace("training.attention=", ""))
    raise AssertionError(f"no backend for {wanted}: the last of each platform can do everything")
