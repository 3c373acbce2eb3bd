"""A model that was taught by a template is asked by it, whoever opens it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig
from data.pipeline import prepare
from data.tokens.chat_template import CONFIG
from data.tokens.tokenizer import load_tokenizer
from data.tokens.turns import give_chat, speaks_in_turns

ROOT = Path(__file__).resolve().parents[2]
ASKED = [{"role": "user", "content": "one and two "}]
RECORDS = {
    "text": {"text": "one and two"},
    "chat": {"messages": [*ASKED, {"role": "assistant", "content": "three"}]},
    "completion": {"prompt": "one and two", "completion": "three"},
    "pairs": {"prompt": "one and two", "chosen": "three", "rejected": "four"},
    "labels": {"prompt": "one and two", "completion": "three", "label": True},
}


def data_of(folder, form):
    path = folder / form / "records.jsonl"
    path.parent.mkdir(exist_ok=True)
    record = json.dumps(RECORDS[form])
    path.write_text("".join(f"{record.replace('one', f'one {i}')}\n" for i in range(40)), "utf-8")
    packing = "concat" if form in ("text", "chat", "completion") else "none"
    return DataConfig(
        source="folder",
        path=str(path.parent),
        cache_dir=str(folder / "cache"),
        format=form,
        packing=packing,
        seq_len=64,
        workers=1,
        validation_fraction=0.2,
    )


def mixture_of(folder, *forms):
    parts = {form: {"weight": 1.0, "path": data_of(folder, form).path, "format": form} for form in forms}
    return replace(data_of(folder, forms[0]), mixture=parts)


@pytest.mark.parametrize("form", [*RECORDS, "text+chat", "chat+text", "text+text"])
def test_a_run_is_asked_as_it_was_taught(tmp_path, form):
    """By what its directory holds: the tokenizer and, where a template framed its data, that template."""
    forms = dict.fromkeys(form.split("+"))
    data = mixture_of(tmp_path, *forms) if "+" in form else data_of(tmp_path, form)
    taught = prepare(data, TokenizerConfig(kind="byte"), progress=False).tokenizer
    run = tmp_path / "run"
    run.mkdir()
    taught.save(run / "tokenizer.json")
    if taught.chat is not None:
        taught.chat.save(run)
    opened = load_tokenizer(run / "tokenizer.json")
    assert speaks_in_turns(data, run / "tokenizer.json") == (taught.chat is not None)
    assert (taught.chat is not None) == (set(forms) != {"text"})
    give_chat(opened, run / "tokenizer.json", data)
    assert (opened.chat is None) == (taught.chat is None)
    if taught.chat is not None:
        assert opened.chat.prompt(ASKED) == taught.chat.prompt(ASKED)
        assert opened.chat.stop_id == taught.chat.stop_id
    for chat in ("true", "false"):
        give_chat(opened, run / "tokenizer.json", data, chat)
        assert (opened.chat is not None) == (chat == "true")


def test_published_weights_speak_where_a_template_lies_beside_them(tmp_path):
    beside = tmp_path / "tokenizer.json"
    assert not speaks_in_turns(None, beside)
    (tmp_path / CONFIG).write_text(json.dumps({"chat_template": "{{ messages }}"}), "utf-8")
    assert speaks_in_turns(None, beside)


def test_no_command_decides_for_itself():
    commands = {path.name: path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py")}
    assert not [name for name, source in commands.items() if "chat_template import" in source]
    doors = {name for name, source in commands.items() if "give_chat(" in source}
    assert doors == {"generate.py", "serve.py", "make_pairs.py", "export.py", "compress.py"}
