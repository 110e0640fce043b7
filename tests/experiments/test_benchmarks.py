"""The benchmark scripts run and write what they promise. How long anything takes is not looked at."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from benchmarks.speed import rivals, step, timing
from benchmarks.speed.floor import Floor, streams
from sam_fused import ReferenceSAM
from tests.helpers.cases import assert_near, set_grads
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def run(script: str, *flags: str, status: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", f"benchmarks.speed.{script}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def report(monkeypatch, capsys):
    """``step`` with these flags in this process, which takes less time to begin: what it prints and its verdict."""

    def called(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["step", *flags])
        verdict = ""
        try:
            step.main()
        except SystemExit as error:
            verdict = str(error)
        return capsys.readouterr().out, verdict

    return called


def cell(ours: list[float], **others: list[float]) -> dict:
    return {
        **{"list": "resnet18", "tensors": 62, "numel": 11173962, "base": "adam", "adaptive": False, "threads": 2},
        **{"reference": "FusedSAM", "ms": {"FusedSAM": ours, **others}, "floor_ms": 8.0},
        **{"others": 0.01, "load": [0.1, 2.0]},
    }


def test_ratios_are_taken_round_by_round():
    """The rival takes twice as long in every round, and the rounds differ by much more than that."""
    c = cell([1.0, 10.0, 100.0, 1000.0, 10000.0], rival=[2.0, 20.0, 200.0, 2000.0, 50000.0])
    assert timing.ratio(c, "rival") == (2.0, 2.0, 2.0)
    assert timing.median(c, "rival") == 200.0
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.ratio_words(cell([1.0] * 3, rival=[5.0, 3.0, 4.0]), "rival") == "4.00 (3.50 to 4.50)"


@pytest.mark.parametrize(
    ("ours", "change", "reason"),
    [
        ([10.0] * 20, {}, ""),
        ([10.0] * 10 + [12.0] * 10, {}, ""),
        ([10.0] * 10 + [14.0] * 10, {}, "spread 0.33"),
        ([10.0] * 19, {}, "n below 20"),
        ([10.0] * 20, {"others": 0.26}, "others had 0.26 processors"),
        ([10.0] * 20, {"others": None}, ""),
        ([10.0] * 19 + [7.9], {}, "below the floor"),
        ([10.0] * 20, {"floor_ms": 11.0, "others": 1.0}, "others had 1.00 processors, below the floor"),
    ],
)
def test_a_disturbed_cell_is_marked(ours, change, reason):
    c = {**cell(ours), **change}
    assert timing.disturbed(c) == reason
    if reason:
        with pytest.raises(SystemExit, match=r"^1 of 2 cells were disturbed .*: this run should not be committed$"):
            timing.conclude([cell([10.0] * 20), c])
    else:
        timing.conclude([c])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_benchmark_leaves_no_worker(how):
    """It would keep a processor busy, and disturb the next one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        cell = f"import socket, time; s = socket.create_connection({server.getsockname()!r}); time.sleep(600)"
        program = f"from benchmarks.speed.timing import alone\nif __name__ == '__main__':\n    alone(exec, {cell!r})\n"
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        worker, _ = server.accept()
    with worker:
        worker.settimeout(60)
        process.send_signal(how)
        process.wait()
        assert worker.recv(1) == b""  # the system has closed the worker's end


@pytest.mark.skipif(timing.busy() is None, reason="/proc/stat does not tell")
def test_others_are_counted_and_this_process_is_not(monkeypatch):
    """Another process that has a processor for a second; and a clock of others that runs twice as fast as time."""
    start = timing.busy()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    assert timing.busy() - start > 0.9
    lines = "cpu  100 20 30 900 40 5 6 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    monkeypatch.setattr(timing.Path, "read_text", lambda self: lines)
    monkeypatch.setattr(timing.time, "process_time", lambda: 1.25)
    assert timing.busy() == (100 + 20 + 30 + 5 + 6 + 7) / os.sysconf("SC_CLK_TCK") - 1.25


@pytest.mark.parametrize(("seconds", "share"), [(2.0, 2.0), (0.9, None)])
def test_a_cell(monkeypatch, seconds, share):
    """Every call once a round, in other orders; times in milliseconds; too short a cell cannot tell of others."""
    now, called = [0.0], []

    def call(name: str, ms: float) -> None:
        called.append(name)
        now[0] += ms / 1e3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "busy", lambda: 2 * now[0])
    each = seconds * 1e3 / 20
    calls = {"a": lambda: call("a", 0.75 * each), "b": lambda: call("b", 0.25 * each)}
    c = timing.measure(calls, 20, "a", warm_up=1)
    assert c["ms"]["a"] == pytest.approx([0.75 * each] * 20, abs=1e-3)
    assert timing.ratio(c, "b") == pytest.approx((1 / 3,) * 3, abs=1e-3)
    assert c["others"] == share
    rounds = list(zip(called[2::2], called[3::2], strict=True))
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert len(rounds) == 20


def test_caches_are_emptied_before_a_call_and_not_before_it_is_made_again(monkeypatch):
    """Times apart, and what is between calls in neither; a call that is not timed comes first."""
    now, happened = [0.0], []

    class Buffer:
        def add_(self, _):
            happened.append("emptied")
            now[0] += 100.0

    def call() -> None:
        now[0] += 1e-3 if happened[-1] == "emptied" else 2e-3
        happened.append("called")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.torch, "zeros", lambda numel: Buffer())
    happened.append("nothing")
    c = timing.measure({"a": call}, 3, "a", warm_up=1, cold=True, again=True)
    assert happened == ["nothing", "called", *["called", "emptied", "called", "called"] * 3]
    assert c["ms"]["a"] == pytest.approx([1.0] * 3)
    assert c["again"]["ms"]["a"] == pytest.approx([2.0] * 3)


def test_the_report_of_a_step(tmp_path, report):
    """step.md and step.png of a json; the exit status is the verdict."""
    quiet = cell([10.0] * 20, **{"foreach + fused base": [20.0] * 20, "FusedMSAM": [9.0] * 20})
    quiet["peak_extra"] = {"FusedSAM": 1.0}
    env = {"cpu": "a processor", "instruction_set": "avx2", "torch": "2.6", "threads": 2}
    (tmp_path / "step.json").write_text(json.dumps({"environment": env, "cells": [quiet]}))
    printed, said = report("--report-only", "--out", str(tmp_path))
    assert said == ""
    assert (tmp_path / "step.md").read_text() == printed.removesuffix("\n")
    assert "| list | optimizer | threads | n | FusedSAM | time / floor | disturbed | foreach + fused base |" in printed
    assert "| resnet18 | SAM + adam | 2 | 20 | 10.00 | 1.25 | | 20.00: 2.00 (2.00 to 2.00) |" in printed
    assert "| resnet18 | SAM + adam | 2 | 20 | 10.00 | 9.00: 0.90 (0.90 to 0.90) |" in printed
    assert "Not measured: davda54/sam (--davda54 FILE)." in printed
    assert "Made again at once" not in printed
    assert (tmp_path / "step.png").stat().st_size > 1000
    loud = {**quiet, "others": 0.9}
    (tmp_path / "step.json").write_text(json.dumps({"environment": env, "cells": [quiet, loud]}))
    printed, said = report("--report-only", "--out", str(tmp_path))
    assert "| 10.00 | 1.25 | others had 0.90 processors | 20.00: 2.00 (2.00 to 2.00) |" in printed
    assert "1 of 2 cells were disturbed" in said


def test_step(tmp_path):
    copy = tmp_path / "sam.py"
    copy.write_text("from pytorch_optimizer import SAM\n")
    flags = ["--lists", "1000x100", "--bases", "adam", "--threads", "1", "--rounds", "2", "--no-heavyball"]
    printed, said = run("step", *flags, "--davda54", str(copy), "--out", str(tmp_path), status=1)
    cells = json.loads((tmp_path / "step.json").read_text())["cells"]
    assert [(c["base"], c["adaptive"], c["tensors"], c["threads"]) for c in cells] == [
        ("adam", False, 1000, 1),
        ("adam", True, 1000, 1),
    ]
    for c in cells:
        assert {*rivals.RIVALS, "davda54/sam", "FusedMSAM", "base", "base, fused=True"} <= c["ms"].keys()
        assert {len(times) for times in c["ms"].values()} == {2}
        assert c["floor_ms"] > 0
        assert c["again"]["ms"].keys() == c["ms"].keys()
    memory = cells[0]["peak_extra"]  # the backup and nothing else; it is no timing
    assert 1 <= memory["FusedSAM"] < 1.02
    assert 1 <= memory["FusedMSAM"] < 1.02
    assert printed.count("| 1000x100 | ASAM + adam | 1 | 2 |") == 3
    assert "Made again at once" in printed
    assert "n below 20" in printed
    assert "2 of 2 cells were disturbed" in said
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_step_wants_a_file(tmp_path, report):
    _, said = report("--out", str(tmp_path), "--davda54", str(tmp_path / "no.py"))
    assert said.startswith("--davda54: expected the path of davda54/sam's sam.py, got ")


@pytest.mark.parametrize("base", rivals.BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_floor_has_the_traffic_of_a_step(base, adaptive):
    """Streams as the design counts them, and each part takes the least time of all calls."""
    states = {"adam": 2, "adamw": 2, "sgd_momentum": 1}[base]
    assert streams(base, adaptive) == 1 + adaptive + 4 + 3 + 2 * states
    floor = Floor(1000, base, adaptive)
    floor()
    first = dict(floor.least)
    floor()
    assert all(0 < floor.least[part] <= first[part] for part in ("norm", "perturb", "update"))
    assert floor.ms == pytest.approx(1e3 * sum(floor.least.values()))


def test_the_floors_kernel():
    """Reads all, writes all: the mean, to arrays that are read and to others, past the cache or not."""
    floor = Floor(64, "adam", False)
    x, y, z = (torch.arange(192.0) + i for i in range(3))
    total = floor.move([x, y], [x], [z])
    assert torch.equal(x, torch.arange(192.0) + 0.5)
    assert torch.equal(z, x)
    assert total > 0


def test_training(tmp_path):
    flags = ["--rounds", "2", "--archs", "vgg16", "--widths", "2"]
    printed, said = run("training", "--out", str(tmp_path), *flags, status=1)
    network = json.loads((tmp_path / "train.json").read_text())["networks"][0]
    assert {"FusedSAM", "FusedMSAM", "FusedSAM, --norm-only"} <= network["ms"].keys()
    assert "torchvision transforms, DataLoader" in printed
    assert "2 of 2 cells were disturbed" in said


def test_features():
    """What the table says of FusedSAM; the probes of the others are asked of pytorch_optimizer's SAM alone."""
    printed, _ = run("features")
    header, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert header[0] == "FusedSAM"
    assert header[1].startswith("pytorch_optimizer")
    answers = {row[0]: row[1] for row in rows}
    assert int(answers.pop("operator calls per step, ResNet-18 + Adam").split()[0]) < 20
    assert len(answers) == 20
    assert not {name: words for name, words in answers.items() if not words.startswith("yes")}
    assert any(row[2].startswith("no") for row in rows)


def test_the_rivals_compute_the_same():
    """A rival that did less would be no rival: one step of each from the same weights and gradients."""
    for base, options in rivals.BASES.values():
        for adaptive in (False, True):
            ends = {}
            reference = {"ReferenceSAM": lambda p, b, a, **o: ReferenceSAM(p, b, rho=rivals.RHO, adaptive=a, **o)}
            for name, make in (reference | rivals.RIVALS).items():
                g = torch.Generator().manual_seed(0)
                params = [torch.nn.Parameter(torch.randn(n, generator=g)) for n in (5, 300)]
                opt = make(params, base, adaptive, **options)
                for seed in range(2):
                    set_grads(params, 2 * seed)
                    opt.first_step()
                    ends.setdefault(f"{name}, perturbed", torch.cat([p.detach().clone() for p in params]))
                    set_grads(params, 2 * seed + 1)
                    opt.second_step()
                ends[name] = torch.cat([p.detach().clone() for p in params])
            for name, end in ends.items():
                expected = ends["ReferenceSAM, perturbed" if "perturbed" in name else "ReferenceSAM"]
                assert_near(end, expected, 1e-5, f"{name}, {base.__name__}, adaptive {adaptive}")
