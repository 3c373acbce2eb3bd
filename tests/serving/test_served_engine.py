"""The server before the engine itself: over HTTP too, answers do not depend on the load."""

import threading

import jax
import pytest

from models.config import ModelConfig
from models.ops import Ops
from models.transformer import build_model
from serving.engine import Engine
from serving.settings import ServeConfig
from tests.serving.fake_engine import TOKENIZER, served, until

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 64}
# The last 127 rows are nobody's token, and as likely as others: no answer may name them.
SETTINGS = ServeConfig(slots=4, page=8, chunk=16, max_len=128)
ASKED = {"prompt": "def f(x):\n    return x", "max_tokens": 24, "seed": 5, "logprobs": 3, "n": 2}


@pytest.fixture(scope="module")
def client():
    model = build_model(ModelConfig(vocab_size=384, **SIZES))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model.init(jax.random.key(0)))
    made = Engine(model, params, Ops(), SETTINGS, version="3-abc", vocab_size=TOKENIZER.vocab_size)
    made.warm()
    made.start()
    with served(made) as found:
        yield found


def test_an_answer_over_http_does_not_depend_on_the_load(client):
    alone = client.complete(**ASKED)
    crowd = [
        threading.Thread(target=client.complete, kwargs={"prompt": "x" * size, "max_tokens": 20, "n": 3})
        for size in (1, 17, 40, 80)
    ]
    for thread in crowd:
        thread.start()
    again = client.complete(**ASKED)
    *events, done = client.events("/v1/completions", {**ASKED, "echo": True})
    for thread in crowd:
        thread.join()
    assert again["choices"] == alone["choices"] and alone["system_fingerprint"] == "3-abc"
    for index, choice in enumerate(alone["choices"]):
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == ASKED["prompt"] + choice["text"] and done is None
        streamed = [x for part in parts for x in part["logprobs"]["token_logprobs"]]
        assert streamed[-24:] == choice["logprobs"]["token_logprobs"]


def test_an_echo_s_floats_are_the_engine_s(client):
    text = "import os\nfrom a import b"
    ids = (TOKENIZER.bos_id, *TOKENIZER.encode(text).tolist())
    asked = {"prompt": [ids], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    (choice,) = client.complete(**asked)["choices"]
    wanted = client.engine.score(ids, 1)
    found = choice["logprobs"]
    assert found["token_logprobs"][:-1] == [one.logprob for one in wanted]
    for one, logprob, top in zip(
        wanted[1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False
    ):
        assert (logprob == max(top.values())) == (one.token == one.top[0][0])
    # The one that was written comes from another program, and is the likeliest there.
    assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())
    names = {name for top in found["top_logprobs"][1:] for name in top}
    assert not any(name.startswith("token_id:") for name in names)


def test_a_form_is_kept_by_a_model_that_knows_nothing(client):
    form = {"regex": "[ab]{3}(yes|no)"}
    choices = client.complete(prompt="a", max_tokens=20, n=4, structured_outputs=form)["choices"]
    assert all(c["finish_reason"] == "stop" and len(c["text"]) in (5, 6) for c in choices)
    assert {c["text"][3:] for c in choices} <= {"yes", "no"} and len({c["text"] for c in choices}) > 1


def test_who_leaves_holds_no_page(client):
    for stream in (True, False):
        connection = client.begin("/v1/completions", {"prompt": "a", "max_tokens": 120, "stream": stream})
        until(lambda: client.engine.load().running)
        connection.close()
        until(lambda: client.engine.load().running == 0)
    load = client.engine.load()
    assert load.pages_used == load.waiting == 0 and client.service.open == 0
