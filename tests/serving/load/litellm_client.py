"""What litellm makes of a server: `python litellm_client.py URL`, JSON to stdout."""

import json
import sys

import litellm

PLACE = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_tokens": 12, "seed": 3, "temperature": 0.7}
TURNS = [{"role": "user", "content": "hi"}]

said = litellm.completion(model="openai/tiny", messages=TURNS, **PLACE)
parts = list(litellm.completion(model="openai/tiny", messages=TURNS, stream=True, **PLACE))
text = litellm.text_completion(model="text-completion-openai/tiny", prompt="def ", **PLACE)
found = {
    "said": said.choices[0].message.content,
    "streamed": "".join(part.choices[0].delta.content or "" for part in parts),
    "text": text.choices[0].text,
    "usage": said.usage.completion_tokens,
}
print(json.dumps(found))
