import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokens.tokenizer import (
    CONFIG,
    SEPARATOR,
    Tokenizer,
    _empty_backend,
    load_tokenizer,
    train_tokenizer,
)
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


def bytes_with(*specials, ordinary=()):
    """A byte-level vocabulary with these special tokens, and these that are none."""
    backend = _empty_backend()
    backend.train_from_iterator(
        ["plain text"],
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(specials),
            show_progress=False,
        ),
    )
    content = json.loads(backend.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in specials]
    backend = Backend.from_str(json.dumps(content))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    return backend


def separators(tokenizer):
    return tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)


SPECIALS = {
    "gemma": (("<pad>", "<eos>", "<bos>"), ("<bos>", "<eos>")),
    "qwen": ((SEPARATOR,), (SEPARATOR, SEPARATOR)),
    "bert": (("[UNK]", "[CLS]", "[SEP]"), ("[CLS]", "[SEP]")),
    "eos alone": (("<eos>",), ("<eos>", "<eos>")),
}


@pytest.mark.parametrize(("specials", "wanted"), SPECIALS.values(), ids=SPECIALS)
def test_separators_are_special_tokens_and_no_text_gives_them(specials, wanted):
    tokenizer = Tokenizer(bytes_with(*specials, ordinary=("<s>", "</s>")).to_str())
    assert separators(tokenizer) == wanted
    text = "old <s>price</s> " + "".join(specials)
    ids = tokenizer.encode(text)
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
    assert tokenizer.decode(ids) == text


BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
BESIDE = {
    "objects": ({CONFIG: {"bos_token": {"content": BEGIN}, "eos_token": {"content": END}}}, (BEGIN, END)),
    "texts": ({CONFIG: {"bos_token": BEGIN, "eos_token": END}}, (BEGIN, END)),
    "map": ({"special_tokens_map.json": {"bos_token": BEGIN, "eos_token": {"content": END}}}, (BEGIN, END)),
    "both": (
        {CONFIG: {"bos_token": None, "eos_token": END}, "special_tokens_map.json": {"bos_token": BEGIN}},
        (BEGIN, END),
    ),
    "eos alone": ({CONFIG: {"bos_token": None, "eos_token": END}}, ("</s>", END)),
    "bert": ({CONFIG: {"cls_token": BEGIN, "sep_token": END}}, (BEGIN, END)),
    "a mark": ({CONFIG: {"bos_token": BEGIN, "eos_token": END, "cls_token": "x"}}, (BEGIN, END)),
    "ordinary": ({CONFIG: {"bos_token": "<a>", "eos_token": "<b>"}}, ("<a>", "<b>")),
    "none": ({}, ("</s>", "</s>")),
}


@pytest.mark.parametrize(("files", "wanted"), BESIDE.values(), ids=BESIDE)
def test_separators_are_what_the_files_beside_name(tmp_path, files, wanted):
    path = tmp_path / "tokenizer.json"
    bytes_with("</s>", BEGIN, END, ordinary=("<a>", "<b>")).save(str(path))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert separators(tokenizer) == wanted
    ids = tokenizer.encode("".join(wanted))
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "".join(wanted)
    # The store and the run's directory have only what `save` writes; and what is another document is said.
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    again = load_tokenizer(tmp_path / "copy" / "tokenizer.json")
    assert (separators(again), again.digest) == (wanted, tokenizer.digest)
    plain = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tokenizer.digest == plain) == (wanted == ("</s>", "</s>"))


def test_a_separator_that_the_vocabulary_lacks_is_refused(tmp_path):
    bytes_with("</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / CONFIG).write_text(json.dumps({"bos_token": "<none>"}))
    with pytest.raises(DataError, match=r"has no token '<none>', the bos_token that .* names; name one"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(DataError, match=f"{CONFIG} cannot be read .*; mend it or move it away"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_separators_are_what_the_file_frames_a_text_with():
    backend = bytes_with("<first>", "<last>", "</s>")
    ids = [(token, backend.token_to_id(token)) for token in ("<first>", "<last>")]
    for frame, wanted in (("<first> $A <last>", ("<first>", "<last>")), ("<first> $A", ("<first>", "</s>"))):
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
        assert separators(Tokenizer(backend.to_str())) == wanted


def whole_words(model, before, normalizer=None):
    backend = Backend(model)
    backend.pre_tokenizer = before
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(["</s>", "<unk>"])
    return Tokenizer(backend.to_str())


PIECES = ["<unk>", "</s>", "a", "<", "/", "s", ">"]
WHOLE = {
    "words": (
        models.WordLevel({p: i for i, p in enumerate(PIECES)}, "<unk>"),
        pre_tokenizers.WhitespaceSplit(),
    ),
    "pieces": (
        models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="<unk>"),
        pre_tokenizers.WhitespaceSplit(),
    ),
    "unigram": (
        models.Unigram([(p, -float(i)) for i, p in enumerate(PIECES)], 0),
        pre_tokenizers.Metaspace(),
    ),
    "merged": (
        models.BPE(
            {p: i for i, p in enumerate([*PIECES, "</", "</s"])},
            [("<", "/"), ("</", "s"), ("</s", ">")],
            unk_token="<unk>",
        ),
        pre_tokenizers.WhitespaceSplit(),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("spelled", ["</s>", "</S>"])
def test_a_model_of_whole_words_gives_no_separator_either(case, spelled):
    tokenizer = whole_words(*WHOLE[case], normalizer=normalizers.Lowercase())
    for text in (spelled, f"a {spelled} a", spelled * 3000):
        ids = tokenizer.encode(text)
        assert len(ids) and tokenizer.eos_id not in ids
    assert tokenizer.token(tokenizer.encode("é")[-1]) == "<unk>"  # unknown characters stay what they were


def test_what_we_train_agrees_with_itself_and_has_its_first_digest(tmp_path):
    config = TokenizerConfig(vocab_size=320)
    tokenizer = train_tokenizer(some_texts(50), config)
    # As it was written once: the trainer leaves the untrained vocabulary's id in the list of added tokens.
    backend = _empty_backend()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        some_texts(50),
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
        ),
    )
    first = backend.to_str(pretty=True)
    (tmp_path / "first.json").write_text(first, encoding="utf-8")
    old = load_tokenizer(tmp_path / "first.json")
    assert old.digest == tokenizer.digest == hashlib.sha256(first.encode()).hexdigest()
    for one in (tokenizer, old):
        one.save(tmp_path / "tokenizer.json")
        content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        assert [(token["content"], token["id"]) for token in content["added_tokens"]] == [(SEPARATOR, 0)]
        assert content["model"]["vocab"][SEPARATOR] == 0
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again.digest == tokenizer.digest
        # Nothing but that id has changed, and the library reads the same of either.
        read = [Backend.from_str(text).to_str() for text in (first, again._text)]
        assert read[0] == read[1]
    # What somebody else wrote of it is a file like any other.
    theirs = Backend.from_str(first).to_str(pretty=True)
    assert Tokenizer(theirs).digest == hashlib.sha256(theirs.encode()).hexdigest()
    byte = train_tokenizer([], TokenizerConfig(kind="byte"))
    assert byte.digest == hashlib.sha256(_empty_backend().to_str(pretty=True).encode()).hexdigest()


def test_a_piece_counts_what_it_stands_for_in_a_text():
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "walk", "##ing", ".", "走"]
    backend.model = models.WordPiece({p: i for i, p in enumerate(vocabulary)}, unk_token="[UNK]")
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    counts = Tokenizer(backend.to_str()).token_bytes()
    # A word has the space before it, what continues it and a sign have none.
    assert counts.tolist() == [0, 0, 0, 5, 3, 1, 3]
    content = json.loads(bytes_with(SEPARATOR).to_str())
    content["model"]["end_of_word_suffix"] = "</w>"
    content["model"]["vocab"] |= {"walk</w>": 900, "walk": 901, ".</w>": 902}
    counts = Tokenizer(json.dumps(content)).token_bytes()
    assert counts[900:].tolist() == [5, 4, 1]
