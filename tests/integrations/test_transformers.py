"""transformers.Trainer on a tiny model: FusedMSAM as it is, FusedSAM by a subclass of a few lines."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sam_fused import FusedMSAM, FusedSAM

pytestmark = pytest.mark.slow
EPOCHS, BATCH = 2, 8


class Sentences(Dataset):
    """Whose label is whether the first token is in the upper half of the vocabulary."""

    def __init__(self, n: int = 48) -> None:
        self.tokens = torch.randint(0, 50, (n, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": (self.tokens[i, 0] > 24).long()}


class SAMTrainer(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.optimizer.first_step(zero_grad=True)
        super().training_step(model, inputs, num_items_in_batch)
        return loss


def tiny() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=8, **sizes, **dropout))


def make(cls, model: torch.nn.Module, given: bool):
    return cls(model.parameters(), torch.optim.AdamW, lr=1e-2, rho=0.1, **({"model": model} if given else {}))


def trainer(kind: type[Trainer], cls, folder, given: bool = True, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    model = tiny()
    opt = make(cls, model, given)
    constant = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    return kind(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), optimizers=(opt, constant))


def plain_loop(cls, order: list[list[int]]) -> dict[str, torch.Tensor]:
    """The weights that a loop over the same batches ends with."""
    model, data = tiny(), Sentences()
    model.train()
    opt = make(cls, model, given=True)
    for indices in order:
        inputs = {key: torch.stack([data[i][key] for i in indices]) for key in data[0]}
        for half in range(1 if cls is FusedMSAM else 2):
            opt.zero_grad()
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) if half or cls is FusedMSAM else None
            opt.first_step() if cls is FusedSAM and half == 0 else opt.step()
    return model.state_dict()


class Recording(Sentences):
    """Keeps in which order it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.read.append(i)
        return super().__getitem__(i)


@pytest.mark.parametrize(("kind", "cls"), [(Trainer, FusedMSAM), (SAMTrainer, FusedSAM)])
def test_it_trains_as_a_plain_loop_does(kind, cls, tmp_path):
    made = trainer(kind, cls, tmp_path, save_strategy="no", eval_strategy="no")
    made.train_dataset = Recording()
    made.train()
    read = made.train_dataset.read
    expected = plain_loop(cls, [read[i : i + BATCH] for i in range(0, len(read), BATCH)])
    assert len(read) == EPOCHS * 48
    for key, value in made.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("given", [False, True], ids=["by hand", "model="])
def test_evaluations_see_the_clean_weights(given, tmp_path):
    made = trainer(Trainer, FusedMSAM, tmp_path, given, save_strategy="no", eval_strategy="epoch")
    perturbed = []
    evaluate = made.prediction_step
    made.prediction_step = lambda *a, **k: (perturbed.append(opt.perturbed), evaluate(*a, **k))[1]
    opt = made.optimizer
    made.train()
    assert perturbed
    assert given or not any(perturbed)
    loss = made.evaluate()["eval_loss"]
    opt.eval()
    assert made.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize(("kind", "cls"), [(Trainer, FusedMSAM), (SAMTrainer, FusedSAM)])
def test_it_resumes(kind, cls, tmp_path):
    whole = trainer(kind, cls, tmp_path / "whole", save_strategy="epoch", eval_strategy="epoch")
    whole.train()
    [first, _] = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    resumed = trainer(kind, cls, tmp_path / "resumed", save_strategy="no", eval_strategy="epoch")
    resumed.train(resume_from_checkpoint=str(first))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
