"""What `data.steps` did to a corpus: `python scripts/data_report.py +experiment=NAME`.

Takes the overrides that `train.py` takes. Runs the steps where their result is missing, prints documents and
bytes before and after each, and says where the page with plots and examples lies.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

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


if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common.terminal import steady_streams
    from configs.cli import main

    steady_streams()
    sys.exit(main(data_report, script="python scripts/data_report.py", purpose=PURPOSE))
