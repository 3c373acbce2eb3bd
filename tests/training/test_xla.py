"""Compiler options by name: known to the installed compiler, made for the devices at hand, or refused."""

import jax
import pytest

from common.host import ONE_ORDER
from parallel.config import XLA_PROFILES
from serving.generator import Generator
from serving.programs import Programs
from tests.parallel.small import DENSE, make_config, make_program
from training.xla import (
    COMBINE,
    DETERMINISTIC_GPU,
    LEAST_COMBINED,
    PLATFORMS,
    check_options,
    deterministic_row,
    largest_layer_bytes,
    needed_options,
    profile_options,
    resolve_profile,
)


def test_only_a_gpu_is_asked_to_be_deterministic():
    assert needed_options(True, "cuda", 8) == needed_options(True, "gpu") == DETERMINISTIC_GPU
    assert needed_options(False, "gpu") == needed_options(True, "cpu") == needed_options(True, "tpu") == {}
    assert needed_options(True, "cpu", 8) == ONE_ORDER
    check_options(DETERMINISTIC_GPU, jax.devices()[0], "default")  # names that this compiler knows


def test_devices_that_nobody_knows_to_repeat_themselves_are_refused():
    assert needed_options(False, "toy") == {}
    with pytest.raises(
        ValueError, match="deterministic=true: it is not known how to make toy devices"
    ) as error:
        needed_options(True, "toy")
    assert "\n" not in str(error.value)
    assert all(deterministic_row(platform) for platform in ("cpu", "cuda", "rocm", "tpu"))


@pytest.mark.parametrize(
    ("name", "platform", "devices", "profile"),
    [
        ("default", "cpu", 1, "cpu"),
        ("default", "cuda", 1, "gpu"),
        ("default", "gpu", 8, "gpu_cluster"),
        ("default", "tpu", 4, "tpu"),
        ("default", "toy", 1, "none"),
        ("none", "cuda", 8, "none"),
        ("gpu", "cuda", 8, "gpu"),
    ],
)
def test_the_default_is_made_for_the_devices(name, platform, devices, profile):
    assert resolve_profile(name, platform, devices) == profile


def test_a_profile_of_other_devices_is_refused_and_told_which_fit():
    with pytest.raises(
        ValueError, match=r"xla=tpu is for tpu devices, and these are cpu; use one of .*cpu"
    ) as error:
        resolve_profile("tpu", "cpu", 1)
    assert "gpu" not in str(error.value) and "\n" not in str(error.value)
    assert set(XLA_PROFILES) == {"default", "none", *PLATFORMS}


def test_several_cpu_devices_keep_one_order_under_every_profile():
    for profile in ("none", "cpu"):
        config = make_config({"data": 2})
        config.hardware.xla = profile
        assert make_program(config).compiler_options == ONE_ORDER


def test_so_does_what_writes_and_scores_on_a_mesh(monkeypatch):
    program, made = make_program(make_config({"tensor": 2})), []
    abstract = program.model.info
    real = jax.jit

    def noted(*arguments, **words):
        made.append(words.get("compiler_options"))
        return real(*arguments, **words)

    monkeypatch.setattr(jax, "jit", noted)
    for layout, wanted in ((program.layout, ONE_ORDER), (None, None)):
        made.clear()
        Programs(program.model, program.ops, layout, slots=2, max_len=16, page=8, chunk=8, pages=4)
        monkeypatch.setattr(Generator, "update", lambda *_: None)
        Generator(program.model, abstract, program.ops, layout)
        assert len(made) > 8 and all(options == wanted for options in made)


@pytest.mark.parametrize("profile", ["cpu", "gpu_cluster", "gpu_tensor"])
def test_this_compiler_knows_the_options_of_a_profile(profile):
    check_options(profile_options(profile), jax.devices()[0], profile)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({**ONE_ORDER, "xla_cpu_faster": True}, "xla_cpu_faster=True"),
        ({"xla_cpu_scheduler_type": "BEST"}, "xla_cpu_scheduler_type=BEST"),
    ],
)
def test_an_option_that_this_compiler_does_not_take_is_one_line(options, named):
    with pytest.raises(
        ValueError, match=f"xla=default: jaxlib .* option {named}; use hardware.xla=none"
    ) as error:
        check_options(options, jax.devices()[0], "default")
    assert "\n" not in str(error.value)


def test_a_cluster_combines_the_collectives_of_one_layer():
    model = make_program(make_config()).model
    D, N, K, H, F = (DENSE[key] for key in ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"))
    layer = 4 * (2 * D * N * H + 2 * D * K * H + 3 * D * F + 2 * D)  # float32; two norms
    assert largest_layer_bytes(model.info["segments"]) == layer
    small, large = (profile_options("gpu_cluster", layer_bytes=n) for n in (layer, 1 << 30))
    assert {small[name] for name in COMBINE} == {LEAST_COMBINED}  # never below XLA's own
    assert {large[name] for name in COMBINE} == {1 << 30}
