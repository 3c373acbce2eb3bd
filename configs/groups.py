"""The groups that a command line may choose from: directories of YAML files, read without Hydra."""

from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parent
APART = ("suite", "load", "compress")  # what `eval.suite` names, presets of scripts/load.py, recipes


def options(group: str, root: Path = CONFIG_DIR) -> list[str]:
    """What GROUP=NAME may name; files that begin with an underscore are shared parts."""
    return sorted(p.stem for p in (root / group).glob("*.yaml") if not p.stem.startswith("_"))


def groups(root: Path = CONFIG_DIR) -> list[str]:
    """The groups there are: directories with YAML files, but for those that are no part of a run's config."""
    return sorted(
        p.name for p in root.iterdir() if p.is_dir() and p.name not in APART and options(p.name, root)
    )


def mesh_rules() -> dict[str, list[str]]:
    """The rules that meshes share: which of their axes split what, for weights that no run has."""
    import yaml

    return yaml.safe_load((CONFIG_DIR / "mesh" / "_rules.yaml").read_text("utf-8"))["rules"]
