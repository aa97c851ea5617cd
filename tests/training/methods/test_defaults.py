"""--lr auto is the suggested rate, and the default where the table of a script says so."""

import pytest
import timm
import torch

from randlora_vision import RandLoRAConfig, inject, suggest_lr
from randlora_vision.training.classifier.defaults import resolve
from randlora_vision.training.classifier.options import ClassifierModel, ClassifierOptions
from randlora_vision.training.dreambooth.defaults import resolve as resolve_dreambooth
from randlora_vision.training.dreambooth.options import DreamBoothOptions
from randlora_vision.training.harness.command_line import parse
from randlora_vision.training.methods import adaptation
from randlora_vision.training.methods.defaults import Defaults

NAME = "vit_tiny_patch16_224"
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def settings(*words):
    options = parse(ClassifierOptions, ["--rank", "8", *words], "")
    return resolve(options, ClassifierModel(model=NAME), model(), lambda: IMAGES)


def of_features():
    adapted = model()
    inject(adapted, RandLoRAConfig(rank=8, alpha=160, target_modules="timm:backbone"))
    return suggest_lr(adapted, features=lambda: adapted.forward_head(adapted.forward_features(IMAGES), pre_logits=True))


@pytest.mark.parametrize("words", [["--data", "x"], ["--data", "x", "--lr", "auto"], ["--lr", "auto"]])
def test_auto_and_the_default_on_own_data(words):
    found = settings(*words)
    assert found.training.lr == pytest.approx(of_features(), rel=0.06)  # two digits
    assert found.adapter.head_lr == (1e-3 if "--data" in words else 6e-3)


def test_a_given_rate_is_taken():
    assert settings("--data", "x", "--lr", "0.004").training.lr == 0.004
    assert settings().training.lr == 2e-3  # the demo has a table


@pytest.mark.parametrize("method", ["lora", "full", "linear-probe", "vera"])
def test_auto_is_a_rule_for_randlora(method):
    with pytest.raises(ValueError, match=f"--lr auto is a rule for --method randlora.*--method {method} then takes"):
        Defaults(1e-3).rate("auto", method)


def test_auto_is_refused_for_diffusion_models():
    with pytest.raises(ValueError, match="--lr auto has no rule for diffusion models: leave --lr out"):
        resolve_dreambooth(parse(DreamBoothOptions, ["--lr", "auto"], ""))


@pytest.mark.parametrize(("words", "message"), [(["--lr", "fast"], "--lr"), (["--lr", "0"], "--lr must be above 0")])
def test_a_wrong_rate_is_one_line(words, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(ClassifierOptions, words, "")
    assert "\n" not in str(error.value)


def test_where_the_features_give_no_rate_a_line_names_that_of_the_weights(capsys):
    adapted = model()
    inject(adapted, RandLoRAConfig(rank=8, alpha=160, target_modules="timm:backbone"))
    rate = suggest_lr(adapted)
    equal = IMAGES[:1].expand(8, -1, -1, -1)
    options = parse(ClassifierOptions, ["--rank", "8", "--data", "x"], "")
    found = resolve(options, ClassifierModel(model=NAME), model(), lambda: equal).training.lr
    assert found == pytest.approx(rate, rel=0.06)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: --lr auto goes by the weights alone, {rate:.1e}: the features of the 8 samples are")


def test_every_process_takes_the_rate_of_the_first(monkeypatch):
    monkeypatch.setattr(adaptation, "broadcast_object_list", lambda own: [2 * own[0]])
    assert settings("--data", "x").training.lr == pytest.approx(2 * float(f"{of_features():.1e}"))
