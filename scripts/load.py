"""A load test of a server: `python scripts/load.py URL preset=peak`.

    URL                http://HOST:PORT of a server that speaks OpenAI's completions: ours, or vLLM's
    preset=steady      {presets}; or a path to a YAML file
    output=DIR         for report.md, report.json and two pictures; null: runs/load/PRESET
    api_key_file=PATH  the key to send; null: none
    host=HOST          said once more where the server is not on this machine, and is yours to load
    KEY=VALUE          a key of the preset, such as seed=1, duration=0.2, prompt.most=100, saturation=20;
                       serving/load/config.py has all of them

Rates of a preset are multiples of what the server can do, which is measured first. Everything is bounded in
count and in time. Exit status: 0 where every request was answered or refused, 1 where one failed, 2 for bad
input and where the server cannot be tested.
"""

import asyncio
import ipaddress
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import command

from common.checks import choice
from common.text import first_line
from configs.groups import CONFIG_DIR, options
from scripts.command import run
from serving.load.config import LoadConfig

OWN = ("preset", "output", "api_key_file", "host")


def load_config(preset: str, words: Sequence[str]) -> LoadConfig:
    """The preset with these words over it. Raises ValueError in one line, OSError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(preset)
    if path.suffix != ".yaml":
        choice("preset", preset, options("load"))
        path = CONFIG_DIR / "load" / f"{preset}.yaml"
    stored = OmegaConf.load(path)
    try:
        schema = OmegaConf.structured(LoadConfig)
        made = OmegaConf.to_object(OmegaConf.merge(schema, stored, OmegaConf.from_dotlist(list(words))))
    except OmegaConfBaseException as error:
        raise ValueError(f"{first_line(error)}; serving/load/config.py has the keys") from None
    assert isinstance(made, LoadConfig)
    if made.trace and not Path(made.trace).is_absolute() and not Path(made.trace).exists():
        made.trace = str(path.parent / made.trace)  # beside the preset
    return made


def check_host(host: str, named: str | None) -> None:
    """ValueError where another machine would be loaded and nobody has said twice that it is theirs."""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if not here and named != host:
        raise ValueError(
            f"{host} is not this machine; a load test of a server that is yours says host={host} too"
        )


def do(arguments: Sequence[str]) -> int:
    """Test, write, say what came out."""
    from serving.load.client import Target
    from serving.load.drive import drive
    from serving.load.report import verdicts, write_report

    urls = [word for word in arguments if "://" in word.partition("=")[0] or "=" not in word]
    if len(urls) != 1:
        raise ValueError(
            "give one URL of a server, as in http://127.0.0.1:8000; --help shows the whole command"
        )
    own = dict(word.split("=", 1) for word in arguments if word.partition("=")[0] in OWN)
    preset = own.get("preset", "steady")
    rest = [w for w in arguments if w not in urls and w.partition("=")[0] not in OWN]
    config = load_config(preset, rest)
    key = Path(own["api_key_file"]).read_text("utf-8").split() if "api_key_file" in own else [None]
    target = Target.of(urls[0], key[0])
    check_host(target.host, own.get("host"))
    recording = asyncio.run(drive(target, config))
    output = Path(own.get("output", f"runs/load/{Path(preset).stem}"))
    figures = write_report(output, config, recording, f"Load test: {Path(preset).stem}")
    print("\n".join(verdicts(figures)))
    print(f"{output}/report.md")
    return 1 if figures["failures"]["count"] else 0


def main(arguments: Sequence[str]) -> int:
    """Exit status: see the module's docstring."""
    purpose = (__doc__ or "").format(presets=", ".join(options("load")))
    return run(do, arguments, purpose)


if __name__ == "__main__":
    command.start(main)
