"""Execute the Dockerfile where no image can be pulled: `make test-docker`. Needs root, mmdebstrap, a network.

The base is what `debian:…-slim` is made of: a minimal Debian of the same release, put up by mmdebstrap. Every
instruction is then done in a root directory of its own, RUN by chroot with the image's variables alone, in
namespaces where mounts and processes end with it. Last the image's entry point trains, is asked to leave, and
goes on, as the image's user. Exit status 0 only where all of that came out right.

    --lock requirements-cuda.lock   the packages of another lock (gigabytes), without the run at the end
    --keep DIR                      leave the roots there, instead of in a temporary directory
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.docker.instructions import ROOT, Stage, context, filled, pair, pairs, stages, words

RELEASES = {"12": "bookworm", "13": "trixie"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# How this machine reaches its mirrors is the builder's business, as a proxy is Docker's; no image has it.
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL")
CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
ENTER = """
mount --make-rprivate / && mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" || exit 125
mount -t tmpfs shm "$0/dev/shm"
exec chroot --userspec="$1" "$0" /bin/sh -c 'cd "$0" && exec "$@"' "$2" "${@:3}"
"""


@dataclass
class Image:
    """A root directory, and what an image says about it."""

    root: Path
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    workdir: str = "/"
    user: str = "0:0"
    entry: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    def start(self, command: list[str], extra: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """A command in here, as the image's user, as process 1 of its own."""
        inside = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "bash",
            "-c",
            ENTER,
            str(self.root),
        ]
        return subprocess.Popen(
            [*inside, self.user, self.workdir, *command], env={**self.env, **(extra or {})}, **options
        )

    def run(self, command: list[str], extra: dict[str, str] | None = None) -> None:
        """The same to its end. CalledProcessError with what it said, unless it ended well."""
        process = self.start(command, extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, _ = process.communicate(timeout=1500)
        if process.returncode:
            print(said[-4000:])
            raise subprocess.CalledProcessError(process.returncode, command)


class Builder:
    """Docker's instructions, as far as the Dockerfile uses them; another one is a KeyError."""

    def __init__(self, folder: Path, arguments: dict[str, str]):
        self.folder, self.arguments = folder, arguments
        self.images: dict[str, Image] = {}

    def build(self, text: str) -> Image:
        """Every stage in order; the last one's image."""
        given, found = stages(text)
        for stage in found:
            self.images[stage.name] = self.stage(stage, filled(stage.base, given | self.arguments))
        return self.images[found[-1].name]

    def stage(self, stage: Stage, base: str) -> Image:
        root = self.folder / stage.name
        with timed(f"FROM {base} AS {stage.name}"):
            if base in self.images:
                copy(self.images[base].root, root)
                before = self.images[base]
                image = Image(root, dict(before.env), before.workdir, before.user)
            else:
                bootstrap(base, root)
                image = Image(root)
        scope: dict[str, str] = {}
        for name, value in stage.steps:
            with timed(f"{name} {value}"):
                getattr(self, name.lower())(image, value, scope)
        return image

    def arg(self, image: Image, value: str, scope: dict[str, str]) -> None:
        name, default = pair(value)
        scope[name] = self.arguments.get(name, default)

    def env(self, image: Image, value: str, scope: dict[str, str]) -> None:
        image.env |= pairs(filled(value, scope | image.env))

    def label(self, image: Image, value: str, scope: dict[str, str]) -> None:
        image.labels |= pairs(filled(value, scope | image.env))

    def workdir(self, image: Image, value: str, scope: dict[str, str]) -> None:
        image.workdir = value
        (image.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def user(self, image: Image, value: str, scope: dict[str, str]) -> None:
        image.user = value

    def entrypoint(self, image: Image, value: str, scope: dict[str, str]) -> None:
        image.entry = words(value)

    def run(self, image: Image, value: str, scope: dict[str, str]) -> None:
        with builders_way_out(image.root) as extra:
            image.run(["/bin/sh", "-c", value], scope | extra)

    def copy(self, image: Image, value: str, scope: dict[str, str]) -> None:
        *sources, target = filled(value, scope | image.env).split()
        place = image.root / os.path.join(image.workdir, target).lstrip("/")
        if sources[0].startswith("--from="):
            (source,) = sources[1:]
            copy(self.images[sources[0].removeprefix("--from=")].root / source.lstrip("/"), place)
        elif sources == ["."]:
            for path in context():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, place / path)
        else:
            (source,) = sources
            assert Path(source) in context(), f"{source} is not in the context"
            shutil.copy(ROOT / source, place)


def copy(source: Path, target: Path) -> None:
    """A tree with its owners and modes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--reflink=auto", "--no-target-directory", source, target], check=True)


def bootstrap(base: str, root: Path) -> None:
    """A minimal Debian of the release that `debian:RELEASE-slim` names."""
    match = re.fullmatch(r"debian:(\d+)\.\d+-slim", base)
    assert match, base
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", RELEASES[match[1]], str(root)]
    subprocess.run(command, check=True, timeout=1200)  # half a minute, but beside other work


@contextmanager
def builders_way_out(root: Path) -> Iterator[dict[str, str]]:
    """While a RUN lasts: this machine's resolver, proxies and certificates, none of which the image keeps."""
    extra = {name: os.environ[name] for name in PROXIES if name in os.environ}
    borrowed = root / "tmp/builder"
    borrowed.mkdir()
    for name in CERTIFICATES:
        if name in os.environ and Path(os.environ[name]).is_file():
            shutil.copy(os.environ[name], borrowed / name)
            extra[name] = f"/tmp/builder/{name}"
    resolver, hosts = root / "etc/resolv.conf", Path("/etc/resolv.conf")
    before = resolver.read_bytes() if resolver.is_file() else None
    resolver.write_bytes(hosts.read_bytes())
    try:
        yield extra
    finally:
        shutil.rmtree(borrowed)
        if before is None:
            resolver.unlink()
        else:
            resolver.write_bytes(before)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"{what[:100]:100} ", end="", flush=True)
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:6.1f} s", flush=True)


def check_contents(image: Image) -> None:
    """No caches, no tools of the build, nothing that the image's user could change but where it writes."""
    left = [
        "root/.cache",
        "var/lib/apt/lists/*_dists_*",
        "cambrian/.git",
        "cambrian/tests",
        "opt/packages.lock",
    ]
    found = [str(path) for pattern in left for path in image.root.glob(pattern)]
    assert not found, found
    owned = [path for path in (image.root / "cambrian").iterdir() if path.stat().st_uid == 10001]
    assert not owned, owned
    assert image.labels["org.opencontainers.image.revision"] == COMMIT
    image.run(["python", "-m", "pip", "check"])
    image.run(["python", "-c", "import train, training.loop, jax; print(jax.__version__)"])


def check_run(image: Image) -> None:
    """The entry point trains, leaves with 75 when asked to, goes on, and knows its commit."""
    run = image.root / "cambrian/runs/debug"
    long = ["+experiment=debug", "training.num_steps=100000", "schedule=constant"]
    process = image.start([*image.entry, *long], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)
    os.kill(first_inside(process.pid), signal.SIGTERM)  # as `docker stop` and the kubelet do
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 75, (process.returncode, said[-2000:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = rows[-1]["step"]
    assert json.loads((run / "manifest.json").read_text("utf-8"))["git"]["sha"] == COMMIT
    image.run([*image.entry, *long[:1], "schedule=constant", f"training.num_steps={steps + 5}"])
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in after if "loss" in row] == list(range(1, steps + 6))


def check_server(image: Image) -> None:
    """The same image serves the run: all is compiled, it is ready, and ends when asked to."""
    url = image.root / "cambrian/runs/url"
    words = [*image.entry[:-1], "scripts/serve.py", "debug", "port=0", "slots=2", "url_file=runs/url"]
    process = image.start(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 600
    while not url.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)
    os.kill(first_inside(process.pid), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, (process.returncode, said[-2000:])


def first_inside(launcher: int) -> int:
    """The process that is number 1 inside, by its number out here."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text("utf-8").split()
    return int(children[0])


@contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    """The folder named, which must be new, or a temporary one that is gone afterwards."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # the image's user goes through it
        yield Path(name)


def main() -> int:
    """Exit status: 0 all right, 1 not, 2 where it cannot be tried here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lock", default="requirements-serve.lock")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        print(
            "error: a clean root needs root's rights and mmdebstrap (apt-get install mmdebstrap)",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    with folder_for(options.keep) as folder:
        builder = Builder(folder, {"LOCK": options.lock, "COMMIT": COMMIT})
        image = builder.build((ROOT / "Dockerfile").read_text("utf-8"))
        with timed("contents"):
            check_contents(image)
        if options.lock == "requirements-serve.lock":
            with timed("train, SIGTERM, go on"):
                check_run(image)
            with timed("serve what was trained"):
                check_server(image)
    print(f"the Dockerfile's instructions came out right in a clean root: {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
