"""longrope as Phi-4-mini's config.json has it: in every spelling the same model, back again, or refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from interop.config_out import write_config
from interop.configs import read_config
from models.config import ModelConfig
from models.rope import rope_frequencies
from models.spec import layer_spec

SHORT, LONG = [1.0, 1.25, 1.5], [1.5, 4.0, 8.0]
BASE = {
    "model_type": "phi3",
    **{"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
    **{"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "tie_word_embeddings": True},
    **{"full_attn_mod": 1, "interpolate_factor": 1, "sliding_window": 262144},
}
OWN = {"short_factor": SHORT, "long_factor": LONG}
SPELLINGS = {
    "transformers 4": {
        **{"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        "rope_scaling": {"type": "longrope", **OWN},
    },
    "before it had a name": {
        **{"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        "rope_scaling": {"type": "su", **OWN},
    },
    "transformers 5": {
        "rope_parameters": {
            **{"rope_type": "longrope", "type": "longrope", "rope_theta": 10000.0, **OWN},
            **{"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096},
        }
    },
    "with its factor": {
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            **{"factor": 32.0, **OWN},
        }
    },
}


def turns_of(config):
    return rope_frequencies(config, layer_spec(config, "global"), 6)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model_and_goes_out_as_it_came(spelling):
    config, family = read_config({**BASE, **SPELLINGS[spelling]})
    assert family.name == "phi3" and config == read_config({**BASE, **SPELLINGS["transformers 4"]})[0]
    frequencies, amplitude = turns_of(config)
    planes = np.arange(3)
    np.testing.assert_allclose(frequencies, 10000.0 ** (-planes / 3) / LONG, rtol=1e-12)
    assert amplitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-12)
    _, values = write_config(config, "phi3")
    assert values["rope_scaling"] == {"type": "longrope", **OWN}  # three keys: version 4 refuses a fourth
    assert values["original_max_position_embeddings"] == 4096
    assert read_config(json.loads(json.dumps(values)))[0] == config


def test_the_list_is_that_of_the_length_the_model_is_for_and_the_amplitude_stays():
    long = read_config({**BASE, **SPELLINGS["transformers 4"]})[0]
    for length, factors in ((64, SHORT), (4096, SHORT), (4097, LONG)):
        config = replace(long, max_seq_len=length)
        frequencies, amplitude = turns_of(config)
        np.testing.assert_allclose(frequencies * 10000.0 ** (np.arange(3) / 3), 1 / np.array(factors))
        assert amplitude == turns_of(long)[1]
        _, values = write_config(config, "phi3")  # where it no longer follows from the lengths, it is said
        assert values["rope_scaling"]["attention_factor"] == amplitude
        assert turns_of(read_config(values)[0])[1] == amplitude
    assert turns_of(replace(long, rope_scaling=replace(long.rope_scaling, factor=0.5)))[1] == 1.0


def scaled(**more):
    return {"rope_scaling": {"type": "longrope", **OWN, **more}, "partial_rotary_factor": 0.75}


REFUSED = {
    "another factor": (scaled(factor=8.0), "rope_scaling.factor=8.0 is not supported; only 32 is"),
    "another length": (
        scaled(original_max_position_embeddings=2048),
        "original_max_position_embeddings=2048 is not supported; only 4096 is",
    ),
    "further key": (scaled(short_mscale=1.2), "rope_scaling.short_mscale=1.2 of longrope is not supported"),
    "no list": (scaled(long_factor=None), "long_factor=None must be a list"),
    "too few": (scaled(long_factor=[1.0]), "long_factor has 1 numbers, and short_factor 3"),
    "too many planes": (
        {**scaled(), "partial_rotary_factor": 1.0},
        "short_factor has 3 numbers, and model.head_dim=8 with model.rope_fraction=1.0 4 planes",
    ),
    "no number": (scaled(long_factor=[1.0, 0.0, 2.0]), "long_factor=0.0 must be above 0"),
    "yarn proper": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.factor=4.0"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear is not supported in"),
    "sparse attention": ({**scaled(), "full_attn_mod": 2}, "full_attn_mod=2"),
    "another family": (
        {
            **scaled(),
            "model_type": "llama",
            "partial_rotary_factor": None,
            "original_max_position_embeddings": None,
        },
        "rope_type=longrope is not supported",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_longrope_could_mean_otherwise_is_refused_in_one_line(how):
    change, says = REFUSED[how]
    with pytest.raises(ValueError, match=says) as caught:
        read_config({**BASE, **change})
    assert "\n" not in str(caught.value)


def test_a_head_of_another_size_than_its_class_takes_is_written_nowhere():
    config = read_config({**BASE, **SPELLINGS["transformers 4"]})[0]
    wide = {"head_dim": 16, "rope_fraction": 0.375}  # the same planes
    with pytest.raises(ValueError, match="phi3 fails by model.head_dim=16"):
        write_config(ModelConfig(**{**vars(config), **wide}))
