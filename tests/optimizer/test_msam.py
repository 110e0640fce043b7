"""The one-pass protocol: the clean weights and the perturbed ones, what may be called when, saving and copying."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

from sam_fused import FusedMSAM, ReferenceMSAM
from tests.helpers.cases import assert_same_state, awkward, generator, set_grads
from tests.helpers.sam import assert_untouched, snapshot

both = pytest.mark.parametrize("cls", [FusedMSAM, ReferenceMSAM])
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),  # composed
}
every_base = pytest.mark.parametrize("base", BASES)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, 5, generator=generator(step)), torch.arange(16, device=generator(0).device) % 3


def backward(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        opt.step()


def trained(cls: type, steps: int, hooked: bool = False) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A network after ``steps`` steps around Adam, whose weights are perturbed; ``hooked``: with ``model=``."""
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model if hooked else None)
    train(model, opt, range(steps))
    return model, opt


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, w) for p, w in zip(model.parameters(), expected, strict=True))


# ---- the clean weights ----


@both
@every_base
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_base_steps_from_the_clean_weights(cls, base, adaptive):
    """torch.optim with the same gradients has the very weights that eval() gives, up to rounding."""
    optimizer, options = BASES[base]
    model, twin = network().double(), network().double()
    opt = cls(model.parameters(), optimizer, rho=0.5, adaptive=adaptive, **options)
    plain = optimizer(twin.parameters(), **options)
    for step in range(6):
        opt.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x.double()), y).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
        opt.eval()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        opt.train()
        assert opt.perturbed
    distance = sum((p - q).square().sum() for p, q in zip(model.parameters(), twin.parameters(), strict=True)).sqrt()
    assert adaptive or distance.item() == pytest.approx(0.5)


@both
@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eval_and_train_to_the_same_bits(cls, base, dtype):
    optimizer, options = BASES[base]
    params = awkward(dtype)
    opt = cls(params, optimizer, rho=0.3, **{**options, "lr": 0.1})
    for step in range(4):
        set_grads(params, step)
        opt.step()
        perturbed = snapshot(params)
        opt.eval()
        assert not opt.perturbed
        clean = snapshot(params)
        assert any(not torch.equal(a, b) for (a, *_), (b, *_) in zip(clean, perturbed, strict=True))
        opt.eval()
        assert_untouched(params, clean)
        opt.train()
        assert_untouched(params, perturbed)
        opt.train()
        assert_untouched(params, perturbed)
        opt.restore()
        assert_untouched(params, clean)
        opt.train()


@both
def test_rho_0_is_the_base(cls):
    model, twin = network(), network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.0)
    plain = cls(twin.parameters(), torch.optim.Adam, lr=0.01, rho=0.5)
    for group in plain.param_groups:
        group["rho"] = 0.0
    for step in range(3):
        for network_, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            backward(network_, step)
            o.step()
            assert not o.perturbed
    assert same(model, values(twin))


@both
def test_rho_may_change_from_step_to_step(cls):
    """A warm-up from 0 and back: the distance from the clean weights is each step's own."""
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.0)
    for step, rho in enumerate([0.0, 0.0, 0.1, 0.4, 0.4, 0.0, 0.2]):
        opt.param_groups[0]["rho"] = rho
        opt.zero_grad()
        backward(model, step)
        opt.step()
        moved = values(model)
        opt.eval()
        distance = sum((p - w).square().sum() for p, w in zip(model.parameters(), moved, strict=True)).sqrt()
        assert distance.item() == pytest.approx(rho, rel=1e-5)
        opt.train()
        assert same(model, moved)


@both
def test_groups_of_their_own_rho(cls):
    model = network()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[3].parameters(), "rho": 0.5}]
    opt = cls(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        opt.step()
        moved = values(model)
        opt.eval()
        assert torch.equal(model[0].weight, moved[0])
        assert not torch.equal(model[3].weight, moved[4])
        # a group that is not perturbed may be changed at any time
        opt.train()
        with torch.no_grad():
            model[0].weight.mul_(0.5)


@both
def test_a_group_whose_rho_begins_without_gradients(cls):
    """Its moments are part of the norm, and its weights are perturbed."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = cls([{"params": [p]}, {"params": [q], "rho": 0.0}], torch.optim.Adam, rho=0.5, lr=0.1)
    for _ in range(2):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        opt.step()
    opt.param_groups[1]["rho"], q.grad = 0.5, None
    opt.step()
    moved = p.detach().clone(), q.detach().clone()
    opt.eval()
    assert not torch.equal(q, moved[1])
    opt.train()
    assert torch.equal(p, moved[0])
    assert torch.equal(q, moved[1])


@both
@pytest.mark.parametrize("option", ["rho", "eta"])
def test_a_radius_that_is_none(cls, option):
    model, opt = trained(cls, 2)
    before = values(model)
    opt.param_groups[0][option] = float("nan")
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{option}'\]: expected a finite number >= 0, got nan"):
        opt.step()
    opt.param_groups[0][option] = 0.0
    assert same(model, before)


@both
def test_a_moment_that_is_not_finite_moves_nothing(cls):
    p = nn.Parameter(torch.ones(3))
    opt = cls([p], torch.optim.SGD, lr=0.0, momentum=0.9, rho=0.5)
    p.grad = torch.tensor([1.0, torch.inf, 1.0])
    for _ in range(2):
        opt.step()
        opt.eval()
        clean = p.detach().clone()
        opt.train()
        assert torch.equal(p.nan_to_num(), clean.nan_to_num())


# ---- closures ----


@both
def test_a_closure_is_called_once_at_the_perturbed_weights(cls):
    model, twin = network(), network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    other = cls(twin.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    for step in range(4):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(opt.perturbed)
            opt.zero_grad()
            return backward(model, step)

        loss = opt.step(closure)
        other.zero_grad()
        assert torch.equal(loss, backward(twin, step))
        other.step()
        assert calls == [step > 0]
    assert same(model, values(twin))


@both
def test_a_closure_that_raises_changes_nothing(cls):
    model, opt = trained(cls, 3)
    before = values(model)

    def closure():
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        opt.step(closure)
    assert same(model, before)
    opt.eval()
    opt.train()
    assert same(model, before)


@both
def test_a_base_that_fails_leaves_the_clean_weights(cls):
    class Failing(torch.optim.NAdam):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise ArithmeticError("stop")
            return super().step(closure)

    model = network()
    opt = cls(model.parameters(), Failing, lr=0.01, rho=0.3)
    train(model, opt, range(3))
    moved = values(model)
    opt.eval()
    clean = values(model)
    opt.train()
    opt.base_optimizer.fails = True
    with pytest.raises(ArithmeticError, match="stop"):
        train(model, opt, range(3, 4))
    assert same(model, clean)
    opt.train()
    assert same(model, moved)


# ---- what is not allowed ----


@both
def test_no_step_after_eval(cls):
    model, opt = trained(cls, 2)
    opt.eval()
    clean = values(model)
    with pytest.raises(RuntimeError, match=r"step\(\) was called after eval\(\); call train\(\)"):
        opt.step()
    assert same(model, clean)


@both
@pytest.mark.parametrize(("base", "options"), [(torch.optim.SGD, {}), (torch.optim.RMSprop, {})])
def test_a_native_base_without_a_moment_is_refused(cls, base, options):
    with pytest.raises(ValueError, match=rf"base: {base.__name__} with momentum=0 keeps no first moment.*exp_avg"):
        cls(network().parameters(), base, lr=0.1, rho=0.3, **options)
    opt = cls(network().parameters(), base, lr=0.1, rho=0.0, **options)
    with pytest.raises(ValueError, match="keeps no first moment"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.1})
    assert len(opt.param_groups) == 1


@both
def test_a_refused_optimizer_leaves_nothing_in_the_model(cls):
    model = network()
    with pytest.raises(ValueError, match="momentum"):
        cls(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)
    backward(model, 0)
    model.eval()
    model(batch(0)[0])
    model.state_dict()


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook for m in model.modules() for hooks in (m._forward_pre_hooks, m._state_dict_pre_hooks) for hook in hooks
    ]


@both
@pytest.mark.parametrize("part", [True, False], ids=["a part", "the whole"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_script_module_takes_no_hooks(cls, part):
    model = network()
    if part:
        model[1] = torch.jit.script(model[1])
    else:
        model = torch.jit.script(model)
    refused = pytest.raises(ValueError, match=r"model: .*ScriptModule.* takes no hooks; leave model= out")
    with refused:
        cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model)
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    with refused:
        opt.model = model
    assert opt.model is None
    assert not hooks_of(model)


@both
def test_hooks_that_could_not_all_be_registered_are_taken_off(cls, monkeypatch):
    model, opt = trained(cls, 2)

    def refuse(hook):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model[3], "register_state_dict_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        opt.model = model
    assert opt.model is None
    assert not hooks_of(model)


@both
def test_another_base_without_a_moment_is_refused_at_the_first_step(cls):
    model, twin = network(), network()
    opt = cls(model.parameters(), torch.optim.Rprop, lr=0.1, rho=0.3)
    with pytest.raises(ValueError, match="base: Rprop keeps no first moment"):
        train(model, opt, range(1))
    train(twin, torch.optim.Rprop(twin.parameters(), lr=0.1), range(1))
    assert same(model, values(twin))


@both
def test_weights_that_are_changed_while_they_are_perturbed(cls):
    """They would be lost with the next step, so it is an error; restore() is the way out."""
    model = network()
    opt = cls([{"params": model.parameters(), "param_names": None}], torch.optim.Adam, lr=0.01, rho=0.3)
    train(model, opt, range(3))
    opt.eval()
    clean = values(model)
    opt.train()
    with torch.no_grad():
        model[3].weight.mul_(2)
    for action in (opt.step, opt.eval):
        with pytest.raises(RuntimeError, match=r"'params'\]\[4\] was changed while it was perturbed"):
            action()
    opt.restore()
    assert same(model, clean)
    with torch.no_grad():
        model[3].weight.mul_(2)  # now they are the clean weights
    changed = values(model)
    opt.train()
    opt.eval()
    assert same(model, changed)


@both
def test_weights_that_the_forward_pass_changes(cls):
    """nn.Embedding scales down in place the rows that are longer than max_norm."""
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 1))
    embedding, linear = model[0].parameters(), model[1].parameters()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.1, rho=0.5, model=model)

    def passes(opt):
        for _ in range(3):
            opt.zero_grad()
            model(torch.arange(5)).square().sum().backward()
            opt.step()

    with pytest.raises(RuntimeError, match=r"\['params'\]\[0\] was changed .* max_norm, needs a group with rho=0"):
        passes(opt)
    opt.restore()
    opt = cls([{"params": embedding, "rho": 0.0}, {"params": linear}], torch.optim.Adam, lr=0.1, rho=0.5, model=model)
    passes(opt)
    assert opt.perturbed


@both
@pytest.mark.parametrize("how", ["replaced", "vector_to_parameters"])
def test_weights_whose_data_is_replaced_while_they_are_perturbed(cls, how):
    """As in a layer that keeps its norm below a bound. Autograd counts no change then."""
    model, opt = trained(cls, 3)
    opt.eval()
    clean = values(model)
    opt.train()
    if how == "replaced":
        model[0].weight.data = torch.renorm(model[0].weight.data, 2, 0, 0.1)
    else:
        nn.utils.vector_to_parameters(torch.zeros(sum(w.numel() for w in clean)), model.parameters())
    for action in (opt.step, opt.eval):
        with pytest.raises(RuntimeError, match=r"'params'\]\[0\] was changed while it was perturbed"):
            action()
    opt.restore()
    assert same(model, clean)


@both
def test_a_model_may_be_moved_while_it_is_perturbed(cls):
    model, opt = trained(cls, 3)
    opt.eval()
    clean = values(model)
    opt.train()
    model.to(torch.float64)
    opt.eval()
    assert same(model, [w.double() for w in clean])


@both
def test_what_it_does_not_have(cls):
    opt = cls(network().parameters(), torch.optim.Adam, rho=0.3)
    for name in ("sharpness", "grad_norm", "first_step", "measure_sharpness"):
        assert not hasattr(opt, name)
    with pytest.raises(TypeError, match="rho"):
        cls(network().parameters(), torch.optim.Adam)
    with pytest.raises(ValueError, match="rho"):
        cls(network().parameters(), torch.optim.Adam, rho=-1.0)


# ---- model= ----


@both
def test_the_model_shows_the_weights_that_are_wanted(cls):
    model, opt = trained(cls, 3, hooked=True)
    moved = values(model)
    opt.restore()
    clean = values(model)
    model(batch(0)[0])
    assert same(model, moved)
    model.eval()
    model(batch(0)[0])
    assert same(model, clean)
    model.train()
    with torch.no_grad():  # torch.optim.swa_utils.update_bn
        model(batch(0)[0])
    assert same(model, clean)
    model(batch(0)[0])
    assert same(model, moved)
    saved = model.state_dict()
    assert same(model, clean)
    assert torch.equal(saved["0.weight"], clean[0])
    opt.step()  # of gradients that were taken before
    opt.state_dict()
    opt.eval()
    model.load_state_dict({key: torch.zeros_like(value) for key, value in saved.items()})
    model(batch(0)[0])
    opt.eval()
    assert same(model, [torch.zeros_like(w) for w in clean])


class Halves(nn.Module):
    """Whose parts a trainer calls, and never the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(network())


@both
def test_parts_that_are_called_alone_go_by_the_whole_models_mode(cls):
    model = Halves()
    whole = nn.Sequential(*model.parts)  # which the optimizer does not know
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model)
    twin = network()
    theirs = cls(twin.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    x, _ = batch(9)
    for steps in (range(3), range(3, 5)):
        train(whole, opt, steps)
        train(twin, theirs, steps)
        assert opt.perturbed
        with torch.no_grad():  # a part of a training pass may ask for no gradients
            model.parts[0](x)
        assert opt.perturbed
        model.eval()
        theirs.eval()
        whole(x)
        assert not opt.perturbed
        assert same(twin, values(model))
        model.train()
        theirs.train()
    model.parts[1].eval()  # a frozen layer is no evaluation
    backward(whole, 5)
    assert opt.perturbed


@both
def test_a_model_that_is_given_later_and_taken_away(cls):
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    for given in (model, nn.Sequential(model)):  # as it is wrapped later
        opt.model = given
        train(given, opt, range(2))
        assert opt.perturbed
        given.eval()
        given(batch(0)[0])
        assert not opt.perturbed
        given.train()
    opt.eval()
    opt.model = None
    assert not hooks_of(given)
    torch.jit.script(model)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


@both
def test_frozen_parameters_have_no_share_in_the_perturbation(cls):
    model, opt = trained(cls, 3, hooked=True)
    frozen, rest = list(model[0].parameters()), [*model[1].parameters(), *model[3].parameters()]
    model[0].requires_grad_(False)
    for again in (False, True):
        train(model, opt, range(3, 5))
        perturbed = values(model)
        opt.eval()
        assert all(map(torch.equal, frozen, perturbed[:2]))
        eps = [a - p.detach() for a, p in zip(perturbed[2:], rest, strict=True)]
        torch.testing.assert_close(torch.cat([e.flatten() for e in eps]).norm().item(), 0.3, rtol=1e-4, atol=0.0)
        opt.train()
        assert same(model, perturbed)
        if again:
            model[0].requires_grad_(True)
            opt.eval()
            opt.train()
            assert not torch.equal(frozen[0], perturbed[0])


@both
def test_a_part_of_the_model_is_saved_and_loaded_at_the_clean_weights(cls):
    model, opt = trained(cls, 2, hooked=True)
    opt.restore()
    clean = values(model)
    backward(model, 2)
    assert not same(model, clean)
    assert torch.equal(model[0].state_dict()["weight"], clean[0])
    backward(model, 2)
    model[0].load_state_dict({"weight": torch.zeros(8, 5), "bias": torch.zeros(8)})
    backward(model, 2)
    opt.step()
    assert torch.equal(model[3].state_dict()["weight"], values(model)[4])


@both
def test_a_model_in_eval_mode_trains_without_sam_and_a_warning(cls, recwarn):
    """Its gradients are those of the clean weights: fine-tuning often leaves the model in eval mode."""
    model, opt = trained(cls, 2, hooked=True)

    def warned() -> list[str]:
        opt.step()
        return [str(recwarn.pop().message) for _ in range(len(recwarn))]

    model.eval()
    backward(model, 0)
    assert "in eval mode" in warned()[0]
    model.train()
    backward(model, 0)
    model.eval()
    model(batch(0)[0])  # to look at something, with gradients
    assert warned() == []
    model.train()
    backward(model, 0)
    assert warned() == []
    model.eval()
    opt.param_groups[0]["rho"] = 0.0  # as a schedule has it that begins later
    backward(model, 0)
    assert warned() == []


@both
def test_after_eval_the_weights_stay_clean_until_train(cls):
    """So another optimizer may go on with the model."""
    model, opt = trained(cls, 2, hooked=True)
    moved = values(model)
    opt.eval()
    clean = values(model)
    backward(model, 2)
    assert same(model, clean)
    with pytest.raises(RuntimeError, match=r"step\(\) was called after eval\(\); call train\(\)"):
        opt.step()
    opt.train()
    assert same(model, moved)
    opt.eval()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    changed = values(model)
    model.eval()
    model(batch(0)[0])
    model.state_dict()
    assert same(model, changed)


@both
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_second_optimizer_of_the_same_parameters_takes_over(cls, evaluated):
    """As when a cell of a notebook runs again."""
    model, opt = trained(cls, 2, hooked=True)
    if evaluated:
        model.eval()
        model(batch(0)[0])
        model.train()
    twin = copy.deepcopy(model)
    opt.restore()
    twin.load_state_dict(model.state_dict())
    if not evaluated:
        backward(model, 0)
        assert opt.perturbed
    for net in (model, twin):
        opt = cls(net.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=net)
        train(net, opt, range(3))
        net.eval()
        net(batch(0)[0])
    assert same(model, values(twin))


@both
def test_what_was_changed_since_is_not_taken_back_by_a_second_optimizer(cls):
    model, opt = trained(cls, 2, hooked=True)
    assert opt.perturbed
    for layer in (model[0], model[1], model[3]):
        layer.reset_parameters()
    fresh = values(model)
    cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model)
    assert same(model, fresh)
    model.eval()
    model(batch(0)[0])
    assert same(model, fresh)


@both
def test_two_optimizers_of_two_parts_of_a_model(cls):
    model = network()
    parts = [model[0].parameters(), [*model[1].parameters(), *model[3].parameters()]]
    opts = [cls(part, torch.optim.Adam, lr=0.01, rho=0.3, model=model) for part in parts]
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        for opt in opts:
            opt.step()
    assert all(opt.perturbed for opt in opts)
    model.state_dict()
    assert not any(opt.perturbed for opt in opts)


@both
def test_the_average_of_the_clean_weights(cls):
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model)
    average, sums = torch.optim.swa_utils.AveragedModel(model), [torch.zeros_like(p) for p in model.parameters()]
    for step in range(4):
        train(model, opt, range(step, step + 1))
        opt.eval()
        average.update_parameters(model)
        opt.train()
        model.state_dict()
        sums = [total + p.detach() for total, p in zip(sums, model.parameters(), strict=True)]
    for p, total in zip(average.module.parameters(), sums, strict=True):
        torch.testing.assert_close(p, total / 4)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_of_a_part(cls, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.first, self.rest, self.on = nn.Linear(5, 5), network()[0], on

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.rest, x, use_reentrant=reentrant) if self.on else self.rest(x)

    ends = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(on)
        opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model)
        train(model, opt, range(4))
        opt.eval()
        ends.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@both
def test_checkpointed_activations_of_the_whole_model(cls):
    ends = []
    for on in (False, True):
        model, opt = trained(cls, 0, hooked=True)
        for step in range(4):
            x, y = batch(step)
            opt.zero_grad()
            output = checkpoint(model, x, use_reentrant=False) if on else model(x)
            nn.functional.cross_entropy(output, y).backward()
            opt.step()
        opt.eval()
        ends.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@both
def test_with_and_without_a_model_are_the_same_training(cls):
    ends = []
    for given in (False, True):
        model = network()
        opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3, model=model if given else None)
        for step in range(6):
            if not given:
                opt.train()
            opt.zero_grad()
            backward(model, step)
            opt.step()
            if not given:
                opt.eval()
            model.eval()
            model(batch(step)[0])
            model.state_dict()
            model.train()
        opt.eval()
        ends.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@both
def test_a_copy_of_the_model_has_nothing_to_do_with_the_optimizer(cls):
    model, opt = trained(cls, 2, hooked=True)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        before = values(model)
        assert same(twin, before)
        twin.eval()
        twin(batch(0)[0])
        assert opt.perturbed
        assert same(twin, before)


# ---- saving and copying ----


@both
def test_saving_is_refused_while_perturbed(cls):
    model, opt = trained(cls, 2)
    actions = [opt.state_dict, lambda: pickle.dumps(opt), lambda: copy.copy(opt), lambda: copy.deepcopy(opt)]
    for action in actions:
        with pytest.raises(RuntimeError, match=r"while the weights are perturbed; call eval\(\) first"):
            action()
    opt.eval()
    clean = values(model)
    for action in actions:
        action()
    saved = opt.state_dict()
    opt.train()
    opt.load_state_dict(saved)  # whose moments are another perturbation's
    assert same(model, clean)


@both
@every_base
@pytest.mark.parametrize("given", [False, True], ids=["by hand", "model="])
def test_resuming_is_bit_identical(cls, base, given):
    optimizer, options = BASES[base]

    def make():
        model = network()
        return model, cls(model.parameters(), optimizer, rho=0.3, model=model if given else None, **options)

    model, opt = make()
    train(model, opt, range(3))
    if not given:
        opt.eval()
    saved = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, saved)
    if not given:
        opt.train()
    train(model, opt, range(3, 6))
    opt.eval()

    again, resumed = make()
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["opt"])
    if not given:
        backward(again, 3)
        with pytest.raises(RuntimeError, match=r"after load_state_dict\(\), with gradients of the clean weights"):
            resumed.step()
        again.load_state_dict(checkpoint["model"])  # BatchNorm's statistics have moved
        resumed.train()
    train(again, resumed, range(3, 6))
    resumed.eval()
    assert same(again, values(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


@both
def test_a_checkpoint_from_before_the_first_momentum(cls):
    """Its gradients were right, and so are all that come later."""
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    twin = network()
    other = cls(twin.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for steps in (range(1), range(1, 3)):
        for m, o in ((model, opt), (twin, other)):
            train(m, o, steps)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@both
def test_a_checkpoint_loaded_before_training_in_eval_mode(cls):
    """Whose hooks know what the gradients belong to: a warning, as without a checkpoint."""
    model, opt = trained(cls, 2, hooked=True)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    model.eval()
    opt.zero_grad()
    backward(model, 2)
    with pytest.warns(UserWarning, match="in eval mode"):
        opt.step()


@both
def test_a_distributed_checkpoint_without_a_model(cls):
    """torch makes the state of a fresh optimizer by a step with learning rate 0, after eval() too."""
    model, opt = trained(cls, 3)
    opt.eval()
    weights, state = copy.deepcopy(get_state_dict(model, opt))
    opt.train()
    train(model, opt, range(3, 5))

    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        get_state_dict(*trained(cls, 0))
    other, resumed = trained(cls, 0)
    resumed.eval()
    get_state_dict(other, resumed)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    with pytest.raises(RuntimeError, match=r"step\(\) was called after eval\(\)"):
        resumed.step()
    resumed.train()
    train(other, resumed, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@both
def test_resuming_by_closures_is_bit_identical(cls):
    def step(model, opt, i):
        def closure():
            opt.zero_grad()
            return backward(model, i)

        opt.step(closure)

    model, twin = network(), network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    for i in range(3):
        step(model, opt, i)
    opt.eval()
    other = cls(twin.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.train()
    for i in range(3, 6):
        step(model, opt, i)
        step(twin, other, i)
    assert same(model, values(twin))


@both
@every_base
def test_checkpoints_go_both_ways(cls, base):
    optimizer, options = BASES[base]
    model = network()
    plain = optimizer(model.parameters(), **options)
    train(model, plain, range(2))
    opt = cls(model.parameters(), optimizer, rho=0.3, **options)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["rho"] == 0.3
    assert_same_state(opt, plain, 0.0, "from the base")
    opt.train()
    assert opt.perturbed
    train(model, opt, range(2, 4))
    opt.eval()
    after = optimizer(model.parameters(), **options)
    after.load_state_dict(opt.state_dict())
    assert_same_state(after, opt, 0.0, "to the base")
    train(model, after, range(4, 5))


@both
def test_a_copy_trains_on_by_itself(cls):
    model, opt = trained(cls, 2, hooked=True)
    twin = copy.deepcopy(opt)  # the model goes with it
    saved = pickle.loads(pickle.dumps(opt))
    for other in (twin, saved):
        train(other.model, other, range(2, 4))
    train(model, opt, range(2, 4))
    for o in (opt, twin, saved):
        o.eval()
    assert same(twin.model, values(model))
    assert same(saved.model, values(model))


# ---- with what goes around it ----


@both
def test_accumulation_and_clipping(cls):
    """Two halves of a batch are the whole of it; clipping by norm before the step clips what the base is given."""
    model, twin = network().double(), network().double()
    model[1].eval()
    twin[1].eval()
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    other = cls(twin.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    for step in range(4):
        x, y = batch(step)
        opt.zero_grad()
        for half in (slice(0, 8), slice(8, 16)):
            (nn.functional.cross_entropy(model(x[half].double()), y[half]) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        other.zero_grad()
        nn.functional.cross_entropy(twin(x.double()), y).backward()
        assert norm > 0.1
        for p in twin.parameters():
            p.grad *= 0.1 / (norm + 1e-6)
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@both
@every_base
@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler(cls, base, unscales):
    """A power of two changes no bit; an overflow changes nothing, at the first step and later."""
    optimizer, options = BASES[base]
    model, twin = network(), network()
    opt = cls(model.parameters(), optimizer, rho=0.3, **options)
    other = cls(twin.parameters(), optimizer, rho=0.3, **options)
    scaler = torch.amp.GradScaler(model[0].weight.device.type, init_scale=256.0)
    for step in range(6):
        before, state = values(model), copy.deepcopy(opt.base_optimizer.state_dict()["state"])
        opt.zero_grad()
        x, y = batch(step)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        overflow = step in (0, 3)
        if overflow:
            model[3].bias.grad[0] = torch.inf
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update(256.0)
        if overflow:
            assert same(model, before)
            after = opt.base_optimizer.state_dict()["state"]
            for key, entry in state.items():
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[key][k])) for k, v in entry.items())
            assert step == 0 or opt.perturbed
            twin(x)  # whose BatchNorm has seen the batch too
        else:
            other.zero_grad()
            backward(twin, step)
            other.step()
    assert same(model, values(twin))
    opt.eval()
    other.eval()
    assert same(model, values(twin))


@both
def test_after_a_step_that_grad_scaler_saw_fail(cls, monkeypatch):
    """It leaves its marks on the optimizer; restore() wipes them off."""
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    scaler = torch.amp.GradScaler(model[0].weight.device.type)
    scaler.scale(backward(model, 0).detach())
    with monkeypatch.context() as patch:
        patch.setattr(opt, "_advance", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scaler.step(opt)
    opt.restore()
    opt.step(lambda: backward(model, 1))


@both
@pytest.mark.parametrize("mistake", ["eval", "closure", "rho"])
def test_a_step_that_grad_scaler_saw_refused_leaves_no_scale_behind(cls, mistake):
    """GradScaler.step would multiply the next scale by it."""
    model, twin = network(), network()
    opt, plain = (cls(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3) for m in (model, twin))
    scaler = torch.amp.GradScaler(model[0].weight.device.type, init_scale=1024.0)
    scaler.scale(backward(model, 0).detach())
    if mistake == "eval":
        opt.eval()
    if mistake == "rho":
        opt.param_groups[0]["rho"] = float("nan")
    with pytest.raises((RuntimeError, ValueError)):
        scaler.step(opt, *([lambda: None] if mistake == "closure" else []))
    opt.param_groups[0]["rho"] = 0.3
    opt.train()
    for m in (model, twin):
        m.zero_grad()
        backward(m, 1)
    for p in model.parameters():
        p.grad.mul_(1024.0)
    scaler.step(opt)
    plain.step()
    assert same(model, values(twin))


@both
def test_a_closure_through_grad_scaler_is_refused(cls):
    model = network()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.01, rho=0.3)
    scaler = torch.amp.GradScaler(model[0].weight.device.type)
    scaler.scale(backward(model, 0))
    with pytest.raises(RuntimeError, match=r"came through GradScaler\.step"):
        scaler.step(opt, lambda: backward(model, 0))


@both
def test_autocast_around_a_whole_training_keeps_no_stale_weights(cls):
    losses = []
    for around in (False, True):
        model = network()
        opt = cls(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.5)
        device = model[0].weight.device.type

        def forward(step, model=model, device=device):
            with torch.autocast(device, torch.bfloat16):
                return backward(model, step)

        mine = []
        with torch.autocast(device, torch.bfloat16, enabled=around):
            for step in range(4):
                opt.zero_grad()
                mine.append(forward(step).item())
                opt.step()
        losses.append(mine)
    assert losses[0] == losses[1]


@both
def test_a_scheduler_may_have_either(cls):
    model = network()
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    for holder in (opt, opt.base_optimizer):
        scheduler = torch.optim.lr_scheduler.StepLR(holder, 1, 0.5)
        train(model, opt, range(1))
        lr = opt.param_groups[0]["lr"]
        scheduler.step()
        assert opt.param_groups[0]["lr"] == lr / 2
