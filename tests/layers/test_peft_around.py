"""PEFT's layers around adapted ones, and hosts that copy weights: against PEFT around plain layers with the sum."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, inject, merge, remove, set_active, unmerge
from tests.helpers import dense_model, randomize


class Host(nn.Module):
    """A linear layer, a convolution, and a linear layer whose weight is read instead of called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.lin = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x).mean((-2, -1)))
        return nn.functional.linear(torch.tanh(self.lin(hidden)), self.read.weight)


CALLED = ["conv", "lin"]
IMAGES = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
LORA = peft.LoraConfig(r=2, target_modules=CALLED)
# Their forward reads the weight instead of calling the layer.
READERS = {
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["lin"]),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=["lin"]),
}


def adapted() -> tuple[nn.Module, nn.Module]:
    """An adapted host, and the plain one with W + delta W."""
    model, base = Host(), Host()
    report = inject(model, RandLoRAConfig(rank=4, target_modules="all"))
    randomize(model)
    return model, dense_model(base, model, report).float()


def wrap(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Let PEFT wrap layers of the model in place, with an adapter that acts."""
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "hra_u", "oft_R")):
            nn.init.normal_(parameter, std=0.3)
    return model


def theirs(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [None, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("ours_merged", [False, True])
def test_peft_merges_into_the_base(copied: Callable[[nn.Module], nn.Module] | None, ours_merged: bool) -> None:
    model, plain = adapted()
    ours = output(model)
    if ours_merged:
        merge(model)
    wrap(model, LORA)
    both = output(wrap(plain, LORA))
    if copied is not None:
        model = copied(model)
    assert (both - ours).abs().max() > 1e-2
    for layer in theirs(model):
        layer.merge()
    torch.testing.assert_close(output(model), both)
    if ours_merged:
        unmerge(model)
        torch.testing.assert_close(output(model), both)
    for layer in theirs(model):
        layer.unmerge()
    torch.testing.assert_close(output(model), both)


@pytest.mark.parametrize("kind", READERS)
def test_layers_of_peft_that_read_the_weight_get_the_effective_one(kind: str) -> None:
    model, plain = adapted()
    before = output(model)
    both = output(wrap(plain, READERS[kind]()))
    torch.testing.assert_close(output(wrap(model, READERS[kind]())), both)
    assert (both - before).abs().max() > 1e-3


def test_dora_starts_as_the_identity_and_merges_into_the_base() -> None:
    model, plain = adapted()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, use_dora=True, target_modules=CALLED), model)
    torch.testing.assert_close(output(model), output(plain))
    for layer in theirs(model):
        layer.merge()
    torch.testing.assert_close(output(model), output(plain))


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("ours_merged", [False, True])
def test_an_initialisation_that_splits_the_weight_keeps_the_sum(method: str, ours_merged: bool) -> None:
    model, plain = adapted()
    if ours_merged:
        merge(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, init_lora_weights=method, target_modules=["lin"]), model)
    torch.testing.assert_close(output(model), output(plain))
    if ours_merged:
        unmerge(model)
        torch.testing.assert_close(output(model), output(plain))
    set_active(model, [])
    torch.testing.assert_close(output(model), output(Host()))


def test_a_merge_that_peft_did_not_write_is_undone_bit_for_bit() -> None:
    model, _ = adapted()
    merge(model)
    wrap(model, LORA)
    for layer in theirs(model):
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()
    unmerge(model)
    remove(model)
    inner = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(inner[name], value) for name, value in Host().state_dict().items())


def attentions() -> dict[str, Callable[[], nn.Module]]:
    """One attention of every class in diffusers that has a `fuse_projections` of its own."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_flux import FluxAttention
    from diffusers.models.transformers.transformer_wan import WanAttention

    return {
        "self": lambda: Attention(8, heads=2, dim_head=4),
        "cross": lambda: Attention(8, cross_attention_dim=6, heads=2, dim_head=4),
        "joint": lambda: Attention(8, added_kv_proj_dim=8, heads=2, dim_head=4),
        "flux": lambda: FluxAttention(8, heads=2, dim_head=4, added_kv_proj_dim=8),
        "wan": lambda: WanAttention(8, heads=2, dim_head=4, added_kv_proj_dim=8, cross_attention_dim_head=4),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "joint", "flux", "wan"])
def test_fusing_adapted_projections_is_refused_before_anything_changes(kind: str, wrapped: bool) -> None:
    module = attentions()[kind]()
    inject(module, RandLoRAConfig(rank=2, target_modules=["to_v"]))
    if wrapped:
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_v"]), module)
    names = {name for name, _ in module.named_modules()}
    with pytest.raises(RuntimeError, match="fuse before adding the adapters"):
        module.fuse_projections()
    assert {name for name, _ in module.named_modules()} == names
    other = attentions()[kind]()
    inject(other, RandLoRAConfig(rank=2, target_modules=["to_out.0"]))
    other.fuse_projections()  # copies no adapted weight
