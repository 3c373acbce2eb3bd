"""The laws of published weights under a URL, with an S3 that moto serves on loopback."""

import jax
import numpy as np
import pytest

from interop.adapted import is_published, published
from interop.places import path_of
from interop.write import export, reader
from interop.write_gguf import export_gguf
from models.config import ModelConfig
from models.transformer import build_model
from tests.interop.test_gguf import NAMES
from tests.interop.test_round_trip import placed, random_weights
from tests.s3 import bucket


@pytest.fixture
def s3(endpoint, monkeypatch):
    with bucket(endpoint, monkeypatch, "models") as fs:
        yield fs


def test_weights_in_s3_are_those_of_their_files(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("interop.places.CHUNK", 1 << 10)
    config = ModelConfig(**NAMES["qwen3"])
    model = build_model(config)
    params = random_weights(model)
    export(tmp_path / "a", config, model, reader(params))
    export_gguf(tmp_path / "a.gguf", config, model, reader(params))
    s3.put(str(tmp_path / "a"), "models/deep/a", recursive=True)
    s3.put_file(str(tmp_path / "a.gguf"), "models/a.gguf")
    for url in ("s3://models/deep/a", "s3://models/a.gguf"):
        asked = path_of(url)
        assert is_published(asked)
        got = jax.device_get(published(asked).weights(placed(model), model))
        jax.tree.map(np.testing.assert_array_equal, got, params)
    assert not is_published(path_of("s3://models/deep"))


def test_a_bucket_that_refuses_is_one_line(s3):
    with pytest.raises(
        ValueError, match="cannot be read .* check the bucket and folder, and the cred"
    ) as caught:
        is_published(path_of("s3://no bucket has this name/a"))
    assert "\n" not in str(caught.value)
