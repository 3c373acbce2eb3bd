"""What a projection is called, by the letters of its einsum: imports nothing, so that a config may ask.

The letters are those of `models.layers`: B rows, T (S) positions, D and E model, N and K heads, H head size,
F feed-forward, R a latent, C the two of a fused pair.
"""

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
