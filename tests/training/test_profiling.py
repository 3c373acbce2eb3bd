"""A trace of a few steps, the page about it, and what is said where steps cannot be traced."""

import jax
import pytest

import training.setup
from parallel.mesh import build_layout
from training.config import LoggingConfig
from training.loop import fit
from training.profiling import Operation, module_name, operations, plan, summary_page

HLO = """HloModule jit_train_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %c = f32[8]{0} cosine(%p), metadata={op_name="jit(train_step)/head/cos"}
  ROOT %m = f32[8]{0} multiply(%c, %p), metadata={op_name="jit(train_step)/transpose(jvp(layer_1))/mlp/mul"}
}

ENTRY %main (x: f32[8]) -> (f32[8], f32[8]) {
  %x = f32[8]{0} parameter(0), metadata={op_name="leaves[0]"}
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %while.2 = (f32[8]{0}, s32[]) while(%t), body=%b, metadata={op_name="jit(train_step)/jvp()/while"}
  ROOT %dot.3 = f32[8,8]{1,0} dot(%x, %x), metadata={op_name="jit(train_step)/embed/dot_general"}
}
"""


def test_every_operation_has_the_scope_that_it_comes_from():
    known = operations(HLO)
    assert module_name(HLO) == "jit_train_step"
    assert known["dot.3"] == Operation("jit(train_step)/embed/dot_general", "dot")
    assert known["fusion.1"].part == "layer_1/mlp, backward"  # its root's
    assert known["while.2"].kind == "while"
    assert (
        Operation("jit(train_step)/jvp()/while/body/layer_0/attention_norm/mul", "multiply").part == "layer_0"
    )
    again = "transpose(jvp())/while/body/rematted_computation/layer_0/attention/dot"
    assert Operation(again, "dot").part == "layer_0/attention, again"


def test_the_page_shares_time_among_parts_and_counts_no_loop_twice():
    events = [
        ("fusion.1", 0.003),
        ("fusion.1", 0.003),
        ("dot.3", 0.002),
        ("while.2", 1.0),
        ("of_another", 9.0),
    ]
    lines = summary_page(events, operations(HLO), range(5, 7)).splitlines()
    assert lines[0].startswith("Steps 5 to 6: 4.00 ms of operations a step")
    assert [line.split(maxsplit=2) for line in lines[3:5]] == [
        ["75.0%", "3.000", "layer_1/mlp, backward"],
        ["25.0%", "1.000", "embed"],
    ]
    assert "(2 in all)" in lines[6]
    assert lines[7].split() == [*("75.0%", "3.000", "1.0", "fusion.1"), "(layer_1/mlp,", "backward;", "mul)"]
    assert "no operation" in summary_page([], operations(HLO), range(5, 7))


@pytest.mark.parametrize(
    ("first", "last", "steps", "said"),
    [
        (0, 20, [10, 11, 12], None),
        (9, 12, [10, 11, 12], None),
        (0, 11, [10, 11], "steps 10 to 11: it goes from step 1 to 11"),
        (11, 20, [12], "steps 12 to 12: it goes from step 12 to 20"),
        (0, 9, [], "none: it goes from step 1 to 9"),
        (12, 20, [], "none: it goes from step 13 to 20"),
    ],
)
def test_steps_that_a_start_does_not_make_are_not_traced_and_that_is_said(first, last, steps, said):
    left, line = plan([10, 13], first, last)
    assert list(left) == steps
    assert (line is None) == (said is None) and (said or "") in (line or "")


@pytest.mark.parametrize("steps", [[], [3], [0, 2], [3, 3], [3, 2], [1, 2, 3]])
def test_profile_steps_are_two_in_order(steps):
    with pytest.raises(ValueError, match=r"logging\.profile_steps=.* must be two steps \[first, end\)"):
        LoggingConfig(profile_steps=steps)


def test_a_run_leaves_a_trace_and_a_page_of_the_parts_of_the_model(ground, monkeypatch, capsys):
    monkeypatch.setattr(training.setup, "build_layout", lambda m, _: build_layout(m, jax.devices()[:1]))
    words = (
        "training.num_steps=3",
        "schedule.warmup_steps=1",
        "logging.profile_steps=[2,9]",
        "eval.every=2",
        "checkpoint.every=9",
    )
    assert fit(ground.config("traced", *words, "mesh.data=1", "profile=true")) == 0
    directory = ground.run("traced") / "profile"
    out = capsys.readouterr().out
    assert "this start makes steps 2 to 3" in out and f"profile: {directory}/summary.txt" in out
    assert len(list(directory.glob("plugins/profile/*/*.xplane.pb"))) == 1
    page = (directory / "summary.txt").read_text()
    assert page.startswith("Steps 2 to 3: ")
    for part in ("embed", "layer_0/attention", "layer_0/mlp", "layer_0/mlp, backward", "head", "optimizer"):
        assert f"  {part}\n" in page, part
    assert ground.summary("traced")["goodput"]["categories"]["profile"] > 0
