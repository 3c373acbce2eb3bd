"""What TensorBoard itself reads back from our files."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from artifacts.tensorboard import TensorBoard
from common.errors import RunFault


def _read(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={TENSORS: 0})
    accumulator.Reload()
    return accumulator


def test_scalars_and_text_read_back(tmp_path):
    board = TensorBoard(tmp_path)
    for step in range(1, 5):
        board.scalars(step, {"loss": 8.0 / step, "learning_rate": 0.5})
    board.text(4, "samples", "def f():\n    return 'é'")
    board.close()
    read = _read(tmp_path)
    assert [s.step for s in read.Scalars("loss")] == [1, 2, 3, 4]
    assert [s.value for s in read.Scalars("loss")] == pytest.approx([8.0, 4.0, 8 / 3, 2.0])
    assert len(read.Scalars("learning_rate")) == 4
    assert read.Tensors("samples")[0].tensor_proto.string_val == ["def f():\n    return 'é'".encode()]
    assert read.SummaryMetadata("samples").plugin_data.plugin_name == "text"


def test_points_above_the_resumed_step_are_purged_twice_in_a_row(tmp_path):
    for resume, value in ((0, 1.0), (3, 2.0), (4, 3.0)):
        board = TensorBoard(tmp_path, resume)
        for step in range(resume + 1, 7):
            board.scalars(step, {"loss": value})
        board.close()
    points = [(s.step, s.value) for s in _read(tmp_path).Scalars("loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 3.0), (6, 3.0)]


def test_flushed_points_are_seen_while_the_run_goes_on(tmp_path):
    board = TensorBoard(tmp_path)
    board.scalars(1, {"loss": 1.0})
    board.flush()
    assert len(_read(tmp_path).Scalars("loss")) == 1
    board.close()
    board.close()


def test_a_full_disk_is_a_fault(tmp_path):
    board = TensorBoard(tmp_path)
    board._file.close()
    board._file = open("/dev/full", "wb")  # noqa: SIM115
    board._records._writer = board._file
    board.scalars(1, {"loss": 1.0})
    with pytest.raises(RunFault, match=r"No space left.*logging\.tensorboard=false"):
        board.flush()
    with pytest.raises(RunFault):
        board.close()
