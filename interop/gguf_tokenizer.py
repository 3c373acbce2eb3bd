"""A tokenizer in GGUF's values, to and from the files of Hugging Face's layout.

Two kinds: `gpt2`, byte-level BPE with its merges, whose way to cut a text into words has a name
(`tokenizer.ggml.pre`); and `llama`, SentencePiece's BPE, whose merges follow from the pieces' scores.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checks import choice
from common.files import text_digest, write_text
from data.tokens.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # what a piece is
HEAD = "tokenizer.ggml."
SPACE = "\u2581"
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _cut(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _words(digits: str) -> list[dict[str, Any]]:
    endings = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return [_cut(f"{endings}|{rest % digits}"), _bytes(False)]


# How each name cuts a text: pre-tokenizers in a row, and whether a piece that is whole needs no merges.
PRE: dict[str, tuple[list[dict[str, Any]], bool, dict[str, Any] | None]] = {
    "gpt-2": ([_bytes(True)], False, None),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(True)], False, None),
    "llama-bpe": (_words(r"\p{N}{1,3}"), True, None),
    "qwen2": (_words(r"\p{N}"), False, {"type": "NFC"}),
}
ALIKE = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "gpt2": "gpt-2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
}


# -- in ----------------------------------------------------------------------------------------------------


def tokenizer_files(values: Mapping[str, Any], where: str) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a file's values. ValueError, by name, for another kind."""
    model = values.get(HEAD + "model")
    choice(f"{where}: {HEAD}model", model, ("gpt2", "llama"))
    pieces, kinds = values[HEAD + "tokens"], values.get(HEAD + "token_type", [])
    kinds = kinds or [NORMAL] * len(pieces)
    made = _byte_level(values, pieces, where) if model == "gpt2" else _sentencepiece(values, pieces, kinds)
    named = {
        key: pieces[values[HEAD + name + "_token_id"]]
        for key, name in SPECIALS.items()
        if HEAD + name + "_token_id" in values
    }
    unknown = made["model"].get("unk_token")
    added = [
        _added(
            index,
            piece,
            kind == CONTROL or piece in (named.get("bos_token"), named.get("eos_token"), unknown),
        )
        for index, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER)
    ]
    bos = named.get("bos_token")
    if values.get(HEAD + "add_bos_token", model == "llama") and bos is not None:
        made["post_processor"] = framed(bos, values[HEAD + "bos_token_id"])
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    about["clean_up_tokenization_spaces"] = False
    if template := values.get("tokenizer.chat_template"):
        about["chat_template"] = template
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **made}
    return {
        "tokenizer.json": json.dumps(whole, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(about, ensure_ascii=False, indent=2) + "\n",
    }


def write_tokenizer(values: Mapping[str, Any], cache: Path, where: str) -> Path:
    """The tokenizer.json of a file's values, written once into a directory of `cache` by what it holds."""
    files = tokenizer_files(values, where)
    directory = cache / text_digest("\0".join(files.values()))[:16]
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items(), reverse=True):  # tokenizer.json last: where it is, all is
        if not (directory / name).is_file():
            write_text(directory / name, text, shared=True)
    return directory / "tokenizer.json"


def framed(bos: str, index: int) -> dict[str, Any]:
    """A post-processor that begins each text with this token."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [token, one],
        "pair": [token, one, {"SpecialToken": {"id": bos, "type_id": 1}}, two],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _added(index: int, piece: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": piece, **flags, "special": special}


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "fuse_unk": False, **more, "vocab": vocabulary, "merges": merges}


def _byte_level(values: Mapping[str, Any], pieces: list[str], where: str) -> dict[str, Any]:
    name = values.get(HEAD + "pre", "default")
    name = ALIKE.get(name, name)
    choice(f"{where}: {HEAD}pre", name, PRE)
    cuts, whole, normalizer = PRE[name]
    merges = [merge.split(" ") for merge in values[HEAD + "merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if len(cuts) > 1 else cuts[0],
        "post_processor": None,
        "decoder": _bytes(True) | {"add_prefix_space": True},
        "model": _bpe(vocabulary, merges, byte_fallback=False, ignore_merges=whole),
    }


def _sentencepiece(values: Mapping[str, Any], pieces: list[str], kinds: list[int]) -> dict[str, Any]:
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    ordinary = {
        p: s for p, s, k in zip(pieces, values[HEAD + "scores"], kinds, strict=True) if k in (NORMAL, USER)
    }
    prefix = values.get(HEAD + "add_space_prefix", True)
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, blank]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(
            vocabulary,
            merges_of(ordinary, vocabulary),
            unk_token=unknown,
            byte_fallback=BYTE in kinds,
            ignore_merges=False,
        )
        | {"fuse_unk": True},
    }


def merges_of(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """All pairs of pieces that are a piece, the best piece's first: what SentencePiece merges by."""
    found = []
    for piece, score in scores.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


# -- out ---------------------------------------------------------------------------------------------------


def tokenizer_values(tokenizer: Tokenizer, text: str, rows: int, template: str | None) -> dict[str, Any]:
    """GGUF's values of a tokenizer.json (its `text`) for a table of so many rows.

    Raises ValueError, by name, for a kind that llama.cpp does not cut texts by in the same way.
    """
    whole = json.loads(text)
    kind = _byte_level_values(whole) if _is_byte_level(whole) else _sentencepiece_values(whole)
    vocabulary = {**whole["model"]["vocab"], **{a["content"]: a["id"] for a in whole["added_tokens"]}}
    vocabulary |= {tokenizer.token(index): index for index in tokenizer.specials_by_id}
    kinds = dict.fromkeys(vocabulary.values(), NORMAL)
    kinds |= {index: BYTE for piece, index in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)}
    kinds |= {a["id"]: USER for a in whole["added_tokens"] if not a["special"]}
    kinds |= dict.fromkeys(tokenizer.specials_by_id, CONTROL)
    if (unknown := vocabulary.get(whole["model"].get("unk_token"))) is not None:
        kinds[unknown] = UNKNOWN
    pieces = {index: piece for piece, index in vocabulary.items()}
    # Rows without a piece have names that no text gives.
    every = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    found = {
        HEAD + "tokens": every,
        HEAD + "token_type": [kinds.get(index, UNUSED) for index in range(rows)],
        HEAD + "bos_token_id": tokenizer.bos_id,
        HEAD + "eos_token_id": tokenizer.eos_id,
        HEAD + "add_bos_token": True,  # every document that the model has seen began with it
        HEAD + "add_eos_token": False,
        **kind,
    }
    if HEAD + "scores" in found:
        found[HEAD + "scores"] = [found[HEAD + "scores"].get(piece, -1e6) for piece in every]
    if template is not None:
        found["tokenizer.chat_template"] = GENERATION.sub("", template)  # llama.cpp's Jinja has no such block
    return found


def _is_byte_level(whole: Mapping[str, Any]) -> bool:
    return whole["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(whole.get("decoder"))


def _byte_level_values(whole: Mapping[str, Any]) -> dict[str, Any]:
    cuts = whole["pre_tokenizer"]
    cuts = cuts["pretokenizers"] if cuts["type"] == "Sequence" else [cuts]
    merges_first = bool(whole["model"].get("ignore_merges"))
    for name, (wanted, whole_pieces, normalizer) in PRE.items():
        if [_plain(cut) for cut in cuts] == [_plain(cut) for cut in wanted] and normalizer == whole[
            "normalizer"
        ]:
            if whole_pieces == merges_first:
                return {HEAD + "model": "gpt2", HEAD + "pre": name, HEAD + "merges": _merges(whole)}
    raise ValueError(
        f"the tokenizer cuts words as none of {', '.join(PRE)} does, and llama.cpp would cut them otherwise; "
        "use format=hf"
    )


def _plain(cut: Mapping[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer without what changes no token."""
    return {key: value for key, value in cut.items() if key != "trim_offsets"}


def _merges(whole: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]


def _sentencepiece_values(whole: Mapping[str, Any]) -> dict[str, Any]:
    model = whole["model"]
    prefix = '"Prepend"' in json.dumps(whole["normalizer"])
    values = {HEAD + "model": "llama", HEAD + "add_space_prefix": prefix}
    if model["type"] == "BPE":
        special = {token["content"] for token in whole["added_tokens"] if token["special"]}
        pieces = [p for p in model["vocab"] if p not in special and not re.fullmatch("<0x[0-9A-F]{2}>", p)]
        # Both merge in this order, one by the list, one by the scores, only where the list has all pairs.
        rank: dict[str, float] = {}
        for number, merge in enumerate(_merges(whole)):
            rank.setdefault(merge.replace(" ", ""), -float(number))
        scores = {piece: rank.get(piece, -1e6) for piece in pieces}
        made = _sentencepiece(
            {**values, HEAD + "scores": list(scores.values())}, pieces, [NORMAL] * len(pieces)
        )
        same = all(made[key] == whole[key] for key in ("normalizer", "pre_tokenizer", "decoder"))
        if same and [" ".join(pair) for pair in made["model"]["merges"]] == _merges(whole):
            return values | {HEAD + "scores": scores}
    raise ValueError(
        f"a tokenizer of kind {model['type']} with these merges is none that llama.cpp cuts texts by "
        "in the same way; use format=hf"
    )
