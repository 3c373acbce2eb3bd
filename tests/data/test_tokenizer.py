import json
import subprocess
import sys

import numpy as np
import pytest

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokens.tokenizer import load_tokenizer, train_tokenizer
from tests.data.corpora import some_texts

TEXTS = [
    "",
    "plain",
    "  \n\t\r\n  indented\n",
    "Ünïcödé 语言 🙂👩‍👩‍👧 \u0000\u0001\u007f\u0080 \ufeff\u2028 e\u0301",
    "<|endoftext|> is text here",
    bytes(range(256)).decode("latin-1"),
    "".join(chr(c) for c in range(0x20, 0x3000, 7)),
]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(some_texts(50), TokenizerConfig(vocab_size=320))


@pytest.fixture(scope="module")
def byte():
    return train_tokenizer([], TokenizerConfig(kind="byte"))


@pytest.mark.parametrize("kind", ("bpe", "byte"))
def test_any_text_comes_back(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32
        assert np.array_equal(ids, tokenizer.encode(text))
        assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


@pytest.mark.parametrize("kind", ("bpe", "byte"))
def test_token_bytes_sum_to_the_texts_bytes(kind, request):
    tokenizer = request.getfixturevalue(kind)
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.eos_id] == 0
    for text in TEXTS:
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


def test_byte_ids_are_the_bytes(byte):
    assert byte.vocab_size == 257
    assert byte.bos_id == byte.eos_id == 256
    assert byte.encode("aé\n").tolist() == list("aé\n".encode())


def test_bpe_compresses_and_respects_its_size(bpe):
    text = some_texts(50)[7]
    assert bpe.vocab_size == 320
    assert len(bpe.encode(text)) < len(text.encode()) / 2


def test_save_and_load_keep_digest_and_ids(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.digest == bpe.digest
    assert (again.vocab_size, again.bos_id, again.eos_id) == (bpe.vocab_size, bpe.bos_id, bpe.eos_id)
    assert np.array_equal(again.encode(TEXTS[3]), bpe.encode(TEXTS[3]))


def test_training_gives_the_same_tokenizer_in_another_process(bpe):
    code = (
        "from data.config import TokenizerConfig; from data.tokens.tokenizer import train_tokenizer;"
        "from tests.data.corpora import some_texts;"
        "print(train_tokenizer(some_texts(50), TokenizerConfig(vocab_size=320)).digest)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == bpe.digest


def test_bpe_of_a_text_with_few_pairs_is_smaller():
    tokenizer = train_tokenizer(["abab"], TokenizerConfig(vocab_size=4096))
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("xyz")) == "xyz"


def test_file_with_separate_bos_and_eos_uses_both(bpe, tmp_path):
    content = json.loads(bpe._text)
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": 320 + i, "content": name}
        for i, name in enumerate(("<s>", "</s>"))
    ]
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (320, 321, 322)


def test_bad_files_are_said_in_one_line(tmp_path, bpe):
    with pytest.raises(DataError, match=r"^tokenizer\.path=.*none\.json cannot be read \(No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"^tokenizer\.path=.*bad\.json is no valid tokenizer\.json .*$"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "latin.json").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        load_tokenizer(tmp_path / "latin.json")
    content = json.loads(bpe._text)
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "plain.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has no separator"):
        load_tokenizer(tmp_path / "plain.json")
