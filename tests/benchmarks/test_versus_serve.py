"""The servers' comparison without the servers: commands, the closed loop, figures, ratios and the table."""

import asyncio
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.serving import versus_serve
from benchmarks.serving.versus_serve import Case, Figures
from common.errors import RunFault
from data.tokens.tokenizer import Tokenizer
from scripts.serve import parse_options
from serving.load.client import SentRequest, Target
from tests.serving.fake_server import FakeServer

CASE = Case("ours", "bfloat16", 32, 192, 2)


@pytest.fixture
def interpreters(tmp_path, monkeypatch):
    """Both peers' interpreters are there."""
    for name in (versus_serve.VLLM_PYTHON, versus_serve.TORCH_PYTHON):
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))


def loop(server, users, count, answer=5):
    async def run():
        async with server.serve():
            requests = versus_serve.requests_of(count, 7, answer, 100, seed=0)
            return await versus_serve.closed_loop(Target.of(server.url), requests, users)

    return asyncio.run(run())


def test_each_user_has_one_request_under_way_and_all_are_of_one_length():
    server = FakeServer(slots=8)
    sent = loop(server, users=3, count=9)
    assert len(sent) == 9 and server.most == 3
    assert {len(body["prompt"]) for body in server.bodies} == {7}
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 9
    assert all(body["ignore_eos"] and body["temperature"] == 0 and body["stream"] for body in server.bodies)
    found = versus_serve.figures(sent, 5)
    assert 0 < found.first <= found.first_p95 and found.rate > 0 and found.gap > 0


def test_figures_are_those_of_the_times():
    def one(sent, first, end):
        return SentRequest(0, sent, sent=sent, first=first, end=end, status=200, tokens=5)

    found = versus_serve.figures([one(10.0, 10.5, 12.5), one(11.0, 12.5, 14.5), one(12.0, 12.5, 15.0)], 5)
    assert found.rate == pytest.approx(15 / 5)
    assert (found.first, found.gap) == (0.5, 0.5) and found.first_p95 == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (FakeServer(fail="error"), "gone"),
        (FakeServer(fail="cut"), "cut off"),
        (FakeServer(slots=1, queue=1, pace=0.01), "503"),
    ],
)
def test_a_request_without_its_answer_is_no_figure(server, says):
    with pytest.raises(RunFault, match=says):
        versus_serve.figures(loop(server, users=4, count=4), 5)
    with pytest.raises(RunFault, match="5 tokens of 6"):
        versus_serve.figures(loop(FakeServer(), users=1, count=1), 6)


def test_our_command_is_one_that_our_server_takes():
    _, _, *words = versus_serve.command(CASE, "model", 8123)
    options = parse_options(words)
    assert (options.slots, options.max_len, options.precision, options.port) == (32, 192, "bfloat16", 8123)
    assert not options.prefix_cache


def test_peers_are_given_as_much(interpreters):
    for side, slots in (("vllm", "--max-num-seqs 32"), ("transformers", "bfloat16 32 192 2 8123")):
        line = " ".join(versus_serve.command(Case(side, *list(vars(CASE).values())[1:]), "model", 8123))
        assert slots in line and "bfloat16" in line and "8123" in line and "192" in line
    line = " ".join(versus_serve.command(Case("vllm", *list(vars(CASE).values())[1:]), "model", 8123))
    assert "--no-enable-prefix-caching" in line


def test_an_interpreter_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(versus_serve.VLLM_PYTHON, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="make vllm-env"):
        versus_serve.command(Case("vllm", "float32", 8, 64, 2), tmp_path, 1)


def test_servers_are_started_in_turn_and_the_table_says_who_is_faster(tmp_path, monkeypatch):
    """Ours is twice as fast in all; slots are 8, or the users."""
    started, rates = [], {"ours": 100.0, "vllm": 50.0}

    class Started:
        def __init__(self, case, *_):
            self.target = case
            started.append((case.side, case.slots))

        def close(self):
            started.append("closed")

    def ask(case, users, *_):
        rate = rates[case.side]
        return Figures(rate * users, 1 / rate, 2 / rate, 0.5 / rate)

    monkeypatch.setattr(versus_serve, "Server", Started)
    monkeypatch.setattr(versus_serve, "command", lambda *_: [])
    monkeypatch.setattr(versus_serve, "ask", ask)
    asked = Namespace(
        prompt=60, tokens=8, precisions=["float32"], peers=["vllm"], threads=1, rounds=2, start_seconds=1.0
    )
    found = versus_serve.measure_all(asked, tmp_path / "model", 100, [1, 8, 32])
    assert started[1::2] == ["closed"] * 8
    first = [("ours", 8), ("vllm", 8), ("ours", 32), ("vllm", 32)]
    assert started[::2] == [*first, *first[::-1]]
    ratios = versus_serve.ratios_of(found)
    assert len(ratios) == 9 and {ratio["median"] for ratio in ratios.values()} == {2.0}
    table = versus_serve.table_of(found)
    rows = [(row["users"], row["slots"], row["server"], row["tokens/s"]) for row in table]
    assert rows[:2] == [(1, 8, "ours", 100), (1, 8, "vllm", 50)] and rows[-1] == (32, 32, "vllm", 1600)
    assert table[0]["ours over it, tokens/s"] is None and table[1]["ours over it, tokens/s"] == "2 (2 to 2)"
    assert "| 32 | 32 | vllm | 1,600 |" in measure.as_table(table)


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path, monkeypatch):
    words = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    monkeypatch.setattr(versus_serve, "command", lambda *_: words)
    with pytest.raises(RunFault, match="ended with status 1: no such model"):
        versus_serve.Server(CASE, tmp_path, tmp_path / "log", 60.0)


def test_what_a_server_started_ends_with_it(tmp_path, monkeypatch):
    """The child would outlive its parent by a minute."""
    monkeypatch.setattr(versus_serve, "command", lambda *_: ["sh", "-c", "sleep 60 & echo $!; exit 3"])
    with pytest.raises(RunFault, match=r"ended with status 3: \d+$") as caught:
        versus_serve.Server(CASE, tmp_path, tmp_path / "log", 60.0)
    child = Path("/proc", str(caught.value).split()[-1], "stat")
    until = time.monotonic() + 20
    while alive(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(child)


def alive(stat):
    """Whether a process is there and not merely waiting to be noted."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_tokenizer_has_all_ids_and_each_is_a_text():
    text = versus_serve.pairs_tokenizer(2000)
    tokenizer = Tokenizer(text, named={"bos_token": "<bos>", "eos_token": "<eos>"})
    assert tokenizer.vocab_size == 2000 and len(json.loads(text)["model"]["vocab"]) == 2000
    assert tokenizer.gives_back("def f(x): return x  # \u00e9")
    assert tokenizer.token(1999).isascii()
    with pytest.raises(ValueError, match="vocabulary of 90000"):
        versus_serve.pairs_tokenizer(90000)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "gpt5"], "--model"),
        (["--peers", "sglang"], "--peers"),
        (["--users", "0,8"], "--users=0,8"),
        (["--model", "smollm2", "model.num_layers=2"], "leave out model.num_layers=2"),
    ],
)
def test_flags_are_checked_before_anything_starts(flags, says, capsys):
    assert versus_serve.main(flags) == 2
    assert says in capsys.readouterr().err


def test_vllm_takes_all_cores():
    found = versus_serve.environment(3)
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
