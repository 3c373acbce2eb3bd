"""The step for a GPU that is not here: the claims of the committed table, and the same of a smaller model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.measure import as_table
from benchmarks.planner import described
from kernels.token_losses import chunked_cross_entropy
from tests.compilers import skip_without

COMMITTED = json.loads(described.GPU_RESULT.read_text("utf-8"))
ROWS = [described.GpuStep(**row) for row in COMMITTED["rows"]]
SMALL = (
    *("model.num_layers=3", "model.d_model=256", "model.num_heads=4", "model.num_kv_heads=2"),
    *("model.head_dim=64", "model.d_ff=768", "model.vocab_size=4096", "training.loss_chunk=1024"),
)
CHUNK = {"committed": 8192, "small": 1024}
VOCAB = {"committed": 50304, "small": 4096}
WORKSPACE = 2**25  # cuBLASLt's, in the same tuple as its result


def check_claims(row, size):
    """Attention once a layer; all products cuBLASLt's; nothing quadratic in T; logits of one chunk."""
    assert row.attention_forward == row.attention_backward == row.layers
    assert row.other_products == 0
    assert row.product_flops == row.model_flops + row.again_flops  # the one behind attention is made twice
    assert 0 < row.again_flops < 0.03 * row.model_flops or size == "small"
    chunks = row.rows * row.seq_len // CHUNK[size]
    # The head and its two gradients stay bfloat16; XLA merges small products that share an operand.
    projections = row.cublaslt + row.cublaslt_f8 - 3 * chunks
    assert row.cublaslt_f8 == (projections if row.precision == "fp8" else 0)
    assert 5 * row.layers < projections <= 16 * row.layers
    assert projections == 16 * row.layers or row.parameters < 1e9
    assert not row.scores_bytes
    assert 0 < row.logits_bytes <= CHUNK[size] * VOCAB[size] * 4 + WORKSPACE


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.experiment}-{r.precision}-{r.rows}x{r.seq_len}")
def test_the_committed_table_shows_what_is_claimed(row):
    check_claims(row, "committed")
    assert row.temporary_bytes <= 40e9
    assert row.rows * row.seq_len == 32768


def test_the_documents_table_is_the_committed_one():
    assert as_table([row.row() for row in ROWS]) in Path("docs/precision.md").read_text("utf-8")


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_a_smaller_step_shows_the_same(precision):
    config = described.gpu_config("bench_1b", precision, 4, 1024, *SMALL)
    try:
        row, _ = described.describe_gpu(config, "bench_1b")
    except ImportError as error:
        skip_without(error)
    check_claims(row, "small")


def test_the_loss_multiplies_three_times_a_chunk():
    x, w = jnp.ones((2, 16, 8)), jnp.ones((32, 8))
    targets, weights = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16))

    def loss(x, w):
        return chunked_cross_entropy(x, w, targets, weights, chunk=8, softcap=30.0, z_loss=1e-4)[0]

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w))
    assert jaxpr.count("dot_general[") == 3
