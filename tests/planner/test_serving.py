"""An engine's plan: bytes by hand, slots that fit, and the programs that the engine itself compiles."""

from dataclasses import replace

import jax
import pytest

from artifacts.config import RunConfig
from models.config import DeltaConfig, MLAConfig, ModelConfig
from parallel.config import MeshConfig
from parallel.hardware import machine_of
from planner.described_devices import described_devices
from planner.serving import ServingModel, plan_serving, refusal_of, size_of
from planner.serving_question import ServingQuestion
from planner.serving_screen import serving_screen
from tests.compilers import skip_without
from tests.planner.test_described import mesh_rules
from tests.planner.test_hardware import hardware
from training.config import Config, TrainingConfig

# L 2, D 32, N 4, K 2, H 8, F 48, V 64
PLAIN = ModelConfig(
    vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64
)
LATENT = MLAConfig(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
DELTA = DeltaConfig(
    num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8, conv_width=4, chunk=8
)
QUESTION = ServingQuestion(page=4, chunk=8)
H200 = machine_of(hardware("h200"), 1)


def asked(model=PLAIN, precision="auto"):
    return Config(
        run=RunConfig(name="planned"),
        model=model,
        mesh=MeshConfig(rules=mesh_rules(), data=1),
        training=TrainingConfig(precision=precision),
    )


def made(model=PLAIN, machine=H200, compiles=False, question=QUESTION):
    """The engine's model at any number of slots, made on this machine's CPU."""
    question, here = question.settled(model), machine.kind != "cpu"
    return ServingModel(asked(model), machine, question, jax.devices("cpu")[0], here, compiles)


def cpu():
    sheet = hardware("cpu")
    return machine_of(replace(sheet, peak_tflops=0.1, device=replace(sheet.device, memory_gib=4.0)), 1)


@pytest.mark.parametrize(
    ("model", "bits", "token", "fixed"),
    [
        (PLAIN, None, 2 * 2 * 2 * 8 * 2, 0),  # L * (K, V) * K * H in bfloat16
        (PLAIN, 8, 2 * 2 * 2 * (8 + 4), 0),  # a level a number, a float32 scale a vector
        (replace(PLAIN, num_kv_heads=4), None, 2 * 2 * 4 * 8 * 2, 0),
        (replace(PLAIN, mla=LATENT, num_kv_heads=4, head_dim=12), None, 2 * (16 + 4) * 2, 0),
        (replace(PLAIN, mla=LATENT, num_kv_heads=4, head_dim=12), 8, 2 * (16 + 4 + 4 + 4), 0),
        # One layer of attention; of the other its state in float32 and three inputs of its convolutions.
        (
            replace(PLAIN, delta=DELTA, mixer_pattern=["gated_delta", "attention"]),
            None,
            2 * 2 * 8 * 2,
            4 * 8 * 8 * 4 + 3 * (2 * 2 * 8 + 4 * 8) * 2,
        ),
    ],
    ids=["grouped", "grouped in eight bits", "every head", "latent", "latent in eight bits", "recurrent"],
)
def test_bytes_of_a_token_and_of_a_slot_are_those_by_hand(model, bits, token, fixed):
    engine = made(model, question=replace(QUESTION, cache_bits=bits))
    assert engine.cache_bytes == (token, fixed)
    # 64 tokens are 16 pages of 4.
    segments = engine.programs(3).abstract()["segments"]
    assert size_of(segments) == 3 * (64 * token + fixed)


def test_bytes_of_weights_are_those_by_hand():
    products = 2 * (3 * 32 * 4 * 8 + 3 * 32 * 48)  # q, k and v as one, o; gate, up, down
    norms = (2 * 2 + 1) * 32
    tables = 64 * 32  # one that is looked up; tied, a copy of it is the head's
    assert size_of(made().weights) == 2 * (products + tables) + 4 * (norms + tables)
    assert size_of(made().masters) == 4 * (products + norms + tables)


def test_more_slots_need_more_and_as_many_as_fit_do_fit():
    engine = made()
    sizes = [engine.needs(slots) for slots in (1, 2, 3, 20)]
    assert sizes == sorted(set(sizes))
    for slots in (1, 2, 20):
        small = made(machine=replace(H200, memory_bytes=engine.needs(slots)))
        assert small.fit() == slots
        assert small.needs(slots + 1) > small.machine.memory_bytes
    assert made(machine=replace(H200, memory_bytes=engine.needs(1) - 1)).fit() == 0


def test_longer_texts_and_more_of_them_take_longer():
    few, many = (
        plan_serving(asked(), H200, replace(QUESTION, slots=n), compile="never").decode[-1] for n in (2, 16)
    )
    assert few.seconds < many.seconds and few.tokens_per_second < many.tokens_per_second
    short = plan_serving(asked(), H200, replace(QUESTION, slots=2, context=8), compile="never").decode[-1]
    assert short.seconds < few.seconds
    small = plan_serving(asked(), H200, replace(QUESTION, slots=16, cache_bits=8), compile="never").decode[-1]
    assert small.seconds < many.seconds


def test_what_is_abstract_is_what_an_engine_begins_with():
    programs = made().programs(3)
    there = jax.tree.map(lambda x: (x.shape, x.dtype), programs.empty())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), programs.abstract()) == there


def test_the_programs_are_compiled_for_this_machine_and_read():
    """Of a decode the products are those that the model needs, the loop over pages to the text's length."""
    plan = plan_serving(asked(), cpu(), replace(QUESTION, slots=2))
    assert plan.how == "compiled" and plan.compile_seconds > 0 and not plan.notes
    assert plan.dtype == "float32" and plan.cache_token == 2 * 2 * 2 * 8 * 4
    assert plan.beside > 2 * 64 * 4 and plan.fit > 2  # the logits at least
    engine = made(machine=cpu(), compiles=True)
    read, computed = engine.cost(2).work["decode"].flops, engine.guess("decode", 2)[1].flops
    assert read["float32"] == pytest.approx(computed["float32"], rel=0.05)


def test_what_does_not_fit_says_how_much_is_missing_and_what_would():
    engine = made()
    tight = replace(H200, memory_bytes=engine.needs(20))
    plan = plan_serving(asked(), tight, replace(QUESTION, slots=40), compile="never")
    assert plan.missing == engine.needs(40) - engine.needs(20)
    said = refusal_of(plan)
    assert said is not None and f"{plan.missing:,} bytes more" in said and "use slots=20" in said
    assert "DOES NOT FIT" in serving_screen(plan) and not plan.json()["fits"]
    none = plan_serving(asked(), replace(H200, memory_bytes=2**10), QUESTION, compile="never")
    assert none.fit == 0 and none.slots == 1
    said = refusal_of(none)
    assert said is not None and "scripts/export.py" in said


def test_promises_hold_or_do_not():
    question = replace(QUESTION, slots=2, prompt=17)
    plan = plan_serving(asked(), H200, question, compile="never")
    assert plan.chunks == 2 and plan.gap == plan.decode[-1].seconds + plan.chunk_seconds
    assert plan.first_busy == pytest.approx(2 * plan.gap + plan.decode[-1].seconds)
    good = replace(plan, question=replace(plan.question, slo_gap=1.0, slo_ttft=1.0))
    assert refusal_of(good) is None and serving_screen(good).count(" s holds") == 2
    bad = replace(plan, question=replace(plan.question, slo_gap=plan.gap / 2))
    assert (refusal_of(bad) or "").startswith("slo_gap=") and "DOES NOT HOLD" in serving_screen(bad)
    assert not bad.json()["promises"]["slo_gap"]["holds"]


def test_what_was_not_compiled_for_the_device_is_called_a_guess():
    screen = serving_screen(plan_serving(asked(), H200, replace(QUESTION, slots=2), compile="never"))
    assert "(a guess)" in screen and "not compiled: plan.compile=never" in screen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk": 6, "page": 4}, "chunk=6 must be a multiple of page=4"),
        ({"slots": -1}, "slots=-1"),
        ({"cache_bits": 4}, "cache_bits=4 must be 8, or null"),
        ({"slo_gap": 0.0}, "slo_gap=0.0 must be above 0"),
        ({"prompt": 64}, "prompt=64"),
        ({"max_len": 32, "context": 33}, "context=33"),
    ],
)
def test_a_question_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ServingQuestion(**{"page": 4, "chunk": 8, **changes}).settled(PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [("h200", "1"), ("v5p", "2x2x1"), ("v6e", "2x2")])
def test_an_engine_is_compiled_for_one_described_device(name, topology):
    try:
        described_devices(name, topology)
    except ImportError as error:
        skip_without(error)
    plan = plan_serving(asked(), machine_of(hardware(name), 1), QUESTION, compile="always")
    assert plan.how == "compiled" and plan.dtype == "bfloat16" and not plan.missing
    assert plan.cache_token == 2 * 2 * 2 * 8 * 2
    assert plan.decode[0].tokens_per_second < plan.decode[-1].tokens_per_second
