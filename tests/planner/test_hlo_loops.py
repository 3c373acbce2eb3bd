"""How often a loop runs where the compiler does not say: from its start, its step and its end."""

import pytest

from planner.hlo.program import read_hlo

LOOP = """
HloModule looped

%body (p: (s32[], f32[2,2])) -> (s32[], f32[2,2]) {{
  %p = (s32[], f32[2,2]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[2,2]{{1,0}}) %p), index=0
  %step = s32[] constant({step})
  %next = s32[] {change}(s32[] %i, s32[] %step)
  %x = f32[2,2]{{1,0}} get-tuple-element((s32[], f32[2,2]{{1,0}}) %p), index=1
  %dot = f32[2,2]{{1,0}} dot(f32[2,2]{{1,0}} %x, f32[2,2]{{1,0}} %x), lhs_contracting_dims={{1}}
  ROOT %t = (s32[], f32[2,2]{{1,0}}) tuple(s32[] %next, f32[2,2]{{1,0}} %dot)
}}

%cond (p.1: (s32[], f32[2,2])) -> pred[] {{
  %p.1 = (s32[], f32[2,2]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element((s32[], f32[2,2]{{1,0}}) %p.1), index=0
  %end = s32[] constant({end})
  ROOT %go = pred[] compare(s32[] %i.1, s32[] %end), direction={direction}
}}

ENTRY %main (x.1: f32[2,2]) -> f32[2,2] {{
  %x.1 = f32[2,2]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %init = (s32[], f32[2,2]{{1,0}}) tuple(s32[] %start, f32[2,2]{{1,0}} %x.1)
  %loop = (s32[], f32[2,2]{{1,0}}) while((s32[], f32[2,2]{{1,0}}) %init), condition=%cond, body=%body
  ROOT %out = f32[2,2]{{1,0}} get-tuple-element((s32[], f32[2,2]{{1,0}}) %loop), index=1
}}
"""
ONE = 2 * 2 * 2 * 2  # FLOPs of the product


@pytest.mark.parametrize(
    ("start", "step", "change", "end", "direction", "times"),
    [
        (0, 1, "add", 7, "LT", 7),
        (0, 1, "add", 7, "LE", 8),
        (3, 1, "add", 7, "LT", 4),
        (0, 2, "add", 7, "LT", 4),
        (7, 1, "subtract", 0, "GT", 7),
        (0, 1, "add", 7, "NE", 7),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_says(start, step, change, end, direction, times):
    text = LOOP.format(start=start, step=step, change=change, end=end, direction=direction)
    found = read_hlo(text, {"data": 1})
    assert found.flops == times * ONE
    assert not found.uncounted_loops


def test_what_is_not_known_is_named_and_counted_once():
    text = LOOP.format(start=0, step=1, change="add", end=7, direction="LT")
    text = text.replace("%end = s32[] constant(7)", '%end = s32[] custom-call(), custom_call_target="data"')
    found = read_hlo(text, {"data": 1})
    assert found.uncounted_loops == ["loop"]
    assert found.flops == ONE
