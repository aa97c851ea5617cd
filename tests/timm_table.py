"""The table of timm families in docs/timm_families.md: ``python -m tests.timm_table`` writes it."""

import functools
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_vision import InjectionReport, RandLoRAConfig, plan
from randlora_vision.integrations.timm import PRESETS, conv_targets
from tests.timm_families import FAMILIES, Family, build, images, make_full_size

PAGE = Path(__file__).parent.parent / "docs" / "timm_families.md"
RANK = 32
SHOWN = 6  # patterns of targets in a row

HEADER = f"""# timm families

Written by `python -m tests.timm_table`; a test compares. Each row is a family of timm's whose small member the tests
take through injection, training, merging, removal, saving and loading with every target of `timm:conv` (the widest
preset); headless and with `features_only`, the same layers are chosen. The numbers are of the registered model named,
at rank {RANK}, for `timm:backbone` and without the classifier that is trained beside it. A larger rank trains fewer
numbers.

Targets: how many weights `timm:backbone`, `timm:attention` and `timm:conv` choose. What `timm:backbone` adapts is
summarised by the last two names of each path. Share: trained numbers in percent of the model's.

"read": the model hands this layer's weight to a function instead of calling the layer. Adapters here act and learn all
the same. An adapter that wraps layers gets no gradient there: PEFT's RandLora on the same linear layers loses just
these and no others (a test shows it).

| family | model | targets | `timm:backbone` adapts | trained | share | notes |
|---|---|---|---|---:|---:|---|
"""


def page() -> str:
    """The whole text."""
    return HEADER + "".join(line(family) for family in FAMILIES)


def line(family: Family, model: nn.Module | None = None) -> str:
    return f"| {' | '.join(row(family, model or make_full_size(family.full_size)))} |\n"


def row(family: Family, model: nn.Module) -> tuple[str, ...]:
    report = plan(model, RandLoRAConfig(rank=RANK, target_modules="timm:backbone"))
    backbone = len(report.targets) + len(report.skipped)
    counts = " / ".join(map(str, (backbone, *(len(PRESETS[preset](model)) for preset in ("attention", "conv")))))
    share = 100 * report.num_parameters / report.base_parameters
    adapted = patterns([target.name for target in report.targets])
    trained = f"{report.num_parameters:,}"
    remarks = notes(family, model, report)
    return family.name, f"`{family.full_size}`", counts, adapted, trained, f"{share:.1f}", remarks


def patterns(names: list[str]) -> str:
    """The last two components of paths that are not numbers, the most frequent first."""
    groups = Counter(".".join([part for part in name.split(".") if not part.isdecimal()][-2:]) for name in names)
    shown = [f"`{group}` ({count})" for group, count in groups.most_common(SHOWN)]
    rest = sum(groups.values()) - sum(count for _, count in groups.most_common(SHOWN))
    return ", ".join(shown) + (f", {rest} others" if rest else "")


def notes(family: Family, model: nn.Module, report: InjectionReport) -> str:
    found = []
    read = sorted({".".join(name.split(".")[-2:]) for name in read_weights(family)})
    if read:
        found.append("read: " + ", ".join(f"`{name}`" for name in read))
    if report.skipped:
        found.append(f"{len(report.skipped)} narrower than rank {RANK}, left out")
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        found.append("its LSTMs are not targets")
    return "; ".join(found)


@functools.cache
@torch.no_grad()
def read_weights(family: Family) -> set[str]:
    """Targets whose layer is not called in a forward pass of the family's small member, though its weight is used."""
    model = build(family)
    called: set[str] = set()

    def note(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            called.add(name)

        model.get_submodule(name).register_forward_hook(hook)

    targets = [name for name in conv_targets(model) if not family.cannot_reach(name)]
    for name in targets:
        note(name)
    model(images(family, model))
    return set(targets) - called


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
