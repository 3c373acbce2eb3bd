"""Tokenizers of every kind that published files hold: the same ids as the library's own, out and in again."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.tokens.tokenizer import Tokenizer as Ours
from data.tokens.tokenizer import load_tokenizer
from interop.gguf_tokenizer import tokenizer_files, tokenizer_values
from interop.tokenizer_out import hub_files

CORPUS = [
    "def forward(self, x):\n    return self.weight @ x + 12345  # na\u00efve",
    "the quick brown fox jumps over the lazy dog, and the dog's fox isn't the other's",
    "  many   spaces\tand\r\nline ends \u00e9\u00e9 \u4f60\u597d \u0928\u092e\u0938\u094d\u0924\u0947",
] * 4
WORDS = (
    "the| fox|dog's|DON'T|it'LL|self.weight|return|{%|#|====|-->|a|Z|0|12|1234567890|3.14e-5|<0x41>|<tool>"
)
SPELLED = ["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<unk>"]
BLANKS = [
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n \n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\x00",
    "\x7f",
    "\ufffd",
    "\ufeff",
]
LETTERS = [
    "\u00e9",
    "e\u0301",
    "\ufb01",
    "\u00df",
    "\u0130",
    "\u4f60\u597d",
    "\u0928\u092e\u0938\u094d",
    "\u0663",
    "\u00bd",
]
OTHERS = ["\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u202e", "\u2581", "\u0120"]
PIECES = [*WORDS.split("|"), *SPELLED, *BLANKS, *LETTERS, *OTHERS]


def nasty(count=200):
    rng = random.Random(0)
    return ["", " ", *("".join(rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(count - 2))]


def byte_level(digits=False, whole=False):
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend.to_str(), ("<|im_start|>", "<|im_end|>")


def scored():
    """A SentencePiece vocabulary: pieces, their scores, bytes for what none of them has."""
    rng = random.Random(1)
    words = [word for line in CORPUS for word in line.replace(" ", " \u2581").split(" ")]
    counts = {}
    for word in words:
        for begin in range(len(word)):
            for end in range(begin + 1, min(begin + 5, len(word)) + 1):
                counts[word[begin:end]] = counts.get(word[begin:end], 0) + 1
    characters = sorted({c for word in words for c in word} - {"#", "\n"})
    longer = sorted((p for p, n in counts.items() if len(p) > 1 and n > 4), key=lambda p: (-counts[p], p))[
        :120
    ]
    rng.shuffle(longer)  # merges need not come in the order of lengths
    pieces = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{b:02X}>" for b in range(256)), *longer, *characters]
    kinds = [2, 3, 3, 4, *[6] * 256, *[1] * (len(longer) + len(characters))]
    scores = [0.0] * 260 + [-float(n) for n in range(len(longer) + len(characters))]
    return pieces, kinds, scores


def sentencepiece_values(prefix=True):
    pieces, kinds, scores = scored()
    head = "tokenizer.ggml."
    values = {"model": "llama", "tokens": pieces, "token_type": kinds, "scores": scores}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix}
    return {head + key: value for key, value in values.items()}


def byte_fallback():
    return tokenizer_files(sentencepiece_values(), "there")["tokenizer.json"], ("<s>", "</s>")


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend.to_str(), ("<s>", "</s>")


KINDS = {
    "bpe": byte_level,
    "bpe, digits alone": lambda: byte_level(digits=True),
    "bpe with bytes": byte_fallback,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """(name, tokenizer.json, our tokenizer)."""
    text, named = KINDS[request.param]()
    return request.param, text, Ours(text, named=dict(zip(("bos_token", "eos_token"), named, strict=True)))


def test_ids_are_those_of_the_library(kind):
    """Of a text as such, and of one whose special tokens are meant; what no piece has is refused there."""
    _, text, ours = kind
    library, plain = Tokenizer.from_str(text), Tokenizer.from_str(text)
    plain.encode_special_tokens = True
    unknown = library.token_to_id("<unk>")
    for one in nasty():
        ids = ours.encode(one).tolist()
        if any(token in one for token in ours.specials_by_id.values()):
            # A model may have what it spells for a piece: the library takes it, and a text must not.
            assert not {*ids} & ours.specials_by_id.keys() - {unknown}, repr(one)
        else:
            assert ids == plain.encode(one, add_special_tokens=False).ids, repr(one)
        wanted = library.encode(one, add_special_tokens=False).ids
        if unknown not in wanted:
            assert ours.encode_with_specials([one])[0][0].tolist() == wanted, repr(one)


def test_what_is_written_for_transformers_gives_the_same_ids(kind, tmp_path):
    _, text, ours = kind
    for name, content in hub_files(text, ours, "{{ messages }}", 7, 512).items():
        (tmp_path / name).write_bytes(content)
    back = load_tokenizer(tmp_path / "tokenizer.json")
    assert (back.bos_id, back.eos_id) == (ours.bos_id, ours.eos_id)
    texts = nasty()
    same = zip(back.encode_batch(texts), ours.encode_batch(texts), strict=True)
    assert all(a.tolist() == b.tolist() for a, b in same)
    framed = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the fox").ids
    assert framed == [ours.bos_id, *ours.encode("the fox")]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [ours.eos_id, 7]


def test_as_gguf_and_back_it_gives_the_same_ids_or_is_refused(kind):
    name, text, ours = kind
    if name == "unigram":
        with pytest.raises(ValueError, match="kind Unigram .* use format=hf"):
            tokenizer_values(ours, text, ours.vocab_size, None)
        return
    template = "{% generation %}{{ x }}{%- endgeneration -%}"
    values = tokenizer_values(ours, text, ours.vocab_size + 3, template)
    assert (
        values["tokenizer.chat_template"] == "{{ x }}"
        and len(values["tokenizer.ggml.tokens"]) == ours.vocab_size + 3
    )
    named = {"bos_token": ours.token(ours.bos_id), "eos_token": ours.token(ours.eos_id)}
    back = Ours(tokenizer_files(values, "there")["tokenizer.json"], named=named)
    assert (back.bos_id, back.eos_id, back.specials_by_id) == (ours.bos_id, ours.eos_id, ours.specials_by_id)
    texts = nasty()
    for one, a, b in zip(texts, back.encode_batch(texts), ours.encode_batch(texts), strict=True):
        assert a.tolist() == b.tolist(), repr(one)


def greedy(text, values):
    """SentencePiece's own way: the best neighbours that are a piece are joined, the leftmost of equals."""
    head = "tokenizer.ggml."
    pieces, kinds, scores = (values[head + key] for key in ("tokens", "token_type", "scores"))
    score = {p: s for p, s, k in zip(pieces, scores, kinds, strict=True) if k == 1}
    parts = list(("\u2581" + text).replace(" ", "\u2581"))
    while True:
        joined = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in score
        ]
        if not joined:
            break
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = {piece: index for index, piece in enumerate(pieces)}
    return [
        index
        for part in parts
        for index in ([ids[part]] if part in score else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


def test_sentencepiece_is_merged_by_its_scores():
    values = sentencepiece_values()
    ours = Ours(tokenizer_files(values, "there")["tokenizer.json"])
    texts = [
        text
        for text in nasty()
        if text and not any(s in text for s in ("<tool>", "<s>", "</s>", "<unk>", "<0x"))
    ]
    assert len(texts) > 50
    for text in texts:
        assert ours.encode(text).tolist() == greedy(text, values), repr(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "t5"}, "model=t5 is not one of gpt2, llama"),
        ({"pre": "tekken"}, "pre=tekken is not one of gpt-2"),
    ],
)
def test_another_kind_is_refused_by_its_name(change, says):
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    with pytest.raises(ValueError, match=says):
        tokenizer_files(values | {f"tokenizer.ggml.{key}": value for key, value in change.items()}, "there")
