"""Names by which other rooms know what a layer computes: imports nothing, so that a config may ask.

Checkpoint names are what models and kernels call an array by, and what policies of rematerialization
(`parallel.schedules.accumulate`) keep: a name is changed in both places, so it stands here once.
Projections are named by the letters of their einsums.

The letters are those of `models.layers`: B rows, T (S) positions, D and E model, N and K heads, H head size,
F feed-forward, R a latent, C the two of a fused pair.
"""

# -- checkpoint names --------------------------------------------------------------------------------------

# What attention's backward needs of its forward: the output and the log-sum-exp of each query's scores.
# One name for all kernels, though the ring had it first: a policy does not ask which of them runs.
ATTENTION_OUTPUT = "ring_attention"
ATTENTION_Q, ATTENTION_K, ATTENTION_V = "attention_q", "attention_k", "attention_v"
ATTENTION_INPUTS = (ATTENTION_Q, ATTENTION_K, ATTENTION_V)
MLP_UP = "mlp_up"  # the product into the wide hidden layer: the largest array of a dense layer
# A quantized product, or the scales of its operands: a policy that keeps matrix products cannot see them by
# their primitive, since what follows the product (scaling, rounding) is what has to be kept.
QUANTIZED = "projection"

# -- projections -------------------------------------------------------------------------------------------

PROJECTIONS = {
    "BTD,DNH->BTNH": "q",
    "BTD,DCKH->BTCKH": "kv",
    "BTNH,NHD->BTD": "o",
    "BTD,DCF->BTCF": "up",  # gated, its gate beside it
    "BTD,DF->BTF": "up",
    "BTF,FD->BTD": "down",
    "BTD,DR->BTR": "latent",  # latent attention: down to the latents of queries, and of keys and values
    "BTR,RNH->BTNH": "latent_q",  # and up from them
    "BSR,RNH->BSNH": "latent_kv",
    "BTD,DH->BTH": "latent_rope",
    "BTD,DE->BTE": "further",  # multi-token prediction: stream and embedding to one stream
}
NAMES = tuple(dict.fromkeys(PROJECTIONS.values()))


def name_of(spec: str) -> str:
    """The projection's name; a KeyError is a projection that the table above has yet to learn."""
    return PROJECTIONS[spec]
