"""The operators by themselves: schemas, fake kernels, bits, threads, errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sam_fused import _C
from sam_fused.bases import UPDATE_BY_NAME
from tests.helpers.cases import CHUNK, Wrapper, generator
from tests.helpers.fronts import OPS, Kept
from tests.helpers.paths import ROOT
from tests.helpers.place import DEVICE, on_the_cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows(*values):
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def there(*values):
    return rows(*values).to(DEVICE)


def make(dtype=torch.float32, sizes=(5, 3), seed=0):
    g = generator(seed)
    return [torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for n in sizes]


def arguments(op, base="adam", dtype=torch.float32, sizes=(5, 3)):
    """Sound arguments, by name."""
    common = {
        "params": make(dtype, sizes, 1),
        "grads": make(dtype, sizes, 2),
        "ascent": rows([0.1, 0.0, 0.0], [0.2, 0.1, 1.0]),
        "run_sizes": [1, len(sizes) - 1],
    }
    if op == "grad_sq_norm":
        return common
    if op == "sharpness_":
        out = there(0.0, 0.0, 0.0)
        return {"sq_norms": there(4.0, 5.0), "ascent": common["ascent"], "out": out, "total": there(0.0, 0.0)}
    backups = make(dtype, sizes, 3)
    if op == "perturb_":
        norm = there(3.0)[0]
        return {
            **{k: common[k] for k in ("params", "grads")},
            "backups": backups,
            "grad_norm": norm,
            "ascent": common["ascent"],
            "run_sizes": common["run_sizes"],
        }
    if op == "perturb_from_":
        return {
            "params": common["params"],
            "directions": common["grads"],
            "saved": backups,
            "norm": there(3.0)[0],
            "ascent": common["ascent"],
            "run_sizes": common["run_sizes"],
        }
    if op == "restore_":
        return {"params": common["params"], "backups": backups}
    update = UPDATE_BY_NAME[base]
    of_base = {
        "state": [
            1 + t.abs() if "sq" in key else t / 8  # a mean of squares is larger than the square of the mean
            for k, key in enumerate(update.state)
            for t in make(dtype, sizes, 4 + k)
        ],
        "steps": [torch.tensor(float(i)) for i in range(len(sizes))] if update.counts_steps else [],
        "hyper": rows(*2 * [list(update.hyper.values())]),
    }
    given = {"base": base, "params": common["params"], "grads": common["grads"]}
    of_groups = {"run_sizes": common["run_sizes"], "lr": []}
    if op == "step_along_":
        return {**given, **of_base, "ascent": common["ascent"], "moment": update.moment, **of_groups}
    return {**given, "backups": [backups[0], *[None for _ in sizes[2:]], backups[-1]], **of_base, **of_groups}


CALLS = [(op, None) for op in ("grad_sq_norm", "sharpness_", "perturb_", "perturb_from_", "restore_")]
CALLS += [("restore_step_", base) for base in UPDATE_BY_NAME]
CALLS += [("step_along_", base) for base, update in UPDATE_BY_NAME.items() if update.moment is not None]


@pytest.mark.parametrize(("op", "base"), CALLS)
def test_opcheck(op, base):
    args = arguments(op, base or "adam")
    if op != "sharpness_":
        args["params"] = [p.requires_grad_() for p in args["params"]]
    with torch.no_grad():
        torch.library.opcheck(getattr(OPS, op).default, tuple(args.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "base"), CALLS)
def test_both_front_ends_do_the_same(op, base, dtype):
    one, two = (arguments(op, base or "adam", dtype) for _ in range(2))
    result = getattr(OPS, op)(*one.values())
    other = getattr(Kept, op)(*two.values())
    assert (result is None and other is None) or torch.equal(result, other)
    for name in one:
        for a, b in zip(tensors(one[name]), tensors(two[name]), strict=True):
            assert torch.equal(a, b), name


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, list) else []


MUTATED = {
    "perturb_": ("params", "backups"),
    "perturb_from_": ("params",),
    "restore_": ("params",),
    "sharpness_": ("out", "total"),
}


@pytest.mark.parametrize("front", [OPS, Kept], ids=["torch.ops", "kept"])
@pytest.mark.parametrize(("op", "base"), CALLS)
def test_version_counters(op, base, front):
    args = arguments(op, base or "adam")
    versions = {name: [t._version for t in tensors(value)] for name, value in args.items()}
    getattr(front, op)(*args.values())
    mutated = MUTATED.get(op, () if op == "grad_sq_norm" else ("params", "state", "steps"))
    for name, value in args.items():
        for t, before in zip(tensors(value), versions[name], strict=True):
            assert (t._version > before) == (name in mutated), name


@pytest.mark.parametrize("front", [OPS, Kept], ids=["torch.ops", "kept"])
def test_version_counters_that_tensors_share(front):
    """Views of one storage count together, once a call; the others beside them for themselves."""
    params, grads = make(sizes=(5, 3, 4, 2)), make(sizes=(5, 3, 4, 2), seed=1)
    storage = torch.zeros(9)
    backups = [storage[:5], storage[5:8], torch.zeros(4), torch.zeros(2)]
    front.perturb_(params, grads, backups, there(1.0)[0], rows([0.1, 0, 0]), [4])
    assert [t._version for t in (*params, *backups)] == [1] * 8
    assert all(torch.equal(a, b) for a, b in zip(backups, make(sizes=(5, 3, 4, 2)), strict=True))


def test_autograd_notices_the_mutation():
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        OPS.perturb_([w], [torch.ones(3)], [torch.empty(3)], there(1.0)[0], rows([0.1, 0, 0]), [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SIZES = (3 * CHUNK + 17, 1, 0, CHUNK - 1, CHUNK + 1, 33, 257)


@pytest.fixture
def isa():
    best = _C.cpu_isa()
    yield
    _C.set_cpu_isa(best)


@pytest.fixture
def threads():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def everything(dtype, adaptive, sizes=SIZES):
    """The bits of all that the operators compute."""
    out = []
    ascent = rows([0.1, 0.0, adaptive], [0.2, 0.1, adaptive])
    for op, base in CALLS:
        args = arguments(op, base or "adam", dtype, sizes)
        if "ascent" in args:
            args["ascent"] = ascent
        result = getattr(Kept, op)(*args.values())
        out += tensors(result) + [t for value in args.values() for t in tensors(value)]
    return out


def each_instruction_set():
    """Sets those of this machine, which must be all that it says that it has, one after the other."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    needs = {"default": set(), "avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    for name, needed in needs.items():
        try:
            _C.set_cpu_isa(name)
        except ValueError:
            assert not needed <= flags
            continue
        assert _C.cpu_isa() == name
        yield name


def same_bits(a, b):
    """NaN and the sign of zero included."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@on_the_cpu
@pytest.mark.parametrize("adaptive", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(dtype, adaptive, isa):
    first, *others = [everything(dtype, adaptive) for _ in each_instruction_set()]
    if not others:
        pytest.skip("this processor has one instruction set")
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


EXTREME = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    1e-45,
    -1e-39,
    6e-8,
    3e-5,
    65504.0,
    3e38,
    -1e308,
    0.1,
]


@on_the_cpu
@pytest.mark.parametrize("adaptive", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "base"), [call for call in CALLS if call[0] != "sharpness_"])  # which is no loop
def test_every_instruction_set_is_at_one_on_extreme_numbers(op, base, dtype, adaptive, isa):
    """Infinities, NaN, zeros, subnormals and overflows, in every pairing and at every place in a vector."""
    values = torch.tensor(EXTREME, dtype=torch.float64).to(dtype)
    results = []
    for _ in each_instruction_set():
        n = len(EXTREME)
        args = arguments(op, base or "adam", dtype, (n * n + 1, n * n, 1))
        for name in ("params", "grads", "directions", "backups", "saved", "state"):
            for t in tensors(args.get(name, []))[:2]:
                grid = values.repeat_interleave(n) if name in ("grads", "directions", "state") else values.repeat(n)
                t[: n * n].copy_(grid[: t.numel()])
        if "ascent" in args:
            args["ascent"] = rows([0.1, 0.0, adaptive], [0.2, 0.1, adaptive])
        result = getattr(Kept, op)(*args.values())
        results.append([result] * (result is not None) + [t for v in args.values() for t in tensors(v)])
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), i
            assert same_bits(a.nan_to_num(7.0), b.nan_to_num(7.0)), i


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="cannot run the instruction set 'mmx'"):
        _C.set_cpu_isa("mmx")


@on_the_cpu
@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_thread_count_gives_the_same_bits(dtype, adaptive, threads):
    [grain] = re.findall(r"kGrain = 1 << (\d+);", (ROOT / "csrc" / "cpu.cpp").read_text())
    sizes = (2 * 2 ** int(grain) + CHUNK + 5, *SIZES)  # enough for three threads
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(everything(dtype, adaptive, sizes))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_past_the_caches_write_the_same(dtype):
    """They begin at 8 MiB of parameters: two tensors in one call, one of them not aligned, and each in a call."""
    n = (1 << 23) // dtype.itemsize // 2 + 17
    norm, ascent, hyper = there(3.0)[0], rows([50.0, 0, 0]), rows(list(UPDATE_BY_NAME["adam"].hyper.values()))

    def pair(seed: int) -> list[torch.Tensor]:
        random = [torch.randn(n, generator=generator(seed + i)).to(dtype) for i in range(2)]
        return [torch.empty(n + 1, dtype=dtype)[1:].copy_(random[0]), random[1]]

    def computed(together: bool) -> list[list[torch.Tensor]]:
        """By what is done, then by tensor."""
        w, g, m, v, backups = (pair(seed) for seed in (0, 2, 4, 6, 8))
        v = [t.abs_() for t in v]
        steps = [torch.tensor(1.0), torch.tensor(1.0)]
        out = [[], [], [], [], [], []]
        for i in [slice(0, 2)] if together else [slice(0, 1), slice(1, 2)]:
            groups = [len(w[i])]
            Kept.perturb_(w[i], g[i], backups[i], norm, ascent, groups)
            out[0] += [p.clone() for p in w[i]]
            Kept.restore_(w[i], backups[i])
            out[1] += [p.clone() for p in w[i]]
            Kept.perturb_from_(w[i], g[i], backups[i], norm, ascent, groups)
            out[2] += [p.clone() for p in w[i]]
            Kept.restore_step_("adam", w[i], g[i], backups[i], [*m[i], *v[i]], steps[i], hyper, groups, [])
        out[3:] = [w, m, v]
        return out

    whole, apart = computed(True), computed(False)
    for i, (done, expected) in enumerate(zip(whole, apart, strict=True)):
        assert all(same_bits(a, b) for a, b in zip(done, expected, strict=True)), i
    assert all(same_bits(a, b) for a, b in zip(whole[1], pair(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole[0], pair(0), strict=True))


@on_the_cpu
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime():
    """Two of them, and torch.set_num_threads steers the wrong one."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    torchs = {f for f in files if "/torch/" in f}
    assert len(torchs) == 1
    needed = Path(_C.__file__).read_bytes()
    assert b"libgomp.so" not in needed


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [base for op, base in CALLS if op == "step_along_"])
def test_step_along_is_the_step_and_the_norm(base, dtype, skipped, adaptive):
    """To the same bits, whether or not an overflow skips the update."""
    along, plain = (arguments(op, base, dtype, SIZES) for op in ("step_along_", "restore_step_"))
    ascent = along["ascent"] = rows([0.1, 0.0, adaptive], [0.2, 0.1, adaptive])
    plain["backups"] = [None for _ in SIZES]
    found_inf = torch.tensor(float(skipped))
    sq_norms = Kept.step_along_(**along, found_inf=found_inf)
    Kept.restore_step_(**plain, found_inf=found_inf)
    for name in ("params", "state", "steps"):
        assert all(torch.equal(a, b) for a, b in zip(along[name], plain[name], strict=True)), name
    n, k = len(SIZES), along["moment"]
    moments = plain["state"][k * n : (k + 1) * n]
    assert torch.equal(sq_norms, Kept.grad_sq_norm(plain["params"], moments, ascent, plain["run_sizes"]))


@pytest.mark.parametrize("norm", [3.0, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_from_is_perturb_from_what_is_saved(dtype, norm):
    args = arguments("perturb_from_", dtype=dtype, sizes=SIZES)
    saved, params = args["saved"], [t.clone() for t in args["saved"]]
    backups = [torch.empty_like(t) for t in params]
    Kept.perturb_(params, args["directions"], backups, there(norm)[0], args["ascent"], args["run_sizes"])
    Kept.perturb_from_(**{**args, "norm": there(norm)[0]})
    assert all(torch.equal(a, b) for a, b in zip(args["params"], params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved, backups, strict=True))


def test_norm_is_summed_in_float64():
    """A hundred million equal squares: float32 sums stop growing at 2^24 of them."""
    g = torch.full((1 << 25,), 1.0)
    assert Kept.grad_sq_norm([g], [g], rows([1.0, 0, 0]), [1]).item() == 1 << 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_type_conversions(dtype):
    """Every bit pattern goes through unchanged, and every rounding is torch's: subnormals, ties, overflow, NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    w = every.clone()
    still = rows([0.0, 0, 0, 0, 0])
    Kept.restore_step_("sgd", [w], [torch.zeros_like(w)], [None], [], [], still, [1], [])
    number = ~every.isnan()
    assert torch.equal(w.view(torch.int16)[number], bits[number])
    assert w[~number].isnan().all()
    g = generator(0)
    a, b = (every[torch.randint(0, 1 << 16, (1 << 20,), generator=g)] for _ in range(2))
    w = a.clone()
    Kept.restore_step_("sgd", [w], [b], [None], [], [], rows([1.0, 0, 0, 0, 0]), [1], [])
    torch.testing.assert_close(w, (a.float() - b.float()).to(dtype), rtol=0, atol=0, equal_nan=True)
    w = a.clone()
    Kept.restore_step_("sgd", [w], [b], [None], [], [], rows([2.0**-12, 0, 0, 0, 0]), [1], [])
    torch.testing.assert_close(w, (a.float() - 2.0**-12 * b.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


def change(**values):
    return lambda args: {**args, **values}


ERRORS = [
    ("grad_sq_norm", change(params=[]), RuntimeError,
     r"params: expected at least one tensor"),
    ("grad_sq_norm", change(grads=make()[:1]), RuntimeError,
     r"grads: expected 2 tensors, one for each of params, got 1"),
    ("grad_sq_norm", change(run_sizes=[1, 2]), RuntimeError,
     r"run_sizes: expected to add up to the 2 .* got 3"),
    ("grad_sq_norm", change(run_sizes=[3, -1]), RuntimeError,
     r"run_sizes: expected numbers >= 0, got -1"),
    ("grad_sq_norm", change(grads=[make()[0], torch.ones(4)]), RuntimeError,
     r"grads\[1\]: expected shape \[3\], got \[4\]"),
    ("grad_sq_norm", change(grads=[make()[0], make()[1].double()]), TypeError,
     r"grads\[1\]: expected dtype Float, got Double"),
    ("grad_sq_norm", change(grads=[make()[0], torch.ones(3, device="meta")]), RuntimeError,
     rf"grads\[1\]: expected device {DEVICE}, got meta"),
    ("grad_sq_norm", change(grads=[make()[0], torch.ones(3).to_sparse()]), RuntimeError,
     r"grads\[1\]: expected a dense tensor, got layout Sparse"),
    ("grad_sq_norm", change(params=[torch.ones(5), torch.ones(3).int()]), TypeError,
     r"params\[1\]: expected dtype float32.*got Int"),
    ("grad_sq_norm", change(ascent=rows([0.1, 0, 0])), RuntimeError,
     r"ascent: expected shape \[2, 3\], got \[1, 3\]"),
    ("grad_sq_norm", change(ascent=torch.ones(2, 3)), RuntimeError,
     r"ascent: expected a contiguous float64 tensor on the CPU, got Float"),
    ("sharpness_", change(out=there(0.0)), RuntimeError,
     r"out: expected 3 contiguous float64 elements"),
    ("sharpness_", change(total=there(0.0)), RuntimeError,
     r"total: expected 2 contiguous float64 elements"),
    ("perturb_", change(backups=[torch.ones(5), torch.ones(3).half()]), TypeError,
     r"backups\[1\]: expected dtype Float, got Half"),
    ("perturb_", change(backups=[torch.ones(5), torch.ones(6)[::2]]), RuntimeError,
     r"backups\[1\]: expected strides \[1\], .* got \[2\]"),
    ("perturb_", change(grad_norm=torch.tensor(1.0)), RuntimeError,
     r"grad_norm: expected 1 contiguous float64"),
    ("perturb_from_", change(saved=make()[:1]), RuntimeError,
     r"saved: expected 2 tensors, one for each of params, got 1"),
    ("perturb_from_", change(directions=[torch.ones(5), torch.ones(4)]), RuntimeError,
     r"directions\[1\]: expected shape \[3\], got \[4\]"),
    ("step_along_", change(moment=2), ValueError,
     r"moment: expected one of the 2 lists of state, got 2"),
    ("step_along_", change(moment=2**32), ValueError,
     r"moment: expected one of the 2 lists of state, got 4294967296"),
    ("step_along_", change(ascent=rows([0.1, 0, 0])), RuntimeError,
     r"ascent: expected shape \[2, 3\], got \[1, 3\]"),
    ("restore_step_", change(base="lion"), ValueError,
     r"base: the extension has no update called 'lion'"),
    ("restore_step_", change(state=make()), RuntimeError,
     r"state: expected 2 x 2 tensors, got 2"),
    ("restore_step_", change(steps=[torch.tensor(1.0)]), RuntimeError,
     r"steps: expected 2 tensors"),
    ("restore_step_", change(steps=[torch.tensor(1.0), torch.tensor(1)]), RuntimeError,
     r"steps\[1\]: expected one float32 element.*Long"),
    ("restore_step_", change(hyper=rows([1.0], [1.0])), RuntimeError,
     r"hyper: expected shape \[2, 7\], got \[2, 1\]"),
    ("sharpness_", change(grad_scale=there(1.0)), RuntimeError,
     rf"grad_scale: expected one float32 element on {DEVICE}, got Double"),
    ("restore_step_", change(found_inf=torch.zeros(2)), RuntimeError,
     rf"found_inf: expected one float32 element on {DEVICE}, got Float of shape \[2\]"),
    ("restore_step_", change(lr=[there(1.0)]), RuntimeError,
     r"lr: expected none or 2, one for each run, got 1"),
    ("restore_step_", change(lr=[None, torch.tensor([1.0, 2.0], device=DEVICE)]), RuntimeError,
     rf"lr\[1\]: expected one float32 or float64 element on {DEVICE}, got Float of shape \[2\]"),
    ("step_along_", change(lr=[there(1.0).half(), None]), RuntimeError,
     rf"lr\[0\]: expected one float32 or float64 element on {DEVICE}, got Half"),
]  # fmt: skip


@pytest.mark.parametrize("front", [OPS, Kept], ids=["torch.ops", "kept"])
@pytest.mark.parametrize(("op", "alter", "error", "message"), ERRORS)
def test_errors(op, alter, error, message, front):
    args = alter(arguments(op))
    if front is OPS and ("meta" in message or "Sparse" in message):
        return  # torch.ops chooses another kernel for such a list
    before = [t.clone() for t in args["params"] if t.numel()] if op != "sharpness_" else []
    with pytest.raises(error, match=message):
        getattr(front, op)(**args)
    assert all(torch.equal(a, b) for a, b in zip(args.get("params", []), before, strict=False))


@pytest.mark.parametrize("front", [OPS, Kept], ids=["torch.ops", "kept"])
def test_steps_of_a_base_that_counts_none_are_left_alone(front):
    args = arguments("restore_step_", "sgd")
    args["steps"] = [torch.tensor(float(i)) for i in range(5)]  # more than there are parameters
    front.restore_step_(**args)
    assert [step.item() for step in args["steps"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["steps", "grad_scale", "found_inf", "lr"])
def test_a_wrapper_without_memory_is_refused(name):
    """It would be read as not given."""
    args = arguments("restore_step_")
    wrapper = Wrapper(torch.zeros(1, device=DEVICE))
    args[name] = [wrapper, wrapper] if name in ("steps", "lr") else wrapper
    with pytest.raises(RuntimeError, match=rf"{name}(\[0\])?: expected a tensor with memory of its own, got a wrapper"):
        Kept.restore_step_(**args)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="grads: expected a tensor"):
        Kept.grad_sq_norm(make(), [torch.ones(5), None], rows([0.1, 0, 0]), [2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: _C.perturb_(r, make(), there(3.0)[0], rows([0.1, 0, 0])), "given backups to write"),
        (lambda r: _C.perturb_from_(r, make(), there(3.0)[0], rows([0.1, 0, 0])), "given a backup for each parameter"),
        (lambda r: _C.restore_step_(r, make(), rows([0.0] * 5)), "given the state of a base"),
    ],
)
def test_rows_that_lack_what_an_operator_wants(call, message):
    params = make()
    with pytest.raises(RuntimeError, match=message):
        call(_C.Rows(params, [2]))
    assert all(torch.equal(a, b) for a, b in zip(params, make(), strict=True))


def test_rows_last_unless_something_was_copied():
    gaps = torch.zeros(6)[::2]
    assert _C.Rows(make(), [2], backups=make(seed=1)).lasting
    assert not _C.Rows([torch.zeros(5), gaps], [2]).lasting
    assert not _C.Rows(make(), [2], saved=[None, gaps]).lasting


def test_rows_that_are_kept_do_the_same_again():
    """With other gradients each time, in another layout too, which are copied for the one call alone."""
    params, grads = make(sizes=(6, 3)), make(sizes=(6, 3), seed=1)
    kept = _C.Rows(params, [2], backups=make(sizes=(6, 3), seed=2))
    every_second = torch.stack([grads[0], grads[0]], dim=1)[:, 0]
    first, second, third = (
        _C.grad_sq_norm(kept, g, rows([0.1, 0, 0])) for g in (grads, [every_second, grads[1]], [grads[0] * 2, grads[1]])
    )
    assert torch.equal(first, second)
    assert third > first
