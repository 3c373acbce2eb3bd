"""What llama.cpp makes of a GGUF file, for an environment that has xllamacpp.

python tests/interop/llama_cpp.py FILE ASKED ANSWERED    greedy tokens behind "prompt", ids of each of "texts"
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def main(file: str, asked: str, answered: str) -> None:
    """Ask a server in this process, which keeps keys and values in float32 as we do."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = file, 256, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, **values: Any) -> Any:
        content = json.dumps(values).encode()
        where = f"{server.listening_address}/{path}"
        request = urllib.request.Request(where, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    with open(asked, encoding="utf-8") as source:
        given = json.load(source)
    greedy = {"n_predict": 64, "temperature": 0, "top_k": 1, "return_tokens": True}
    found = {
        "greedy": post("completion", prompt=given["prompt"], **greedy),
        "ids": [
            post("tokenize", content=text, add_special=True, parse_special=False) for text in given["texts"]
        ],
    }
    with open(answered, "w", encoding="utf-8") as out:
        json.dump(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
