"""`scripts/serve.py`: what it is told, what it opens, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from models.transformer import build_model
from scripts.export import main as export
from scripts.serve import build_engine, engine_settings, main, open_model, parse_options
from serving.offline import complete
from serving.request import Draw, Request
from serving.settings import ServeConfig
from tests.scripts.test_generate_script import MODEL, make_run
from tests.serving.fake_engine import until

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["slots=2", "page=8", "chunk=16", "max_len=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    model = build_model(replace(MODEL, vocab_size=384))
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tokenizer, model)


def test_the_engine_s_words_are_its_settings():
    settings = engine_settings(parse_options(["a", *SMALL, "queue_seconds=2.5", "prefix_cache=false"]))
    wanted = ServeConfig(slots=2, page=8, chunk=16, max_len=64, queue_seconds=2.5, prefix_cache=False)
    assert settings == wanted and engine_settings(parse_options(["a"])) == ServeConfig()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "RUN is missing"),
        (["a", "slot=2"], "did you mean slots?"),
        (["a", "slots=0"], "slots=0 must be 1 or more"),
        (["a", "chunk=100"], "chunk=100 must be a multiple of page=64"),
        (["a", "cache_bits=4"], "cache_bits=4 must be 8, or null"),
        (["a", "port=99999"], "port=99999"),
        (["a", "chat=maybe"], "chat=maybe"),
        (["a", "follow=true", "step=3"], "follow=true goes with a run and step=latest"),
        (["nowhere", "port=0"], "run=nowhere is no run's name"),
        (["a", "host=256.0.0.1"], "host=256.0.0.1 port=8000"),
    ],
)
def test_nonsense_is_one_line_and_status_two(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_a_port_that_is_taken_and_a_key_that_is_none(capsys, tmp_path, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(run), f"port={taken.getsockname()[1]}"]) == 2
    assert "choose another port, or 0 for any" in capsys.readouterr().err
    (tmp_path / "key").write_text("\n")
    assert main([str(run), f"api_key_file={tmp_path}/key"]) == 2
    assert "is empty" in capsys.readouterr().err


def test_published_weights_answer_as_the_run_does(run, tmp_path):
    path = tmp_path / "tiny"
    assert export([str(run), f"output={path}"]) == 0
    answers, names = [], []
    for name in (run, path):
        options = parse_options([str(name), *SMALL, "precision=float32"])
        opened = open_model(options)
        engine = build_engine(options, opened)
        engine.warm()
        ids = (opened.tokenizer.bos_id, *opened.tokenizer.encode("def f").tolist())
        ((answer, _),) = complete(engine, [Request(ids, 12, Draw(0))])
        answers.append([one.token for one in answer])
        names.append((opened.version.partition("-")[0], opened.add_bos, opened.tokenizer.chat))
        assert engine.vocab_size == opened.tokenizer.vocab_size == 257
    assert answers[0] == answers[1] and len(answers[0]) == 12
    assert names == [("2", True, None), ("published", True, None)]
    assert open_model(parse_options([str(run), "bos=false", "chat=true"])).tokenizer.chat is not None
    assert not open_model(parse_options([str(run), "bos=false"])).add_bos


@pytest.mark.slow
def test_it_follows_a_run_and_answers_to_the_end_of_a_job(run, tmp_path):
    """A newer checkpoint is served without a pause; at SIGTERM what runs is answered, to go on later."""
    words = [str(run), "port=0", *SMALL, "follow=true", f"url_file={tmp_path}/url", "chat=true"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "SLURM_JOB_ID": "7"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "scripts/serve.py", *words], cwd=ROOT, stderr=log, env=environment
        )
    try:
        until(lambda: (tmp_path / "url").exists() or process.poll() is not None, 180)
        assert process.poll() is None, (tmp_path / "log").read_text()
        url = (tmp_path / "url").read_text().strip()

        def ask(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=60) as response:
                return response.read()

        def ready():
            return json.loads(ask("/ready"))["version"][:2]

        first = json.loads(ask("/v1/completions", {"prompt": "a", "temperature": 0}))
        assert first["system_fingerprint"].startswith("2-") and ready() == "2-"
        tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
        model = build_model(replace(MODEL, vocab_size=384))
        newer = make_run(tmp_path / "newer", tokenizer, model, steps=(3,))
        (newer / "checkpoints" / "3").rename(run / "checkpoints" / "3")
        until(lambda: ready() == "3-", 60)
        then = json.loads(ask("/v1/completions", {"prompt": "a", "temperature": 0}))
        assert then["system_fingerprint"].startswith("3-") and then["choices"] != first["choices"]
        behind = dict(
            re.findall(rb"^cambrian_serving_(\w+_step|\w+_age_seconds)\{.*\} (.*)$", ask("/metrics"), re.M)
        )
        assert float(behind[b"weights_step"]) == float(behind[b"newest_step"]) == 3
        assert 0 <= float(behind[b"weights_age_seconds"]) < 600

        asked = {"prompt": "a", "max_tokens": 62, "ignore_eos": True, "stream": True}
        streams = []
        threads = [
            threading.Thread(target=lambda: streams.append(ask("/v1/completions", asked))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()

        def taken_on():
            held = re.findall(rb"^vllm:num_requests_(?:running|waiting)\{.*\} (.*)$", ask("/metrics"), re.M)
            return sum(map(float, held)) + len(streams) >= 6

        until(taken_on)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(60) == 75
        assert len(streams) == 6 and all(one.endswith(b"data: [DONE]\n\n") for one in streams)
        assert not (tmp_path / "url").exists()
    finally:
        process.kill()
        process.wait()
