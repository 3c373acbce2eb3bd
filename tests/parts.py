"""Parts of the suite, of which each commit runs one: after N commits in a row every test has run.

What is in a part is decided by a hash of its name, so that neither its neighbours nor their number move it.
A part of 2N lies in one of N: a slow machine may take half of its part and miss nothing for good.
"""

import zlib
from argparse import ArgumentTypeError

# What a new Python or a new JAX breaks first, in every part: names of tests, or what they begin with.
SMOKE = (
    "tests/artifacts/test_checkpoint.py::test_layouts_restore_the_same_numbers_and_digests",
    "tests/artifacts/test_checkpoint.py::test_a_save_that_fails_in_the_background_surfaces",
    "tests/configs/test_commands.py",
    "tests/data/test_steps.py::test_workers_and_jobs_do_not_change_a_byte",
    "tests/data/test_store.py::test_bytes_are_those_of_the_first_version",
    "tests/kernels/test_attention.py::test_padding_gives_zeros_and_finite_gradients",
    "tests/launch/test_launch_local.py",
    "tests/models/test_mla.py",
    "tests/models/test_moe.py::test_model_equals_loops_in_objective_and_gradient[deepseek]",
    "tests/optim/test_muon.py::test_devices_that_share_the_work_get_what_one_gets",
    "tests/parallel/test_collectives.py",
    "tests/parallel/test_context.py::test_stages_side_by_side_equal_one_device",
    "tests/parallel/test_cudnn.py::test_inside_ulysses",
    "tests/parallel/test_matrix.py::test_equals_one_device[dense-pipeline2-fsdp2-tensor2]",
    "tests/parallel/test_matrix.py::test_equals_one_device[moe-pipeline2-expert2-tensor2]",
    "tests/parallel/test_pipeline.py::test_split_backward_does_what_its_table_says",
    "tests/parallel/test_splash.py::test_equals_the_reference_with_every_feature",
    "tests/planner/test_hlo.py",
    "tests/serving/test_generate.py",
    "tests/training/test_fit.py::test_the_step_compiles_exactly_once",
    "tests/training/test_fit.py::test_every_step_is_a_row_and_the_average_is_evaluated_beside_the_weights",
    "tests/training/test_processes.py::test_every_count_of_processes_gives_the_same_losses",
    "tests/training/test_profiling.py::test_a_run_leaves_a_trace_and_a_page_of_the_parts_of_the_model",
    "tests/training/test_resume.py::test_a_notice_loses_no_step_and_the_same_command_goes_on",
)


def part_of(name: str, count: int) -> int:
    """The part of `count`, from 1, in which this is."""
    return zlib.crc32(name.encode()) % count + 1


def read_part(text: str) -> tuple[int, int]:
    """(part, count) of `--part 3/4`. Raises ArgumentTypeError where there is no such part."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ArgumentTypeError(f"--part {text} is no part; use K/N with K from 1 to N, as in 3/4")
    return int(part), int(count)


def unit(item) -> str:
    """What stays together: a file, which shares what it compiles, but each case of the matrix by itself."""
    return item.nodeid if item.get_closest_marker("matrix") else item.nodeid.partition("::")[0]
