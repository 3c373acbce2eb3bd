"""Further tokens: which they are, wherever positions lie. Their layers are held to loops in test_moe."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import MTPConfig
from models.mtp import next_targets
from models.ops import Ops
from models.transformer import build_model
from parallel.schedules.accumulate import GradientAccumulation
from tests.models.decoders import LoopDecoder, family, lively, make_batch
from training.objectives.next_token import NextToken

PACKED = [[5, 7], [3, 1, 6]]
ZIGZAG = np.array([0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8])  # what two devices hold of twelve positions


def moved(batch):
    """The same rows with their positions in another order, and where each lay."""
    order = np.broadcast_to(ZIGZAG, (2, 12)).astype(np.int32)
    return {**{name: x[:, ZIGZAG] for name, x in batch.items()}, "order": order}


def logits_of(model, params, batch, monkeypatch):
    """Of the next token and of each further one: what every head of the model reads, times its table."""
    streams = []

    def spy(x, table, *arguments, **settings):
        streams.append(x @ table.T)
        return real(x, table, *arguments, **settings)

    real = transformer.chunked_cross_entropy
    monkeypatch.setattr(transformer, "chunked_cross_entropy", spy)
    GradientAccumulation().evaluate(model, params, batch, Ops())
    monkeypatch.undo()
    return [np.asarray(x) for x in streams]


def loop_logits(config, params, batch, *, normed):
    """The same in float64: DeepSeek-V3's modules as its published weights have them (arXiv:2412.19437, 2.2).

    normed: each reads the stream as the head before it did, behind that head's own norm.
    """
    loop = LoopDecoder(config)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table, tokens = params["embed"]["table"], batch["targets"]

    def norm(weights, x):
        return weights["scale"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    x = table[batch["tokens"]]
    for layer in loop.layers(params):
        x = loop.layer(layer, x, batch, "global")
    heads = [norm(params["final_norm"], x)]
    for d in range(config.mtp.depth):
        part = params["mtp"][str(d)]
        hidden = norm(part["hidden_norm"], heads[-1] if normed else x)
        both = np.concatenate([hidden, norm(part["embed_norm"], table[tokens])], -1)
        x = loop.layer(part["block"], both @ np.concatenate(part["project"]), batch, "global")
        heads.append(norm(part["final_norm"], x))
        tokens = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return [head @ table.T for head in heads]


@pytest.mark.parametrize("normed", [True, False])
def test_a_further_token_reads_what_the_head_before_it_read(normed, monkeypatch):
    """Behind that head's norm, as weights that others trained expect; before it where an old run goes on."""
    config = family(num_layers=1, mtp=MTPConfig(2, normed_stream=normed))
    model, batch = build_model(config), make_batch(PACKED, 12)
    params = lively(model)
    mine = logits_of(model, params, batch, monkeypatch)
    want = loop_logits(config, params, batch, normed=normed)
    other = loop_logits(config, params, batch, normed=not normed)
    assert len(mine) == 3
    for depth, (logits, same, unlike) in enumerate(zip(mine, want, other, strict=True)):
        assert np.abs(logits - same).max() <= 1e-5 * same.std()
        assert depth == 0 or np.abs(logits - unlike).max() > same.std()


def test_the_next_target_is_of_the_same_document():
    batch = make_batch([[3, 2]], 6)
    targets, weights = next_targets({name: jnp.asarray(x) for name, x in batch.items()})
    same = [1, 1, 0, 1, 0, 0]
    np.testing.assert_array_equal(np.asarray(weights[0]) > 0, np.array(same) > 0)
    for t in np.flatnonzero(same):
        assert (
            targets[0, t] == batch["targets"][0, t + 1] and weights[0, t] == batch["loss_weights"][0, t + 1]
        )


def test_the_order_of_positions_changes_neither_loss_nor_gradients():
    model = build_model(family(num_layers=1, mtp=MTPConfig(2)))
    params, batch = lively(model), make_batch(PACKED, 12)
    run = jax.jit(
        lambda p, b: GradientAccumulation().value_and_grad(NextToken(), model, p, b, jax.random.key(0), Ops())
    )
    (means, grads), (others, slopes) = run(params, batch), run(params, moved(batch))
    assert means["mtp_nll"] > 1 and means["objective"] > means["nll"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), others, means)
    for mine, want in zip(jax.tree.leaves(slopes), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(mine - want) <= 1e-4 * np.linalg.norm(want)
    # Without being told the order it would be another text.
    lost = {name: x for name, x in moved(batch).items() if name != "order"}
    assert abs(run(params, lost)[0]["mtp_nll"] - means["mtp_nll"]) > 1e-3


def test_a_document_sees_no_target_of_the_next():
    model = build_model(family(num_layers=1, mtp=MTPConfig()))
    params, batch = lively(model), make_batch([[4, 4]], 8)
    batch["loss_weights"] *= batch["segment_ids"] == 1

    @jax.jit
    def further(targets):
        x = model.embed(params, batch, Ops())
        return model.head(params, x, {**batch, "targets": targets}, Ops())[1]["mtp_nll"]

    start, matters = further(batch["targets"]), []
    for t in range(8):
        other = batch["targets"].copy()
        other[0, t] = (other[0, t] + 7) % 64
        matters.append(bool(further(other) != start))
    assert matters == [True] * 4 + [False] * 4


def test_evaluation_reports_the_next_token_alone():
    plain, model = (build_model(family(num_layers=1, mtp=mtp)) for mtp in (None, MTPConfig()))
    params, batch = lively(model), make_batch(PACKED, 12)
    own = {name: leaf for name, leaf in params.items() if name != "mtp"}
    evaluate = jax.jit(lambda m, p: GradientAccumulation().evaluate(m, p, batch, Ops()), static_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, evaluate(model, params), evaluate(plain, own))
