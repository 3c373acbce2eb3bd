"""Inputs, a dense kernel and meshes that the tests of context parallelism share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Masks, Scores
from parallel.config import MESH_AXES, MeshConfig
from parallel.mesh import build_layout

RULES = {
    "batch": ["replica", "data", "fsdp", "expert"],
    "length": ["context"],
    "act_heads": ["tensor"],
    "act_kv_heads": ["tensor"],
}
# Rows of documents by length; what is left of a row is padding. The third row is padding alone.
DOCUMENTS = [[20, 12], [5, 1, 17], [], [32]]
LENGTH, HEADS = 32, 8


def layout_of(**sizes):
    config = MeshConfig(rules=RULES, **{"data": 1, **sizes})
    devices = math.prod(getattr(config, axis) for axis in MESH_AXES)
    return build_layout(config, jax.devices()[:devices])


def dense_attention(q, k, v, masks, scores):
    """Attention as its definition reads, K/V heads repeated: nothing to get wrong."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q_positions, kv_positions, q_segments, kv_segments = masks
    products = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scores.scale
    if (cap := scores.softcap) is not None:
        products = cap * jnp.tanh(products / cap)
    behind = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments > 0)[:, :, None] & (behind >= 0)
    if scores.window is not None:
        mask &= behind < scores.window
    weights = jax.nn.softmax(jnp.where(mask[:, None], products, -1e30), axis=-1) * mask[:, None]
    return jnp.einsum("BNTS,BSNW->BTNW", weights, v).astype(q.dtype)


def make_masks(documents=DOCUMENTS, length=LENGTH):
    positions, segments = np.zeros((2, len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        start = 0
        for number, n in enumerate(lengths, 1):
            positions[row, start : start + n] = np.arange(n)
            segments[row, start : start + n] = number
            start += n
    return positions, segments


def make_inputs(kv_heads=HEADS, value_size=8, heads=HEADS, size=8, length=LENGTH):
    """q, k, v and the output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)]
    return [
        2 * jax.random.normal(key, (len(DOCUMENTS), length, *s)) for key, s in zip(keys, shapes, strict=True)
    ]


def value_and_grads(attention, q, k, v, cotangent, positions, segments, **options):
    """Output, and gradients of q, k and v."""
    masks, scores = Masks.of_rows(positions, segments), Scores(scale=0.3, **options)
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, masks, scores), q, k, v)
    return out, *pull(cotangent)


def errors(got, expected):
    """Distance by norm, relative, of each array."""
    pairs = (
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(got, expected, strict=True)
    )
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
