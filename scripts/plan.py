"""Plan a run on hardware that is not here: `python scripts/plan.py +experiment=NAME hardware=h200`.

Takes the overrides that `train.py` takes, and `plan.*` for the plan. Compiles the very step that `train.py`
would run, for described devices, and prints what it needs and how long it would take: docs/planner.md.
`serve=true` plans an engine instead of a step: slots that fit, tokens/s, and whether promises hold.
"""

import inspect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import command

from planner.config import MOST_COMPILED, PlanConfig, split_words
from scripts.command import parse, refuse

if TYPE_CHECKING:
    from parallel.hardware import Machine
    from planner.report import Plan
    from planner.search import Compile, Searched
    from planner.serving_question import ServingQuestion
    from training.config import Config

COMMAND = "python scripts/plan.py"
EXPERIMENTS = Path(__file__).resolve().parent.parent / "configs" / "experiment"
PURPOSE = """\
Plan a run on hardware that is not here: what its step needs, how long it takes, what would be faster.
  hardware=h200 hardware.nodes=2         of GPUs, or hardware.topology=8x8
  hardware=v5p hardware.topology=4x4x4   of TPUs
  plan.KEY=VALUE                         what is asked of the planner:
{keys}
  serve=true KEY=VALUE                   plan the engine of scripts/serve.py on one of these devices instead:
{serving}"""


def purpose() -> str:
    """What `--help` says of us: every key and, from the source, its comment."""
    from planner.serving_question import ServingQuestion

    return PURPOSE.format(keys=keys_of(PlanConfig), serving=keys_of(ServingQuestion))


def keys_of(config: type[Any]) -> str:
    """A dataclass's keys, one a line, each with its comment."""
    lines = inspect.getsource(config).splitlines()
    comments = {
        code.split(":")[0].strip(): text for code, mark, text in (x.partition("  # ") for x in lines) if mark
    }
    return "\n".join(f"    {f.name:12} {comments[f.name]}" for f in fields(config))


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 where the plan fits, 2 where it does not, and for bad input."""
    from configs.cli import main as compose

    try:
        options, words = split_words(argv)
        question, words = split_question(words)
    except ValueError as error:
        return refuse(error)
    # No device of this machine is wanted, and none is waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    def plan(config: "Config") -> int:
        return task(config, options, words) if question is None else serving_task(config, options, question)

    return compose(plan, words, script=COMMAND, purpose=purpose())


def split_question(words: Sequence[str]) -> tuple["ServingQuestion | None", list[str]]:
    """What `serve=true` asks with the words beside it, and the words that are left for the run.

    Raises ValueError where one has another type or is out of range, or goes with a search alone.
    """
    from planner.serving_question import ServingQuestion

    if "serve=true" not in words:
        return None, [word for word in words if word != "serve=false"]
    keys = {field.name for field in fields(ServingQuestion)}
    own = [word for word in words if word.partition("=")[0] in keys]
    rest = [word for word in words if word not in own and word != "serve=true"]
    if not any(word.startswith(("run.name=", "+experiment=")) for word in rest):
        rest.append("run.name=served")  # an engine has none, and a config wants one
    return parse(own, ServingQuestion, ()), rest


def serving_task(config: "Config", options: PlanConfig, question: "ServingQuestion") -> int:
    """Plan an engine, and refuse what does not fit or hold, once all is shown."""
    from parallel.hardware import machine_of
    from planner.serving import plan_serving, refusal_of
    from planner.serving_screen import serving_screen
    from training.config import with_vocab

    if options.search:
        raise ValueError("plan.search=true looks for a training step's mesh, and an engine has one device")
    config = with_vocab(config)
    hardware = replace(config.hardware, nodes=None, topology=None)
    machine = machine_of(here(hardware, 1) if hardware.name == "cpu" else hardware, 1)
    plan = plan_serving(config, machine, question, compile=options.compile)
    print(serving_screen(plan), flush=True)
    write_figures(plan.json(), options)
    if (reason := refusal_of(plan)) is not None:
        raise ValueError(reason)
    return 0


def write_figures(figures: dict[str, Any], options: PlanConfig) -> None:
    """Every figure as JSON, where a file is asked for."""
    if options.output is not None:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"every figure is in {path}")


def task(config: "Config", options: PlanConfig, words: Sequence[str]) -> int:
    """Plan, and search where that is asked."""
    from training.config import with_vocab

    config = with_vocab(config)
    config, machine, notes = settle(config)
    if options.search:
        return look_further(config, machine, options, notes, words)
    plan = plan_of(config, machine, options, notes)
    return show(config, machine, plan, options)


def settle(config: "Config") -> tuple["Config", "Machine", tuple[str, ...]]:
    """The cluster, the config checked against it, and what was taken for granted."""
    from parallel.hardware import machine_of
    from training.legal.check import check, mesh_sizes

    hardware = config.hardware
    sizes = mesh_sizes(config.mesh, None)
    product = math.prod(sizes.values()) if sizes is not None else None
    if hardware.name == "cpu":
        config = replace(config, hardware=here(hardware, hardware.nodes or product or 1))
    machine = machine_of(config.hardware, product)
    notes = []
    if hardware.nodes is None and hardware.topology is None:
        whence = "as many devices as the mesh has" if product is not None else "one host"
        notes.append(f"hardware.nodes and hardware.topology are not given: {whence}")
    check(config, machine.devices)
    return config, machine, tuple(notes)


def here(hardware: Any, devices: int) -> Any:
    """A CPU's datasheet is what this machine has, each of its forced devices a part of it.

    Its memory, and the product that `train.py` times as well.
    """
    import jax

    from training.flops import peak_flops

    jax.config.update("jax_num_cpu_devices", devices)
    peak = peak_flops(hardware, "cpu", "cpu")[0] / 1e12
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    memory = hardware.device.memory_gib or whole / devices
    return replace(hardware, peak_tflops=peak, device=replace(hardware.device, memory_gib=memory))


def plan_of(config: "Config", machine: "Machine", options: PlanConfig, notes: tuple[str, ...]) -> "Plan":
    """Compiled where that is asked and can be, else computed; which of both is said."""
    from planner.analytic import attention_of, estimate
    from planner.compiled import DoesNotFit, compile_step, compiler_name, model_flops
    from planner.report import About, make_plan
    from planner.sizes import model_of

    analytic = estimate(config, machine)
    compiled, refused = None, None
    if options.compile == "auto" and machine.devices > MOST_COMPILED:
        notes = (*notes, f"not compiled: more than {MOST_COMPILED:,} devices (plan.compile=always compiles)")
    elif options.compile != "never":
        try:
            compiled = compile_step(config, machine, devices_here(machine))
        except DoesNotFit as error:
            refused = str(error).partition(";")[0]
            notes = (*notes, "no program, the compiler refuses it: what follows is computed")
        except ImportError as error:
            if options.compile == "always":
                raise ValueError(f"plan.compile=always: {error}") from error
            notes = (*notes, f"not compiled: {error}")
    about = About(*attention_of(config, machine))
    if compiled is not None:
        choice = compiled.program.attention
        about = About(choice.name, choice.why, compiled.compile_seconds, compiler_name(machine.kind))
    model = model_of(config.model)
    return make_plan(
        config,
        machine,
        analytic if compiled is None else compiled.work,
        parameters=model.num_params()["total"],
        per_token=model_flops(model, config.data.seq_len),
        about=about,
        beside=None if compiled is None else analytic,
        price=options.price,
        budget_tokens=options.tokens,
        notes=notes,
        refused=refused,
    )


def devices_here(machine: "Machine") -> list[Any] | None:
    """CPUs are here; all else is described."""
    import jax

    return jax.devices("cpu")[: machine.devices] if machine.kind == "cpu" else None


def show(config: "Config", machine: "Machine", plan: "Plan", options: PlanConfig) -> int:
    """The screen and the file; what does not fit is refused with what would."""
    from planner.fixes import fixes
    from planner.screen import screen
    from planner.search import compiled_work
    from training.preflight import refusal

    print(screen(plan), flush=True)
    write_figures(plan.json(), options)
    if plan.fits:
        return 0
    words = plan.refused or refusal(plan.work.memory, plan.capacity, machine.name)
    if options.fixes == 0:
        raise ValueError(words)
    asked = plan.compile_seconds is not None or plan.refused is not None
    compile = compiled_work if asked and machine.kind != "cpu" else None
    found = fixes(config, machine, count=options.fixes, compile=compile)
    for fix in found:
        print(f"{'fits with':13} {fix.line()}")
    remedy = f"use {found[0].words}" if found else "no change that was tried makes it fit: take more devices"
    raise ValueError(f"{words}; {remedy}")


def look_further(
    config: "Config", machine: "Machine", options: PlanConfig, notes: tuple[str, ...], words: Sequence[str]
) -> int:
    """Search, show the best plan, and write all that was found, a picture, and the winner."""
    from planner.pareto import draw
    from planner.search import compiled_work, search
    from training.progress import Counting

    compile: Compile | None = compiled_work
    if reason := no_compiler(machine, options):
        compile, notes = None, (*notes, reason)
    with Counting("compiling candidates") as counting:
        found = search(
            config, machine, top=options.top, jobs=options.jobs, compile=compile, tell=counting.tell
        )
    print(f"{'candidates':13} {found.legal:,} legal, {found.fitting:,} fit by the analytic model")
    for place, one in enumerate((found.compiled or found.computed[:1])[:5]):
        size = one.work.memory.total / 2**30
        own = " ".join(one.candidate.words) or "as asked"
        print(f"{'' if place else one.work.how:13} {one.seconds:.3f} s a step, {size:.1f} GiB: {own}")
    if found.best is None:
        raise ValueError(f"no legal plan of {machine.devices} x {machine.name} fits; take more devices")
    directory = Path(options.directory or f"plans/{config.run.name}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "search.json").write_text(json.dumps(found.json(), indent=1) + "\n", encoding="utf-8")
    draw(found, directory / "pareto.png", directory / "pareto.html")
    written = [directory / "best.yaml"]
    if options.experiment is not None:
        written.append(EXPERIMENTS / f"{options.experiment}.yaml")
    for path in written:
        write_experiment(path, words, found)
    print(f"{'written':13} {directory}/search.json, pareto.png, pareto.html; {', '.join(map(str, written))}")
    config = found.best.candidate.config
    return show(config, machine, plan_of(config, machine, options, notes), options)


def no_compiler(machine: "Machine", options: PlanConfig) -> str | None:
    """Why nothing is compiled; None where it can be. Raises ValueError where it was asked for."""
    from planner.described_devices import described_devices

    if options.compile == "never":
        return "not compiled: plan.compile=never"
    if machine.kind == "cpu":
        return "not compiled: a search on CPUs computes"
    try:
        described_devices(machine.name, machine.topology)
    except ImportError as error:
        if options.compile == "always":
            raise ValueError(f"plan.compile=always: {error}") from error
        return f"not compiled: {error}"
    return None


def write_experiment(path: Path, words: Sequence[str], found: "Searched") -> None:
    """The words of the command and the winner's, as an experiment that `train.py` takes as it is."""
    assert found.best is not None
    path.write_text(experiment_text(path.stem, words, found), encoding="utf-8")


def experiment_text(name: str, words: Sequence[str], found: "Searched") -> str:
    """YAML in the form of configs/experiment; the base experiment is merged in by name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from configs.groups import groups
    from configs.text_words import as_typed
    from training.config import Config

    best = found.best
    assert best is not None
    parts, tree = [], dict[str, Any]()
    base = ""
    # Read and written by Hydra's rules, not YAML's, to which a path such as 2024-01-15 is a date.
    for word in OverridesParser.create().parse_overrides(as_typed([*words, *best.candidate.words], Config)):
        key, value = word.key_or_group, word.value()
        if key == "experiment":
            base = str(value)
        elif key in groups():
            parts.append(f"  - override /{key}: {'null' if value is None else value}")
        else:
            node = tree
            *rooms, leaf = key.split(".")
            for room in rooms:
                node = node.setdefault(room, {})
            node[leaf] = value
    tree.setdefault("run", {})["name"] = name
    size = best.work.memory.total / 2**30
    lines = [
        "# @package _global_",
        f"# {base}, as the best of {found.legal:,} plans for {found.machine.devices} x {found.machine.name}.",
        f"# command:  python train.py +experiment={name}",
        f"# hardware: {found.machine.devices} x {found.machine.name}",
        f"# time:     {best.seconds:.3f} s a step predicted, {best.work.how}; not measured",
        f"# expected: as {base}; {size:.1f} GiB on a device",
        "defaults:",
        *([f"  - {base}"] if base else []),
        *parts,
        "  - _self_",
    ]
    return "\n".join([*lines, OmegaConf.to_yaml(OmegaConf.create(tree))])


if __name__ == "__main__":
    command.start(main)
