"""Programs that JAX alone runs say what the model says, of whatever its weights are made."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.stablehlo import ABOUT, export_programs
from compress.steps import packed_by_rounding
from interop.safetensors import Tensors
from models.ops import Ops
from models.transformer import build_model
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from tests.models.decoders import family

CONFIG = family(num_heads=4, num_kv_heads=2, tie_embeddings=True)
PROMPT, NEW = [7 * i % 64 for i in range(80)], 8
# A stranger's program: the folder and a prompt in, tokens out. Nothing of ours can be imported there.
STRANGER = """
import json, struct, sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from jax import export

home, ids, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
about = json.loads((home / "decode.json").read_text())
raw = (home / "model.safetensors").read_bytes()
(length,) = struct.unpack("<Q", raw[:8])
kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "U8": np.uint8}
weights = {}
for name, entry in json.loads(raw[8 : 8 + length]).items():
    if name != "__metadata__":
        first, last = (8 + length + at for at in entry["data_offsets"])
        weights[name] = np.frombuffer(raw[first:last], kinds[entry["dtype"]]).reshape(entry["shape"])
begin, read, following = (
    export.deserialize(bytearray((home / f"{name}.bin").read_bytes())) for name in ("begin", "read", "next")
)
def step(program, cache, part, width):
    tokens = np.zeros((about["rows"], width), np.int32)
    tokens[0, : len(part)] = part
    counts = np.zeros(about["rows"], np.int32)
    counts[0] = len(part)
    logits, cache = program.call(weights, cache, tokens, counts)
    return np.asarray(logits[0]), cache

cache, chunk = begin.call(), about["chunk"]
for start in range(0, len(ids), chunk):
    logits, cache = step(read, cache, ids[start : start + chunk], chunk)
for _ in range(count - 1):
    ids.append(int(logits.argmax()))
    logits, cache = step(following, cache, ids[-1:], 1)
ids.append(int(logits.argmax()))
assert not {"models", "serving", "flax"} & set(sys.modules)
print(json.dumps([ids[-count:], logits.astype(float).tolist()]))
"""


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 8), ("bfloat16", 4)])
def test_jax_alone_says_what_the_model_says(tmp_path, dtype, bits):
    model, ops = build_model(CONFIG), Ops(compute_dtype=jnp.dtype(dtype))
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(7), w.shape), params)
    params = packed_by_rounding(model, params, bits, None)
    out = tmp_path / "out"
    about = export_programs(out, model, params, dtype=dtype, rows=2, max_len=96, extra={"eos_token_id": 3})
    assert json.loads((out / ABOUT).read_text()) == about and about["chunk"] == 64
    words = [sys.executable, "-I", "-c", STRANGER, str(out), json.dumps(PROMPT), str(NEW)]
    ran = subprocess.run(words, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"}, timeout=300)
    assert ran.returncode == 0, ran.stderr
    tokens, logits = json.loads(ran.stdout)
    generator = Generator(model, params, ops, packed=True)
    greedy = Sampling(0.0, 0, 1.0, CONFIG.vocab_size)
    assert [tokens] == generator.complete([PROMPT], greedy, sample_keys(0, [0]), max_new_tokens=NEW)
    # As one pass over the whole text, which has other sums.
    whole = jnp.array([PROMPT + tokens[:-1]])
    count = whole.shape[1]
    batch = {"tokens": whole, "positions": jnp.arange(count)[None], "segment_ids": jnp.ones((1, count), int)}
    wanted = np.asarray(jax.jit(lambda p: model.apply(p, batch, ops))(params))[0, -1]
    assert np.abs(np.array(logits) - wanted).max() < (1e-5 if dtype == "float32" else 0.05) * wanted.std()
    kinds = {str(dtype) for _, dtype, _, _ in Tensors(out).entries.values()}
    assert kinds == {"float32", *({8: ("int8",), 4: ("uint8", "bfloat16")}[bits])}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"platforms": ("gpu",)}, "platforms=gpu"),
        ({"rows": 0}, "rows=0"),
        ({"max_len": -1}, "max_len=-1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, words, said):
    model = build_model(CONFIG)
    with pytest.raises(ValueError, match=said):
        export_programs(tmp_path / "out", model, {}, dtype="float32", **words)
    assert not any(tmp_path.iterdir())
