from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from randlora_vision.training.clip.contrastive import Contrast, ContrastiveLoss, fitted_bias
from randlora_vision.training.clip.load import load_trained
from randlora_vision.training.clip.methods import adapt, own_rates
from randlora_vision.training.clip.options import ClipAdapterOptions, ClipOptions, LossOptions, ModelOptions
from randlora_vision.training.clip.tasks import loss_of
from randlora_vision.training.data.batches import training_batches
from randlora_vision.training.data.captioned import PairBatch, class_captions
from randlora_vision.training.data.sources import digits
from randlora_vision.training.harness.accelerators import make_accelerator, prepare_sharding, require_all_gradients
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.options import Training, TrainingOptions
from randlora_vision.training.harness.seeding import seed_everything
from tests.training_helpers import NO_SKIPS, TINY_CONFIG, clip_settings, tiny_clip, write_tiny_clip

CONTRASTS: list[Contrast] = ["clip", "siglip"]


class Towers(nn.Module):
    """The parts of an open_clip model that the loss uses, in float64."""

    def __init__(self, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(dropout))
        self.transformer = nn.Sequential(nn.Linear(4, 5), nn.Dropout(dropout))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.5)) if bias else None
        self.double()

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return F.normalize(self.transformer(tokens), dim=-1)


def pairs(captions: list[int]) -> PairBatch:
    """Return pairs in which captions with equal ids differ in their words, like the prompts of one class."""
    generator, size = torch.Generator().manual_seed(3), len(captions)
    images = torch.randn(size, 3, 2, 2, dtype=torch.float64, generator=generator)
    tokens = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    return PairBatch(images=images, tokens=tokens, captions=torch.tensor(captions), indices=torch.arange(size))


def cut(batch: PairBatch, start: int, stop: int | None) -> PairBatch:
    return {name: value[start:stop] for name, value in batch.items()}  # type: ignore[attr-defined,return-value]


DISTINCT, REPEATED = pairs([0, 1, 2, 3, 4, 5, 6]), pairs([0, 1, 1, 2, 0, 1, 3])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


@pytest.mark.parametrize(("contrast", "bias"), [("clip", True), ("clip", False), ("siglip", True)])
def test_where_no_caption_repeats_it_is_open_clips_loss(contrast: Contrast, bias: bool) -> None:
    model = Towers(bias=bias)
    images = model.encode_image(DISTINCT["images"], normalize=True)
    texts = model.encode_text(DISTINCT["tokens"], normalize=True)
    theirs = ClipLoss() if contrast == "clip" else SigLipLoss()
    expected = theirs(images, texts, model.logit_scale.exp(), model.logit_bias)
    actual = ContrastiveLoss(model, contrast)(DISTINCT)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(model, actual), gradients(model, expected))


def plain_loss(
    contrast: Contrast, model: Towers, images: Tensor, texts: Tensor, captions: Tensor, owners: Sequence[int] = ()
) -> Tensor:
    """The definition, pair by pair; `owners` are the images if some are there twice."""
    logits, bias = model.logit_scale.exp().to(images) * images @ texts.T, model.logit_bias
    assert bias is not None
    total, count = logits.new_zeros(()), len(captions)
    for i in range(count):
        one_image = [j for j in range(count) if owners and owners[i] == owners[j] >= 0]
        same = sorted({j for j in range(count) if captions[i] == captions[j]} | set(one_image))
        if contrast == "siglip":
            for j in range(count):
                total = total + F.softplus((-1 if j in same else 1) * (logits[i, j] + bias))
        else:
            for z in (logits[i], logits[:, i]):
                total = total - sum((z[j] - z.logsumexp(0)) / len(same) for j in same) / 2
    return total / count


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_repeated_captions_are_positives(contrast: Contrast) -> None:
    model = Towers()
    images = model.encode_image(REPEATED["images"], normalize=True)
    texts = model.encode_text(REPEATED["tokens"], normalize=True)
    expected = plain_loss(contrast, model, images, texts, REPEATED["captions"])
    actual = ContrastiveLoss(model, contrast)(REPEATED)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(model, actual), gradients(model, expected))
    distinct = ContrastiveLoss(model, contrast)({**REPEATED, "captions": torch.arange(7)})
    assert (distinct - actual).abs() > 0.1


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_the_captions_of_one_image_are_not_negatives_of_it(contrast: Contrast) -> None:
    """A small data set has an image twice in a batch, with two of its captions; -1 is an image of a stream."""
    model, owners = Towers(), [0, 1, 0, -1, -1, 2, 1]
    batch: PairBatch = {**DISTINCT, "indices": torch.tensor(owners)}
    images = model.encode_image(batch["images"], normalize=True)
    texts = model.encode_text(batch["tokens"], normalize=True)
    expected = plain_loss(contrast, model, images, texts, batch["captions"], owners)
    loss = ContrastiveLoss(model, contrast)
    torch.testing.assert_close(loss(batch), expected)
    torch.testing.assert_close(gradients(model, loss(batch)), gradients(model, expected))
    assert (loss(batch) - loss(DISTINCT)).abs() > 0.01
    (first, second) = loss.join([cut(batch, 0, 3), cut(batch, 3, None)], lambda part: None)
    torch.testing.assert_close(first.loss, expected.detach())
    images, texts = (features.detach() for features in (images, texts))
    mean = loss.mean_loss(images, texts, batch["captions"], batch["indices"], len(owners))
    assert mean == pytest.approx(expected.item())


def test_a_model_without_bias_gets_the_best_one() -> None:
    """At the minimum over the bias, the other gradients equal those of the loss with a fixed bias."""
    model, without = Towers(), Towers(bias=False)
    assert model.logit_bias is not None
    plain = ContrastiveLoss(model, "siglip")
    optimizer = torch.optim.LBFGS([model.logit_bias], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = plain(REPEATED)
        value.backward()
        return value

    optimizer.step(closure)
    expected, actual = plain(REPEATED), ContrastiveLoss(without, "siglip")(REPEATED)
    torch.testing.assert_close(actual, expected)
    found = gradients(without, actual)
    torch.testing.assert_close(
        found, {name: grad for name, grad in gradients(model, expected).items() if name in found}
    )


def test_the_best_bias_where_all_are_positives_is_finite() -> None:
    logits = torch.randn(3, 3)
    assert fitted_bias(logits, torch.ones(3, 3, dtype=torch.bool)).isfinite()


# Accumulation


def seed(part: int) -> None:
    seed_everything("part", part)


@pytest.mark.parametrize("frozen", ["", "visual", "transformer", "logit"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_joined_batches_have_the_gradient_of_one_big_batch(contrast: Contrast, frozen: str) -> None:
    """With dropout: both computations of a batch use the same masks."""
    model = Towers(dropout=0.3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    loss = ContrastiveLoss(model, contrast)
    parts = [cut(REPEATED, 0, 3), cut(REPEATED, 3, 4), cut(REPEATED, 4, 7)]

    features = []
    for number, part in enumerate(parts):
        seed(number)
        features.append(loss.features(part))
    images, texts = (torch.cat(column) for column in zip(*features, strict=True))
    big = plain_loss(contrast, model, images, texts, REPEATED["captions"])
    big.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    values = []
    for number, replay in enumerate(loss.join(parts, seed)):
        seed(number)
        value = loss(replay)
        (value / len(parts)).backward()  # as the loop does
        values.append(value.detach())
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.stack(values), big.detach().expand(len(parts)))


def test_without_dropout_the_joint_loss_is_the_big_batchs_call() -> None:
    model = Towers()
    loss = ContrastiveLoss(model, "clip")
    replays = loss.join([cut(REPEATED, 0, 4), cut(REPEATED, 4, 7)], seed)
    mean = torch.stack([loss(replay) for replay in replays]).mean()
    torch.testing.assert_close(mean, loss(REPEATED))
    torch.testing.assert_close(gradients(model, mean), gradients(model, loss(REPEATED)))


def test_features_of_low_precision_are_compared_in_float32() -> None:
    model = Towers().to(torch.bfloat16)
    batch = {**DISTINCT, **{name: DISTINCT[name].bfloat16() for name in ("images", "tokens")}}  # type: ignore[literal-required]
    loss = ContrastiveLoss(model, "clip")
    images, texts = loss.features(batch)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss.pair_loss(images, texts, DISTINCT["captions"], DISTINCT["indices"])
    expected = plain_loss("clip", model, images.double(), texts.double(), DISTINCT["captions"])
    assert images.dtype == actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


class PairTask:
    """A task for the training loop: the loss over pairs with repeated captions."""

    def __init__(self, batch_size: int, contrast: Contrast = "clip", dtype: torch.dtype = torch.float64) -> None:
        self.model = Towers().to(dtype)
        self.loss = ContrastiveLoss(self.model, contrast)
        everything = pairs([k % 11 for k in range(24)])
        items = [{name: value[k] for name, value in everything.items()} for k in range(24)]  # type: ignore[attr-defined]
        items = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in item.items()} for item in items]
        self.batches: DataLoader[Any] = DataLoader(items, batch_size=batch_size)  # type: ignore[arg-type]
        self.own_lr: dict[nn.Parameter, float] = {}

    def evaluate(self) -> dict[str, float]:
        return {"score": 0.0}

    def check_gradients(self) -> list[str]:
        return []

    def save(self) -> str:
        return "nowhere"


def train(task: PairTask, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Return losses and parameters after two steps of plain gradient descent."""
    settings = Training(steps=2, lr=0.5, optimizer="sgd", warmup_fraction=0.0, max_grad_norm=0, log_every=1, **options)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    losses: list[float] = []
    log: Any = lambda step, split, values: losses.append(values["loss"]) if split == "train" else None  # noqa: E731
    Trainer(task, settings, make_accelerator(settings), log).run()
    return losses, {name: p.detach().clone() for name, p in task.model.named_parameters()}


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_the_loop_accumulates_to_the_big_batch(contrast: Contrast) -> None:
    big_losses, big = train(PairTask(12, contrast), batch_size=12)
    losses, parameters = train(PairTask(4, contrast), batch_size=4, gradient_accumulation_steps=3)
    assert losses == pytest.approx(big_losses, rel=1e-6)
    torch.testing.assert_close(parameters, big)
    _, plain = train(PairTask(4, contrast), batch_size=4)
    assert not torch.allclose(plain["visual.1.weight"], big["visual.1.weight"], rtol=1e-3)


def test_accumulation_in_mixed_precision_is_near_the_big_batch() -> None:
    start = dict(Towers().float().named_parameters())
    _, exact = train(PairTask(12, dtype=torch.float32), batch_size=12)
    task = PairTask(4, dtype=torch.float32)
    _, parameters = train(task, batch_size=4, gradient_accumulation_steps=3, mixed_precision="bf16")
    for name, value in exact.items():
        assert (parameters[name] - value).norm() <= 0.02 * (value - start[name]).norm()


# On open_clip's models


@pytest.mark.parametrize("towers", ["vision", "text", "both"])
@pytest.mark.parametrize("method", ["randlora", "lora", "full"])
def test_every_method_learns_pairs(tmp_path: Path, method: Any, towers: Any) -> None:
    clip = tiny_clip(tmp_path / "clip")
    options = ClipOptions(
        clip=ModelOptions(model="tiny", towers=towers, train_logit_scale=True),
        loss=LossOptions("clip"),
        adapter=ClipAdapterOptions(method=method, rank=4),
        training=TrainingOptions(steps=1, batch_size=6),
    )
    settings = clip_settings(options)
    _, adaptation = adapt(clip, None, settings)
    data = class_captions(digits.read_digits(range(3)), digits.TEMPLATES)
    train = data.select("train", clip.eval_transform, clip.tokenize, NO_SKIPS)
    objective = loss_of(clip, None, settings)
    (batch,) = training_batches(train, 6, batches=1, seed=0, workers=0)
    optimizer = torch.optim.AdamW([p for _, p in adaptation.parameters()], lr=3e-3)
    losses = []
    for step in range(5):
        loss = objective(batch)
        loss.backward()
        if step == 0:
            assert adaptation.check_gradients() == []
            sides = {name.split(".")[1] == "visual" for name, p in objective.named_parameters() if p.grad is not None}
            assert sides >= {"vision": {True}, "text": {False}, "both": {True, False}}[towers]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    scale = clip.model.logit_scale
    assert scale.requires_grad and own_rates(clip.model, settings) == {scale: settings.training.lr}
    adaptation.save(tmp_path / "adapter.safetensors")
    fresh = tiny_clip(tmp_path / "clip").model
    load_trained(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh.logit_scale, scale) and not fresh.logit_scale.requires_grad


def test_siglips_bias_is_trained_with_the_scale_where_the_loss_depends_on_it(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "siglip", {**TINY_CONFIG, "init_logit_bias": -10.0})
    for method in ("randlora", "full"):
        for loss, expected in (("siglip", {"logit_scale", "logit_bias"}), ("clip", {"logit_scale"})):
            clip = tiny_clip(folder)
            options = ClipOptions(
                clip=ModelOptions(train_logit_scale=True),
                loss=LossOptions(loss),  # type: ignore[arg-type]
                adapter=ClipAdapterOptions(method=method),  # type: ignore[arg-type]
            )
            _, adaptation = adapt(clip, None, clip_settings(options))
            assert {name for name, _ in adaptation.parameters() if name.startswith("logit_")} == expected


@pytest.mark.parametrize(
    ("loss", "method", "captions", "expected"),
    [
        (None, "randlora", True, "clip"),
        (None, "randlora", False, "class-prompts"),
        ("siglip", "full", False, "siglip"),
        ("class-prompts", "lora", True, "needs data with classes, but this has captions"),
        (None, "linear-probe", True, "linear-probe is a classifier and needs data with classes"),
        ("clip", "linear-probe", False, "it cannot be trained with --loss clip"),
    ],
)
def test_the_loss_follows_the_data(loss: Any, method: Any, captions: bool, expected: str) -> None:
    if expected in ("clip", "siglip", "class-prompts"):
        options = ClipOptions(loss=LossOptions(loss), adapter=ClipAdapterOptions(method=method))
        settings = clip_settings(options, captions=captions)
        assert settings.loss.loss == expected
        assert settings.training.best_metric == ("mean_recall" if captions else "top1")
    else:
        with pytest.raises(ValueError, match=expected):
            options = ClipOptions(loss=LossOptions(loss), adapter=ClipAdapterOptions(method=method))
            clip_settings(options, captions=captions)


# Distributed training


def sharded(**fsdp: Any) -> Any:
    plugin = SimpleNamespace(auto_wrap_policy=None, ignored_modules=None, **fsdp)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, state=state)


def test_fsdp_spreads_all_but_scalars() -> None:
    model, accelerator = Towers(bias=False), sharded()
    model.logit_scale.requires_grad_(False)
    prepare_sharding(accelerator, model, TrainingOptions())
    (left_out,) = accelerator.state.fsdp_plugin.ignored_modules
    assert list(left_out.parameters()) == [model.logit_scale]


def test_what_fsdp_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot train a scalar .logit_scale.: start without --train-logit-scale"):
        prepare_sharding(sharded(), Towers(bias=False), TrainingOptions())
    with pytest.raises(ValueError, match="--optimizer prodigy measures whole parameters"):
        prepare_sharding(sharded(), nn.Linear(1, 1), TrainingOptions(optimizer="prodigy"))
    wrapping = sharded()
    wrapping.state.fsdp_plugin.auto_wrap_policy = print
    with pytest.raises(ValueError, match="NO_WRAP"):
        prepare_sharding(wrapping, nn.Linear(1, 1), TrainingOptions())


def test_what_deepspeed_cannot_do_is_refused() -> None:
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    model = Towers(bias=False)
    prepare_sharding(accelerator, model, TrainingOptions(batch_size=3, gradient_accumulation_steps=2))
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }
    assert hasattr(model.logit_scale, "ds_optim_param")
    with pytest.raises(ValueError, match="--checkpoint-every and --resume are not supported with DeepSpeed"):
        prepare_sharding(accelerator, model, TrainingOptions(), checkpoints=True)
    with pytest.raises(ValueError, match="--ema-decay is not supported"):
        prepare_sharding(accelerator, model, TrainingOptions(ema_decay=0.5))
    plugin.zero_stage = 3
    with pytest.raises(ValueError, match="set zero_stage: 2, or use FSDP"):
        prepare_sharding(accelerator, model, TrainingOptions())


def test_deepspeed_is_not_ignored_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="set DS_ACCELERATOR=cpu instead"):
        make_accelerator(TrainingOptions())


def test_a_parameter_without_gradient_is_named_where_processes_would_wait_for_it() -> None:
    task = PairTask(4)
    names = {parameter: name for name, parameter in task.loss.named_parameters()}
    task.loss(pairs([0, 1, 2])).backward()  # the CLIP loss does not use the bias

    def processes(number: int, handler: Any = None, kind: Any = DistributedType.MULTI_CPU) -> Any:
        return SimpleNamespace(num_processes=number, ddp_handler=handler, distributed_type=kind)

    searching = SimpleNamespace(find_unused_parameters=True)
    require_all_gradients(processes(1), names)
    require_all_gradients(processes(2, searching), names)
    require_all_gradients(processes(2, kind=DistributedType.FSDP), names)
    with pytest.raises(ValueError, match="no gradient reaches clip.logit_bias: with several processes"):
        require_all_gradients(processes(2), names)


def test_compiled_it_is_the_same_loss() -> None:
    model = Towers()
    plain, compiled = ContrastiveLoss(model, "clip"), ContrastiveLoss(model, "clip")
    compiled.compile(backend="eager")
    assert compiled.features is not plain.features
    for batch in (REPEATED, *compiled.join([cut(REPEATED, 0, 4), cut(REPEATED, 4, 7)], seed)):
        torch.testing.assert_close(compiled(batch), plain(batch))
