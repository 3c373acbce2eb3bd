"""What a run asks of attention, in the words of `kernels.backends`: numbers and names, no device.

Asked three times: by `training.legal` before devices are known, by the program when they are, and by the
planner about devices that are not here.
"""

from typing import Any

from kernels.backends import Wanted
from training.config import Config


def wanted_attention(config: Config, ways: int, **known: Any) -> Wanted:
    """What attention must be able to do where mesh.context splits rows over `ways` devices.

    known: fields of `Wanted` that say more, such as those of the devices.
    """
    model, split = config.model, config.context
    kind = split.attention if ways > 1 else None
    # Ulysses brings whole rows together again; of the others a device keeps its part, in zigzag order two.
    parts = ways * (2 if split.zigzags else 1) if kind not in (None, "ulysses") else 1
    return Wanted(
        head_dim=model.head_dim,
        value_dim=model.mla.v_head_dim if model.mla is not None else model.head_dim,
        grouped=model.num_kv_heads < model.num_heads,
        window=model.window,
        softcap=model.attention_softcap,
        sinks=model.attention_sinks,
        packed=documents_of(config) > 1,
        order="text" if parts > 1 else "whole",
        context=kind,
        part=config.data.seq_len // parts,
        **known,
    )


def documents_of(config: Config) -> int:
    """Documents that a row may hold, for kernels that must be told of them."""
    # A curriculum cuts one document into several rows' worth, also where packing puts one in a row.
    single = config.data.packing == "none" and not config.data.curriculum
    return 1 if single else config.training.max_documents
