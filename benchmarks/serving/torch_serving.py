"""Transformers' continuous batching behind as much of OpenAI's completions as `versus_serve` asks for.

    .venv-torch/bin/python -P benchmarks/serving/torch_serving.py DIR PRECISION SLOTS LENGTH THREADS PORT

Prompts are token ids, answers are greedy, streamed and as long as asked; each token is an event.
"""

import asyncio
import itertools
import json
import sys
from typing import Any

import torch
import transformers

NUMBERS = itertools.count()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def start(directory: str, precision: str, slots: int, length: int) -> Any:
    """The manager of a model's batches, its thread begun."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, precision)
    ).eval()
    greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    page = 64
    sizes = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=(slots + 1) * -(-length // page),
        max_batch_tokens=max(512, slots),
        max_requests_per_batch=slots,
        allow_block_sharing=False,
        use_cuda_graph=False,
    )
    manager = model.init_continuous_batching(greedy, sizes)
    manager.start()
    return manager


async def answer(manager: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request of a connection: its tokens as they come, or that the server is alive."""
    path = (await reader.readline()).split()[1]
    size = 0
    while line := (await reader.readline()).strip().lower():
        if line.startswith(b"content-length:"):
            size = int(line.partition(b":")[2])
    body = json.loads(await reader.readexactly(size) or b"{}")
    writer.write(HEAD)
    if path == b"/v1/completions":
        await stream(manager, body["prompt"], body["max_tokens"], writer)
    await writer.drain()
    writer.close()


async def stream(manager: Any, prompt: list[int], count: int, writer: asyncio.StreamWriter) -> None:
    """Write an event for each token, then how many there were."""
    outputs: asyncio.Queue[Any] = asyncio.Queue()
    number = f"{next(NUMBERS)}"
    manager.register_result_handler(number, outputs.put_nowait)
    manager.add_request(prompt, request_id=number, max_new_tokens=count, streaming=True, eos_token_id=-1)
    written, over = 0, False
    while not over:
        found = await outputs.get()
        over, fresh = found.is_finished(), len(found.generated_tokens) - written
        written += fresh
        if found.error:
            event(writer, {"error": {"message": found.error}})
        for _ in range(fresh):
            event(writer, {"choices": [{"text": "."}]})
        await writer.drain()
    event(writer, {"choices": [], "usage": {"completion_tokens": written}})
    writer.write(b"data: [DONE]\n\n")


def event(writer: asyncio.StreamWriter, value: Any) -> None:
    """Write one event of a stream."""
    writer.write(f"data: {json.dumps(value)}\n\n".encode())


async def serve(manager: Any, port: int) -> None:
    """Serve until the process ends."""
    server = await asyncio.start_server(lambda r, w: answer(manager, r, w), "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main(directory: str, precision: str, slots: str, length: str, threads: str, port: str) -> None:
    """Open the model, then listen."""
    torch.set_num_threads(int(threads))
    manager = start(directory, precision, int(slots), int(length))
    asyncio.run(serve(manager, int(port)))


if __name__ == "__main__":
    main(*sys.argv[1:])
