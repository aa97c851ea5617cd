"""Whatever is passed in place of a model: one line says what it is and what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import randlora_vision as rv
from randlora_vision.injection.selection import PRESET_HOSTS

CONFIG = rv.RandLoRAConfig(rank=2, target_modules="all-linear")


class Pipeline:
    """What diffusers' pipelines have."""

    def __init__(self) -> None:
        self.components = {"unet": nn.Linear(4, 4), "scheduler": object(), "vae": nn.Linear(4, 4), "tokenizer": None}


WRONG = {
    "name": ("vit_base", "got the string 'vit_base': create the model first"),
    "class": (nn.Linear, "got the class Linear: create the model first"),
    "pipeline": (Pipeline(), r"got a Pipeline: pass one of its parts \(unet, vae\); .*integrations.diffusers"),
    "tuple": ((nn.Linear(4, 4), None), "got a tuple: pass the model in it alone"),
    "none": (None, "got a NoneType$"),
    "empty": ([], "got a list$"),
}
FUNCTIONS = {
    "inject": lambda model: rv.inject(model, CONFIG),
    "plan": lambda model: rv.plan(model, CONFIG),
    "load_adapter": lambda model: rv.load_adapter(model, GOLDEN),
    "save_adapter": lambda model: rv.save_adapter(model, "adapter.safetensors"),
    "adapter_parameters": lambda model: list(rv.adapter_parameters(model)),
    "count_parameters": rv.count_parameters,
    "check_gradients": rv.check_gradients,
    "suggest_lr": rv.suggest_lr,
    "merge": rv.merge,
    "unmerge": rv.unmerge,
    "remove": rv.remove,
    "delete_adapter": lambda model: rv.delete_adapter(model, "default"),
    "set_scale": lambda model: rv.set_scale(model, 0.5),
    "set_active": lambda model: rv.set_active(model, "default"),
    "set_weights": lambda model: rv.set_weights(model, {"default": 1.0}),
    "disabled": lambda model: rv.disabled(model).__enter__(),
}
GOLDEN = Path(__file__).parents[1] / "golden" / "uniform.safetensors"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", WRONG)
def test_every_function_says_what_it_got(kind: str, function: str) -> None:
    value, message = WRONG[kind]
    with pytest.raises(ValueError, match=f"^expected a torch.nn.Module, {message}"):
        FUNCTIONS[function](value)


def test_an_unknown_host_is_answered_with_those_that_have_presets() -> None:
    files = (Path(__file__).parents[2] / "integrations").glob("*.py")
    found = {path.stem for path in files if "\nPRESETS" in path.read_text(encoding="utf-8")}
    assert set(PRESET_HOSTS) == found
    with pytest.raises(ValueError, match="no integration 'tim' with presets; there are diffusers, open_clip, timm"):
        rv.plan(nn.Linear(4, 4), rv.RandLoRAConfig(rank=2, target_modules="tim:backbone"))


@pytest.mark.parametrize(
    ("text", "meant"), [("all-linears", "all-linear"), ("all_linear", "all-linear"), ("alll", "all")]
)
def test_a_misspelt_word_is_answered_with_the_word(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"leaves nothing to adapt; close matches: .*{meant}"):
        rv.plan(nn.Sequential(nn.Linear(4, 4)), rv.RandLoRAConfig(rank=2, target_modules=text))


@pytest.mark.parametrize("rank", [0, -3, "8", 2.5, True, None])
def test_a_rank_is_a_positive_integer(rank: object) -> None:
    with pytest.raises(ValueError, match=r"^rank must be an integer of at least 1, got "):
        rv.RandLoRAConfig(rank=rank, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"^rank must be at most "):
        rv.RandLoRAConfig(rank=2**63, target_modules="all-linear")
