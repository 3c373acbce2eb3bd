"""Names by which other rooms know what a layer computes: imports nothing, so that a config may ask.

Dims of arrays are named by logical axes, which a mesh's rules split. Checkpoint names are what models and
kernels call an array by, and what policies of rematerialization (`parallel.schedules.accumulate`) keep: a
name is changed in both places, so it stands here once. Projections are named where they are called,
`ops.project("q", "BTD,DNH->BTNH", x, w)`, and whoever treats one unlike another asks the table below.
"""

from dataclasses import dataclass

Axes = tuple[str | None, ...]

# -- logical axes ------------------------------------------------------------------------------------------

PARAMETER_AXES = (
    "stages",
    "layers",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "experts",
    "expert_embed",
    "vocab",
    "positions",
)
ACTIVATION_AXES = (
    "batch",
    "length",
    "act_length",
    "act_embed",
    "act_heads",
    "act_kv_heads",
    "act_mlp",
    "act_vocab",
)
LOGICAL_AXES = PARAMETER_AXES + ACTIVATION_AXES


# -- checkpoint names --------------------------------------------------------------------------------------

# What attention's backward needs of its forward: the output and the log-sum-exp of each query's scores.
# One name for all kernels, though the ring had it first: a policy does not ask which of them runs.
ATTENTION_OUTPUT = "ring_attention"
ATTENTION_Q, ATTENTION_K, ATTENTION_V = "attention_q", "attention_k", "attention_v"
ATTENTION_INPUTS = (ATTENTION_Q, ATTENTION_K, ATTENTION_V)
ROUTER_LOGITS = "router_logits"
MATERIALIZED = "materialized"  # what `Ops.materialize` made an array of its own

# -- projections -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """What is known of a product of the activations with a weight, by its name.

    x, y: logical axes of the last dims of the activation that goes in and of the result; what lies between
    these and the rows (batch, length) is whole. kept: whether remat=dots keeps the result for the backward
    pass; one that is not kept is multiplied again there.
    """

    x: Axes = (None,)
    y: Axes = (None,)
    kept: bool = True


PROJECTIONS = {
    "q": Projection(y=("act_heads", None)),
    "kv": Projection(y=("act_kv_heads", None)),
    # Its factors are kept in any case, and it is as cheap as its result is wide: of a layer's products the
    # one with the least to make again for the memory that it takes.
    "o": Projection(x=("act_heads", None), kept=False),
    "up": Projection(y=("act_mlp",)),  # gated, its gate beside it
    "down": Projection(x=("act_mlp",)),
    "latent": Projection(),  # latent attention: down to the latents of queries, and of keys and values
    "latent_q": Projection(y=("act_heads", None)),  # and up from them
    "latent_kv": Projection(y=("act_heads", None)),
    "latent_rope": Projection(),
    "gate": Projection(y=("act_heads", None)),  # of attention's output
    "delta_qk": Projection(y=("act_heads", None)),  # the gated delta rule: queries and keys
    "delta_v": Projection(y=("act_heads", None)),
    "delta_z": Projection(y=("act_heads", None)),  # the gate of its output
    "delta_ba": Projection(y=("act_heads",)),  # how much is written, and how much is left
    "further": Projection(),  # multi-token prediction: stream and embedding to one stream
}


def product_name(name: str) -> str:
    """The checkpoint name of a projection's result."""
    return f"{name}_projection"


def dims_of(axes: Axes, ndim: int) -> Axes:
    """Logical axes of all dims of an activation [batch, length, ...] whose last ones are `axes`."""
    return ("batch", "length", *(None,) * (ndim - 2 - len(axes)), *axes)
