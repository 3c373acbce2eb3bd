"""Clients that others wrote, unmodified, before `scripts/serve.py`: openai, litellm, lm_eval, inference-perf.

They live in .venv-load (`make test-load`), the server in this environment.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from data.config import TokenizerConfig
from data.tokens.tokenizer import train_tokenizer
from models.transformer import build_model
from scripts.export import main as export
from tests.scripts.test_generate_script import MODEL, make_run
from tests.serving.fake_engine import until

ROOT = Path(__file__).resolve().parents[3]
PYTHON = Path(os.environ.get("CAMBRIAN_LOAD_PYTHON", ROOT / ".venv-load/bin/python"))
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
pytestmark = [
    pytest.mark.load,
    pytest.mark.skipif(
        not PYTHON.exists() and "CAMBRIAN_REQUIRE_LOAD" not in os.environ, reason="needs make test-load"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from dataclasses import replace

    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    model = build_model(replace(MODEL, vocab_size=384))
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tokenizer, model, steps=(1,))


@pytest.fixture(scope="module")
def url(run, tmp_path_factory):
    """A server in a process of its own, which ends with 0 at SIGTERM."""
    folder = tmp_path_factory.mktemp("server")
    words = [str(run), "port=0", "chat=true", "max_len=512", f"url_file={folder}/url"]
    command = [sys.executable, "scripts/serve.py", *words]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} | {"XLA_FLAGS": ""}
    environment.pop("SLURM_JOB_ID", None)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, env=environment)
    until(lambda: (folder / "url").exists() or process.poll() is not None, 180)
    assert process.poll() is None, (folder / "log").read_text()
    yield (folder / "url").read_text().strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, (folder / "log").read_text()
    assert not (folder / "url").exists()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run as a directory, whose tokenizer the clients cut texts with."""
    path = tmp_path_factory.mktemp("exported") / "tiny"
    assert export([str(run), f"output={path}"]) == 0
    return path


def client(place, *words):
    """What a program of .venv-load prints."""
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(place), "HOME": str(place)}
    for name in ("XLA_FLAGS", "PYTHONPATH"):
        environment.pop(name, None)
    command = [str(PYTHON), *map(str, words)]
    result = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def ask(url, **body):
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_openai_s_client(url, tmp_path):
    found = json.loads(client(tmp_path, ROOT / "tests/serving/load/openai_client.py", url))
    assert found["model"] == "tiny" and found["fingerprint"].startswith("1-")
    assert found["texts"] == found["streamed"] and found["texts"][0] != found["texts"][1]
    assert found["said"] == found["said_streamed"] and found["said_tokens"] == found["said_usage"]
    assert found["formed"] in ("yes", "no") and found["tokens"] <= found["usage"]
    assert found["errors"] == [
        ["BadRequestError", 400, "temperature"],
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "max_token"],
        ["BadRequestError", 400, "max_tokens"],
    ]


def test_litellm(url, tmp_path):
    found = json.loads(client(tmp_path, ROOT / "tests/serving/load/litellm_client.py", url).splitlines()[-1])
    assert found["said"] == found["streamed"] and 0 < found["usage"] <= 12
    same = ask(url, prompt="def ", max_tokens=12, seed=3, temperature=0.7)
    assert found["text"] == same["choices"][0]["text"]


def test_lm_eval_scores_what_the_server_scores(url, exported, tmp_path):
    docs = [
        {"q": f"the {word} of", "choices": [" a", " house"], "gold": 0} for word in ("end", "top", "name")
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        **{"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        **{"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
        **{"target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(task))
    model = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={exported}"
    words = ["-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model, "--tasks", "mine"]
    words += ["--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out", "--log_samples"]
    client(tmp_path, *words)
    (samples,) = (tmp_path / "out").rglob("samples_mine_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        doc = row["doc"]
        for choice, (said,) in zip(doc["choices"], row["resps"], strict=True):
            size = len(choice.encode())
            asked = {
                "prompt": [list((doc["q"] + choice).encode())],
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            }
            (echo,) = ask(url, **asked)["choices"]
            scores = echo["logprobs"]["token_logprobs"][-size:]
            tops = echo["logprobs"]["top_logprobs"][-size:]
            greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
            assert float(said[0]) == pytest.approx(sum(scores), abs=1e-4) and str(said[1]) == str(greedy)


def test_inference_perf_counts_no_failure(url, exported, tmp_path):
    lengths = {"min": 4, "max": 40, "mean": 20, "std_dev": 5, "total_count": 20}
    settings = {
        "api": {"type": "completion", "streaming": True},
        "data": {"type": "random", "input_distribution": lengths, "output_distribution": lengths},
        "load": {"type": "poisson", "stages": [{"rate": 4, "duration": 4}], "num_workers": 1},
        "server": {"type": "vllm", "model_name": "tiny", "base_url": url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(exported)},
        "storage": {"local_storage": {"path": str(tmp_path / "report")}},
    }
    (tmp_path / "load.yaml").write_text(yaml.safe_dump(settings))
    client(tmp_path, PYTHON.with_name("inference-perf"), "--config_file", tmp_path / "load.yaml")
    report = json.loads((tmp_path / "report" / "summary_lifecycle_metrics.json").read_text())
    assert report["successes"]["count"] > 5 and report["failures"]["count"] == 0
