"""The plan that a search finds against the meshes that were written by hand, by the same model.

    JAX_PLATFORMS=cpu python -m benchmarks.searched       # writes results/searched.json

Needs NVIDIA's compiler (`pip install -e '.[plan-gpu]'`) and no GPU. Every mesh of configs/mesh is tried with
every policy of rematerialization and is compiled; those that are not legal or do not fit are left out.
Seconds are predictions: nothing here ran.
"""

import time
from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_dir

from benchmarks import measure
from configs import schema
from configs.groups import CONFIG_DIR, options
from configs.optional_groups import opened
from parallel.hardware import Machine, machine_of
from planner.candidates import POLICIES, Candidate
from planner.search import Evaluated, compiled_work, evaluate, search
from training.config import Config, with_vocab
from training.legal.nearest import legal

CASES = {
    "llama3_8b on 16 x H100": (
        *("+experiment=llama3_8b", "hardware=h100", "hardware.nodes=2", "training.global_batch_size=64"),
    ),
    "llama3_70b on 128 x H100": (
        *("+experiment=llama3_70b", "hardware=h100", "hardware.nodes=16", "training.global_batch_size=256"),
    ),
}


def config_of(*words: str) -> Any:
    """Composed, its vocabulary known."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("config", overrides=opened(["run.name=searched", *words], Config))
    return with_vocab(schema.from_hydra(composed))


def by_hand(words: tuple[str, ...], machine: Machine) -> list[Evaluated]:
    """Every mesh of configs/mesh with every policy that is legal and, compiled, fits; fastest first."""
    found = []
    for mesh in options("mesh"):
        base = config_of(*words, f"mesh={mesh}")
        if legal(base, machine.devices) is not None:
            continue
        for remat in POLICIES:
            config = replace(base, training=replace(base.training, remat=remat))
            one = Candidate(config, (f"mesh={mesh}", f"training.remat={remat}"))
            try:
                result = evaluate(one, machine, compiled_work(config, machine))
            except ValueError:  # the compiler refuses it
                continue
            if result.work.memory.total <= machine.memory_bytes:
                found.append(result)
    return sorted(found, key=lambda e: e.seconds)


def main() -> None:
    """Both cases, and the file."""
    schema.register()
    rows, details = [], {}
    for name, words in CASES.items():
        config = config_of(*words)
        machine = machine_of(config.hardware)
        began = time.perf_counter()
        found = search(config, machine)
        seconds = time.perf_counter() - began
        hand = by_hand(words, machine)
        assert found.best is not None and hand
        rows.append(
            {
                "case": name,
                "legal candidates": found.legal,
                "of these fit, by the model": found.fitting,
                "search, s": round(seconds),
                "found": " ".join(found.best.candidate.words),
                "step, s": found.best.seconds,
                "GiB": found.best.work.memory.total / 2**30,
                "best by hand": " ".join(hand[0].candidate.words),
                "its step, s": hand[0].seconds,
                "by hand / found": hand[0].seconds / found.best.seconds,
            }
        )
        details[name] = {"found": found.best.json(), "by hand": [e.json() for e in hand]}
        print(measure.as_table(rows[-1:]), flush=True)
    result = {
        "benchmark": "searched",
        "title": "A search against meshes written by hand: predicted, compiled, not run",
        "table": rows,
        "details": details,
    }
    print(f"written: {measure.write_result('searched', result).name}")


if __name__ == "__main__":
    main()
