"""Every command of the documentation: those of train.py and torchrun are run, with less to do, the others are parsed.

A command that no test knows what to do with fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

from sam_fused.extension import BUILD_COMMAND
from tests.docs.pages import PAGES, Block, blocks
from tests.experiments.test_train import folder
from tests.helpers.paths import ROOT


def commands_of(block: Block) -> list[list[str]]:
    """Split as a shell does; without a loop around them."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] not in ("for", "done;"):
            found.append([word for word in words if word != "&"])
    return found


BASH = blocks("bash")
COMMANDS = {f"{at}, {i}": words for at, block in BASH.items() for i, words in enumerate(commands_of(block))}
TRAINING = {at: block for at, block in BASH.items() if any("train.py" in words for words in commands_of(block))}


def settings(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that are set before a command, and the command."""
    n = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:n]), words[n:]


@pytest.mark.parametrize("at", COMMANDS)
def test_command(at, monkeypatch):
    variables, words = settings(COMMANDS[at])
    assert variables.keys() <= {"SAM_FUSED_CUDA"}
    match words:
        case ["make", *targets]:
            done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        case ["pip", "install", *_]:
            # test_package.py builds; with isolation pip would build against another torch
            assert "." not in words or "--no-build-isolation" in words
        case ["python", "-m", "pytest", path, *_]:
            assert (ROOT / path).exists()
        case ["python", "-m", module, *arguments]:
            parses(module, arguments, monkeypatch)
        case ["python", "train.py", *_] | ["torchrun", "--nproc-per-node", _, "train.py", *_]:
            assert at.rpartition(",")[0] in TRAINING  # test_training_commands runs it
        case _:
            pytest.fail(f"what is to be done with {shlex.join(words)}?")


class Parsed(Exception):
    pass


def parses(module: str, arguments: list[str], monkeypatch) -> None:
    """The module's main takes these arguments, and does nothing with them here."""
    main = importlib.import_module(module).main
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        main()


#: Less to do; the last of two equal flags counts.
LESS = ["--epochs", "1", "--width", "2", "--batch-size", "10", "--arch", "vgg16", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("at", TRAINING)
def test_training_commands(at, tmp_path):
    """One after the other in one folder."""
    data = folder(tmp_path / "images", per_class=2)
    for words in commands_of(TRAINING[at]):
        words = [str(data) if word == "DIR" else str(ROOT / word) if word == "train.py" else word for word in words]
        if words[0] == "torchrun":
            words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:], *([] if "--report" in words else LESS)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        if "--out" in words:
            assert (tmp_path / words[words.index("--out") + 1] / "metrics.jsonl").exists()


def test_commands_are_found():
    assert len(COMMANDS) > 10
    assert TRAINING


def test_commands_in_the_text():
    """In a line of text: the modules, the targets and the scripts are there."""
    makefile = (ROOT / "Makefile").read_text()
    assert BUILD_COMMAND in (ROOT / "README.md").read_text()
    for page in PAGES:
        for module in re.findall(r"`python -m ([\w.]+)", page.read_text()):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"
        for target in re.findall(r"`make ([\w-]+)", page.read_text()):
            assert f"\n{target}:" in makefile, f"{page.name}: {target}"
        for script in re.findall(r"`([\w/]+\.py)", page.read_text()):
            assert (ROOT / script).exists() or (ROOT / "sam_fused" / script).exists(), f"{page.name}: {script}"
