"""What a run says of its compilations: each second of tracing, lowering and compiling, and each once."""

import time

import jax
import pytest

from training.compile_cache import CacheWatch, _Spans


def test_spans_inside_of_others_count_once():
    spans = _Spans()
    told = [(1.0, 2.0), (2.5, 3.0), (0.5, 4.0), (4.0, 5.0), (7.0, 8.0), (6.0, 8.0), (5.5, 9.0)]
    assert sum(spans.add(*span) for span in told) == pytest.approx(3.5 + 1.0 + 3.5)


def test_tracing_is_compilation_and_what_is_traced_inside_of_it_is_no_more():
    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.1)
        return inner(inner(x) * 2)

    watch = CacheWatch(None)
    began = time.time()
    outer.lower(1.0).compile()
    wall = time.time() - began
    assert 0.3 <= watch.seconds <= wall


def test_what_is_compiled_already_costs_nothing():
    double = jax.jit(lambda x: x * 2)
    double(1.0).block_until_ready()
    watch = CacheWatch(None)
    double(2.0).block_until_ready()
    assert watch.seconds == 0.0
