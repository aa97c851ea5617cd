"""Scales over the steps, adapters swapped in place, and pipelines saved with an adapter beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_vision.integrations import diffusers as integration
from tests.pipeline_helpers import adapt, deltas, denoiser, difference, plain, scaled
from tests.tiny_pipelines import PIPELINES, sample

CLOSE = 2e-3


def by_step(pipes: list[Any], steps: int) -> Any:
    """The first pipeline, whose denoiser is that of another one at each step."""
    main = pipes[0]
    model, forwards = denoiser(main), [denoiser(pipe).forward for pipe in pipes]
    calls = iter(range(steps))
    model.forward = lambda *given, **named: forwards[next(calls)](*given, **named)  # type: ignore[method-assign]
    return sample(main, steps=steps)


@pytest.mark.parametrize("name", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def test_scales_hold_for_their_steps(name: str) -> None:
    pipe = PIPELINES[name]()
    update = deltas(pipe, adapt(pipe, text=False))
    part = next(iter(update)).partition(".")[0]
    block = "mid_block" if name == "sd15" else "single_transformer_blocks"
    full = sample(pipe, steps=3)
    schedule = {0.3: {part: {block: 0.0}}, 0: 1.0, 0.5: -0.5}
    with integration.scheduled(pipe, schedule, "default") as on_step_end:
        found = [sample(pipe, steps=3, callback_on_step_end=on_step_end) for _ in range(2)]
    off, other = (plain(name, scaled(update, *by)) for by in ((0.0, f"{part}.{block}"), (-0.5,)))
    expected = by_step([plain(name, update), off, other], 3)
    assert difference(found[0], expected) < CLOSE < difference(full, expected)
    assert torch.equal(*found)
    assert torch.equal(sample(pipe, steps=3), full)  # the scales from before


def test_schedules_that_are_refused_change_nothing() -> None:
    pipe = PIPELINES["sd15"]()
    adapt(pipe, text=False)
    before = sample(pipe)
    for scales, message in (
        ({0.5: 1.0}, "expected scales by fractions from 0 on"),
        ({0: 1.0, 1: 0.5}, "fractions from 0 on and below 1"),
        ({0: 1.0, 0.5: {"vae": 0.5}}, "'vae' is not among the components"),
        ({0: 0.5, 0.5: float("nan")}, "finite"),
    ):
        with pytest.raises(ValueError, match=message), integration.scheduled(pipe, scales, "default"):  # type: ignore[arg-type]
            pass
    with pytest.raises(RuntimeError), integration.scheduled(pipe, {0: 0.0}):
        raise RuntimeError
    assert torch.equal(sample(pipe), before)


def files(tmp_path: Path, text: bool = True) -> tuple[list[Path], list[Any]]:
    """Two adapter files of equal targets and bases, and the pictures that they give."""
    paths, pictures = [], []
    pipe = PIPELINES["sd15"]()
    adapt(pipe, text)
    for seed in (3, 4):
        for part in ("unet", "text_encoder") if text else ("unet",):
            torch.manual_seed(seed)
            for parameter in getattr(pipe, part).parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.05)
        paths.append(integration.save_adapter(pipe, tmp_path / f"{seed}.safetensors"))
        pictures.append(sample(pipe))
    return paths, pictures


@pytest.mark.parametrize("text", [True, False])
def test_swapped_adapters_are_those_of_the_file(text: bool, tmp_path: Path) -> None:
    (first, second), (one, other) = files(tmp_path, text)
    pipe = PIPELINES["sd15"]()
    integration.load_adapter(pipe, first)
    assert torch.equal(sample(pipe), one)
    places = [parameter.data_ptr() for parameter in pipe.unet.parameters()]
    integration.swap_adapter(pipe, second)
    assert torch.equal(sample(pipe), other) and difference(one, other) > 0.01
    assert [parameter.data_ptr() for parameter in pipe.unet.parameters()] == places
    foreign = PIPELINES["sd15"]()
    adapt(foreign, text=False, seed=9)
    wrong = integration.save_adapter(foreign, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="wrong.safetensors"):
        integration.swap_adapter(pipe, wrong)
    integration.fuse(pipe)
    with pytest.raises(ValueError, match="'default' is merged into unet: unfuse it first"):
        integration.swap_adapter(pipe, first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_block_is_not_compiled_again(tmp_path: Path) -> None:
    (first, second), (one, other) = files(tmp_path, text=False)
    pipe = PIPELINES["sd15"]()
    integration.load_adapter(pipe, first)
    graphs = []
    torch._dynamo.reset()
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    try:
        assert difference(sample(pipe), one) < CLOSE
        compiled = len(graphs)
        torch._dynamo.utils.counters.clear()
        integration.swap_adapter(pipe, second)
        assert difference(sample(pipe), other) < CLOSE
        assert compiled and len(graphs) == compiled
        assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    finally:
        torch._dynamo.reset()


def test_several_adapters_are_fused_at_once(tmp_path: Path) -> None:
    pipe = PIPELINES["sd15"]()
    updates = [deltas(pipe, adapt(pipe, name=name, seed=seed)) for name, seed in (("a", 0), ("b", 20), ("c", 40))]
    integration.set_scales(pipe, {"a": 0.5, "b": 2.0})
    expected = sample(plain("sd15", scaled(updates[0], 0.5), scaled(updates[1], 2.0)))
    for part in (pipe.unet, pipe.text_encoder):
        activate(part, ["a", "b", "c"])
    before = sample(pipe)
    integration.fuse(pipe, ["a", "b"])
    integration.set_scales(pipe, 0.0, "c")
    assert difference(sample(pipe), expected) < CLOSE
    integration.set_scales(pipe, 1.0, "c")
    integration.unfuse(pipe)
    assert torch.equal(sample(pipe), before)


def activate(part: Any, names: list[str]) -> None:
    from randlora_vision import set_active

    set_active(part, names)


def test_a_saved_pipeline_has_its_adapter_beside_it(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = PIPELINES["sd15"]()
    base = sample(pipe)
    adapt(pipe)
    adapt(pipe, name="other", seed=5)
    for part in (pipe.unet, pipe.text_encoder):
        activate(part, ["default"])
    picture = sample(pipe)
    path = integration.save_pipeline(pipe, tmp_path / "saved")  # warnings are errors
    assert path == tmp_path / "saved/adapter.safetensors" and torch.equal(sample(pipe), picture)
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    fresh.set_progress_bar_config(disable=True)
    assert difference(sample(fresh), base) < CLOSE
    integration.load_adapter(fresh, tmp_path / "saved")
    assert difference(sample(fresh), picture) < CLOSE < difference(base, picture)
    integration.fuse(pipe)
    with pytest.raises(ValueError, match="'default' is merged into unet: unfuse it first"):
        integration.save_pipeline(pipe, tmp_path / "fused")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        integration.save_pipeline(pipe, tmp_path / "third", "third")
    assert not (tmp_path / "fused").exists() and not (tmp_path / "third").exists()
