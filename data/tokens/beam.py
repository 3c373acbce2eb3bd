"""The shards of a store made by Apache Beam (extra `beam`), where a corpus outgrows one machine.

The pipeline does what `data.tokens.shards.local_engine` does: each worker writes its shards and their
records into the store's journal, so the cache and the corpus must lie where all workers see them, under the
same path. A pipeline that breaks off, or whose workers are tried again, leaves what any killed preparation
leaves.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.cache import Stopped
from data.errors import DataError
from data.tokens.encoding import Encoder
from data.tokens.shards import Engine, Record, ShardTask, record_of, write_shard


def beam_engine(options: Sequence[str]) -> Engine:
    """Return the engine of a Beam runner; `options` are Beam's own, as in ["--runner=DirectRunner"].

    Raises DataError where Beam is not installed, knows no such runner, or the pipeline fails.
    """
    beam, pipeline_options = _beam()

    def make(work: ShardTask, shards: dict[int, range]) -> Iterator[Record]:
        try:
            parsed = pipeline_options.PipelineOptions(list(options))
            with _findable(), beam.Pipeline(options=parsed) as pipeline:
                numbered = [(number, part.start, part.stop) for number, part in shards.items()]
                _ = (
                    pipeline
                    | "shards" >> beam.Create(numbered)
                    | "spread" >> beam.Reshuffle()
                    | "tokenize" >> beam.ParDo(_writer(beam, work))
                )
        except DataError:
            raise
        except Exception as error:
            raise _said_plainly(error, options) from error
        for number in shards:
            record = record_of(work.directory, number)
            if record is None:
                raise Stopped(
                    f"the runner's workers wrote no shard {number} into {work.directory}; "
                    "put data.cache_dir on a file system that all of them share"
                )
            yield record

    return make


def _beam() -> tuple[Any, Any]:
    try:
        import apache_beam
        from apache_beam.options import pipeline_options
    except ImportError:
        raise DataError("--runner needs Apache Beam; install it with pip install -e '.[beam]'") from None
    return apache_beam, pipeline_options


@contextlib.contextmanager
def _findable() -> Iterator[None]:
    """Let the processes that a runner starts here find this project, in a clone that is not installed too."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), before)))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _writer(beam: Any, work: ShardTask) -> Any:
    """Return the function that Beam sends to its workers: each opens the encoder once."""

    class WriteShard(beam.DoFn):
        def setup(self) -> None:
            self.encoder: Encoder = work.encoding.open()

        def process(self, shard: tuple[int, int, int]) -> None:
            number, first, end = shard
            write_shard(work, self.encoder, number, range(first, end))

    return WriteShard()


def _said_plainly(error: Exception, options: Sequence[str]) -> DataError:
    """Return what a worker said, from under what Beam wrapped around it; else Beam's own last line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DataError):
            return inner
        inner = inner.__cause__ or inner.__context__
    # A worker's traceback may be all there is, and its last line is what was raised.
    line = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
    return Stopped(f"the Beam pipeline failed ({line}); its options were {' '.join(options)}")
