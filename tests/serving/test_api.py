"""Bodies on the wire become requests, or a refusal that names what is wrong: nothing between."""

import json
import random

import msgspec
import pytest

from serving.http.api import ANSWERS, Limits, check, count_answers, form_of, prompts_of, requests_of
from serving.http.wire import NESTED, ApiError, ChatBody, CompletionBody, read_body
from serving.request import Request

LIMITS = Limits(max_len=64, vocab_size=257, stop_ids=frozenset({256}))
SAID = {"messages": [{"role": "user", "content": "a"}]}


def asked(body, prompts=((1, 2),), kind=CompletionBody):
    """The requests of a body, or its refusal as ApiError."""
    try:
        read = read_body(json.dumps(body).encode(), kind)
        check(read)
        if kind is CompletionBody:
            given = prompts_of(read)
            prompts = [p if isinstance(p, tuple) else tuple(p.encode()) for p in given]
        count = count_answers(read, len(prompts))
        form_of(read)
        return requests_of(read, prompts, LIMITS, "me", [None] * count)
    except ValueError as error:
        raise ApiError.of(error) from None


def test_an_answer_is_as_long_as_is_asked_or_as_there_is_room():
    def length(kind=CompletionBody, **body):
        base = {"prompt": [[1] * 60]} if kind is CompletionBody else SAID
        (request,) = asked(base | body, [(1,) * 60], kind)
        return request.max_tokens

    assert length() == 4 and length(prompt="a") == 16 and length(max_tokens=2) == 2
    assert length(ChatBody) == 4 and length(ChatBody, max_completion_tokens=3) == 3
    for body in ({"prompt": [[1] * 64]}, {"prompt": [[1] * 60], "max_tokens": 5}):
        with pytest.raises(ApiError, match="max_len=64") as error:
            asked(body)
        assert error.value.code == "context_length_exceeded" and error.value.param == "max_tokens"
    assert asked({"prompt": [[1] * 64], "max_tokens": 0, "echo": True}) == []


def test_ends_are_the_models_and_the_clients():
    (plain,) = asked({"prompt": "a", "stop_token_ids": [7]})
    (deaf,) = asked({"prompt": "a", "stop_token_ids": [7], "ignore_eos": True})
    assert plain.stop_ids == {7, 256} and deaf.stop_ids == {7}


def test_many_prompts_and_choices_have_a_limit():
    assert len(asked({"prompt": ["a"] * ANSWERS})) == ANSWERS
    for body in ({"prompt": "a", "n": ANSWERS + 1}, {"prompt": ["a"] * (ANSWERS // 2 + 1), "n": 2}):
        with pytest.raises(ApiError, match=f"{ANSWERS}"):
            asked(body)


@pytest.mark.parametrize("path", [(), ("stream_options",), ("response_format",), ("structured_outputs",)])
def test_a_key_with_a_slip_is_named_with_the_one_that_was_meant(path):
    kind = NESTED[path[0]] if path else CompletionBody
    for key in kind.__struct_fields__:
        inner = {f"{key}x": 1}
        body = {"prompt": "a", **inner} if not path else {"prompt": "a", "stream": True, path[0]: inner}
        if path == ("response_format",):
            inner["type"] = "text"
        with pytest.raises(ApiError) as error:
            asked(body)
        assert f"did you mean {key}?" in str(error.value)
        assert error.value.param == ".".join([*path, f"{key}x"])


def test_the_key_of_a_wrong_value_is_its_param():
    for body, param in (
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": ["a", 1.5]}, "prompt[1]"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": [999]}, "prompt"),
    ):
        with pytest.raises(ApiError) as error:
            asked(body)
        assert error.value.param == param and error.value.status == 400


def test_any_json_is_requests_or_a_refusal_in_one_line():
    """Values of every kind in every place: never another error, which would be the server's fault."""
    draw = random.Random(4)
    odd = [None, True, False, 0, 1, -1, 0.5, 2**70, -1e300, "", "a", "é" * 300, [], [1], ["a"], [[1]], [[]]]
    odd += [{}, {"a": 1}, {"65": 1}, {"type": "text"}, {"type": "json_schema"}, {"regex": "a"}, [{}], [None]]
    taken = 0
    for kind, base in ((CompletionBody, {"prompt": "a"}), (ChatBody, SAID)):
        keys = [*kind.__struct_fields__, "unknown", "max_token"]
        for _ in range(4000):
            body = base | {draw.choice(keys): draw.choice(odd) for _ in range(draw.randint(1, 3))}
            try:
                found = asked(body, kind=kind)
            except ApiError as error:
                assert 400 <= error.status < 500 and str(error) and "\n" not in str(error)
                msgspec.json.encode(error.body())
            else:
                assert all(isinstance(one, Request) and one.client == "me" for one in found)
                taken += 1
    assert 200 < taken < 7000
