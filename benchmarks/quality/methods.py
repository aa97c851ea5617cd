"""The methods, each with one knob that sets how many numbers it trains, and the centre of its grid of rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.methods import peft_model, quiet, randlora_numbers, trained_numbers, weight_shape
from randlora_vision import RandLoRAConfig, inject
from randlora_vision.training.methods.rivals import inject_rival

ALPHA_PER_RANK = 20  # of RandLoRA, as in the training scripts
_FROZEN = ("patch_embed", "cls_token", "pos_embed")  # in full fine-tuning too: the pictures' part is not compared

Apply = Callable[[nn.Module, Sequence[str], int, int], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way of training a model.

    Attributes:
        title: Name in the tables.
        apply: (model, target layers, knob, seed) -> the model to train, in which exactly the trained tensors require
            gradients.
        lr: Centre of the grid of learning rates; None for `suggest_lr`.
        knobs: The settings to choose from: the one whose trained numbers are closest to the budget is taken. Empty for
            a method without a knob, and for RandLoRA, whose ranks define the budgets.
    """

    title: str
    apply: Apply
    lr: float | None
    knobs: Sequence[int] = ()

    @property
    def sized(self) -> bool:
        """Whether the method exists in several sizes."""
        return self.lr is None or bool(self.knobs)


def randlora(bases: str, alpha_per_rank: float = ALPHA_PER_RANK, init: str = "lambda-zero") -> Apply:
    """Return RandLoRA, whose knob is the rank."""

    def apply(model: nn.Module, targets: Sequence[str], rank: int, seed: int) -> nn.Module:
        alpha = alpha_per_rank * rank
        config = RandLoRAConfig(rank=rank, alpha=alpha, target_modules=list(targets), bases=bases, init=init, seed=seed)
        inject(model, config)
        return model

    return apply


def _peft(kind: str, settings: Callable[[int, int], dict[str, Any]]) -> Apply:
    """Return a method of PEFT; `settings` maps (knob, seed) to those of its configuration class `kind`."""

    def apply(model: nn.Module, targets: Sequence[str], knob: int, seed: int) -> nn.Module:
        import peft

        with quiet():
            config = getattr(peft, kind)(target_modules=list(targets), **settings(knob, seed))
        return peft_model(model, config)

    return apply


def _nola(model: nn.Module, targets: Sequence[str], number: int, seed: int) -> nn.Module:
    inject_rival(model, "nola", targets, number, 1.0, seed)
    return model


def _full(model: nn.Module, targets: Sequence[str], knob: int, seed: int) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(_FROZEN))
    return model


def _probe(model: nn.Module, targets: Sequence[str], knob: int, seed: int) -> nn.Module:
    return model.requires_grad_(False)


METHODS: dict[str, Method] = {
    "structured": Method("RandLoRA, structured", randlora("structured"), None),
    "uniform": Method("RandLoRA, uniform", randlora("uniform"), None),
    "normal": Method("RandLoRA, normal", randlora("normal"), None),
    "sparse": Method("RandLoRA, sparse", randlora("sparse"), None),
    "very_sparse": Method("RandLoRA, very sparse", randlora("very_sparse"), None),
    "lora": Method("LoRA", _peft("LoraConfig", lambda r, _: {"r": r, "lora_alpha": 2 * r}), 1e-3, range(1, 65)),
    "dora": Method(
        "DoRA",
        _peft("LoraConfig", lambda r, _: {"r": r, "lora_alpha": 2 * r, "use_dora": True}),
        1e-3,
        range(1, 65),
    ),
    "oft": Method("OFT", _peft("OFTConfig", lambda block, _: {"r": 0, "oft_block_size": block}), 1e-2, (4, 8, 16, 32)),
    "lokr": Method(
        "LoKr",
        _peft("LoKrConfig", lambda r, _: {"r": r, "alpha": r, "decompose_factor": 4}),
        3e-3,
        range(1, 65),
    ),
    "vera": Method(
        "VeRA",
        _peft("VeraConfig", lambda r, seed: {"r": r, "projection_prng_key": seed, "save_projection": False}),
        1e-2,
        (64, 256, 1024),
    ),
    "nola": Method("NoLA", _nola, 1e-2, (64, 128, 256, 512)),
    "full": Method("full fine-tuning", _full, 1e-4),
    "probe": Method("linear probe", _probe, 1e-2),
}


def knob_for(method: Method, model: nn.Module, targets: Sequence[str], rank: int) -> int:
    """Return the knob with which a method trains about as many numbers as RandLoRA of `rank`; 0 without a knob.

    The numbers are counted on one layer of each shape.
    """
    if method.lr is None:
        return rank
    if not method.knobs:
        return 0
    shapes: dict[tuple[int, int], int] = {}
    for target in targets:
        out, inputs = weight_shape(model, target)
        shapes[out, inputs] = shapes.get((out, inputs), 0) + 1

    def numbers(knob: int) -> int:
        total = 0
        for (out, inputs), times in shapes.items():
            layer = method.apply(nn.Sequential(nn.utils.skip_init(nn.Linear, inputs, out)), ["0"], knob, 0)
            total += times * trained_numbers(layer)
        return total

    budget = randlora_numbers(model, targets, rank)
    # Each knob trains more than the one before: stop once the budget is passed.
    best, distance = method.knobs[0], float("inf")
    for knob in method.knobs:
        now = abs(numbers(knob) - budget)
        if now > distance:
            break
        best, distance = knob, now
    return best
