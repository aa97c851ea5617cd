"""Checkpoints of the transformers Trainer with `AdapterCheckpoints`: small, checked, and right to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from randlora_vision import RandLoRAConfig, inject, load_adapter, merge, remove
from randlora_vision.integrations.transformers import AdapterCheckpoints
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import randomize
from tests.transformers_models import EXAMPLES

CONFIG = RandLoRAConfig(rank=4, target_modules="transformers:language")


class Rows(Dataset):
    """The rows of an example's batch, six of them, all different."""

    def __init__(self, name: str) -> None:
        self.batch = EXAMPLES[name].batch()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {key: value[index % 2].clone() for key, value in self.batch.items()}
        if "input_ids" in row:
            row["input_ids"][-1] = row["labels"][-1] = 10 + index
        return row


def trainer(
    model: nn.Module, folder: Path, data: Dataset, callbacks: list[Any] | None = None, **options: Any
) -> Trainer:
    settings: dict[str, Any] = dict(
        max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=3, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings | options)
    callbacks = callbacks or [AdapterCheckpoints()]
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def adapted(name: str = "llava", config: RandLoRAConfig = CONFIG) -> nn.Module:
    model = EXAMPLES[name].build()
    inject(model, config)
    return model


def losses(run: Trainer) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.state.log_history if "loss" in line}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Four steps of LLaVA with a checkpoint after two."""
    done = trainer(adapted(), tmp_path_factory.mktemp("run"), Rows("llava"))
    done.train()
    return done


@pytest.fixture
def folder(run: Trainer) -> Path:
    return Path(run.args.output_dir)


def test_a_checkpoint_holds_the_trained_numbers(run: Trainer, folder: Path) -> None:
    model = run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    size = (folder / "checkpoint-2" / "model.safetensors").stat().st_size
    assert 4 * trained < size < 4 * trained + 10_000 < 4 * everything
    assert not (folder / "checkpoint-2" / "config.json").exists()  # nobody takes it for a model
    assert losses(run)[4] < losses(run)[1]
    fresh = EXAMPLES["llava"].build()
    load_adapter(fresh, folder / "checkpoint-4" / "adapter.safetensors")
    assert EXAMPLES["llava"].loss(fresh).item() == pytest.approx(EXAMPLES["llava"].loss(model.eval()).item(), rel=1e-6)


def test_a_fresh_process_goes_on_to_the_same_losses(run: Trainer, folder: Path, tmp_path: Path) -> None:
    again = trainer(adapted(), tmp_path, Rows("llava"))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert {step: losses(again)[step] for step in (3, 4)} == {step: losses(run)[step] for step in (3, 4)}
    wanted = dict(run.model.named_parameters())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.model.named_parameters())


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm", "paligemma"])
def test_models_that_talk_are_trained_and_reloaded(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    done = trainer(adapted(name), tmp_path, Rows("gpt2"), save_steps=4)
    done.data_collator = lambda rows: example.batch()
    done.train()
    assert losses(done)[4] < losses(done)[1]
    fresh = example.build()
    load_adapter(fresh, tmp_path / "checkpoint-4" / "adapter.safetensors")
    assert example.loss(fresh).item() == pytest.approx(example.loss(done.model.eval()).item(), rel=1e-6)


def test_a_checkpoint_of_the_whole_model_is_not_taken_for_one_of_the_adapter(tmp_path: Path) -> None:
    """transformers renames LLaVA's keys when it saves, so that the adapter's are lost on the way back."""
    plain = trainer(adapted(), tmp_path, Rows("llava"), [_Nothing()], max_steps=2)
    with pytest.warns(UserWarning, match="writes the adapters default beside the weights"):
        plain.train()
    again = trainer(adapted(), tmp_path, Rows("llava"))
    with pytest.raises(ValueError, match="go on from step 2 with untrained adapters"):
        again.train(resume_from_checkpoint=True)


class _Nothing(TrainerCallback):
    """Does nothing."""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RandLoRAConfig(rank=4, target_modules=CONFIG.target_modules, seed=1), "belongs to other random bases"),
        (RandLoRAConfig(rank=8, target_modules=CONFIG.target_modules), "in the checkpoint and"),
        (RandLoRAConfig(rank=4, target_modules="transformers:vision"), "in the model only"),
    ],
)
def test_another_adapter_is_refused(folder: Path, tmp_path: Path, config: RandLoRAConfig, message: str) -> None:
    again = trainer(adapted(config=config), tmp_path, Rows("llava"))
    with pytest.raises(ValueError, match=message):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_checkpoint_of_an_older_version_holds_the_sha256_of_the_bases(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert tensors.pop("randlora_bases_crc32.default").shape == (4,)
    model = trainer(adapted(), tmp_path, Rows("llava")).model
    bases = next(adapted_modules(model))[3].slots["default"].bases
    digest = torch.tensor(list(bytes.fromhex(bases.sha256)), dtype=torch.uint8)
    model.load_state_dict({**tensors, "randlora_bases_sha256.default": digest})
    with pytest.raises(ValueError, match="belongs to other random bases"):
        model.load_state_dict({**tensors, "randlora_bases_sha256.default": digest + 1})


def test_the_best_checkpoint_is_loaded_at_the_end_and_merged_weights_are_a_whole_model(tmp_path: Path) -> None:
    import transformers

    model = adapted("vit", RandLoRAConfig(rank=4, target_modules="transformers:vision", modules_to_save=["classifier"]))
    data = Rows("vit")
    done = trainer(
        model, tmp_path, data, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=3.0,
        metric_for_best_model="loss",
    )  # fmt: skip
    done.train()
    assert done.state.best_model_checkpoint is not None
    assert done.evaluate()["eval_loss"] == pytest.approx(done.state.best_metric, rel=1e-5)
    randomize(model)
    expected = EXAMPLES["vit"].loss(model.eval()).item()
    done.save_model(str(tmp_path / "last"))
    assert sorted(path.suffix for path in (tmp_path / "last").iterdir()) == [".bin", ".safetensors", ".safetensors"]
    merge(model)
    remove(model)
    model.save_pretrained(tmp_path / "merged")
    whole = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert EXAMPLES["vit"].loss(whole.eval()).item() == pytest.approx(expected, rel=1e-4)


class Wrapped(nn.Module):
    """A model that is not one of transformers, in a form that the Trainer accepts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_models_of_other_libraries(tmp_path: Path) -> None:
    def wrapped() -> nn.Module:
        model = Wrapped()
        inject(model, RandLoRAConfig(rank=4, target_modules=["body.1"]))
        return model

    first = trainer(wrapped(), tmp_path / "a", Rows("vit"))
    first.train()
    assert (tmp_path / "a" / "checkpoint-2" / "model.safetensors").stat().st_size < 10_000
    again = trainer(wrapped(), tmp_path / "b", Rows("vit"))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again)[4] == losses(first)[4]


def test_mistakes_are_reported(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="has no adapters: call inject before the Trainer is created"):
        trainer(EXAMPLES["vit"].build(), tmp_path, Rows("vit"))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        trainer(adapted("vit", RandLoRAConfig(rank=4)), tmp_path, Rows("vit"), [AdapterCheckpoints("other")])
    late = trainer(adapted(), tmp_path, Rows("llava"), [_Nothing()])
    late.add_callback(AdapterCheckpoints())
    with pytest.raises(ValueError, match="was added after the Trainer was created"):
        late.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_adapters_that_cannot_learn_are_named_before_the_first_step(tmp_path: Path) -> None:
    class HalfUsed(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(16, 16)

    model = HalfUsed()
    inject(model, RandLoRAConfig(rank=4, target_modules=["body.1", "spare"]))
    with pytest.raises(ValueError, match="no gradient reaches the adapters of spare"):
        trainer(model, tmp_path, Rows("vit")).train()
