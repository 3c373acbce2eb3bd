"""What `data.steps` did to a corpus: `python scripts/data_report.py +experiment=NAME`.

Takes the overrides that `train.py` takes. Runs the steps where their result is missing, prints documents and
bytes before and after each, and says where the page with plots and examples lies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import command

if TYPE_CHECKING:
    from training.config import Config

PURPOSE = """\
Print what each of data.steps did: documents and bytes before and after it, and where the page with plots,
reasons and examples lies. Of an experiment, data.* counts."""


def data_report(config: "Config") -> int:
    """Make the corpus if need be, and print its table."""
    from data.cache import locked
    from data.curation.optimize import PAGE, OptimizedCorpus
    from data.curation.report import line_of, table
    from data.errors import DataError

    if not config.data.steps:
        raise DataError("data.steps is empty, so there is no report; take data=filtered, or give steps")
    corpus = OptimizedCorpus(config.data, lambda line: print(f"data: {line}"))
    with locked(Path(config.data.cache_dir)):
        corpus.ensure()
    report = corpus.report()
    assert report is not None
    print("\n".join(table(report)))
    for step in report["steps"]:
        print(line_of(step))
    print(f"page: {corpus.directory / PAGE}")
    return 0


def main(words: Sequence[str]) -> int:
    """The command, which takes train.py's words; its exit status."""
    from configs.cli import main as compose

    return compose(data_report, words, script="python scripts/data_report.py", purpose=PURPOSE)


if __name__ == "__main__":
    command.start(main)
