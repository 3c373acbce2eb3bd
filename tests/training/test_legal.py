"""What is legal runs, what is not is refused in one sentence, and what that sentence offers is legal."""

import copy
import itertools
import math
import random
import re
import time

import jax
import pytest
from jax.sharding import AbstractMesh

from common.checks import ConfigError
from configs.groups import options
from kernels.names import LOGICAL_AXES
from models.config import DeltaConfig, MLAConfig, MoEConfig
from models.transformer import build_model
from parallel.axes import Layout
from parallel.config import MESH_AXES, main_segment
from parallel.schedules.stage_layout import Arrangement
from parallel.schedules.tables import check_schedule
from tests.configs.composing import config
from tests.models.decoders import FAMILIES, family
from tests.models.mixtures import MIXTURES
from tests.models.test_gated_delta import HYBRID
from training.config import LocalSGDConfig
from training.legal.check import check, mesh_sizes
from training.legal.nearest import legal, nearest_meshes, overrides, refusal
from training.legal.rules import read_model
from training.state import is_info

MODELS = FAMILIES | MIXTURES | {"hybrid": family(**HYBRID)}
SHAPE = {
    "model.vocab_size": 512,
    "model.num_layers": 8,
    "model.d_model": 64,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.d_ff": 128,
    "data.seq_len": 64,
    "training.global_batch_size": 16,
    "pipeline.microbatches": 4,
    "mesh.data": 1,
}
MOE = MoEConfig(num_experts=4, d_expert=32)
MLA = MLAConfig(kv_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
KERNEL = {"mesh.data": 8, "training.precision": "bfloat16"}


@pytest.fixture(scope="module")
def base():
    return config("+experiment=debug")


def changed(base, values):
    """A copy with these dotted keys set; each part checks itself again."""
    made = copy.deepcopy(base)
    made.local_sgd = made.local_sgd or LocalSGDConfig()
    for key, value in copy.deepcopy({**SHAPE, **values}).items():
        *rooms, name = key.split(".")
        room = made
        for part in rooms:
            room = room[part] if isinstance(room, dict) else getattr(room, part)
        if isinstance(room, dict):
            room[name] = value
        else:
            assert hasattr(room, name), key
            setattr(room, name, value)
    for part in (made.model, made.mesh, made.pipeline, made.context, made.local_sgd, made.training):
        part.__post_init__()
    return made


def meshes(devices):
    """Every mesh of so many devices, found the slow way."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(MESH_AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(MESH_AXES, sizes, strict=True))


def on(made, sizes):
    made = copy.deepcopy(made)
    for axis, size in sizes.items():
        setattr(made.mesh, axis, size)
    return made


# Of eight devices: what is asked, and what the refusal must say.
ILLEGAL = {
    "sinks over context": (
        {"mesh.context": 2, "mesh.data": 4, "model.attention_sinks": True},
        ["mesh.context=2 splits rows, which model.attention_sinks=true", "use mesh.context=1"],
    ),
    "product": ({"mesh.data": 3}, ["mesh.data=3 is 3 devices but 8 are here"]),
    "rest": (
        {"mesh.pipeline": 3, "mesh.data": -1},
        ["mesh.pipeline=3", "does not divide 8 devices", "1, 2, 4, 8"],
    ),
    "two rests": (
        {"mesh.data": -1, "mesh.fsdp": -1, "mesh.tensor": 2},
        ["only one axis can take what is left"],
    ),
    "layers over stages": (
        {"mesh.pipeline": 4, "mesh.data": 2, "model.num_layers": 10, "pipeline.microbatches": 8},
        ["model.num_layers=10", "mesh.pipeline=4", "use mesh.pipeline=1, 2 or model.num_layers=8, 12"],
    ),
    "layers over virtual stages": (
        {
            "mesh.pipeline": 2,
            "mesh.data": 4,
            "pipeline.schedule": "interleaved_1f1b",
            "pipeline.virtual_stages": 3,
        },
        ["model.num_layers=8", "mesh.pipeline=2 * pipeline.virtual_stages=3", "model.num_layers=6, 12"],
    ),
    "periods over stages": (
        {
            "mesh.pipeline": 8,
            "model.num_layers": 26,
            "model.window": 8,
            "model.window_pattern": ["local"] * 5 + ["global"],
        },
        ["(its largest segment: 4 periods of 6)", "use mesh.pipeline=1, 2, 4 or model.num_layers=48"],
    ),
    "segment over stages": (
        {"mesh.pipeline": 4, "mesh.data": 2, "model.moe": MoEConfig(first_dense_layers=2)},
        ["model.num_layers=8 (its largest segment: 6)", "mesh.pipeline=1, 2", "model.num_layers=6, 10"],
    ),
    "accumulation": (
        {"mesh.pipeline": 2, "mesh.data": 4, "training.accumulation_steps": 2},
        ["training.accumulation_steps=2", "mesh.pipeline=2", "use training.accumulation_steps=1"],
    ),
    "chunks of another schedule": (
        {"mesh.pipeline": 2, "mesh.data": 4, "pipeline.virtual_stages": 2},
        ["pipeline.virtual_stages=2", "pipeline.schedule=1f1b", "use pipeline.virtual_stages=1"],
    ),
    "one chunk interleaved": (
        {"mesh.pipeline": 2, "mesh.data": 4, "pipeline.schedule": "interleaved_1f1b"},
        ["pipeline.virtual_stages=1", "use pipeline.virtual_stages=2, 4 or pipeline.schedule=1f1b"],
    ),
    "microbatches interleaved": (
        {
            "mesh.pipeline": 4,
            "mesh.fsdp": 2,
            "pipeline.schedule": "interleaved_1f1b",
            "pipeline.virtual_stages": 2,
            "pipeline.microbatches": 2,
        },
        [
            "pipeline.microbatches=2",
            "mesh.pipeline=4",
            "use pipeline.microbatches=4, 8 or mesh.pipeline=1, 2",
        ],
    ),
    "rows": (
        {"mesh.data": 8, "training.global_batch_size": 12},
        ["training.global_batch_size=12", "mesh.data=8", "such as 8 or 16"],
    ),
    "rows over all of its axes": (
        {
            "mesh.replica": 2,
            "mesh.fsdp": 2,
            "mesh.expert": 2,
            "model.moe": MOE,
            "training.global_batch_size": 12,
        },
        ["mesh.replica=2 * mesh.fsdp=2 * mesh.expert=2", "such as 8 or 16"],
    ),
    "rows in microbatches": (
        {"mesh.pipeline": 2, "mesh.data": 4, "pipeline.microbatches": 8},
        ["mesh.data=4 * pipeline.microbatches=8", "such as 32", "pipeline.microbatches=1, 2, 4"],
    ),
    "heads": (
        {"mesh.tensor": 8, "model.num_heads": 12, "model.num_kv_heads": 12},
        ["model.num_heads=12 cannot be split over mesh.tensor=8", "use mesh.tensor=1, 2, 4"],
    ),
    "heads of ulysses": (
        {"mesh.tensor": 2, "mesh.context": 4, "model.num_heads": 4},
        ["model.num_heads=4", "mesh.tensor=2 * mesh.context=4", "context.attention=allgather, ring"],
    ),
    "positions in zigzag order": (
        {"mesh.context": 8, "context.attention": "ring", "data.seq_len": 72},
        ["data.seq_len=72", "16 equal parts", "use data.seq_len=64, 80 or mesh.context=1, 2, 4"],
    ),
    "positions over context": (
        {"mesh.context": 8, "data.seq_len": 36},
        ["data.seq_len=36", "8 equal parts", "use data.seq_len=32, 40 or mesh.context=1, 2, 4"],
    ),
    "positions between blocks": (
        {
            "mesh.context": 2,
            "mesh.tensor": 4,
            "data.seq_len": 36,
            "mesh.rules.act_length": ["context", "tensor"],
        },
        ["data.seq_len=36", "8 equal parts", "mesh.context=2 * mesh.tensor=4", "data.seq_len=32, 40"],
    ),
    "rows that a recurrence goes through": (
        {
            "mesh.context": 2,
            "mesh.data": 4,
            "model.delta": DeltaConfig(4, 4, 8, 8),
            "model.mixer_pattern": ["gated_delta", "attention"],
        },
        ["mesh.context=2 splits rows, but gated_delta layers", "use mesh.context=1"],
    ),
    "heads of the delta rule": (
        {
            "mesh.tensor": 8,
            "model.delta": DeltaConfig(4, 8, 8, 8),
            "model.mixer_pattern": ["gated_delta", "attention"],
        },
        ["model.delta.num_key_heads=4 cannot be split over mesh.tensor=8", "use mesh.tensor=1, 2, 4"],
    ),
    "experts of a dense model": (
        {"mesh.expert": 2, "mesh.fsdp": 4},
        ["mesh.expert=2", "model.moe=null", "use mesh.expert=1"],
    ),
    "experts": (
        {"mesh.expert": 8, "model.moe": MOE},
        ["model.moe.num_experts=4 cannot be split over mesh.expert=8", "use mesh.expert=1, 2, 4"],
    ),
    "width of an expert": (
        {"mesh.tensor": 8, "model.moe": MoEConfig(num_experts=4, d_expert=36)},
        ["model.moe.d_expert=36", "mesh.tensor=8", "use mesh.tensor=1, 2, 4"],
    ),
    "width": (
        {"mesh.fsdp": 4, "mesh.expert": 2, "model.moe": MOE, "model.d_model": 68},
        [
            "model.d_model=68 cannot be split over mesh.fsdp=4 * mesh.expert=2",
            "mesh.fsdp=1, 2",
            "mesh.expert=1",
        ],
    ),
    "feed-forward": (
        {"mesh.tensor": 8, "model.d_ff": 100},
        ["model.d_ff=100 cannot be split over mesh.tensor=8", "use mesh.tensor=1, 2, 4"],
    ),
    "latent": (
        {"mesh.fsdp": 8, "model.mla": MLA, "model.num_kv_heads": 8},
        ["model.mla.kv_lora_rank=12 cannot be split over mesh.fsdp=8", "use mesh.fsdp=1, 2, 4"],
    ),
    "vocabulary over stages": (
        {"mesh.pipeline": 2, "mesh.tensor": 4, "model.vocab_size": 260},
        ["model.vocab_size=260", "mesh.pipeline=2 * mesh.tensor=4", "model.vocab_size=384"],
    ),
    "slices": (
        {"mesh.data": 4, "mesh.tensor": 2, "mesh.dcn": {"data": 3}},
        ["mesh.dcn.data=3 does not divide mesh.data=4", "use mesh.dcn.data=1, 2, 4"],
    ),
    "a rule that breaks what an axis does": (
        {"mesh.context": 2, "mesh.fsdp": 4, "mesh.rules.length": ["context", "tensor"]},
        ["mesh.context=2", "mesh.rules.length=[context,tensor]", "use mesh.rules.length=[context]"],
    ),
    "one axis twice in a tensor": (
        {"mesh.fsdp": 8, "mesh.rules.mlp": ["fsdp"]},
        ["mesh.rules.embed=[fsdp,expert]", "mesh.rules.mlp=[fsdp]", "mesh.fsdp=8", "use mesh.fsdp=1"],
    ),
    "scores that cudnn cannot bound": (
        {**KERNEL, "training.attention": "cudnn", "model.attention_softcap": 50.0},
        ["training.attention=cudnn cannot bound scores (model.attention_softcap=50.0)", "softcap=null"],
    ),
    "precision that cudnn has not": (
        {**KERNEL, "training.attention": "cudnn", "training.precision": "float32"},
        ["training.attention=cudnn", "not float32", "use training.precision=bfloat16"],
    ),
    "heads that cudnn has not": (
        {**KERNEL, "training.attention": "cudnn", "model.head_dim": 12},
        ["model.head_dim", "a multiple of 8 and at most 256, not 12", "use 8 or 16"],
    ),
    "values that cudnn has not": (
        {
            **KERNEL,
            "training.attention": "cudnn",
            "model.head_dim": 8,
            "model.num_kv_heads": 8,
            "model.mla": MLAConfig(kv_lora_rank=16, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=16),
        },
        ["training.attention=cudnn needs values as wide as keys", "has 16 and 8"],
    ),
    "scores that xla cannot bound": (
        {**KERNEL, "training.attention": "xla", "model.attention_softcap": 50.0},
        ["training.attention=xla cannot bound scores (model.attention_softcap=50.0)"],
    ),
    "positions that splash has not": (
        {**KERNEL, "training.attention": "splash", "data.seq_len": 200},
        ["training.attention=splash", "multiples of 128, not data.seq_len=200", "data.seq_len=128 or 256"],
    ),
    "parts of rows that splash has not": (
        {
            "mesh.context": 8,
            "training.attention": "splash",
            "context.attention": "allgather",
            "data.seq_len": 1024,
        },
        ["multiples of 128", "under context.attention=allgather only 64 lie together", "that makes it 128"],
    ),
    "parts of rows that cudnn has not": (
        {"mesh.context": 8, "training.attention": "cudnn", "context.attention": "allgather"},
        [
            "context.attention=allgather cannot use training.attention=cudnn",
            "use context.attention=ulysses or training.attention=chunked",
        ],
    ),
    "a kernel beside ring's own": (
        {"mesh.context": 2, "mesh.data": 4, "training.attention": "chunked", "context.attention": "ring"},
        ["training.attention=chunked has nothing to do", "context.attention=ring", "training.attention=auto"],
    ),
    "inner steps without replicas": (
        {"mesh.data": 8, "local_sgd.inner_steps": 5},
        ["local_sgd.inner_steps=5", "mesh.replica=1", "use mesh.replica=2, 4, 8 or local_sgd.inner_steps=1"],
    ),
    "checkpoint between outer steps": (
        {"mesh.replica": 8, "local_sgd.inner_steps": 4, "checkpoint.every": 10, "eval.every": 4},
        ["checkpoint.every=10", "local_sgd.inner_steps=4", "use checkpoint.every=8, 12"],
    ),
    "evaluation between outer steps": (
        {"mesh.replica": 8, "local_sgd.inner_steps": 4, "checkpoint.every": 4, "eval.every": 2},
        ["eval.every=2", "local_sgd.inner_steps=4", "use eval.every=4"],
    ),
    "end between outer steps": (
        {"mesh.replica": 8, "local_sgd.inner_steps": 10, "training.num_steps": 25},
        ["training.num_steps=25", "local_sgd.inner_steps=10", "use training.num_steps=20, 30"],
    ),
}


def offers(reason):
    """(key, value) of everything that a refusal says to use."""
    words = reason.split("; nearest legal")[0].partition("; use ")[2]
    assert words, reason
    rows = re.search(r"such as (\d+)(?: or (\d+))?", words)
    found = [("training.global_batch_size", int(rows)) for rows in (rows.groups() if rows else ()) if rows]
    for option in re.findall(r"[a-z_]+(?:\.[a-z_]+)+=[^=]+?(?=,? or [a-z_]+\.|, or |$)", words):
        key, _, listed = option.partition("=")
        for value in listed.split(", "):
            found.append((key, readable(value.split(" ")[0])))
    assert found, reason
    return found


def readable(text):
    if text.startswith("["):
        return text.strip("[]").split(",")
    if text == "null":
        return None
    return int(text) if text.lstrip("-").isdigit() else text


@pytest.mark.parametrize("case", ILLEGAL)
def test_the_illegal_is_refused_in_a_sentence_whose_every_remedy_is_legal(case, base):
    values, fragments = ILLEGAL[case]
    made = changed(base, values)
    reason = legal(made, 8)
    assert reason is not None
    assert "\n" not in reason and not reason.endswith("."), reason
    for fragment in fragments:
        assert fragment in reason, reason
    with pytest.raises(ConfigError) as error:
        check(made, 8)
    assert str(error.value).startswith(reason)
    if case in (
        "product",
        "rest",
        "two rests",
    ):  # these offer sizes that multiply out; see the nearest meshes
        return
    for key, value in offers(reason):
        assert works(base, values, key, value), f"{key}={value} does not make this legal: {reason}"


def works(base, values, key, value):
    """Whether the config is legal with this value: of a mesh axis, with others as they then must be."""
    made = changed(base, {**values, key: value})
    room, _, axis = key.partition(".")
    if room != "mesh" or axis not in MESH_AXES:
        return legal(made, 8) is None
    # Of the rule that was broken, nothing is left; other axes may take up the devices.
    return any(legal(on(made, sizes), 8) is None for sizes in meshes(8) if sizes[axis] == value)


@pytest.mark.parametrize("case", ILLEGAL)
def test_the_nearest_meshes_are_legal_and_are_what_the_refusal_types(case, base):
    values, _ = ILLEGAL[case]
    made = changed(base, values)
    near = nearest_meshes(made, 8)
    possible = [sizes for sizes in meshes(8) if legal(on(made, sizes), 8) is None]
    assert len(near) == min(5, len(possible))
    said = refusal(made, 8)
    assert ("nearest legal meshes of 8 devices: " in said) == bool(possible)
    for mesh in near:
        assert legal(on(made, {axis: getattr(mesh, axis) for axis in MESH_AXES}), 8) is None
        typed = [word.split("=") for word in overrides(made.mesh, mesh).split()]
        assert legal(changed(base, {**values, **{key: int(value) for key, value in typed}}), 8) is None
    if near:
        assert overrides(made.mesh, near[0]) in said


def test_the_nearest_mesh_changes_the_least(base):
    made = changed(base, {"mesh.fsdp": 8, "model.d_model": 68, "model.num_heads": 8})
    near = [overrides(made.mesh, mesh) for mesh in nearest_meshes(made, 8)]
    assert near[0] == "mesh.data=2 mesh.fsdp=4"
    free = changed(base, {"mesh.fsdp": -1, "model.d_model": 68})
    assert overrides(free.mesh, nearest_meshes(free, 8)[0]) == "mesh.data=2"


def test_before_the_devices_are_known_what_is_left_is_taken_as_legal(base):
    assert legal(changed(base, {"mesh.data": -1, "mesh.tensor": 3}), None) is None
    assert "mesh.tensor=3" in legal(changed(base, {"mesh.data": 1, "mesh.tensor": 3}), None)
    with pytest.raises(ConfigError, match="only one axis"):
        check(changed(base, {"mesh.data": -1, "mesh.fsdp": -1}), None)


def test_keys_of_a_pipeline_are_free_where_there_is_none(base):
    made = changed(base, {"mesh.data": 8, "pipeline.virtual_stages": 3, "pipeline.microbatches": 7})
    assert legal(made, 8) is None


def test_a_vocabulary_to_come_is_a_multiple_of_128(base):
    assert legal(changed(base, {"mesh.tensor": 8, "model.vocab_size": -1}), 8) is None
    wide = {"mesh.tensor": 3, "model.vocab_size": -1, "model.num_heads": 3, "model.num_kv_heads": 3}
    reason = legal(changed(base, {**wide, "model.d_ff": 129}), 3)
    assert "model.vocab_size=-1 (it will be a multiple of 128)" in reason
    assert "use mesh.tensor=1 or model.vocab_size=384" in reason


NEEDS = {"moe": {"model.moe": MoEConfig(num_experts=8)}}


@pytest.mark.parametrize("name", options("mesh"))
def test_every_mesh_table_is_legal_on_eight_devices(name):
    made = changed(
        config("+experiment=debug", f"mesh={name}"),
        {"mesh.data": config("+experiment=debug", f"mesh={name}").mesh.data, **NEEDS.get(name, {})},
    )
    devices = 1 if name == "single" else 8
    assert legal(made, devices) is None
    sizes = mesh_sizes(made.mesh, devices)
    used = {axis for axis, size in sizes.items() if size > 1}
    assert used == TABLES[name]


TABLES = {
    "single": set(),
    "data": {"data"},
    "fsdp": {"fsdp"},
    "fsdp_tensor": {"tensor"},  # 8, of 8
    "tensor_sequence": {"tensor"},
    "pipeline_fsdp": {"pipeline", "fsdp"},
    "3d": {"pipeline", "fsdp", "tensor"},
    "moe": {"expert"},
    "long_context": {"context"},
    "multi_slice": {"replica", "fsdp"},
}


def test_slices_of_the_table_follow_its_replicas():
    assert config("+experiment=debug", "mesh=multi_slice", "mesh.replica=4").mesh.dcn == {"replica": 4}


def test_sequence_parallelism_differs_from_the_other_tables_in_one_rule():
    tables = {name: config("+experiment=debug", f"mesh={name}").mesh.rules for name in options("mesh")}
    special = tables.pop("tensor_sequence")
    assert all(rules == tables["data"] for rules in tables.values())
    assert special == {**tables["data"], "act_length": ["context", "tensor"]}
    assert all(set(rules) <= set(LOGICAL_AXES) for rules in tables.values())


def random_config(base, rng):
    """Sizes that often divide and often do not."""
    kv_heads = rng.choice([2, 4, 6, 8])
    moe = rng.choice([None, MoEConfig(rng.choice([2, 6, 8]), 2, rng.choice([8, 12]), rng.choice([0, 1]))])
    values = {
        "model.num_layers": rng.choice([4, 6, 8, 9]),
        "model.d_model": rng.choice([16, 24, 20]),
        "model.num_heads": kv_heads * rng.choice([1, 2]),
        "model.num_kv_heads": kv_heads,
        "model.d_ff": rng.choice([32, 36]),
        "model.vocab_size": rng.choice([64, 60]),
        "model.moe": moe,
        "data.seq_len": rng.choice([16, 32, 24]),
        "training.global_batch_size": rng.choice([8, 16, 24]),
        "training.accumulation_steps": rng.choice([1, 1, 2]),
        "pipeline.schedule": rng.choice(["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]),
        "pipeline.microbatches": rng.choice([2, 4]),
        "pipeline.virtual_stages": rng.choice([1, 1, 2]),
        "context.attention": rng.choice(["ulysses", "allgather", "ring"]),
        "context.zigzag": rng.choice([True, False]),
        "mesh.rules.act_length": rng.choice([["context"], ["context", "tensor"]]),
    }
    return changed(base, values)


def stopped(made, model, sizes):
    """What would stop this program when it is built: the later gates, each asked for itself."""
    m, rows, length = made.model, made.training.global_batch_size, made.data.seq_len
    layout = Layout(AbstractMesh(tuple(sizes.values()), tuple(sizes)), made.mesh.rules)
    stages, turns, info = sizes["pipeline"], made.training.accumulation_steps, model.info
    try:
        assert sizes["expert"] == 1 or m.moe is not None
        if stages > 1:
            assert turns == 1
            turns, chunks = made.pipeline.microbatches, made.pipeline.virtual_stages
            check_schedule(made.pipeline.schedule, stages, turns, chunks)
            info = Arrangement(stages, chunks, str(main_segment(model.segments))).in_memory(info, is_info)
        for leaf in jax.tree.leaves(info, is_leaf=is_info):
            layout.spec(leaf.axes, leaf.shape)
        assert rows % turns == 0
        for axes, shape in (
            (("batch", "act_length", "act_embed"), (rows // turns, length, m.d_model)),
            (("batch", "length", "act_heads"), (rows // turns, length, m.num_heads)),
            (("batch", "length", "act_vocab"), (rows // turns, length, m.vocab_size)),
        ):
            layout.spec(axes, shape)
        context, kind = sizes["context"], made.context.attention
        zigzag = context > 1 and made.context.zigzag and kind != "ulysses"
        assert length % (context * (2 if zigzag else 1)) == 0
        assert context == 1 or kind != "ulysses" or m.num_heads % (sizes["tensor"] * context) == 0
    except (AssertionError, ValueError) as error:
        return str(error) or "a rule of the mesh"
    return None


def test_legal_is_what_no_later_gate_stops(base):
    rng, counts = random.Random(0), {True: 0, False: 0}
    for _ in range(24):
        made = random_config(base, rng)
        model = build_model(made.model)
        for sizes in meshes(8):
            said, found = legal(on(made, sizes), 8), stopped(made, model, sizes)
            assert (said is None) == (found is None), (sizes, said, found, made)
            counts[said is None] += 1
    assert min(counts.values()) > 100, counts


@pytest.mark.parametrize("name", MODELS)
def test_every_split_dim_has_a_key_that_says_it(name):
    """A parameter whose size no key is asked for would be refused by the partitioner, or never."""
    model = build_model(MODELS[name])
    known = {(axis, dim.size) for dim in read_model(model.config)[0] for axis in dim.axes}
    shared = model.config.moe.num_shared_experts * model.config.moe.d_expert if model.config.moe else 0
    known |= {("mlp", shared), ("vocab", model.config.vocab_size)}
    for leaf in jax.tree.leaves(model.info, is_leaf=is_info):
        for axis, size in zip(leaf.axes, leaf.shape, strict=True):
            assert axis in (None, "layers") or (axis, size) in known, (leaf, axis, size)


def test_a_planner_may_ask_thousands_of_times(base):
    made = changed(base, {"training.global_batch_size": 1024, "model.num_layers": 32})
    asked = [on(made, sizes) for sizes in itertools.islice(meshes(8), 84)]
    start = time.perf_counter()
    for each in asked:
        legal(each, 8)
    assert (time.perf_counter() - start) / len(asked) < 5e-3
    start = time.perf_counter()
    nearest_meshes(changed(base, {"mesh.pipeline": 3, "mesh.data": -1}), 1024)
    assert time.perf_counter() - start < 5
