"""The server over HTTP, before an engine without a model: what clients see, and what the engine is spared."""

import contextlib
import json
import threading

import pytest

from data.config import TokenizerConfig
from data.tokens.chat import ChatEncoder
from data.tokens.chat_template import find_template
from data.tokens.tokenizer import train_tokenizer
from serving.request import Failed, Finished
from tests.serving.fake_engine import EOS, TOKENIZER, VERSION, FakeEngine, served, spelling, until

TEXT = "Grüße, 世界! 👍🏽 end."


@pytest.fixture(scope="module")
def client():
    with served(FakeEngine()) as found:
        yield found


@pytest.fixture(scope="module")
def writer():
    with served(FakeEngine(spelling(TEXT))) as found:
        yield found


@pytest.fixture(scope="module")
def talker():
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    tokenizer.chat = ChatEncoder(tokenizer, find_template(None, None, tokenizer))
    with served(FakeEngine(spelling(TEXT)), tokenizer) as found:
        yield found


def test_a_completion_is_the_text_with_its_usage(writer):
    answer = writer.complete(prompt="def ", max_tokens=100, model="tiny")
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["system_fingerprint"] == VERSION
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    written = len(TOKENIZER.encode(TEXT))
    usage = {"prompt_tokens": 5, "completion_tokens": written, "total_tokens": 5 + written}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 2}}
    assert writer.engine.requests[-1].prompt == (TOKENIZER.bos_id, *b"def ")
    assert writer.complete(prompt="def ")["usage"]["completion_tokens"] == 16  # where nobody says how many


def test_prompts_of_every_kind_and_n_come_in_order(client):
    ids = [list(b"ab"), list(b"cd")]
    by_id = client.complete(prompt=ids, n=2, seed=3, max_tokens=5)["choices"]
    by_text = client.complete(prompt=["ab", "cd"], n=2, seed=3, max_tokens=5, add_special_tokens=False)
    assert by_id == by_text["choices"] and [one["index"] for one in by_id] == [0, 1, 2, 3]
    assert [request.choice for request in client.engine.requests[-4:]] == [0, 1, 0, 1]
    one = client.complete(prompt=ids[1], n=2, seed=3, max_tokens=5)["choices"]
    assert [c["text"] for c in one] == [c["text"] for c in by_id[2:]]
    assert len({c["text"] for c in by_id}) > 1


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_a_stream_is_the_whole_answer_in_parts(talker, path):
    chat = path == "chat"
    route = "/v1/chat/completions" if chat else "/v1/completions"
    said = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi", "max_tokens": 99}
    said |= {"n": 2, "seed": 1, "return_token_ids": True}
    *events, usage, done = talker.events(route, {**said, "stream_options": {"include_usage": True}})
    assert done is None and usage["choices"] == []
    status, whole, _ = talker.ask(route, said)
    assert status == 200 and usage["usage"] == whole["usage"]
    for index in (0, 1):
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        texts = [part["delta"]["content"] if chat else part["text"] for part in parts]
        choice = whole["choices"][index]
        assert "".join(texts) == TEXT == (choice["message"]["content"] if chat else choice["text"])
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
        assert [bool(part.get("prompt_token_ids")) for part in parts] == [True] + [False] * (len(parts) - 1)
        if chat:
            assert ["role" in part["delta"] for part in parts] == [True] + [False] * (len(parts) - 1)
    assert {event["id"] for event in events} == {usage["id"]}
    assert events[0]["object"] == ("chat.completion.chunk" if chat else "text_completion")


def test_usage_goes_up_from_event_to_event_where_it_is_asked(writer):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, done = writer.events("/v1/completions", {"prompt": "a", "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 16 and done is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_engine_hears_of_it(writer, stream):
    said = {"prompt": "a", "max_tokens": 100, "stop": ["世界", "zz"]}
    if stream:
        *events, _ = writer.events("/v1/completions", said)
        text = "".join(event["choices"][0]["text"] for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = writer.complete(**said)["choices"]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == ("Grüße, ", "stop")
    assert len(writer.engine.requests) - 1 in writer.engine.cancelled and writer.engine.held == 0


def test_chat_is_the_templates_prompt_and_ends_with_a_turn(talker):
    answer = talker.talk("hi", max_completion_tokens=100)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    request = talker.engine.requests[-1]
    chat = talker.service.tokenizer.chat
    assert list(request.prompt) == chat.prompt([{"role": "user", "content": "hi"}])
    assert request.stop_ids == {chat.stop_id, EOS}
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    status, _, _ = talker.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert status == 200 and talker.engine.requests[-1].prompt == request.prompt
    assert talker.engine.requests[-1].max_tokens == talker.engine.max_len - len(request.prompt)


def test_what_is_asked_reaches_the_engine(client):
    client.complete(
        prompt="a",
        max_tokens=9,
        min_tokens=2,
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1},
        **{"frequency_penalty": -1, "logit_bias": {"65": -100}, "seed": 11, "stop_token_ids": [66]},
        **{"ignore_eos": True, "user": "me", "priority": 0, "repetition_penalty": 1.0, "stop": None},
    )
    request = client.engine.requests[-1]
    draw = request.draw
    assert (draw.temperature, draw.top_p, draw.top_k, draw.min_p) == (0.5, 0.9, 7, 0.1)
    assert (draw.presence, draw.frequency, draw.bias) == (1, -1, {65: -100})
    assert (request.max_tokens, request.min_tokens, request.seed) == (9, 2, 11)
    assert request.stop_ids == {66} and request.client == "\0me"
    client.complete(prompt="a", top_k=-1)
    first = client.engine.requests[-1]
    client.complete(prompt="a")
    assert first.draw.top_k == 0 and first.draw.temperature == 1.0
    assert first.seed != client.engine.requests[-1].seed  # nobody said one


def test_an_echo_is_scored_as_the_harness_reads_it(client):
    """lm_eval: the last token is dropped, and a token is greedy where its float is the largest."""
    prompt = list(b"scored text")
    for length in (0, 1):
        (choice,) = client.complete(prompt=prompt, max_tokens=length, echo=True, logprobs=1)["choices"]
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(prompt) + length
        assert choice["text"].startswith("scored text") and choice["finish_reason"] == "length"
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["text_offset"] == list(range(len(prompt) + length))
        for i, token in enumerate(prompt[1:], 1):
            greedy = found["token_logprobs"][i] == max(found["top_logprobs"][i].values())
            assert greedy == bool(prompt[i - 1] % 2) and found["tokens"][i] == chr(token)
    assert client.engine.scored[-1] == tuple(prompt) and client.engine.requests[-1].stop_ids == frozenset()
    *events, _ = client.events("/v1/completions", {"prompt": prompt, "max_tokens": 2, "echo": True})
    assert "".join(e["choices"][0]["text"] for e in events)[:11] == "scored text"
    *events, _ = client.events("/v1/completions", {"prompt": prompt, "max_tokens": 0, "echo": True})
    assert [e["choices"][0]["finish_reason"] for e in events] == ["length"]


def test_logprobs_name_every_token_and_its_alternatives(talker):
    found = talker.complete(prompt="a", max_tokens=99, logprobs=2)["choices"][0]["logprobs"]
    assert found["tokens"][:3] == ["G", "r", "bytes:\\xc3"] and "".join(found["tokens"][-2:]) == "d."
    assert all(len(top) == 2 and max(top.values()) == -0.125 for top in found["top_logprobs"])
    assert found["text_offset"][:4] == [0, 1, 2, 2]
    (choice,) = talker.talk(logprobs=True, top_logprobs=1)["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(b for one in content for b in one["bytes"]).decode() == TEXT
    assert content[0]["top_logprobs"] == [{"token": "G", "logprob": -0.125, "bytes": [71]}]


def test_a_schema_is_kept_to(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    (choice,) = client.complete(prompt="a", max_tokens=64, response_format=form)["choices"]
    found = json.loads(choice["text"])
    assert isinstance(found["a"], int) and found["b"] in "xy" and choice["finish_reason"] == "stop"
    two = client.complete(prompt="a", n=2, max_tokens=9, structured_outputs={"regex": "(ja|nein){2}"})
    assert {choice["text"] for choice in two["choices"]} <= {"jaja", "janein", "neinja", "neinnein"}


BAD = {
    "bad JSON": (b'{"prompt": "a"', "not JSON"),
    "nothing": (b"", "not JSON"),
    "invalid UTF-8": (b'{"prompt": "a\xff"}', "UTF-8"),
    "half a pair": (b'{"prompt": "\\ud800"}', "not JSON"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
    "no object": ([], "the body: Expected `object`"),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": []}, "prompt=[]"),
    "empty ids": ({"prompt": [[]]}, "prompt=0 tokens"),
    "mixed prompts": ({"prompt": ["a", 1]}, "prompt=a mixture"),
    "wrong type": ({"prompt": "a", "temperature": "1"}, "temperature: Expected `float | null`"),
    "wrong type inside": ({"prompt": ["a", 1.5]}, "prompt[1]: Expected"),
    "unknown key": ({"prompt": "a", "max_token": 1}, "did you mean max_tokens?"),
    "unknown inner key": (
        {"prompt": "a", "stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag is no key of this server; did you mean include_usage?",
    ),
    "tools": ({"prompt": "a", "tools": []}, "tools is no key of this server"),
    "priority": ({"prompt": "a", "priority": 3}, "priority=3"),
    "too long": (
        {"prompt": "a", "max_tokens": 10_000},
        "max_tokens=10000 after a prompt of 2 tokens",
    ),
    "prompt too long": ({"prompt": "a" * 600}, "use a prompt of at most 511 tokens"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "0 goes with echo=true"),
    "fewer than none": ({"prompt": "a", "max_tokens": -1}, "max_tokens=-1"),
    "huge n": ({"prompt": "a", "n": 100_000}, "n=100000"),
    "many answers": ({"prompt": ["a"] * 100, "n": 2}, "200 answers"),
    "id above": ({"prompt": [1, 400]}, "prompt=400 must be from 0 to 256"),
    "id below": ({"prompt": [-1]}, "prompt=-1"),
    "a padded row": ({"prompt": [300]}, "prompt=300"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature=-1.0"),
    "top_p": ({"prompt": "a", "top_p": 0}, "top_p=0.0"),
    "seed": ({"prompt": "a", "seed": -1}, "seed=-1"),
    "logprobs": ({"prompt": "a", "logprobs": 99}, "logprobs=99"),
    "many stops": ({"prompt": "a", "stop": ["a"] * 17}, "stop=17 strings must be at most 16"),
    "empty stop": ({"prompt": "a", "stop": ""}, "stop=a string of 0 letters"),
    "bias of no token": ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias=999"),
    "bias by name": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias: Expected `int`"),
    "stop id": ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids=999"),
    "min above max": ({"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens=3"),
    "options alone": ({"prompt": "a", "stream_options": {}}, "beside stream=true"),
    "schema that cannot be met": (
        {"prompt": "a", "structured_outputs": {"json": {"type": "integer", "minimum": 5, "maximum": 1}}},
        "json_schema cannot be compiled (Unsatisfiable schema: minimum (5)",
    ),
    "no schema": ({"prompt": "a", "response_format": {"type": "json_schema"}}, "json_schema=None"),
    "no regex": ({"prompt": "a", "structured_outputs": {"regex": "("}}, "regex cannot be compiled"),
    "two forms": ({"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, "2 keys"),
    "eos and a form": (
        {"prompt": "a", "ignore_eos": True, "response_format": {"type": "json_object"}},
        "ignore_eos=true",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_by_name_and_the_engine_untouched(client, name):
    body, says = BAD[name]
    before = len(client.engine.requests)
    status, answer, _ = client.ask("/v1/completions", body)
    error = answer["error"]
    assert status == 400 and says in error["message"] and "\n" not in error["message"], answer
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert len(client.engine.requests) == before and client.engine.held == 0 and client.service.open == 0


BAD_TURNS = {
    "no turns": ({"messages": []}, "messages=[]"),
    "no such role": ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    "top alone": ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "logprobs=true"),
    "both lengths": (
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 3},
        "max_tokens=2",
    ),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_wrong_turns_are_refused_by_name(talker, name):
    body, says = BAD_TURNS[name]
    status, answer, _ = talker.ask("/v1/chat/completions", body)
    assert status == 400 and says in answer["error"]["message"], answer


def test_other_refusals_have_their_own_status(client):
    assert client.ask("/v1/completions", {"prompt": "a", "model": "gpt-9"})[0] == 404
    status, answer, _ = client.ask("/nowhere")
    assert status == 404 and "/nowhere" in answer["error"]["message"]
    assert client.ask("/v1/completions")[0] == 405
    status, answer, _ = client.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert status == 400 and "use /v1/completions" in answer["error"]["message"]


def test_what_is_there(client):
    assert client.ask("/health")[0] == 200 and client.ask("/ready")[1]["version"] == VERSION
    (model,) = client.ask("/v1/models")[1]["data"]
    assert model == client.ask("/v1/models/tiny")[1] and client.ask("/v1/models/other")[0] == 404
    assert (model["id"], model["max_model_len"], model["chat"]) == ("tiny", 512, False)
    assert client.ask("/version")[1]["weights"] == VERSION
    found = client.ask("/tokenize", {"prompt": "añ", "return_token_strs": True})[1]
    ids = [TOKENIZER.bos_id, *"añ".encode()]
    assert found["tokens"] == ids and found["count"] == 4 and found["max_model_len"] == 512
    assert found["token_strs"] == ["<|endoftext|>", "a", "bytes:\\xc3", "bytes:\\xb1"]
    assert client.ask("/detokenize", {"tokens": ids})[1] == {"prompt": "añ"}
    assert client.ask("/detokenize", {"tokens": [999]})[0] == 400
    status, page, headers = client.ask("/")
    assert status == 200 and "<!doctype html>" in page.lower()
    assert "default-src 'none'" in headers["content-security-policy"]


def test_figures_have_the_names_that_others_read():
    with served(FakeEngine(spelling("four")), page=16) as client:
        client.complete(prompt="abc", max_tokens=9)
        client.complete(prompt="abc", max_tokens=2)
        status, text, _ = client.ask("/metrics")
    assert status == 200
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name, more=""):
        return float(rows[f'vllm:{name}{{{more}model_name="tiny"}}'])

    assert value("num_requests_running") == value("num_requests_waiting") == value("kv_cache_usage_perc") == 0
    assert value("generation_tokens_total") == 6 and value("num_preemptions_total") == 0
    for reason in ("stop", "length"):
        assert value("request_success_total", f'finished_reason="{reason}",') == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
        assert value(f"{name}_count") == 2
    assert value("inter_token_latency_seconds_count") == 4  # 3 gaps in four tokens, 1 in two
    assert value("request_generation_tokens_sum") == 6
    assert 'vllm:cache_config_info{block_size="16",model_name="tiny",num_gpu_blocks="16",version=' in text


def test_a_key_is_asked_for_where_there_is_one():
    with served(FakeEngine(), api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer, found = client.ask("/v1/completions", {"prompt": "a"}, headers)
            assert status == 401 and found["www-authenticate"] == "Bearer"
            assert answer["error"]["code"] == "invalid_api_key"
        assert client.ask("/v1/completions", {"prompt": "a"}, {"Authorization": "Bearer secret"})[0] == 200
        assert client.engine.requests[-1].client == "secret\000127.0.0.1" and client.ask("/health")[0] == 200


def test_a_hundred_that_leave_are_cancelled():
    """Streams and whole answers alike: nobody's tokens are written for long."""
    with served(FakeEngine(slots=8, queue=1000, pause=0.001)) as client:
        engine = client.engine
        left = []
        for number in range(100):
            stream = bool(number % 2)
            body = {"prompt": "a", "max_tokens": 500, "stream": stream}
            connection = client.begin("/v1/completions", body)
            if stream:
                assert connection.getresponse().status == 200
            left.append(connection)
        until(lambda: len(engine.requests) == 100)
        for connection in left:
            connection.close()
        until(lambda: engine.held == 0)
        assert len(engine.cancelled) + _natural(client) >= 100
        until(lambda: client.service.open == 0)
        assert client.complete(prompt="a", max_tokens=3)["choices"][0]["finish_reason"] == "length"


def _natural(client):
    text = client.ask("/metrics")[1]
    rows = [line for line in text.splitlines() if 'finished_reason="length"' in line and "_total" in line]
    return int(float(rows[0].rsplit(" ", 1)[1]))


def test_overload_is_refused_with_when_to_come_back():
    with served(FakeEngine(slots=1, queue=1)) as client:
        engine = client.engine
        engine.gate.clear()  # nothing moves: whoever is refused was not waited for
        threads = [threading.Thread(target=client.complete, kwargs={"prompt": "a"}) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.requests) == 2)
        for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": "a", "n": 3}):
            status, answer, headers = client.ask("/v1/completions", body)
            assert status == 503 and headers["retry-after"] == "1" and answer["error"]["code"] == "requests"
        # By its head alone: nothing is read of a body. What is no request has its own answer.
        assert client.ask("/v1/chat/completions", b"{")[0] == 503
        assert client.ask("/v1/completions")[0] == 405 and client.ask("/tokenize", {"prompt": "a"})[0] == 200
        assert client.service.open == 2 and len(engine.requests) == 2
        assert (
            'admission_rejections_total{model_name="tiny",reason="requests"} 4.0' in client.ask("/metrics")[1]
        )
        engine.gate.set()
        for thread in threads:
            thread.join()


def test_prompts_that_wait_to_be_scored_are_counted_too(monkeypatch):
    monkeypatch.setattr("serving.http.server.MOST_SCORED", 2)
    asked = {"prompt": [[1, 2]], "max_tokens": 0, "echo": True, "logprobs": 1}
    with served(FakeEngine()) as client:
        client.engine.gate.clear()
        threads = [threading.Thread(target=client.complete, kwargs=asked) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: client.service.open == 2)
        status, answer, headers = client.ask("/v1/completions", asked)
        assert status == 503 and answer["error"]["code"] == "scores" and headers["retry-after"] == "1"
        client.engine.gate.set()
        for thread in threads:
            thread.join()
        assert len(client.engine.scored) == 2 and client.service.open == 0


def test_of_several_answers_none_runs_where_one_is_refused():
    with served(FakeEngine(slots=1, queue=1)) as client:
        client.engine.gate.clear()
        assert client.ask("/v1/completions", {"prompt": "a", "n": 3})[0] == 503
        assert client.engine.cancelled == {0, 1} and client.service.open == 0


def test_a_drain_answers_all_and_takes_nothing_new():
    with served(FakeEngine(slots=2, pause=0.002)) as client:
        answers = []

        def ask(number):
            if number % 2:
                answers.append(client.complete(prompt="a", max_tokens=20)["choices"][0]["finish_reason"])
            else:
                *events, done = client.events("/v1/completions", {"prompt": "a", "max_tokens": 20})
                answers.append(events[-1]["choices"][0]["finish_reason"] if done is None else "cut")

        client.engine.gate.clear()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(client.engine.requests) == 8)
        client.service.draining = True
        status, answer, headers = client.ask("/ready")
        assert status == 503 and answer["error"]["code"] == "draining" and headers["retry-after"] == "5"
        assert client.ask("/v1/completions", {"prompt": "a"})[0] == 503 and client.ask("/health")[0] == 200
        client.engine.gate.set()
        for thread in threads:
            thread.join()
        assert answers == ["length"] * 8
        client.thread.join(30)  # it ends by itself
        assert not client.thread.is_alive() and len(client.engine.requests) == 8


def test_nothing_is_answered_before_it_is_warm(client):
    client.service.ready = False
    try:
        for path, body in (("/ready", None), ("/v1/completions", {"prompt": "a"})):
            status, answer, headers = client.ask(path, body)
            assert status == 503 and answer["error"]["code"] == "starting" and headers["retry-after"]
        assert client.ask("/health")[0] == 200
    finally:
        client.service.ready = True


def test_an_engine_that_fails_says_so_in_either_form():
    with served(FakeEngine()) as client:
        client.engine.fault = Failed("the device is lost; start the server again")
        status, answer, _ = client.ask("/v1/completions", {"prompt": "a"})
        assert status == 500 and answer["error"]["message"].startswith("the device is lost")
        event, done = client.events("/v1/completions", {"prompt": "a"})
        assert event["error"]["type"] == "server_error" and done is None
        client.engine.fault = Finished("cancelled", 1, 0, 0, 0, 0, 0, VERSION)  # that nobody here asked for
        assert client.ask("/v1/completions", {"prompt": "a"})[0] == 500
        assert client.service.open == 0 and client.ask("/health")[0] == 200
        client.engine.failed = "RuntimeError: the device is lost"  # it is for good
        status, answer, _ = client.ask("/health")
        assert status == 500 and "the device is lost" in answer["error"]["message"]
        for path, body in (("/ready", None), ("/v1/completions", {"prompt": "a"})):
            assert client.ask(path, body)[0] == 503


def test_long_texts_and_bodies(client):
    assert client.ask("/tokenize", {"prompt": "a" * 10_000})[1]["count"] == 10_001
    with contextlib.suppress(ConnectionError):  # it may close before all has been sent
        assert client.ask("/tokenize", b" " * (33 * 2**20))[0] == 413
