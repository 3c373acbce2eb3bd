"""A command ends as it would, whoever reads it and whatever letters its terminal has."""

import ast
import inspect
import os
import pty
import subprocess
import sys

import pytest

from common.checks import as_text
from common.terminal import write_at_once
from scripts import command
from tests.test_layering import ROOT, sources

# Prints in every way that we do, long after its reader is gone, and ends with a status of its own.
PRINTS = """
import sys
from rich.console import Console
from common.terminal import steady_streams, write_at_once
steady_streams()
print("first", flush=True)
sys.stdin.readline()
for _ in range(3):
    print("gr\\u00f6\\u00dfe \\ufffd \\udce9", flush=True)
    Console().print("rich")
    sys.stdout.buffer.write(b"bytes" * 10_000)
    write_at_once(1, "at once")
    print("to stderr", file=sys.stderr)
print("unflushed", end="")
sys.exit(7)
"""


def start(code, **how):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE} | how
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **how)


def end(process):
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_stops_reading_ends_nothing(unbuffered):
    with start(PRINTS, env={"PYTHONUNBUFFERED": unbuffered}) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        end(process)
        assert process.stderr.read() == b"to stderr\n" * 3


def test_who_stops_reading_both_ends_nothing():
    with start(PRINTS, stderr=subprocess.STDOUT) as process:
        process.stdout.close()
        end(process)


def test_a_terminal_that_is_closed_ends_nothing():
    ours, theirs = pty.openpty()
    with start(PRINTS, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 5) == b"first"
        os.close(ours)
        end(process)


def test_streams_that_were_closed_before_are_no_files_that_come_after(tmp_path):
    opens = f"held = open({str(tmp_path / 'held')!r}, 'w')\nsys.stdin.readline"
    closed = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable]
    command = [*closed, PRINTS.replace("sys.stdin.readline", opens)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=ROOT, env=env, input=b"\n", timeout=60).returncode == 7
    assert (tmp_path / "held").read_bytes() == b""


def test_a_disk_that_is_full_is_still_an_error():
    with open("/dev/full", "wb") as full, start(PRINTS, stdout=full) as process:
        _, err = process.communicate(b"\n", timeout=60)
    assert process.returncode == 1 and b"No space left on device" in err


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"gr??e ? ?"), ("latin-1", b"gr\xf6\xdfe ? ?"), ("utf-8", "größe \ufffd ?".encode())],
)
def test_letters_that_a_terminal_lacks_are_replaced(encoding, shown):
    with start(PRINTS, env={"PYTHONIOENCODING": encoding}) as process:
        out, err = process.communicate(b"\n", timeout=60)
    assert process.returncode == 7 and err == b"to stderr\n" * 3
    assert out.count(shown + b"\n") == 3 and out.endswith(b"unflushed")


def test_what_is_written_past_all_buffers_may_have_no_reader():
    reader, writer = os.pipe()
    os.close(reader)
    write_at_once(writer, "to nowhere")
    os.close(writer)
    write_at_once(writer, "to what is closed")


def test_a_value_is_text_or_one_line():
    assert as_text("prompt", "größe") == as_text("prompt", os.fsdecode("größe".encode())) == "größe"
    in_ascii = "größe".encode().decode("ascii", "surrogateescape")
    assert as_text("prompt", in_ascii) == "größe"
    for bad in ("\udce9", "a\ud800"):
        with pytest.raises(ValueError, match=r"^prompt=a?\\ud[c8][e0][90] is not UTF-8; type it"):
            as_text("prompt", bad)


def starts(path):
    """What a file does first where it is the command, imports and `sys.path` aside; None where it is none."""
    guards = [
        node
        for node in ast.parse(path.read_bytes()).body
        if ast.unparse(node).startswith("if __name__ == '__main__'")
    ]
    done = [ast.unparse(act) for guard in guards for act in guard.body]
    return next((act for act in done if not act.startswith(("import command", "from "))), None)


def test_every_command_begins_with_steady_streams():
    commands = {path: starts(path) for path in [ROOT / "train.py", *(ROOT / "scripts").glob("*.py")]}
    assert {path.name for path, first in commands.items() if first} > {"train.py", "plan.py", "slurm.py"}
    assert {commands[ROOT / name] for name in ("train.py", "scripts/check_cluster.py")} == {
        "steady_streams()"
    }
    assert {act.partition("(")[0] for act in commands.values() if act} == {"steady_streams", "command.start"}
    first = ast.parse(inspect.getsource(command.start)).body[0].body[1]
    assert ast.unparse(first) == "steady_streams()"


def unspoken(source):
    """Lines where a text file is read or written in whatever encoding the locale has."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = [w.value for w in words if isinstance(w, ast.Constant) and w.value in MODES]
        if (
            (name == "read_text" and not node.args)
            or (name == "write_text" and len(node.args) < 2)
            or (name in ("open", "fdopen") and modes)
            or (isinstance(node.func, ast.Name) and name == "open" and len(words) == 1)
        ):
            yield node.lineno


MODES = {kind + plus + text for kind in "rwax" for plus in ("", "+") for text in ("", "t")}


def test_every_text_file_has_an_encoding_of_its_own():
    """A finished run ended with 1 where its samples had a letter that the locale lacks."""
    found = [f"{path}:{line}" for path in sources() for line in unspoken(path.read_bytes())]
    assert not found, "\n".join(found)
    bad = ["p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "p.open('a')", "os.fdopen(1, 'w')"]
    good = ["p.read_text('utf-8')", "p.write_text(x, encoding='utf-8')", "open(p, 'rb')", "p.open('wb')"]
    assert [bool(list(unspoken(line))) for line in bad + good] == [True] * 6 + [False] * 4


# A locale of ASCII alone, which Python would otherwise take for UTF-8.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_a_run_whose_reader_ends_in_a_locale_of_ascii_is_done_with_all_its_files(ground):
    small = ("model.num_layers=1", "model.d_ff=32", "training.num_steps=6", "sample.max_new_tokens=4")
    command = [sys.executable, "train.py", *ground.words("deaf", *small), 'sample.prompts=["größe"]']
    env = {**os.environ, **ASCII, "XLA_FLAGS": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=240)) == (b"", 0)
    assert len([row for row in ground.rows("deaf") if "loss" in row]) == 6
    assert "größe" in (ground.run("deaf") / "samples/6.txt").read_text("utf-8")
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=240)
    assert (again.returncode, again.stderr) == (0, b"")
    assert b"gr??e" in again.stdout
    command[-1] = b'sample.prompts=["\xe9"]'
    bad = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=240)
    assert (bad.returncode, bad.stderr.count(b"\n"), bad.stdout) == (2, 1, b"")
    assert bad.stderr.startswith(b"error: sample.prompts=\\udce9 is not UTF-8")
