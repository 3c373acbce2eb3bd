"""What OpenAI's own client makes of a server: `python openai_client.py URL`, JSON to stdout."""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
TURNS = [{"role": "user", "content": "hi"}]
ASKED = {"model": "tiny", "max_tokens": 12, "seed": 3, "temperature": 0.7}


def error_of(**body):
    """The class, the status and the key of what is refused."""
    try:
        client.completions.create(**{**ASKED, "prompt": "a", **body})
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.body["param"]]
    return None


(model,) = client.models.list().data
whole = client.completions.create(prompt="def ", logprobs=2, n=2, **ASKED)
parts = list(client.completions.create(prompt="def ", stream=True, n=2, **ASKED))
said = client.chat.completions.create(messages=TURNS, logprobs=True, top_logprobs=2, **ASKED)
options = {"include_usage": True}
events = list(client.chat.completions.create(messages=TURNS, stream=True, stream_options=options, **ASKED))
form = {
    "type": "json_schema",
    "json_schema": {"name": "b", "schema": {"enum": ["yes", "no"]}, "strict": True},
}
formed = client.chat.completions.create(messages=TURNS, response_format=form, **ASKED)
found = {
    "model": model.id,
    "texts": [choice.text for choice in whole.choices],
    "streamed": ["".join(p.choices[0].text for p in parts if p.choices[0].index == i) for i in (0, 1)],
    "tokens": len(whole.choices[0].logprobs.tokens),
    "usage": whole.usage.completion_tokens,
    "fingerprint": whole.system_fingerprint,
    "said": said.choices[0].message.content,
    "said_tokens": len(said.choices[0].logprobs.content),
    "said_streamed": "".join(event.choices[0].delta.content for event in events if event.choices),
    "said_usage": events[-1].usage.completion_tokens,
    "formed": json.loads(formed.choices[0].message.content),
    "errors": [
        error_of(temperature=-1),
        error_of(model="other"),
        error_of(extra_body={"max_token": 1}),
        error_of(max_tokens=10**6),
    ],
}
print(json.dumps(found))
