"""train.py: data, augmentation, networks, and runs that are killed and go on."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from sam_fused import FusedSAM

SCRIPT = Path(train.__file__)
TINY = ["--dataset", "digits", "--train-size", "120", "--width", "8", "--batch-size", "32", "--threads", "1"]


def settings(*flags: str) -> train.Settings:
    return train.settle(train.parse(list(flags)))


def metrics(out: Path) -> list[dict]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


# ---- settings ----


def test_recipes():
    s = settings("--recipe", "paper-text", "--base", "sgd")
    assert (s.rho, s.adaptive, s.lr, s.label_smoothing) == (0.05, False, 0.1, 0.0)
    s = settings("--recipe", "paper-text", "--base", "adam")
    assert (s.lr, s.epochs, s.batch_size, s.width) == (1e-3, 200, 128, 64)
    for base in ("sgd", "adam"):
        s = settings("--recipe", "paper-code", "--base", base)
        assert (s.rho, s.adaptive, s.lr, s.weight_decay, s.label_smoothing) == (2.0, True, 1e-3, 5e-4, 0.1)


def test_a_flag_given_by_hand_wins():
    s = settings("--recipe", "paper-code", "--rho", "0", "--no-adaptive", "--lr", "0.3", "--label-smoothing", "0")
    assert (s.rho, s.measure_rho, s.adaptive, s.lr, s.label_smoothing) == (0.0, 2.0, False, 0.3, 0.0)


@pytest.mark.parametrize(
    "flags",
    [
        ["--ascent-fraction", "0"],
        ["--sam-every", "0"],
        ["--lr", "-1"],
        ["--arch", "vit"],
        ["--weight-decay", "-1"],
        ["--label-smoothing", "1.5"],
    ],
)
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--sam-every", "2"], ["--ascent-fraction", "0.5"]])
def test_options_of_the_first_pass_are_not_for_momentum_sam(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY, "--method", "msam", *flags, "--out", str(out)]) == 1
    assert "--sam-every and --ascent-fraction apply to SAM's first pass" in capsys.readouterr().err
    assert not out.exists()


# ---- data ----


def folder(root: Path, per_class: int = 3, size: int = 32, kind: str = "png") -> Path:
    g = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for c in range(train.CLASSES):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=g)
                Image.fromarray(pixels.numpy()).save(root / part / f"class{c}" / f"{i}.{kind}")
    return root


def test_image_folder(tmp_path):
    folder(tmp_path)
    split, test = train.load_cifar10(str(tmp_path))
    assert split.images.shape == (30, 3, 32, 32)
    assert split.images.dtype == torch.uint8
    assert split.labels.tolist() == sorted(split.labels.tolist())
    with Image.open(tmp_path / "test" / "class1" / "2.png") as image:
        assert test.images[5].permute(1, 2, 0).flatten().tolist() == list(image.tobytes())


def test_the_folder_is_decoded_once(tmp_path, monkeypatch):
    folder(tmp_path)
    first = train.load_cifar10(str(tmp_path))[0].images
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("decoded again"))
    assert torch.equal(train.load_cifar10(str(tmp_path))[0].images, first)
    monkeypatch.undo()
    path = tmp_path / "train" / "class0" / "0.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)  # a changed file is noticed
    assert train.load_cifar10(str(tmp_path))[0].images[0, :, 5, 5].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: Image.new("RGB", (31, 32)).save(root / "train/class3/1.png"),
            r"class3.1\.png: expected 3 x 32 x",
        ),
        (lambda root: (root / "test/class9").rename(root / "test/other"), "train and test have different classes"),
    ],
)
def test_a_spoilt_folder(tmp_path, spoil, message):
    spoil(folder(tmp_path))
    with pytest.raises(train.DataError, match=message):
        train.load_cifar10(str(tmp_path))


def test_torchvision_layout(tmp_path, monkeypatch):
    import pickle

    import torchvision

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    g = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = torch.randint(0, 256, (4, 3072), dtype=torch.uint8, generator=g).numpy()
        (root / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    split, test = train.load_cifar10(str(tmp_path))
    assert split.images.shape == (20, 3, 32, 32)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(rows))
    assert test.labels.tolist() == [0, 1, 2, 3]


def test_no_data_and_no_network(tmp_path, monkeypatch, capsys):
    import torchvision

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    for way in ("no route to host", "torchvision's layout", "train/<class>/*", "--dataset digits"):
        assert way in error


def test_a_split_is_divided_evenly():
    split, _ = train.load_digits()
    chosen, others = train.divide(split, 53, 1, "--train-size")
    counts = chosen.labels.bincount().tolist()
    assert sum(counts) == 53
    assert max(counts) - min(counts) == 1
    assert len(others.labels) == len(split.labels) - 53
    assert torch.equal(torch.cat([chosen.images, others.images]).sum(0), split.images.sum(0))
    assert torch.equal(chosen.images, train.divide(split, 53, 1, "--train-size")[0].images)
    assert not torch.equal(chosen.images, train.divide(split, 53, 2, "--train-size")[0].images)
    with pytest.raises(train.DataError, match="--train-size 5000: expected at most"):
        train.divide(split, 5000, 0, "--train-size")


def test_a_held_out_part_takes_the_test_sets_place():
    held_out = []
    for seed in ("0", "1"):
        s = settings("--dataset", "digits", "--holdout", "100", "--train-size", "1000", "--seed", seed)
        splits = train.load_data(s)
        split, tested = splits["train"], splits["test"]
        assert (len(split.labels), len(tested.labels)) == (1000, 100)
        rows = {x.numpy().tobytes() for x in split.images}
        assert not any(x.numpy().tobytes() in rows for x in tested.images)
        held_out.append(tested.images)
    assert torch.equal(*held_out)


def test_label_noise():
    """In training and validation labels alone: a seeded part of them, each by another class."""
    clean = train.load_data(settings("--dataset", "digits", "--validate", "200"))
    splits = {
        seed: train.load_data(
            settings("--dataset", "digits", "--validate", "200", "--label-noise", "0.4", "--seed", seed)
        )
        for seed in ("0", "1")
    }
    assert torch.equal(splits["0"]["test"].labels, clean["test"].labels)
    for name in ("train", "val"):
        noisy, right = splits["0"][name], clean[name]
        assert torch.equal(noisy.images, right.images)
        assert torch.equal(noisy.wrong, noisy.labels != right.labels)
        assert noisy.wrong.sum() == round(0.4 * len(noisy.labels))
        counts = torch.bincount((noisy.labels - right.labels)[noisy.wrong] % 10, minlength=10)
        assert counts[0] == 0
        assert (counts[1:] > 0).all()
    assert not torch.equal(splits["0"]["train"].wrong, splits["1"]["train"].wrong)
    assert len(clean["train"].labels) + 200 == len(train.load_digits()[0].labels)


@pytest.mark.slow
def test_label_noise_is_the_same_in_every_process():
    """Whatever the seed of Python's hashes."""
    program = (
        "import train; s = train.settle(train.parse('--dataset digits --validate 200 --label-noise 0.4'.split()))\n"
        "print({k: v.labels.tolist() for k, v in sorted(train.load_data(s).items())})"
    )
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPT.parent)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1


def test_augmentation_is_torchvisions():
    """Each image is one of the 81 crops, or its mirror, that RandomCrop(32, padding=4) makes; all equally often."""
    from torchvision.transforms import functional as TF

    g = torch.Generator().manual_seed(0)
    image = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8, generator=g)
    padded = TF.pad(image, [4])
    crops = [TF.crop(padded, top, left, 32, 32) for top in range(9) for left in range(9)]
    options = {c.numpy().tobytes(): i for i, c in enumerate([*crops, *map(TF.hflip, crops)])}
    n = 162 * 60
    out = train.augment(image.expand(n, -1, -1, -1), g, flip=True)
    counts = torch.tensor([options[x.numpy().tobytes()] for x in out]).bincount(minlength=162).double()
    chi2 = ((counts - 60).square() / 60).sum().item()
    assert 90 < chi2 < 250  # 161 degrees of freedom: mean 161, deviation 18
    still = train.augment(image.expand(500, -1, -1, -1), g, flip=False)
    assert all(options[x.numpy().tobytes()] < 81 for x in still)


def test_normalize():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (50, 3, 32, 32), dtype=torch.uint8, generator=g)
    out = train.Normalize(images)(images)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_an_epoch_shows_every_image_once():
    split = train.Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 32, 32), torch.arange(10))
    seen = list(train.batches(split, 4, torch.Generator().manual_seed(0), flip=True))
    assert [len(y) for _, y in seen] == [4, 4, 2]
    assert sorted(torch.cat([y for _, y in seen]).tolist()) == list(range(10))
    for x, y in seen:
        assert x[:, 0, 16, 16].tolist() == y.tolist()  # images and labels stay together


# ---- networks ----


def test_processes_share_the_batches_of_one(monkeypatch):
    images = torch.arange(11, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    split = train.Split(images, torch.arange(11))

    def epoch(rank: int, size: int) -> list[list[int]]:
        monkeypatch.setattr(train, "rank", lambda: rank)
        monkeypatch.setattr(train, "world_size", lambda: size)
        return [y.tolist() for _, y in train.batches(split, 5, torch.Generator().manual_seed(0), flip=True)]

    alone, first, second = epoch(0, 1), epoch(0, 2), epoch(1, 2)
    assert [len(b) for b in alone] == [5, 5, 1]
    assert [len(b) for b in first] == [3, 3]  # one image cannot be shared, and is left out
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(b) for b in alone[:2]]


@pytest.mark.parametrize(("arch", "count"), [("resnet18", 11_173_962), ("vgg16", 14_990_922)])
def test_networks_are_the_papers(arch, count):
    with torch.device("meta"):
        model = train.ARCHS[arch](64)
    assert sum(p.numel() for p in model.parameters()) == count
    small = train.ARCHS[arch](4)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    if arch == "resnet18":
        assert sum(1 for _ in model.parameters()) == 62
        assert small[:-3](torch.randn(2, 3, 32, 32)).shape == (2, 32, 4, 4)


# ---- steps ----


def one_step(*flags: str):
    s = settings(*TINY, *flags)
    torch.manual_seed(0)
    parts = train.build(s)
    calls = []
    parts.model.register_forward_hook(lambda m, a, out: calls.append((len(a[0]), parts.optimizer.perturbed)))
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    return s, parts, x, y, calls


def test_a_sam_step_and_a_base_step():
    s, parts, x, y, calls = one_step("--sam-every", "2")
    done = train.train_step(s, parts, x, y, 0)
    assert calls == [(8, False), (8, True)]
    assert done[1].loss > done[0].loss
    calls.clear()
    train.train_step(s, parts, x, y, 1)
    assert calls == [(8, False)]
    assert parts.optimizer.mean_sharpness(reset=False) > 0


def test_ascent_fraction():
    s, parts, x, y, calls = one_step("--ascent-fraction", "0.25")
    done = train.train_step(s, parts, x, y, 0)
    assert calls == [(2, False), (8, True)]
    assert [p.size for p in done] == [2, 8]
    s = dataclasses.replace(s, ascent_fraction=0.01)
    assert train.train_step(s, parts, x, y, 1)[0].size == 2  # with one image BatchNorm has no deviation
    assert not parts.optimizer.perturbed


def test_rho_0_is_the_plain_base():
    s, parts, x, y, calls = one_step("--rho", "0")
    twin = train.build(s).model
    twin.load_state_dict(parts.model.state_dict())
    plain = torch.optim.Adam(twin.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    train.train_step(s, parts, x, y, 0)
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    norm = torch.stack([p.grad.double().norm() for p in twin.parameters()]).norm()
    plain.step()
    assert calls == [(8, False)]
    assert parts.optimizer.sharpness.item() == pytest.approx(0.05 * norm.item(), rel=1e-5)
    for p, q in zip(parts.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_one_pass_with_momentum_sam():
    s, parts, x, y, calls = one_step("--method", "msam", "--base", "sgd")
    assert s.rho == 0.5  # ten times the recipe's
    for i in range(2):
        assert len(train.train_step(s, parts, x, y, i)) == 1
    assert calls == [(8, False), (8, True)]
    parts.model.eval()
    parts.model(x)
    assert calls[-1] == (8, False)


def test_sam_from_a_part_of_the_run():
    s, parts, x, y, calls = one_step("--sam-from", "0.5", "--epochs", "4", "--ascent-fraction", "0.5")
    for _ in range(4):
        train.train_step(s, parts, x, y, 0)
        parts.rho_schedule.step()
    assert calls == [(8, False), (8, False), (4, False), (8, True), (4, False), (8, True)]


@pytest.mark.parametrize(("start", "epochs"), [("0.55", 100), ("0.07", 100), ("0.5", 3), ("0.3", 10)])
def test_the_first_epoch_with_sam(start, epochs):
    """0.55 * 100 is a little more than 55."""
    _, parts, *_ = one_step("--sam-from", start, "--epochs", str(epochs))
    without = 0
    while not any(parts.rho_schedule.get_last_rho()):
        parts.rho_schedule.step()
        without += 1
    assert without == math.ceil(Fraction(start) * epochs)


def test_the_realised_sharpness_leaves_out_overflows(monkeypatch):
    """They perturb nothing, so both passes have the same loss."""

    def epoch(*flags):
        s, parts, x, y, _ = one_step("--lr", "1e-9", *flags)
        bar = train.tqdm([(x.clone(), y) for _ in range(4)], disable=True)
        return train.train_epoch(s, parts, bar, lambda images: images)

    whole = epoch()["realised_sharpness"]
    step, steps = train.train_step, []

    def overflows(s, parts, x, y, index):
        steps.append(index)
        weight = next(parts.model.parameters())
        spoil = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf)) if index % 2 else None
        scaler = parts.scaler
        parts.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        parts.optimizer.scaler = parts.scaler
        done = step(s, parts, x, y, index)
        parts.scaler = parts.optimizer.scaler = scaler
        if spoil is not None:
            spoil.remove()
        return done

    monkeypatch.setattr(train, "train_step", overflows)
    assert epoch()["realised_sharpness"] == pytest.approx(whole, rel=0.05)
    assert steps == [0, 1, 2, 3]


def test_no_sharpness_before_sam_begins():
    s, parts, x, y, _ = one_step("--sam-from", "0.5", "--epochs", "2", "--sam-every", "2")
    for step in range(2):
        train.train_step(s, parts, x, y, step)
    assert parts.optimizer.mean_sharpness().isnan()
    parts.rho_schedule.step()
    for step in range(2):
        train.train_step(s, parts, x, y, step)
        assert parts.optimizer.mean_sharpness() > 0
    s, parts, x, y, _ = one_step("--sam-from", "0.5", "--epochs", "2", "--rho", "0")  # the plain base is measured
    train.train_step(s, parts, x, y, 0)
    assert parts.optimizer.mean_sharpness() > 0


def test_norm_only():
    _, parts, *_ = one_step("--norm-only", "--rho", "0.3")
    assert [group["rho"] for group in parts.optimizer.param_groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in parts.optimizer.param_groups) == 62
    _, parts, *_ = one_step("--norm-only", "--method", "msam", "--rho", "0")
    assert [group["rho"] for group in parts.optimizer.param_groups] == [0.0, 0.0]


def losses(*flags: str, steps: int = 12) -> list[float]:
    s, parts, x, y, _ = one_step(*flags)
    return [train.train_step(s, parts, x, y, i)[0].loss.item() for i in range(steps)]


def test_amp():
    plain, bf16 = losses("--lr", "0.01"), losses("--lr", "0.01", "--amp", "bf16")
    fp16 = losses("--amp", "fp16", steps=1)  # where a CPU has no float16 convolutions, a step takes a second
    assert bf16 != plain
    assert bf16[0] == pytest.approx(plain[0], rel=0.02)
    assert fp16[0] == pytest.approx(plain[0], rel=0.005)
    assert bf16[-1] < 0.7 * bf16[0]
    assert not train.build(settings(*TINY, "--amp", "bf16")).scaler.is_enabled()
    assert train.build(settings(*TINY, "--amp", "fp16")).scaler.is_enabled()


# ---- runs ----


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *TINY, "--out", str(out), *flags]


def test_a_run_leaves_its_files(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "2", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["rho"] == 0.05
    assert config["environment"]["torch"] == torch.__version__
    rows = metrics(out)
    keys = "epoch lr train_loss train_acc test_loss test_acc sharpness realised_sharpness train_cpu_seconds seconds"
    assert [set(row) for row in rows] == [set(keys.split())] * 2
    assert [row["epoch"] for row in rows] == [1, 2]
    assert config["environment"]["processes"] == 1
    assert rows[0]["sharpness"] > 0
    assert not list(out.glob("*.part"))
    printed = capsys.readouterr().out
    assert printed.count("epoch   ") == 2
    assert train.main(["--report", str(out)]) == 0
    assert "adam + SAM 0.05" in capsys.readouterr().out
    assert train.main([*TINY, "--epochs", "2", "--out", str(out)]) == 1
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert train.main([*TINY, "--epochs", "3", "--out", str(out), "--resume"]) == 1
    assert "was run with epochs = 2, not 3" in capsys.readouterr().err


def test_what_a_killed_save_left_goes(tmp_path):
    """In a run that goes on: the next save has another name."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "1", "--out", str(out)]) == 0
    (out / "checkpoint.pt.1.part").write_bytes(b"half a checkpoint")
    assert train.main([*TINY, "--epochs", "1", "--out", str(out), "--resume"]) == 0
    assert not list(out.glob("*.part"))


def torchrun(*args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]


def test_two_processes_may_save_the_same_file(tmp_path, monkeypatch):
    """As those that share a sweep do with its report: one takes nothing away from the other, in the midst of it too."""
    path, flush, rivals = tmp_path / "table.md", os.fsync, [os.getpid() + 1]

    def with_a_rival(fd):
        flush(fd)
        if rivals:
            rival = rivals.pop()
            with monkeypatch.context() as m:
                m.setattr(os, "getpid", lambda: rival)
                train.save(path, "the rival's")
            assert path.read_text() == "the rival's"

    monkeypatch.setattr(os, "fsync", with_a_rival)
    train.save(path, "mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


RUNS = {
    "sgd": (1, ["--base", "sgd"]),
    "adam": (1, ["--base", "adam"]),
    "fp16": (1, ["--amp", "fp16", "--arch", "mlp"]),  # many CPUs have no float16 convolutions, and need minutes
    "msam": (1, ["--method", "msam", "--sam-from", "0.5", "--label-noise", "0.2", "--validate", "50"]),
    "two processes": (2, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_killed_and_resumed_is_bit_identical(tmp_path, kind, capfd):
    """SIGKILL at whatever moment after the first epoch; what --resume ends with is what a whole run ends with."""
    processes, flags = RUNS[kind]
    flags = [*flags, "--epochs", "4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(out, *more):
        alone = command(out, *flags, *more)
        return alone if processes == 1 else torchrun(*alone[1:])

    def finish(out, *more):
        if processes == 1:  # without another import of torch
            assert train.main([*TINY, "--out", str(out), *flags, *more]) == 0
        else:
            subprocess.run(start(out, *more), check=True)

    finish(whole)
    assert capfd.readouterr().out.count("epoch   ") == 4  # one process speaks
    process = subprocess.Popen(start(cut), stdout=subprocess.DEVNULL, start_new_session=True)
    while not (cut / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(torch.load(cut / "checkpoint.pt", weights_only=True)["metrics"]) < 4
    finish(cut, "--resume")
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, cut))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())
    untimed = {"seconds": 0, "train_cpu_seconds": 0}
    for x, y in zip(metrics(whole), metrics(cut), strict=True):
        assert {**x, **untimed} == {**y, **untimed}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_no_thread_of_the_process_group_is_left(tmp_path):
    """One that still works while Python ends may abort the process (https://github.com/pytorch/pytorch/issues/190489).

    Without the garbage collector, which might come in time by chance.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, os, pathlib, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "gc.disable()\n"
        "import train\n"
        "code = train.main(sys.argv[1:])\n"
        "names = [task.read_text().strip() for task in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "print('left:', [name for name in names if 'gloo' in name], flush=True)\n"
        "os._exit(code)\n"
    )
    flags = [*TINY, "--threads", "1", "--epochs", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(torchrun(str(script), *flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left: []") == 2, done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(tmp_path):
    out = tmp_path / "run"
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # not so in a shell's background
    command_line = command(out, "--epochs", "5000")
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "add --resume to go on" in error
    assert "Traceback" not in error
    assert metrics(out)


@pytest.mark.slow
def test_the_test_set_is_small_but_in_the_last_epoch(tmp_path, monkeypatch):
    sizes, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda m, split, n: sizes.append(len(split.labels)) or evaluate(m, split, n))
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "3", "--eval-size", "50", "--keep-every", "2", "--out", str(out)]) == 0
    assert sizes == [50, 50, len(train.load_digits()[1].labels)]
    assert [f.name for f in out.glob("weights-*.pt")] == ["weights-0002.pt"]
    model = train.ARCHS["resnet18"](8)
    model.load_state_dict(torch.load(out / "weights-0002.pt", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "msam"])
def test_what_is_measured_of_wrong_labels(method, tmp_path, capsys):
    """Learned by heart by a network that is trained long enough on few images."""
    out = tmp_path / "run"
    flags = [
        "--arch",
        "mlp",
        "--width",
        "64",
        "--validate",
        "100",
        "--label-noise",
        "0.3",
        "--epochs",
        "60",
        "--no-augment",
    ]
    assert train.main([*TINY, *flags, "--method", method, "--rho", "0.001", "--out", str(out)]) == 0
    rows = metrics(out)
    assert rows[0]["memorised"] < 0.3
    assert rows[-1]["memorised"] > 0.6
    assert rows[-1]["clean_acc"] > 0.9
    assert (rows[-1]["sharpness"] is None) == (method == "msam")
    assert {"val_loss", "val_acc"} <= set(rows[0])
    capsys.readouterr()
    assert train.main(["--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"adam + {method.upper()} 0.001" in printed
    assert "memorised" in printed


@pytest.mark.slow
@pytest.mark.parametrize("augmented", [False, True])
def test_momentum_sam_ends_with_the_statistics_of_the_clean_weights(augmented, tmp_path, monkeypatch):
    """Of batches as training sees them: of its size, of all classes, and augmented if it augments."""
    out, seen = tmp_path / "run", []
    update_bn = torch.optim.swa_utils.update_bn

    def recorded(loader, model):
        seen.extend(loader)
        update_bn(seen, model)

    monkeypatch.setattr(torch.optim.swa_utils, "update_bn", recorded)
    flags = [*TINY, "--method", "msam", "--rho", "2", "--epochs", "2", "--out", str(out)]
    flags += [] if augmented else ["--no-augment"]
    assert train.main(flags) == 0
    s = settings(*flags)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    model = train.build(s).model
    model.load_state_dict(checkpoint["model"])
    update_bn(seen, model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, checkpoint["model"][key], msg=key)

    split = train.load_data(s)["train"]
    sizes = [len(chunk) for chunk in split.labels.split(s.batch_size)]
    assert [len(batch) for batch in seen] == sizes
    images = train.Normalize(split.images)(split.images).flatten(1)
    same = (torch.cat(seen).flatten(1)[:, None] == images).all(2)
    assert same.any(1).all() != augmented
    if not augmented:
        assert same.sum(0).tolist() == [1] * len(images)
        assert all(len(split.labels[i].unique()) > 4 for i in same.int().argmax(1).split(s.batch_size))


@pytest.mark.slow
def test_the_config_holds_no_paths(tmp_path):
    assert train.main([*TINY, "--epochs", "1", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 0
    assert str(tmp_path) not in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize("rho", ["0", "0.05"])
def test_a_run_that_diverges_says_so(rho, tmp_path, capsys):
    """Also where only the last batches of the last epoch do."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "1", "--base", "sgd", "--rho", rho, "--lr", "1e20", "--out", str(out)]) == 1
    assert "the training loss is nan" in capsys.readouterr().err
    assert not (out / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_do_not_take_the_place_of_good_ones(tmp_path, capsys, monkeypatch):
    """The last update alone may do it, after the last loss was taken."""
    out, epoch = tmp_path / "run", train.train_epoch

    def spoilt(s, parts, *args):
        row = epoch(s, parts, *args)
        if (out / "checkpoint.pt").exists():
            with torch.no_grad():
                next(parts.model.parameters()).fill_(float("inf"))
        return row

    monkeypatch.setattr(train, "train_epoch", spoilt)
    assert train.main([*TINY, "--epochs", "2", "--out", str(out)]) == 1
    assert "weights are not finite after epoch 2" in capsys.readouterr().err
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["metrics"]) == 1
    monkeypatch.undo()
    assert train.main([*TINY, "--epochs", "2", "--out", str(out), "--resume"]) == 0


def test_an_interrupt_between_two_files_loses_neither(tmp_path, monkeypatch):
    out, save, saved = tmp_path / "run", train.save, []

    def interrupted(path, content):
        save(path, content)
        saved.append(path.name)
        if sum(name.endswith(".pt") for name in saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", interrupted)
    assert train.main([*TINY, "--epochs", "2", "--keep-every", "1", "--out", str(out)]) == 130
    monkeypatch.undo()
    assert train.main([*TINY, "--epochs", "2", "--keep-every", "1", "--out", str(out), "--resume"]) == 0
    assert {p.name for p in out.glob("*.pt")} == {"checkpoint.pt", "weights-0001.pt", "weights-0002.pt"}


@pytest.mark.parametrize("flag", ["--eval-size", "--train-size"])
def test_a_start_that_fails_leaves_nothing(flag, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY, flag, "100000", "--epochs", "1", "--out", str(out)]) == 1
    assert flag in capsys.readouterr().err
    assert train.main([*TINY, "--epochs", "1", "--out", str(out)]) == 0


def test_the_config_names_every_machine(tmp_path, monkeypatch):
    """A run that was cut on one and finished on another; a third looked at it when it was finished."""
    out = tmp_path / "run"

    def cut(row):
        raise KeyboardInterrupt

    def on(machine: str) -> None:
        monkeypatch.setattr(train, "environment", lambda device: {"cpu": machine})

    s = settings(*TINY, "--epochs", "2", "--out", str(out))
    on("the first")
    with pytest.raises(KeyboardInterrupt):
        train.train(s, after_epoch=cut)
    for machine in ("the second", "the third"):
        on(machine)
        assert len(train.train(s, resume=True)) == 2
    config = json.loads((out / "config.json").read_text())
    assert [e["cpu"] for e in (config["environment"], *config["resumed_on"])] == ["the first", "the second"]


def test_a_run_that_was_cut_before_its_first_checkpoint_is_of_the_second_machine(tmp_path, monkeypatch):
    out = tmp_path / "run"
    s, epoch = settings(*TINY, "--epochs", "1", "--out", str(out)), train.train_epoch

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "environment", lambda device: {"cpu": "the first"})
    monkeypatch.setattr(train, "train_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(s)
    monkeypatch.setattr(train, "environment", lambda device: {"cpu": "the second"})
    monkeypatch.setattr(train, "train_epoch", epoch)
    train.train(s, resume=True)
    config = json.loads((out / "config.json").read_text())
    assert [e["cpu"] for e in (config["environment"], *config.get("resumed_on", []))] == ["the second"]


def test_metrics_without_a_checkpoint_are_not_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "1", "--out", str(out)]) == 0
    (out / "checkpoint.pt").unlink()
    before = (out / "metrics.jsonl").read_text()
    assert train.main([*TINY, "--epochs", "1", "--out", str(out), "--resume"]) == 1
    assert "has 1 of 1 epochs and no checkpoint.pt to go on from" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == before


def test_another_number_of_processes_does_not_go_on(tmp_path, capsys):
    """Each process perturbs by its own part of the batch."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--epochs", "1", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    config["environment"]["processes"] = 2
    (out / "config.json").write_text(json.dumps(config))
    assert train.main([*TINY, "--epochs", "1", "--out", str(out), "--resume"]) == 1
    assert "was run with processes = 2, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "rows"), [(None, "{}"), ("{}", "{}"), ('{"settings": {}}', ""), ('{"settings": {}}', "half a li")]
)
def test_a_report_of_what_is_no_run(config, rows, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert train.main(["--report", str(tmp_path)]) == 1
    assert f"--report: {tmp_path} holds no run" in capsys.readouterr().err


def test_train_py_uses_the_fused_optimizer():
    assert isinstance(train.build(settings(*TINY)).optimizer, FusedSAM)
