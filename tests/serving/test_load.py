"""Load tests: a plan is its seed's, figures are what they say, and a report is whole."""

import asyncio
import json
import time

import numpy as np
import pytest

from configs.groups import CONFIG_DIR, options
from scripts.load import load_config, main
from serving.load.client import SentRequest, Target, complete
from serving.load.config import LengthConfig, LoadConfig, LoadProbe, LoadStage, ServiceLevel, SharedPrefix
from serving.load.drive import Recording, at_their_times, drive, read_metrics
from serving.load.measure import is_good, quantiles, summary
from serving.load.plan import PROBE, LoadPlan, PlannedRequest, arrivals, lengths, plan, read_trace
from serving.load.report import page, write_report
from tests.serving.fake_server import FakeServer

PRESETS = options("load")


def config(*stages, **changes):
    return LoadConfig(stages=[LoadStage(**stage) for stage in stages], **changes)


# -- the plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plan_is_a_function_of_its_seed(preset):
    same, again, other = (plan(load_config(preset, [f"seed={seed}"]), 5.0) for seed in (0, 0, 1))
    assert same == again and same.requests != other.requests
    assert len(same.requests) > 100
    due = [request.due for request in same.requests]
    assert due == sorted(due) and 0 <= due[0] and due[-1] < same.seconds


def test_a_changed_stage_leaves_the_others_as_they_were():
    calm, peak, wild = {"load": 1.0}, {"load": 2.0}, {"load": 9.0}
    one, two = (plan(config(calm, stage, calm), 3.0) for stage in (peak, wild))
    for number in (0, 2):
        first, second = ([r for r in made.requests if r.stage == number] for made in (one, two))
        assert first == second


@pytest.mark.parametrize("process", ["poisson", "constant", "burst"])
def test_every_process_has_the_rate_that_was_asked_for(process):
    stage = LoadStage(arrivals=process, burst=5)
    times = arrivals(stage, 1000.0, 20.0, np.random.default_rng(0))
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert np.all(np.diff(times) >= 0) and times[-1] < 1000
    assert len(arrivals(stage, 10.0, 0.0, np.random.default_rng(0))) == 0


def test_processes_differ_in_what_they_are_named_for():
    even, poisson, burst = (
        np.diff(arrivals(LoadStage(arrivals=name, burst=5), 1000.0, 20.0, np.random.default_rng(0)))
        for name in ("constant", "poisson", "burst")
    )
    assert np.allclose(even, 0.05)
    assert np.std(poisson) == pytest.approx(np.mean(poisson), rel=0.05)  # exponential
    assert np.mean(burst == 0) == pytest.approx(4 / 5, abs=0.01)  # all but the first of a group


def test_lengths_keep_their_median_and_their_ends():
    drawn = lengths(LengthConfig(median=40, spread=0.8, least=4, most=100), 20_000, np.random.default_rng(0))
    assert np.median(drawn) == pytest.approx(40, abs=1) and drawn.min() == 4 and drawn.max() == 100
    assert set(lengths(LengthConfig(median=7, spread=0), 9, np.random.default_rng(0))) == {7}


def test_prompts_share_the_beginnings_that_were_asked_for_and_no_more():
    shared = SharedPrefix(groups=3, tokens=20)
    made = plan(config({"load": 4.0}, prefix=shared, prompt=LengthConfig(median=8, most=30)), 5.0)
    begun = {request.prompt[:20] for request in made.requests}
    assert len(begun) == 3 and all(20 < len(request.prompt) <= 30 for request in made.requests)
    assert len({request.prompt for request in made.requests}) == len(made.requests)
    low, high = config({}).vocabulary
    assert all(low <= token < high for request in made.requests for token in request.prompt)


def test_a_trace_keeps_its_shape_at_the_load_that_was_asked_for():
    made = load_config("trace", [])
    times, prompts, _ = read_trace(CONFIG_DIR / "load" / "trace.csv")
    slow, fast = plan(made, 2.0), plan(made, 20.0)
    assert slow.seconds == pytest.approx(len(times) / (0.5 * 2.0)) == pytest.approx(10 * fast.seconds)
    share = [request.due / slow.seconds for request in slow.requests]
    assert np.allclose(share, times / times[-1])
    assert [len(request.prompt) for request in slow.requests] == np.clip(prompts, 1, 128).tolist()
    rates = [rate for _, rate in slow.stages]
    assert max(rates) > 3 * np.median(rates)  # the peak at noon


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A,B\n1,2\n", "needs columns TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01,1,1\n", "has 1 requests"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-02,1,1\n2026-01-01,1,1\n",
            "in order of time",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01,many,1\n", "needs columns"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused(text, said, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_trace(tmp_path / "t.csv")


def test_more_than_the_config_allows_is_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="requests are more than most_requests=100; lower duration"):
        plan(config({"seconds": 100.0, "load": 1.0}, most_requests=100), 50.0)
    with pytest.raises(ValueError, match="2000 seconds are more than most_seconds=1200"):
        plan(config({"seconds": 2000.0}), 1.0)


# -- figures -------------------------------------------------------------------------------------------------


def answer(due, first, end, tokens=11, stage=0, **changes):
    gaps = [(end - first) / (tokens - 1)] * (tokens - 1) if tokens > 1 else []
    made = {"sent": due, "status": 200, "gaps": gaps, **changes}
    return SentRequest(stage, due, first=first, end=end, tokens=tokens, **made)


def refusal(due, seconds, stage=0, retry_after="1"):
    return SentRequest(
        stage, due, sent=due, end=due + seconds, status=503, error="full", retry_after=retry_after
    )


def test_quantiles_are_those_of_the_values():
    values = list(range(1, 102))
    assert quantiles(values) == {"p50": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0, "most": 101.0}
    assert quantiles([]) == {}


@pytest.mark.parametrize(
    ("attempt", "good"),
    [
        (answer(0.0, 0.5, 1.5), True),
        (answer(0.0, 1.01, 1.5), False),  # first token late
        (answer(0.0, 0.5, 2.6, tokens=11), False),  # 0.21 s a token
        (answer(0.0, 0.5, 4.5, tokens=41), False),  # 4.5 s in all
        (answer(0.0, 0.5, 0.5, tokens=1), True),
        (answer(0.0, 0.5, 1.5, error="cut off"), False),
        (refusal(0.0, 0.01), False),
    ],
)
def test_an_answer_is_good_within_all_limits(attempt, good):
    assert is_good(attempt, ServiceLevel(first=1.0, token=0.2, whole=4.0)) is good


def recording():
    """Two stages of ten seconds: one that the server can do, and one where it refuses a half."""
    calm = [answer(t, t + 0.1, t + 0.6) for t in range(10)]
    hard = [answer(10 + t / 2, 10 + t / 2 + 0.4, 10 + t / 2 + 0.9, stage=1) for t in range(18)]
    refused = [refusal(10 + t / 2, 0.02, 1, None if t == 3 else "2") for t in range(20)]
    beside = [answer(t + 0.5, t + 0.5 + (0.02 if t < 10 else 0.08), t + 0.9, 1, PROBE) for t in range(20)]
    idle = [answer(0.0, 0.01, 0.01, tokens=1) for _ in range(5)]
    made = LoadPlan((), ((10.0, 1.0), (10.0, 4.0)))
    samples = [{"time": float(t), "running": 2.0, "waiting": t / 4, "pages": 0.5} for t in range(20)]
    return Recording(
        Target("127.0.0.1", 1, model="m"), made, 2.0, idle, [*calm, *hard, *refused], beside, samples
    )


def test_the_summary_is_what_became_of_the_requests():
    figures = summary(recording(), config({}))
    calm, hard = figures["stages"]
    assert (calm["asked"], calm["answered"], calm["refused"]) == (10, 10, 0)
    assert (hard["asked"], hard["answered"], hard["refused"]) == (38, 18, 20)
    assert (calm["load"], hard["load"]) == (0.5, 2.0)
    assert calm["first"]["p50"] == pytest.approx(0.1) and hard["whole"]["p99"] == pytest.approx(0.9)
    assert calm["goodput"] == 1.0 and hard["goodput"] == 1.8 and hard["good_share"] == 18 / 38
    assert calm["tokens_per_second"] == 11.0
    assert figures["goodput"] == {"peak": 1.8, "at_most_load": 1.8, "share": 1.0}
    assert figures["refusals"]["count"] == 20 and figures["refusals"]["silent"] == 1
    assert figures["refusals"]["seconds"]["most"] == pytest.approx(0.02)
    assert figures["failures"] == {"count": 0, "why": {}}
    assert figures["probe"]["ratio"] == pytest.approx(8.0) and calm["probe"]["p95"] == pytest.approx(0.02)
    assert figures["waiting_most"] == 4.75


def test_waiting_to_be_sent_counts_as_the_servers():
    """A client that is held up by slow answers would otherwise measure the few that it managed to send."""
    late = answer(0.0, 5.1, 5.2, sent=5.0)
    made = Recording(Target("h", 1), LoadPlan((), ((10.0, 1.0),)), 1.0, [], [late])
    figures = summary(made, config({}))
    assert figures["stages"][0]["first"]["p50"] == 5.1 and figures["late"]["p50"] == 5.0
    assert "This client was late" in page(figures, "t")


def test_what_failed_is_said_by_its_reason():
    cut = answer(0.0, 0.1, 0.2, error="the answer is cut off")
    made = Recording(Target("h", 1), LoadPlan((), ((10.0, 1.0),)), 1.0, [], [cut, cut])
    figures = summary(made, config({}))
    assert figures["failures"] == {"count": 2, "why": {"the answer is cut off": 2}}
    assert "Failed: 2 (2 × the answer is cut off)" in page(figures, "t")


def test_metrics_are_read_over_all_models():
    text = (
        "# TYPE vllm:num_requests_waiting gauge\n"
        'vllm:num_requests_waiting{model_name="a"} 3\n'
        'vllm:num_requests_waiting{model_name="b"} 2.0\n'
        "vllm:num_requests_waiting_total 99\n"
        'vllm:kv_cache_usage_perc{model_name="a"} 0.25\n'
    )
    assert read_metrics(text) == {"waiting": 5.0, "pages": 0.25}


# -- against a server ----------------------------------------------------------------------------------------


def against(server, do):
    async def run():
        async with server.serve():
            return await do(Target.of(server.url))

    return asyncio.run(run())


def test_a_whole_load_test_leaves_its_report(tmp_path):
    made = config(
        {"seconds": 0.4, "load": 0.5},
        {"seconds": 0.4, "load": 2.0, "arrivals": "burst", "burst": 4},
        saturation=50.0,
        probe=LoadProbe(per_second=10.0, idle=3),
        answer=LengthConfig(median=4, most=8),
    )
    server = FakeServer(queue=1000)
    found = against(server, lambda target: drive(target, made))
    assert found.target.model == "fake" and all(attempt.done for attempt in found.load)
    asked = [r.answer for r in plan(made, 50.0).requests]
    assert [attempt.tokens for attempt in found.load] == asked
    assert all(len(a.gaps) == a.tokens - 1 for a in found.load)
    assert len(found.idle) == 3 and len(found.probes) == 8 and found.samples
    assert all(a.due <= a.sent <= a.first <= a.end for a in found.load)
    assert {"ignore_eos": True, "stream": True}.items() <= server.bodies[-1].items()
    # The first of the idle server is not counted.
    assert sum("user" in body for body in server.bodies) == 1 + len(found.idle) + len(found.probes)
    figures = write_report(tmp_path / "out", made, found, "Load test: $x_1$")
    stored = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (
        stored["figures"]["stages"][1]["asked"]
        == figures["stages"][1]["asked"]
        == len(asked) - sum(a.stage == 0 for a in found.load)
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("rate.png", "report.json", "report.md", "time.png")
    ]
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert text.startswith("# Load test: $x_1$") and "| 2.00 |" in text and "rate.png" in text


def test_saturation_is_what_users_without_a_pause_get():
    made = config(
        {"seconds": 0.1, "load": 0.1}, users=3, users_requests=20, probe=LoadProbe(per_second=0, idle=1)
    )
    server = FakeServer(slots=8)
    found = against(server, lambda target: drive(target, made))
    assert found.saturation > 0 and server.most == 3


def test_an_open_loop_asks_on_while_nothing_is_answered():
    server = FakeServer(slots=1, queue=100, fail="hang")
    requests = [PlannedRequest(0.01 * i, 0, (1, 2), 4) for i in range(5)]
    found = against(server, lambda target: at_their_times(target, requests, time.monotonic(), 0.3))
    assert len(server.bodies) == 5
    assert [attempt.error for attempt in found] == ["no end within 0.3 s"] * 5
    assert not any(attempt.done or attempt.refused for attempt in found)


@pytest.mark.parametrize(("fail", "said"), [("cut", "the answer is cut off"), ("error", "gone"), ("", None)])
def test_an_answer_without_its_end_has_failed(fail, said):
    request = PlannedRequest(0.0, 0, (1, 2), 4)
    got = against(FakeServer(fail=fail), lambda target: complete(target, request, time.monotonic(), 20.0))
    assert got.status == 200 and got.done is (said is None) and (said or "") in (got.error or "")


def test_a_refusal_is_told_from_a_failure():
    request = PlannedRequest(0.0, 0, (1, 2), 4)
    full = against(FakeServer(queue=0), lambda target: complete(target, request, time.monotonic(), 20.0))
    assert full.refused and full.retry_after == "1" and not full.done
    gone = asyncio.run(complete(Target("127.0.0.1", 9), request, time.monotonic(), 20.0))
    assert gone.status == 0 and not gone.refused and gone.error


def test_texts_that_the_server_cannot_take_are_refused_before_the_load():
    long = config({}, prompt=LengthConfig(most=400))
    with pytest.raises(ValueError, match="464 tokens, but the server takes 256"):
        against(FakeServer(), lambda target: drive(target, long))


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_begins_with_its_command_and_fits_a_small_model(preset):
    text = (CONFIG_DIR / "load" / f"{preset}.yaml").read_text("utf-8")
    assert f"python scripts/load.py http://127.0.0.1:8000 preset={preset}" in text and "# expected:" in text
    made = load_config(preset, [])
    assert made.prompt.most + made.answer.most <= 256  # the quickstart's


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one URL of a server"),
        (["http://a:1", "http://b:1"], "give one URL of a server"),
        (["http://127.0.0.1:1/v1"], "is no http://HOST:PORT"),
        (["https://127.0.0.1:1"], "is no http://HOST:PORT"),
        (["http://10.0.0.5:8000"], "10.0.0.5 is not this machine"),
        (["http://example.com:80", "host=example.org"], "example.com is not this machine"),
        (["http://127.0.0.1:1", "preset=peek"], "preset=peek is not one of"),
        (["http://127.0.0.1:1", "sed=1"], "Key 'sed' not in 'LoadConfig'"),
        (["http://127.0.0.1:1", "prompt.median=0"], "median=0 must be from 1 to 128"),
        (["http://127.0.0.1:1", "prefix.groups=2", "prefix.tokens=200"], "prefix.tokens=200 must be below"),
        (["http://127.0.0.1:1", "vocabulary=[5]"], "vocabulary=[5] must be two ids"),
        (["http://127.0.0.1:9"], "Connect"),
    ],
)
def test_what_cannot_be_tested_is_one_line_and_status_2(words, said, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not out


def test_help_has_the_presets(capsys):
    assert main(["--help"]) == 0
    assert ", ".join(PRESETS) in capsys.readouterr().out
