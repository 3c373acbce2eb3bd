"""Make an experiment's token stores before training it: `python scripts/prepare_data.py +experiment=NAME`.

Takes the overrides that `train.py` takes. Training does the same by itself when the stores are missing; this
is for doing it elsewhere or beforehand. Done again, it finds everything made and only prints the table.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import Config
    from data.pipeline import Prepared

PURPOSE = """\
Make an experiment's token stores (data.cache_dir) before training it, for instance on another machine.
Of an experiment, data.* and tokenizer.* count; train.py with the same finds them and starts at once."""


def prepare_data(config: "Config") -> int:
    """Tokenize, and print what there is."""
    from data.pipeline import prepare

    tokenizer = config.tokenizer
    if tokenizer.kind == "inherit":  # only then: it imports JAX
        from training.parent import tokenizer_config

        tokenizer = tokenizer_config(config, None, None)
    prepared = prepare(config.data, tokenizer)
    print_table(prepared, config.data.seq_len)
    return 0


def print_table(prepared: "Prepared", seq_len: int) -> None:
    """Documents, bytes and tokens of each split; bytes per token say how well the tokenizer fits."""
    stores = {"train": prepared.train, "validation": prepared.validation}
    lines: list[tuple[str, ...]] = [("split", "documents", "bytes", "tokens", "bytes/token", "rows")]
    for split, store in stores.items():
        if store is None:  # streaming reads the corpus while training
            continue
        counts = (store.num_documents, store.num_bytes, store.num_tokens)
        ratio = store.num_bytes / max(store.num_tokens, 1)
        rows = store.num_tokens // seq_len
        lines.append((split, *(f"{count:,}" for count in counts), f"{ratio:.2f}", f"{rows:,}"))
    for split, *numbers in lines:
        print(
            f"{split:10}", *(f"{n:>{width}}" for n, width in zip(numbers, (10, 15, 15, 12, 10), strict=True))
        )
    for split, store in stores.items():
        if store is not None:
            print(f"{split}: {store.path}")


if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from configs.cli import main

    sys.exit(main(prepare_data, script="python scripts/prepare_data.py", purpose=PURPOSE))
