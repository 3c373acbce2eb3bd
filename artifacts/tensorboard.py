"""TensorBoard scalars and text without TensorFlow, in the records of the `tensorboard` package.

Written by the caller's thread, a few points every `logging.every` steps: the package's own `EventFileWriter`
has a thread, whose failures would surface late, in another place, and as a traceback.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from common.errors import RunFault


class TensorBoard:
    """One event file a process start. On a resume TensorBoard hides what earlier files say of later steps."""

    def __init__(self, directory: str | os.PathLike[str], resume_step: int = 0):
        """`resume_step`: the last step that stays, 0 for a new run. Raises OSError."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: seconds, then a count for restarts within one.
        count = sum(1 for _ in directory.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{int(time.time()):010d}.{count:04d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        # A START message makes readers purge every point at its step and above.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(session_log=start, step=resume_step + 1))
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each named curve; `float(value)` must hold. Raises RunFault where the disk refuses."""
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=float(v)) for tag, v in values.items()]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=points)))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text (Markdown) panel: the configuration, the samples. Raises RunFault."""
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[text.encode()],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(),
        )
        metadata = summary_pb2.SummaryMetadata(
            plugin_data=plugin, data_class=summary_pb2.DATA_CLASS_TENSOR, summary_description=""
        )
        value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

    def flush(self) -> None:
        """Hand everything to the operating system, so that a running TensorBoard sees it. Raises RunFault."""
        try:
            self._file.flush()
        except OSError as error:
            raise RunFault(self._complaint(error)) from error

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        try:
            self._file.close()
        except OSError as error:
            raise RunFault(self._complaint(error)) from error

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            raise RunFault(self._complaint(error)) from error

    def _complaint(self, error: OSError) -> str:
        return (
            f"cannot write {self._file.name}: {error.strerror}; free space or set logging.tensorboard=false, "
            "then run the same command again to resume"
        )
