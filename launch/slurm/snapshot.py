"""A copy of the code as it is now, so that edits made while a job waits or runs do not reach it."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def snapshot(target: Path, root: Path = ROOT) -> str:
    """Copy the code in `root` to the new directory `target`; what was copied, in words.

    Of a git checkout: a clone at its commit with the uncommitted and the untracked files laid over it, so
    that in the copy `git diff` shows what was not committed and a run's manifest finds both. Untracked files
    count where code is: in the rooms and at the top, not what runs have left elsewhere.
    """
    if _git(root, "rev-parse", "--show-toplevel", check=False).strip() != str(root.resolve()):
        return _copy_rooms(target, root)
    commit = _git(root, "rev-parse", "HEAD").strip()
    # Objects are linked, not copied, where that is possible; the copy stays whole if the original goes.
    _run("git", "clone", "--quiet", "--no-checkout", str(root), str(target))
    _git(target, "checkout", "--quiet", "--detach", commit)
    changed = _names(root, "diff", "--name-only", "--no-renames", "-z", "HEAD")
    others = _names(root, "ls-files", "--others", "--exclude-standard", "-z")
    untracked = [name for name in others if "/" not in name or name.split("/")[0] in rooms(root)]
    for name in changed + untracked:
        _lay_over(root / name, target / name)
    extra = f" with {len(changed + untracked)} files that are not committed" if changed + untracked else ""
    return f"commit {commit[:9]}{extra}"


def rooms(root: Path) -> list[str]:
    """The packages at the top of a checkout, by name."""
    return sorted(path.parent.name for path in root.glob("*/__init__.py"))


def _copy_rooms(target: Path, root: Path) -> str:
    target.mkdir(parents=True)
    for room in rooms(root):
        shutil.copytree(root / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [root / "train.py", *root.glob("*.toml"), *root.glob("requirements*.lock")]:
        shutil.copy2(path, target)
    return f"the files in {root}, which is no git checkout"


def _lay_over(source: Path, target: Path) -> None:
    """What a commit does not have: a new content, a new file, or that a file is gone."""
    if not os.path.lexists(source):
        target.unlink(missing_ok=True)
    elif source.is_file() or source.is_symlink():  # an untracked repository is listed as a directory
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


def _names(root: Path, *arguments: str) -> list[str]:
    return [name for name in _git(root, *arguments).split("\0") if name]


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    return _run("git", "-C", str(root), *arguments, check=check)


def _run(*command: str, check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""  # without git the rooms are copied
    if check and done.returncode:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise OSError(f"the code cannot be copied: {' '.join(command[:4])}: {said}")
    return done.stdout
