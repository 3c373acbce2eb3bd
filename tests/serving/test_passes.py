"""Texts that begin alike lie once in a pass, and each of their tokens is found where its own text has it."""

import numpy as np
import pytest

from serving.passes import KEYS, LEAST_ROW, QUERIES, TOKENS, row_passes, tree_passes


def some_texts(rng):
    """Documents with several endings each, one of them the beginning of another, some repeated, some long."""
    texts = [(), (1,), tuple(range(TOKENS + 5))]
    for _ in range(60):
        context = tuple(rng.integers(0, 3, rng.integers(0, 90)).tolist())
        texts += [(*context, *rng.integers(0, 9, rng.integers(0, 40)).tolist()) for _ in range(4)]
    return [texts[i] for i in rng.permutation(len(texts))]


@pytest.mark.parametrize("ways", [1, 3])
def test_every_token_is_where_its_text_has_it_and_sees_what_it_should(ways):
    texts = some_texts(np.random.default_rng(0))
    passes = list(tree_passes(texts, ways))
    seen = [number for one in passes for number, *_ in one.texts]
    assert sorted(seen) == list(range(len(texts)))
    read = 0
    for one in passes:
        tokens, positions, paths = one.batch["tokens"], one.batch["positions"], one.batch["paths"]
        assert len(tokens) == ways and paths.queries.shape[1:] == (tokens.shape[1] // 4, QUERIES)
        keys = paths.keys.reshape(ways, paths.keys.shape[1], -1)
        assert paths.keys.shape[-1] == KEYS and keys.shape[2] == tokens.shape[1]
        for number, row, places in one.texts:
            text = texts[number]
            assert tokens.shape[1] == (TOKENS if len(text) <= TOKENS else 2 * TOKENS)  # by its length alone
            assert tuple(tokens[row, places]) == text
            assert positions[row, places].tolist() == list(range(len(text)))
            for position, place in enumerate(places):
                block, own = divmod(paths.own[row, place], QUERIES)
                # At the place that its position says, beside the keys of its own text in their order.
                assert paths.queries[row, block, own] == place and own == position % QUERIES
                assert tuple(tokens[row, keys[row, block, : position + 1]]) == text[: position + 1]
        for row in range(ways):
            here = [texts[number] for number, at, _ in one.texts if at == row]
            beginnings = {text[:end] for text in here for end in range(1, len(text) + 1)}
            assert one.batch["segment_ids"][row].sum() == len(beginnings)  # none is there twice
            read += len(beginnings)
    assert read < 0.6 * sum(map(len, texts))


def test_rows_hold_a_text_each():
    texts = some_texts(np.random.default_rng(1))
    for one in row_passes(texts, 2, None):
        for number, row, places in one.texts:
            assert tuple(one.batch["tokens"][row, places]) == texts[number]
            assert one.batch["segment_ids"][row].sum() == len(texts[number])
            assert one.batch["tokens"].shape[1] <= max(LEAST_ROW, 2 * len(texts[number]))
