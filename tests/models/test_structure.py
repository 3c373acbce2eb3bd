import itertools
from dataclasses import asdict
from functools import partial

import jax
import numpy as np
import pytest

from models.config import ModelConfig, MoEConfig, MTPConfig, MultipliersConfig, RopeScaling, regrouped
from models.ops import Ops
from models.rope import rope_frequencies
from models.spec import Segment, cut_layers, layer_spec, make_segments
from models.transformer import build_model
from tests.configs.composing import config as composed
from tests.models.decoders import FAMILIES, LoopDecoder, family, lively, loop_frequencies, make_batch
from tests.models.mixtures import MIXTURES

PLANES = RopeScaling("longrope", short_factor=[1.0, 2.0], long_factor=[1.0, 4.0])


def layers_in_order(config: ModelConfig) -> list:
    return [spec for segment in make_segments(config) for spec in segment.period * segment.count]


@pytest.mark.parametrize(
    ("num_layers", "counts"), [(26, [(4, 6), (2, 1)]), (34, [(5, 6), (4, 1)]), (3, [(3, 1)])]
)
def test_layers_left_over_from_the_pattern_make_a_segment(num_layers, counts):
    pattern = ["local"] * 5 + ["global"]
    config = family(num_layers=num_layers, window=8, window_pattern=pattern, rope_local_theta=100.0)
    segments = make_segments(config)
    assert [(segment.count, len(segment.period)) for segment in segments] == counts
    kinds = [pattern[i % 6] for i in range(num_layers)]
    assert layers_in_order(config) == [layer_spec(config, kind) for kind in kinds]
    assert [spec.window for spec in layers_in_order(config)] == [8 if k == "local" else None for k in kinds]


def shortest_period(kinds):
    sizes = [n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0]
    return next((len(kinds) // n, kinds[:n]) for n in sizes if kinds == kinds[:n] * (len(kinds) // n))


@pytest.mark.parametrize("dense", [0, 2, 5])
def test_a_pattern_that_repeats_keeps_the_segments_that_checkpoints_name(dense):
    """Whole periods, then what is left, each folded; as a pattern that lists its layers that repeat."""
    for size in range(1, 7):
        for pattern in itertools.product(("local", "global"), repeat=size):
            for layers in range(max(size, dense + 1), 2 * size + 3):
                kinds = tuple(pattern[n % size] for n in range(layers))
                want = []
                for part in filter(None, (kinds[:dense], kinds[dense:])):
                    whole = len(part) // size * size
                    want += [shortest_period(piece) for piece in (part[:whole], part[whole:]) if piece]
                if layers > size or all(count > 1 for count, _ in want):
                    assert cut_layers(pattern, layers, dense) == tuple(want), (pattern, layers)


def test_a_pattern_that_lists_every_layer_is_cut_into_the_fewest_to_compile():
    for size in range(1, 9):
        for kinds in itertools.product(("local", "global"), repeat=size):
            cut = cut_layers(kinds, size, size)
            assert sum((period * count for count, period in cut), ()) == kinds
            one = shortest_period(kinds)
            if one[0] > 1:
                assert cut == (one,)
                continue
            costs = []  # of every way to cut between layers
            for places in itertools.product((False, True), repeat=size - 1):
                ends = [0, *(n + 1 for n, here in enumerate(places) if here), size]
                pieces = [shortest_period(kinds[a:b]) for a, b in itertools.pairwise(ends)]
                costs.append((sum(len(period) for _, period in pieces), len(pieces)))
            assert (sum(len(period) for _, period in cut), len(cut)) == min(costs), kinds


@pytest.mark.parametrize(
    ("listed", "cut"),
    [
        (["global"] * 21 + ["local"] * 7, [(21, ["global"]), (7, ["local"])]),  # Qwen 2's max_window_layers
        (
            [*(["local"] * 5 + ["global"]) * 5, *["local"] * 4],
            [(5, ["local"] * 5 + ["global"]), (4, ["local"])],
        ),
        (["local", "global", "local"], [(1, ["local", "global", "local"])]),  # nothing to win
    ],
    ids=["qwen2", "gemma3", "short"],
)
def test_layers_as_published_configs_list_them(listed, cut):
    config = family(num_layers=len(listed), window=8, window_pattern=listed)
    assert layers_in_order(config) == [layer_spec(config, kind) for kind in listed]
    kinds = [tuple(layer_spec(config, kind) for kind in period) for _, period in cut]
    assert make_segments(config) == tuple(Segment(count, k) for (count, _), k in zip(cut, kinds, strict=True))


def test_a_listed_pattern_computes_what_loops_do():
    config = family(num_layers=5, window=3, window_pattern=["local"] * 2 + ["global"] * 3)
    model, batch = build_model(config), make_batch([[5, 7], [3, 9]], 12)
    assert [segment.count for segment in model.segments] == [2, 3]
    params = lively(model)
    want = LoopDecoder(config).logits(jax.tree.map(lambda x: np.asarray(x, np.float64), params), batch)
    np.testing.assert_allclose(jax.jit(partial(model.apply, ops=Ops()))(params, batch), want, atol=2e-4)


def test_a_uniform_pattern_is_one_layer_repeated():
    for pattern in (["local"], ["local", "local", "local"]):
        segments = make_segments(family(num_layers=7, window=8, window_pattern=pattern))
        assert sum(segment.count for segment in segments) == 7
        assert all(len(segment.period) == 1 for segment in segments)


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("scaling", [None, "linear", "llama3", "yarn"])
def test_rope_scalings_equal_their_formulas(scaling, kind):
    config = family(
        head_dim=64,
        rope_theta=5e5,
        rope_scaling=scaling and RopeScaling(scaling, 8.0, 4096),
        rope_local_theta=1e4,
        window=8,
        window_pattern=["local", "global"],
    )
    frequencies, amplitude = rope_frequencies(config, layer_spec(config, kind))
    expected, expected_amplitude = loop_frequencies(config, kind)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-12)
    assert amplitude == pytest.approx(expected_amplitude if kind == "global" else 1.0, rel=1e-12)
    plain = 1e4 ** -(np.arange(32) / 32)
    assert (kind == "local") == np.allclose(frequencies, plain)


def test_gemma3_stretches_its_global_layers_eight_times():
    model = composed("run.name=any", "model=gemma3_4b").model
    turns = [rope_frequencies(model, spec)[0] for spec in layers_in_order(model)]
    planes = range(128)  # of a head of 256
    near = [10_000.0 ** -(i / 128) for i in planes]
    far = [1_000_000.0 ** -(i / 128) / 8 for i in planes]
    want = [far if (n + 1) % 6 == 0 else near for n in range(34)]
    np.testing.assert_allclose(turns, want, rtol=1e-12)


def test_rope_scalings_keep_fast_planes_and_stretch_slow_ones():
    for scaling in ("llama3", "yarn"):
        config = family(head_dim=64, rope_scaling=RopeScaling(scaling, 8.0, 4096))
        plain = rope_frequencies(family(head_dim=64), layer_spec(config, "global"))[0]
        ratio = plain / rope_frequencies(config, layer_spec(config, "global"))[0]
        assert ratio[0] == pytest.approx(1.0) and ratio[-1] == pytest.approx(8.0)
        assert np.all(np.diff(ratio) >= 0) and np.any((ratio > 1.01) & (ratio < 7.99))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (dict(num_kv_heads=3), ["model.num_kv_heads=3", "model.num_heads=4", "[1, 2, 4]"]),
        (dict(head_dim=7), ["model.head_dim=7", "use 8"]),
        (dict(window_pattern=["local"]), ["model.window=null", "set model.window"]),
        (dict(window_pattern=["near"]), ["model.window_pattern=['near']", "global, local"]),
        (dict(window_pattern=[]), ["model.window_pattern=[]"]),
        (dict(activation="swish"), ["model.activation=swish", "swiglu"]),
        (dict(num_layers=0), ["model.num_layers=0", "above 0"]),
        (dict(init_std=float("nan")), ["model.init_std=nan"]),
        (dict(logit_softcap=0.0), ["model.logit_softcap=0.0", "null"]),
        (dict(vocab_size=0), ["model.vocab_size=0", "-1"]),
        (dict(biases=["up"]), ["model.biases=up", "experts"]),
        (dict(biases=["norm"]), ["model.norm=rmsnorm", "use model.norm=layernorm"]),
        (dict(biases=["experts"]), ["model.biases has experts", "model.moe.dispatch=dropless"]),
        (dict(post_norms="both"), ["model.post_norms=both", "only"]),
        (dict(qk_norm="all"), ["model.qk_norm=all", "joint"]),
        (dict(window_pattern=["nope"], position="none"), ["nope", "model.position=none", "use global"]),
        (dict(moe=MoEConfig(shared_gate=True)), ["model.moe.shared_gate=true", "num_shared_experts=1"]),
        (dict(mtp=MTPConfig(), multipliers=MultipliersConfig()), ["model.multipliers", "model.mtp=null"]),
    ],
)
def test_values_that_make_no_model_are_one_clear_line(values, parts):
    with pytest.raises(ValueError) as caught:
        family(**values)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: RopeScaling("llama3", low_freq_factor=4.0), ["low_freq_factor=4.0", "high_freq_factor=4.0"]),
        (lambda: RopeScaling("linear", truncate=False), ["truncate", "yarn, not of linear"]),
        (lambda: RopeScaling("yarn", long_factor=[2.0]), ["long_factor", "longrope, not of yarn"]),
        (lambda: RopeScaling("longrope"), ["short_factor has 0 numbers", "one a plane"]),
        (lambda: RopeScaling("longrope", original_length=1), ["original_length=1", "use 4096"]),
        (lambda: family(rope_scaling=PLANES), ["short_factor has 2 numbers", "model.head_dim=8", "4 planes"]),
        (lambda: MultipliersConfig(logits=0.0), ["model.multipliers.logits=0.0", "1.0"]),
        (lambda: RopeScaling("ntk"), ["model.rope_scaling.kind=ntk", "yarn"]),
        (lambda: RopeScaling(factor=0.0), ["model.rope_scaling.factor=0.0", "positive"]),
        (lambda: MTPConfig(depth=0), ["model.mtp.depth=0", "model.mtp=null"]),
        (lambda: MTPConfig(weight=-1.0), ["model.mtp.weight=-1.0", "0 or more"]),
        (lambda: family(mtp=MTPConfig(depth=4096)), ["model.mtp.depth=4096", "model.max_seq_len"]),
    ],
)
def test_values_of_parts_that_make_no_model_are_one_clear_line(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts)


def test_a_config_stored_before_keys_were_grouped_says_the_same():
    plain = {"num_layers": 2, "rope_scaling": "none", "rope_factor": 1.0, "mtp_depth": 0, "mtp_weight": 0.1}
    long = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_theta": 1e4, "mtp_depth": 1, "mtp_weight": 0.3}
    assert regrouped(plain) == {"num_layers": 2, "rope_scaling": None, "mtp": None}
    assert regrouped(long) == {
        "rope_scaling": {"kind": "yarn", "factor": 4.0},
        "rope_theta": 1e4,
        "mtp": {"depth": 1, "weight": 0.3, "normed_stream": False},
    }
    for config in (ModelConfig(), ModelConfig(mtp=MTPConfig()), *FAMILIES.values(), *MIXTURES.values()):
        assert regrouped(asdict(config)) == asdict(config)


def test_a_model_needs_a_vocabulary():
    with pytest.raises(ValueError, match="model.vocab_size=-1"):
        build_model(family(vocab_size=-1))


def test_flops_are_two_a_weight_and_four_a_visible_key():
    model = build_model(FAMILIES["mistral"])
    flops = model.flops_per_token(16)
    matrices = 2 * (2 * 32 * 4 * 8 + 32 * 2 * 2 * 8 + 3 * 32 * 48) + 64 * 32  # two layers and the head
    assert flops["matmul"] == 2 * matrices
    width, window, layers = 4 * 8, 4, 2
    assert flops["attention_full"] == layers * 4 * width * window
    # A continuous row: the first `window` positions see half a window on average, the others all of it.
    assert (
        flops["attention_causal"] == layers * 4 * width * (window / 2 * window + (16 - window) * window) / 16
    )
    unwindowed = build_model(FAMILIES["llama2"]).flops_per_token(16)
    assert unwindowed["attention_causal"] == unwindowed["attention_full"] / 2


def test_init_is_the_same_on_any_mesh():
    model = build_model(FAMILIES["qwen3"])
    plain = jax.jit(model.init)(jax.random.key(0))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(info):
        spec = [None] * len(info.shape)
        if "embed" in info.axes:
            spec[info.axes.index("embed")] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    sharded = jax.jit(model.init, out_shardings=jax.tree.map(place, model.info))(jax.random.key(0))
    # The same random bits; XLA may round the normal transform's last bit otherwise in another loop shape.
    jax.tree.map(
        lambda a, b: np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), 4), sharded, plain
    )
