"""How long, in what batches and precision, and what is written down on the way."""

from dataclasses import dataclass, field

PRECISIONS = ("auto", "float32", "bfloat16")
REMAT = ("none", "dots", "full")
ATTENTION = ("reference", "chunked")


@dataclass
class RunConfig:
    """One run, one directory, found again by name."""

    name: str = "???"
    dir: str = "runs/${run.name}"
    compile_cache: str | None = ".cache/xla"  # null turns the persistent compile cache off


@dataclass
class TrainingConfig:
    """The step: batch in sequences, precision of the compute (parameters are always float32), what is recomputed."""

    num_steps: int = 1000
    global_batch_size: int = 8
    accumulation_steps: int = 1
    precision: str = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "reference"
    loss_chunk: int = 512  # tokens whose logits exist at once, per device group
    z_loss: float = 0.0
    ema_decay: float | None = None


@dataclass
class CheckpointConfig:
    """Steps between saves and how many to keep. `average_last=K` also evaluates and keeps the mean of the last K checkpoints."""

    every: int = 200
    keep: int = 3
    average_last: int = 0


@dataclass
class EvalConfig:
    """Steps between evaluations on held-out documents, and batches in each; -1 batches takes the whole split."""

    every: int = 200
    batches: int = 16


@dataclass
class LoggingConfig:
    """`metrics.jsonl` is always written, a row a step; these add to it."""

    tensorboard: bool = True
    live: bool = True  # a live line where stdout is a terminal, else plain lines
    every: int = 20  # steps between plain lines and TensorBoard points


@dataclass
class SampleConfig:
    """Text generated at the end of the run. `parse_snippets` counts how many of that many snippets are Python that parses."""

    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0  # 0: all
    parse_snippets: int = 0
