"""Corpora prepared with tokenizers that others made: their separators, and bytes that their pieces lose."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data.config import TokenizerConfig
from data.loading.held_out import EvalBatches
from data.pipeline import follow, prepare
from data.tokens.encoding import TextEncoding
from data.tokens.tokenizer import CONFIG, train_tokenizer
from tests.data.corpora import BYTES, folder_config, some_texts, train_of, write_texts

TEXTS = [f"{text}\n\n    Indented ({number}), and Said.\n" for number, text in enumerate(some_texts(60))]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("foreign"), TEXTS)


def word_pieces(path):
    """BERT's kind: lower case, no spaces, no line breaks; its separators are said beside it."""
    specials = ["[UNK]", "<open>", "<shut>"]
    letters = sorted(set("".join(TEXTS).lower()) - set(" \n语"))
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters), "import", "lam", "##bda", "indent"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.add_special_tokens(specials)
    backend.save(str(path))
    path.with_name(CONFIG).write_text(json.dumps({"cls_token": "<open>", "sep_token": {"content": "<shut>"}}))
    return TokenizerConfig(kind="file", path=str(path))


@pytest.fixture(scope="module")
def prepared(texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("pieces")
    config = folder_config(texts, root / "cache")
    return config, prepare(config, word_pieces(root / "tokenizer.json"), progress=False)


def test_separators_named_beside_reach_the_store_the_workers_and_other_processes(prepared):
    config, made = prepared
    for one in (made, follow(json.loads(json.dumps(made.facts())))):
        tokenizer = one.tokenizer
        assert tokenizer.token(tokenizer.bos_id) == "<open>" and tokenizer.token(tokenizer.eos_id) == "<shut>"
        for ids in train_of(one).framed():
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not np.isin(ids[1:-1], [tokenizer.bos_id, tokenizer.eos_id]).any()
    encoder = TextEncoding(made.description["tokenizer_path"]).open()
    assert (encoder.bos_id, encoder.eos_id) == (made.tokenizer.bos_id, made.tokenizer.eos_id)


def test_other_separators_are_another_store_and_the_same_ones_are_found_again(texts, prepared, tmp_path):
    config, made = prepared
    tokenizer = word_pieces(tmp_path / "tokenizer.json")
    assert prepare(config, tokenizer, progress=False).digest == made.digest
    (tmp_path / CONFIG).write_text(json.dumps({"bos_token": "<shut>", "eos_token": "<shut>"}))
    other = prepare(config, tokenizer, progress=False)
    assert other.digest != made.digest and train_of(other).bos_id == made.tokenizer.eos_id


def test_bytes_are_the_texts_own_however_much_is_evaluated(prepared):
    """Bytes of any batches, and of all of them, are to their tokens as the text's are to its tokens."""
    config, made = prepared
    store = made.validation
    assert store.text_bytes(0) == 0
    whole = EvalBatches(store, config, batch_size=2)
    assert whole.num_bytes == store.num_bytes == whole._covered()[1]
    pieces = int(store.token_bytes[store.tokens].sum())
    assert pieces != store.num_bytes  # so that there is something to share out
    for count in (1, 3, len(whole) - 1, len(whole)):
        part = EvalBatches(store, config, batch_size=2, max_batches=count)
        counted = sum(
            int(store.token_bytes[b["targets"][b["loss_weights"] > 0]].sum()) for b in list(whole)[:count]
        )
        assert part.num_bytes == pytest.approx(counted * store.num_bytes / pieces, abs=0.5)


def test_where_pieces_add_up_bytes_are_those_of_the_tokens(texts, tmp_path):
    config = folder_config(texts, tmp_path / "cache")
    for tokenizer in (BYTES, TokenizerConfig(vocab_size=300)):
        store = prepare(config, tokenizer, progress=False).validation
        assert [store.text_bytes(n) for n in (1, 12345, 10**15 + 1)] == [1, 12345, 10**15 + 1]


def test_a_tokenizer_that_loses_something_is_said(texts, tmp_path, capsys):
    exact = tmp_path / "exact.json"
    train_tokenizer((), BYTES).save(exact)
    for tokenizer in (word_pieces(tmp_path / "pieces.json"), TokenizerConfig(kind="file", path=str(exact))):
        if tokenizer.path == str(exact):
            (tmp_path / CONFIG).unlink()  # it is of the other
        prepare(folder_config(texts, tmp_path / "cache"), tokenizer)
        said = "does not give a text back" in capsys.readouterr().out
        assert said == (tokenizer.path != str(exact))
