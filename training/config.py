"""The root of a run's configuration, and what training itself is told: how long, in what precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from artifacts.config import CheckpointConfig, RunConfig
from common.checks import choice, require
from data.config import DataConfig, TokenizerConfig
from kernels.backends import BACKENDS
from kernels.names import PROJECTIONS
from models.config import ModelConfig, padded_vocab, regrouped
from optim.config import OPTIMIZERS, SCHEDULES, OptimConfig, ScheduleConfig
from parallel.config import AutoscaleConfig, ContextConfig, MeshConfig, PipelineConfig
from parallel.hardware import HardwareConfig
from serving.config import SampleConfig

Setting = int | float | bool | str | None  # a value of an objective: its own dataclass says which it takes
PRECISIONS = ("auto", "float32", "bfloat16", "fp8", "int8")
REMAT = ("none", "dots", "attention", "offload", "full")
ATTENTION = ("auto", *BACKENDS)
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)  # grids of `models.weights`
EXCHANGES = ("float32", "bfloat16", "int8")
ADAPTERS = ("lora", "dora")
TARGETS = (*PROJECTIONS, "experts")
GRIDS = ("8", "4")  # bits of a frozen weight
BYTES = 257  # tokens of the byte tokenizer: all values and the end of a document


@dataclass
class TrainingConfig:
    """The step: batch in rows, precision of the compute (parameters stay float32), what is recomputed."""

    num_steps: int = 1000  # optimizer steps in all
    global_batch_size: int = 8  # rows of seq_len tokens in one step, over all devices
    accumulation_steps: int = 1  # microbatches whose gradients add up to one step
    precision: str = "auto"  # float32 | bfloat16 | fp8 | int8 | auto: bfloat16, on CPU float32
    full_precision: list[str] = field(default_factory=list)  # projections left out of fp8 and int8: [o, down]
    weight_bits: str | None = None  # QAT: 3, or 4/64 (a scale for 64 inputs): projections' grid; null: none
    remat: str = "none"  # what layers keep: none (all) | dots | attention | offload | full (their input)
    scan_layers: bool = True  # compile one layer and loop; false unrolls
    attention: str = "auto"  # auto: the fastest that can | reference | chunked | fused | xla | cudnn | splash
    max_documents: int = 64  # documents a row may hold where attention is cudnn; 1: rows are not packed
    loss_chunk: int = 512  # tokens whose logits exist at once, per device group
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting
    ema_decay: float | None = None  # such as 0.999: also keep a moving average of the weights

    def __post_init__(self) -> None:
        """Each value by itself; what two values must agree on is checked in `configs.schema`."""
        choice("training.precision", self.precision, PRECISIONS)
        for name in self.full_precision:
            choice("training.full_precision", name, PROJECTIONS)
        weight_grid(self.weight_bits)
        choice("training.remat", self.remat, REMAT)
        choice("training.attention", self.attention, ATTENTION)
        for key in ("num_steps", "global_batch_size", "accumulation_steps", "loss_chunk", "max_documents"):
            require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "1 or more")
        require(self.z_loss >= 0, "training.z_loss", self.z_loss, "0 or more")
        ema = self.ema_decay
        require(ema is None or 0 < ema < 1, "training.ema_decay", ema, "between 0 and 1, or null")


@dataclass
class AdapterConfig:
    """Thin factors that learn beside the frozen weights of init_from (`models.weights.LowRank`)."""

    kind: str = "lora"  # lora | dora: a magnitude for each output learns too
    rank: int = 8  # of each pair of factors
    alpha: float = 16.0  # the product of a pair counts alpha / rank times
    targets: list[str] = field(default_factory=lambda: ["q", "kv", "o", "up", "down"])  # projections; experts
    bits: int | None = None  # 8 | 4: frozen weights as integers (QLoRA); null: as they are
    group: int | None = None  # neighbours that share a scale in bits; null: all that one product sums

    def __post_init__(self) -> None:
        """Each value by itself; what a model lacks is said where its parameters are laid out."""
        choice("adapter.kind", self.kind, ADAPTERS)
        require(self.rank >= 1, "adapter.rank", self.rank, "1 or more")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "above 0, such as twice adapter.rank")
        require(bool(self.targets), "adapter.targets", "[]", "at least one projection; adapter=null: none")
        for name in self.targets:
            choice("adapter.targets", name, TARGETS)
        if self.bits is not None:
            choice("adapter.bits", str(self.bits), GRIDS)
        ok = self.group is None or self.bits is not None
        require(ok, "adapter.group", self.group, "null without adapter.bits")


def weight_grid(text: str | None) -> tuple[int, int | None] | None:
    """Bits, and inputs that share a scale (None: all), of `training.weight_bits`; ValueError for others."""
    if text is None:
        return None
    bits, slash, group = str(text).partition("/")
    ok = (
        bits.isdecimal()
        and int(bits) in WEIGHT_BITS
        and (not slash or (group.isdecimal() and int(group) > 1))
    )
    limit = (
        f"one of {', '.join(map(str, WEIGHT_BITS))}, with /GROUP behind it or without, as in 4/64; or null"
    )
    require(ok, "training.weight_bits", text, limit)
    return int(bits), int(group) if slash else None


@dataclass
class LocalSGDConfig:
    """Local SGD and DiLoCo over mesh.replica: replicas step alone and exchange what they learnt now and then.

    Without it, and at 1 inner step, replicas are synchronous data parallelism, and nothing else here is read.
    """

    inner_steps: int = 1  # optimizer steps between exchanges
    outer_learning_rate: float = 0.7  # of the averaged difference (Douillard et al. 2023)
    outer_momentum: float = 0.9  # share of the last outer step that goes on
    nesterov: bool = True  # the outer step looks ahead along its momentum
    exchange: str = "float32"  # float32 | bfloat16 | int8: what crosses the slow link

    def __post_init__(self) -> None:
        """Each value by itself; what inner steps need of the rest is checked in `training.legal.nearest`."""
        require(self.inner_steps >= 1, "local_sgd.inner_steps", self.inner_steps, "1 (synchronous) or more")
        rate = self.outer_learning_rate
        require(rate > 0, "local_sgd.outer_learning_rate", rate, "above 0; DiLoCo has 0.7")
        momentum = self.outer_momentum
        require(0 <= momentum < 1, "local_sgd.outer_momentum", momentum, "0 (off) or more, and below 1")
        choice("local_sgd.exchange", self.exchange, EXCHANGES)


def inner_steps(config: LocalSGDConfig | None) -> int:
    """Optimizer steps between exchanges of replicas; 1 where they step together."""
    return 1 if config is None else config.inner_steps


@dataclass
class GuardConfig:
    """Updates that are skipped, how a run goes back, when it counts as stuck, and replicas that differ."""

    skip_sigma: float | None = None  # such as 6: deviations above the mean at which an update is skipped
    max_skips: int = 10  # consecutive skipped updates that end the run, or take it back
    rollback_batches: int = 0  # 0: end it; N: go back to a checkpoint and leave out the next N batches
    stall_seconds: float | None = 1800.0  # without progress: stacks, then exit 75; null: wait for ever
    replica_every: int = 0  # steps between comparisons of what several devices hold; 0: none

    def __post_init__(self) -> None:
        """Each value by itself; what a rollback needs of the rest is checked in `configs.schema`."""
        sigma, stall = self.skip_sigma, self.stall_seconds
        require(sigma is None or sigma > 0, "guard.skip_sigma", sigma, "above 0, such as 6, or null (off)")
        require(self.max_skips >= 1, "guard.max_skips", self.max_skips, "1 or more")
        batches = self.rollback_batches
        require(batches >= 0, "guard.rollback_batches", batches, "0 (the run ends) or more")
        ok = stall is None or stall >= 0
        require(ok, "guard.stall_seconds", stall, "seconds above 0, or 0 or null (no watchdog)")
        require(self.replica_every >= 0, "guard.replica_every", self.replica_every, "0 (never) or more")


@dataclass
class EvalConfig:
    """Evaluations on held-out documents, `batches` every so many steps, and on tasks of a suite."""

    every: int = 200  # steps
    batches: int = 16  # -1: the whole held-out split
    suite: str | None = None  # small | core | code | domains | a YAML file of tasks; null: none
    suite_every: int = 1000  # steps; 0: at the last one alone

    def __post_init__(self) -> None:
        """Each value by itself."""
        require(self.every >= 1, "eval.every", self.every, "1 step or more")
        ok = self.batches == -1 or self.batches >= 1
        require(ok, "eval.batches", self.batches, "1 or more, or -1 for the whole split")
        ok = self.suite_every >= 0
        require(ok, "eval.suite_every", self.suite_every, "1 step or more, or 0 for the last step alone")


@dataclass
class LoggingConfig:
    """`metrics.jsonl` is always written, a row a step; these add to it."""

    tensorboard: bool = True  # event files in the run directory
    live: bool = True  # a live line where stdout is a terminal, else plain lines
    every: int = 20  # steps between plain lines and TensorBoard points
    profile_steps: list[int] = field(default_factory=lambda: [10, 13])  # traced by profile=true: [first, end)
    prometheus_port: int | None = None  # the first process answers scrapes there; 0: any free port; null: off

    def __post_init__(self) -> None:
        """Each value by itself."""
        require(self.every >= 1, "logging.every", self.every, "1 step or more")
        steps = self.profile_steps
        limit = "two steps [first, end), 1 <= first < end, such as [10, 13]"
        require(len(steps) == 2 and 1 <= steps[0] < steps[1], "logging.profile_steps", steps, limit)
        port = self.prometheus_port
        limit = "a port from 1 to 65535, 0 for any that is free, or null"
        require(port is None or 0 <= port < 65536, "logging.prometheus_port", port, limit)


@dataclass
class Config:
    """Everything that decides a run."""

    run: RunConfig = field(default_factory=RunConfig)  # its name and directory
    seed: int = 0  # of initial weights, data order and samples
    deterministic: bool = False  # equal bits from equal runs, at a cost on GPUs, or the run is refused
    profile: bool = False  # trace the steps of logging.profile_steps
    init_from: str | None = None  # a run's name or a checkpoint's path, whose weights this run starts from
    adapter: AdapterConfig | None = None  # thin factors that learn instead of all weights; null: these do
    freeze: list[str] = field(default_factory=list)  # parameters that do not learn, as [embed, 'norm*']
    model: ModelConfig = field(default_factory=ModelConfig)  # what is computed
    data: DataConfig = field(default_factory=DataConfig)  # from what text
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # in what pieces
    mesh: MeshConfig = field(default_factory=MeshConfig)  # on which devices
    autoscale: AutoscaleConfig | None = None  # which of them when some are missing; null: the mesh as it is
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)  # in what order stages work
    context: ContextConfig = field(default_factory=ContextConfig)  # how attention crosses devices
    local_sgd: LocalSGDConfig | None = None  # how often replicas meet; null: at every step
    hardware: HardwareConfig = field(default_factory=HardwareConfig)  # and what those can do
    optim: OptimConfig = field(default_factory=OptimConfig)  # how a gradient becomes an update
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # and how large it is at each step
    objective: dict[str, Setting] = field(default_factory=lambda: {"name": "next_token"})  # what is minimized
    training: TrainingConfig = field(default_factory=TrainingConfig)  # for how long, in what batches
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # what is kept
    guard: GuardConfig = field(default_factory=GuardConfig)  # what it does when something goes wrong
    eval: EvalConfig = field(default_factory=EvalConfig)  # how it is measured
    sample: SampleConfig = field(default_factory=SampleConfig)  # what it writes at the end
    logging: LoggingConfig = field(default_factory=LoggingConfig)  # what is shown on the way


def from_stored(stored: Mapping[str, Any]) -> Config:
    """The config that a run's directory holds as plain values; keys that are newer have their defaults.

    Raises ValueError where it is no run's config.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.create({**stored, "model": regrouped(dict(stored["model"]))})
        optim = {schema.name: schema for schema in OPTIMIZERS}[tree.optim.name]()
        schedule = {schema.name: schema for schema in SCHEDULES}[tree.schedule.name]()
        typed = OmegaConf.merge(OmegaConf.structured(Config(optim=optim, schedule=schedule)), tree)
        config = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    assert isinstance(config, Config)
    return config


def with_vocab(config: Config, tokenizer_size: int | None = None) -> Config:
    """`model.vocab_size=-1` becomes the tokenizer's padded size; a given one must hold every token.

    tokenizer_size: None where no tokenizer is opened; then the config itself must say it.
    """
    size = config.model.vocab_size
    if tokenizer_size is None and size != -1:
        return config
    if tokenizer_size is None:
        tokenizer_size = {"bpe": config.tokenizer.vocab_size, "byte": BYTES}.get(config.tokenizer.kind)
    if tokenizer_size is None:
        raise ValueError(
            f"model.vocab_size=-1 is that of tokenizer.kind={config.tokenizer.kind}, which is not read; "
            "give model.vocab_size"
        )
    if size == -1:
        return replace(config, model=replace(config.model, vocab_size=padded_vocab(tokenizer_size)))
    if size < tokenizer_size:
        raise ValueError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_size}; "
            f"use model.vocab_size=-1 or at least {padded_vocab(tokenizer_size)}"
        )
    return config
