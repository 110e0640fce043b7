"""Other people's training loops: Lightning and accelerate train as the plain loop does, bit for bit."""

from __future__ import annotations

import accelerate
import lightning.pytorch as pl
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from sam_fused import FusedMSAM, FusedSAM
from tests.helpers.networks import perceptron

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated"),  # Lightning's own
]
EPOCHS = 2
SCALE = 2.0**4  # of float16 losses
torch.manual_seed(0)
DATA = TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))
LOADER = DataLoader(DATA, batch_size=8)


def make(
    model: nn.Module, rho: float = 0.3, given: nn.Module | None = None, **options
) -> tuple[FusedSAM, torch.optim.lr_scheduler.StepLR]:
    """``given``: as ``model=``, where that is something around ``model``."""
    opt = FusedSAM(model.parameters(), torch.optim.AdamW, lr=0.05, rho=rho, model=given or model, **options)
    return opt, torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)


def plain_loop(accumulate: int = 1, bf16: bool = False, rho: float = 0.3) -> dict[str, torch.Tensor]:
    """The weights and statistics that every trainer has to end with."""
    model = perceptron(3)
    opt, scheduler = make(model, rho)
    batches = list(LOADER) * EPOCHS
    for start in range(0, len(batches), accumulate):
        for _ in range(2 if rho else 1):
            opt.zero_grad()
            for x, y in batches[start : start + accumulate]:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = cross_entropy(model(x), y) / accumulate
                loss.backward()
            opt.first_step() if rho and not opt.perturbed else opt.step()
        scheduler.step()
    return model.state_dict()


def make_one_pass(
    model: nn.Module, given: nn.Module | None = None
) -> tuple[FusedMSAM, torch.optim.lr_scheduler.StepLR]:
    opt = FusedMSAM(model.parameters(), torch.optim.AdamW, lr=0.05, rho=0.3, model=given or model)
    return opt, torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)


def plain_one_pass_loop(accumulate: int = 1, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """:func:`plain_loop` with FusedMSAM, an ordinary loop; ``dtype`` is autocast's. Ends with the clean weights."""
    model = perceptron(3)
    opt, scheduler = make_one_pass(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=dtype is torch.float16)
    batches = list(LOADER) * EPOCHS
    for start in range(0, len(batches), accumulate):
        opt.zero_grad()
        for x, y in batches[start : start + accumulate]:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = cross_entropy(model(x), y) / accumulate
            scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        scheduler.step()
    return model.state_dict()


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


# ---- Lightning ----


class Automatic(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(3)
        self.calls = 0

    def loss(self, batch) -> torch.Tensor:
        self.calls += 1
        x, y = batch
        return cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def make(self):
        return make(self.net)

    def configure_optimizers(self):
        self.opt, scheduler = self.make()
        return {"optimizer": self.opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WithTheTrainersModel(Automatic):
    """As in docs/trainers.md. ``reduced`` counts DistributedDataParallel's messages before each pass and at the end."""

    def make(self):
        self.messages, self.reduced = 0, []
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.register_comm_hook(None, self.count)
        return make(self.net, given=self.trainer.model)

    def count(self, _, bucket):
        self.messages += 1
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def training_step(self, batch, batch_idx):
        self.reduced.append(self.messages)
        return super().training_step(batch, batch_idx)


class AutomaticInTwoCalls(Automatic):
    """The first pass by hand: for MixedPrecision with a GradScaler, which calls the closure once."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.first_step()
        optimizer.step(optimizer_closure)


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            opt.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        opt.step(closure)
        self.lr_schedulers().step()


class ManualInTwoCalls(Manual):
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        self.manual_backward(self.loss(batch))
        opt.optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        opt.step()
        opt.zero_grad()
        self.lr_schedulers().step()


class ManualAccumulating(Manual):
    held = ()

    def training_step(self, batch, batch_idx):
        self.held = [*self.held, batch]
        if len(self.held) < 3:
            return
        opt = self.optimizers()

        def closure():
            opt.zero_grad()
            for batch in self.held:
                self.manual_backward(self.loss(batch) / len(self.held))

        opt.step(closure)
        self.held = ()
        self.lr_schedulers().step()


def fit(module: pl.LightningModule, epochs: int = EPOCHS, ckpt_path: str | None = None, **options) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", **quiet, **options)
    trainer.fit(module, LOADER, ckpt_path=ckpt_path)
    return trainer


def fp16() -> MixedPrecision:
    """Lightning's float16 with a GradScaler, on the CPU; nothing overflows."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cls", [Automatic, AutomaticInTwoCalls, Manual, ManualInTwoCalls])
def test_lightning(cls, precision):
    module = cls()
    trainer = fit(module, precision=precision)
    assert trainer.global_step == EPOCHS * len(LOADER)
    assert module.calls == 2 * trainer.global_step
    assert_same(module.net, plain_loop(bf16=precision == "bf16-mixed"))


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_lightning_with_the_trainers_model(strategy):
    """With DistributedDataParallel, here of one process, the first pass of each step sends nothing."""
    module = WithTheTrainersModel()
    try:
        fit(module, strategy=strategy, devices=1, use_distributed_sampler=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert_same(module.net, plain_loop())
    before_first, before_second = module.reduced[::2], module.reduced[1::2]
    assert before_first == before_second
    assert before_first == [step if strategy == "ddp" else 0 for step in range(len(LOADER) * EPOCHS)]


def test_lightning_accumulates_by_hand():
    module = ManualAccumulating()
    assert fit(module).global_step == EPOCHS * len(LOADER) // 3
    assert_same(module.net, plain_loop(accumulate=3))


def test_lightning_accumulating_by_itself_warns():
    """Its closure knows the last batch only, and does not zero what the batches before it left."""
    with pytest.warns(UserWarning, match="the second pass added its gradients to the first pass's"):
        fit(Automatic(), accumulate_grad_batches=3)


@pytest.mark.parametrize("cls", [AutomaticInTwoCalls, ManualInTwoCalls])
def test_lightning_with_a_scaler(cls):
    """Float16 gradients are not float32 ones, so near is what is asked; SAM off ends far away."""
    module = cls()
    fit(module, plugins=[fp16()])
    assert module.calls == 2 * EPOCHS * len(LOADER)
    expected = plain_loop()
    off = plain_loop(rho=0.0)
    for key, value in module.net.state_dict().items():
        if key.endswith(("weight", "running_var")):
            distance = (value - expected[key]).norm()
            assert distance < 0.1 * (off[key] - expected[key]).norm(), key


@pytest.mark.parametrize("cls", [Automatic, Manual])
def test_lightning_with_a_scaler_and_the_closure_warns(cls):
    """Its plugin calls the closure once, then GradScaler.step without one."""
    module = cls()
    with pytest.warns(UserWarning, match=r"step\(\) was called without a closure.*the step of AdamW, without SAM"):
        fit(module, plugins=[fp16()])
    assert module.calls == EPOCHS * len(LOADER)


@pytest.mark.parametrize("method", ["first_step", "measure_sharpness", "restore"])
def test_lightnings_wrapper_does_not_take_our_methods(method):
    """It would keep the backup to itself, and the weights would stay perturbed."""

    class OnTheWrapper(Manual):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            self.manual_backward(self.loss(batch))
            getattr(opt, method)()

    with pytest.raises(RuntimeError, match=rf"{method}\(\) was called on LightningFusedSAM.*opt\.optimizer"):
        fit(OnTheWrapper())


def test_what_lightnings_wrapper_reads_is_ours():
    class Reading(ManualInTwoCalls):
        def on_train_epoch_end(self):
            opt = self.optimizers()
            assert torch.equal(opt.sharpness, opt.optimizer.sharpness)
            assert opt.mean_sharpness() > 0
            assert opt.optimizer.mean_sharpness().isnan()  # it was reset

    fit(Reading())


@pytest.mark.parametrize("cls", [Automatic, Manual])
def test_lightning_resumes(cls, tmp_path):
    fit(cls(), epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = cls()
    fit(module, ckpt_path=str(tmp_path / "half.ckpt"))
    assert module.calls == 2 * len(LOADER)
    assert_same(module.net, plain_loop())


class OnePass(Automatic):
    """Automatic optimization as it is for any optimizer."""

    def make(self):
        return make_one_pass(self.net)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        assert not self.net.training
        self.log("val", cross_entropy(self.net(x), y))
        assert not self.opt.perturbed


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_trains_in_one_pass_in_every_precision(precision, dtype, accumulate):
    module = OnePass()
    how = {"plugins": [fp16()]} if dtype is torch.float16 else {"precision": precision}
    trainer = fit(module, accumulate_grad_batches=accumulate, **how)
    assert trainer.global_step == EPOCHS * len(LOADER) // accumulate
    assert module.calls == EPOCHS * len(LOADER)
    assert module.opt.perturbed
    assert_same(module.net, plain_one_pass_loop(accumulate, dtype))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_lightning_trains_in_one_pass_with_parameters_of_another_precision(precision):
    module = OnePass()
    fit(module, precision=precision)
    assert module.calls == EPOCHS * len(LOADER)
    loss = torch.stack([module.loss([t.to(module.net[0].weight.dtype) if t.is_floating_point() else t for t in batch])
                        for batch in LOADER]).mean()  # fmt: skip
    assert loss.isfinite()


class OnePassOfAll(OnePass):
    """Lightning calls validation_step, and never the module itself."""

    def make(self):
        return make_one_pass(self.net, self.trainer.model if self.of_trainer else self)


@pytest.mark.parametrize("model", ["net", "self", "trainer.model"])
def test_lightning_validates_with_the_clean_weights(model):
    module = OnePass() if model == "net" else OnePassOfAll()
    module.of_trainer = model == "trainer.model"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet)
    trainer.fit(module, LOADER, LOADER)
    assert trainer.callback_metrics["val"].isfinite()
    assert_same(module.net, plain_one_pass_loop())


def test_lightning_resumes_in_one_pass(tmp_path):
    fit(OnePass(), epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = OnePass()
    fit(module, ckpt_path=str(tmp_path / "half.ckpt"))
    assert module.calls == len(LOADER)
    assert_same(module.net, plain_one_pass_loop())


# ---- accelerate ----


@pytest.fixture
def accelerator(request):
    """Its settings are global to the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **getattr(request, "param", {}))


settings = pytest.mark.parametrize(
    "accelerator", [{}, {"mixed_precision": "bf16"}], indirect=True, ids=["fp32", "bf16"]
)


@settings
@pytest.mark.parametrize("closure_form", [True, False])
def test_accelerate(accelerator, closure_form):
    model = perceptron(3)
    model, opt, scheduler, loader = accelerator.prepare(model, *make(model), LOADER)
    for x, y in list(loader) * EPOCHS:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        if closure_form:
            opt.step(closure)
        else:
            closure()
            opt.optimizer.first_step()
            closure()
            opt.step()
        scheduler.step()
    assert_same(accelerator.unwrap_model(model), plain_loop(bf16=accelerator.mixed_precision == "bf16"))


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 3}], indirect=True)
def test_accelerate_accumulates(accelerator):
    """While accumulating its step does nothing, the closure included: that goes through the batches held so far."""
    model = perceptron(3)
    model, opt, scheduler, loader = accelerator.prepare(model, *make(model), LOADER)
    held = []

    def closure():
        opt.zero_grad()
        for x, y in held:
            accelerator.backward(cross_entropy(model(x), y))  # which divides by the number of batches

    for _ in range(EPOCHS):
        for batch in loader:
            held.append(batch)
            with accelerator.accumulate(model):
                opt.step(closure)
                scheduler.step()
            if accelerator.sync_gradients:
                held.clear()
    assert_same(accelerator.unwrap_model(model), plain_loop(accumulate=3))


@pytest.mark.parametrize("one_pass", [False, True])
def test_accelerate_resumes(one_pass, accelerator, tmp_path):
    ends = []
    for resumed in (False, True):
        model = perceptron(3)
        made = make_one_pass(model) if one_pass else make(model)
        model, opt, scheduler, loader = accelerator.prepare(model, *made, LOADER)
        for epoch in range(EPOCHS):
            if resumed and epoch == 0:
                accelerator.load_state(tmp_path)
                continue
            for x, y in loader:

                def closure(x=x, y=y, model=model, opt=opt):
                    opt.zero_grad()
                    accelerator.backward(cross_entropy(model(x), y))

                if one_pass:
                    closure()
                    opt.step()
                else:
                    opt.step(closure)
                scheduler.step()
            if not resumed and epoch == 0:
                accelerator.save_state(tmp_path)
        ends.append(model)
        accelerator.free_memory()
    for model in ends:
        assert_same(accelerator.unwrap_model(model), plain_one_pass_loop() if one_pass else plain_loop())


def test_accelerates_wrapper_hides_first_step(accelerator):
    model = perceptron(3)
    opt = accelerator.prepare(make(model)[0])
    with pytest.raises(AttributeError, match="first_step"):
        opt.first_step()


def loop_with_scaler(first_step: bool = False, closure_form: bool = False) -> nn.Module:
    """What accelerate makes with mixed_precision="fp16", which needs a GPU. A power of two scales without rounding."""
    model = perceptron(3)
    amp = torch.amp.GradScaler("cpu", init_scale=SCALE)
    inner, scheduler = make(model, scaler=amp)
    opt = AcceleratedOptimizer(inner, scaler=amp)
    for x, y in list(LOADER) * EPOCHS:

        def closure(x=x, y=y):
            opt.zero_grad()
            amp.scale(cross_entropy(model(x), y)).backward()

        closure()
        if first_step:
            opt.optimizer.first_step()
            closure()
        opt.step(closure if closure_form else None)
        scheduler.step()
    return model


def test_accelerate_with_a_scaler(accelerator):
    assert_same(loop_with_scaler(first_step=True), plain_loop())


def test_accelerate_with_a_scaler_refuses_the_closure(accelerator):
    with pytest.raises(RuntimeError, match=r"a closure came through GradScaler\.step"):
        loop_with_scaler(closure_form=True)


def test_accelerate_without_first_step_warns(accelerator):
    with pytest.warns(UserWarning, match="the step of AdamW, without SAM"):
        assert_same(loop_with_scaler(), plain_loop(rho=0.0))


@settings
def test_accelerate_in_one_pass(accelerator):
    """Its wrapper passes train() and eval() on."""
    model = perceptron(3)
    opt = FusedMSAM(model.parameters(), torch.optim.AdamW, lr=0.05, rho=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
    model, opt, scheduler, loader = accelerator.prepare(model, opt, scheduler, LOADER)
    for _ in range(EPOCHS):
        opt.train()
        for x, y in loader:
            opt.zero_grad()
            accelerator.backward(cross_entropy(model(x), y))
            opt.step()
            scheduler.step()
        opt.eval()
        assert not opt.optimizer.perturbed
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    assert_same(accelerator.unwrap_model(model), plain_one_pass_loop(dtype=dtype))


@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 3}], indirect=True)
def test_accelerate_accumulates_in_one_pass(accelerator):
    model = perceptron(3)
    model, opt, scheduler, loader = accelerator.prepare(model, *make_one_pass(model), LOADER)
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                opt.step()
                scheduler.step()
                opt.zero_grad()
    assert_same(accelerator.unwrap_model(model), plain_one_pass_loop(accumulate=3))


# ---- timm ----


def test_timms_scaler_in_one_pass():
    """Backward, unscaling, clipping and the step in one call, as timm's train.py makes it."""
    from timm.utils import NativeScaler

    ends = []
    for theirs in (False, True):
        model = perceptron(3)
        opt, _ = make_one_pass(model)
        scaler = NativeScaler(device="cpu")
        plain = torch.amp.GradScaler("cpu")
        for x, y in list(LOADER) * EPOCHS:
            opt.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = cross_entropy(model(x), y)
            if theirs:
                scaler(loss, opt, clip_grad=0.5, parameters=model.parameters())
                continue
            plain.scale(loss).backward()
            plain.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            plain.step(opt)
            plain.update()
        ends.append(model.state_dict())
    assert_same(model, ends[0])
