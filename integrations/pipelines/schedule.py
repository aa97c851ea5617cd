"""Scales of adapters that change over the denoising steps of a pipeline."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from randlora_vision.integrations.pipelines.control import Scale, scale_changes_of

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def scheduled(
    pipe: Any, scales: Mapping[float, Scale | Mapping[str, Scale]], adapter_name: str | None = None
) -> Iterator[OnStepEnd]:
    """Change scales over the denoising steps of the calls within the context, and restore them at its end.

        with scheduled(pipe, {0: 1.0, 0.6: 0.3}, "style") as on_step_end:
            image = pipe(prompt, callback_on_step_end=on_step_end).images[0]

    Prompts are encoded with the scales of the first step.

    Args:
        pipe: The pipeline, which has the argument ``callback_on_step_end``.
        scales: What `set_scales` takes, by the fraction of the steps from which on it holds: 0 must be among them.
            Scales that are not mentioned stay as they are.
        adapter_name: Name of the adapter, as for `set_scales`.

    Yields:
        The ``callback_on_step_end`` for the calls.

    Raises:
        ValueError: If a fraction is not at least 0 and below 1, 0 is missing, or for scales that `set_scales` refuses.
            No scale is then changed.
    """
    if 0 not in scales or not all(0 <= fraction < 1 for fraction in scales):
        raise ValueError(f"scheduled: expected scales by fractions from 0 on and below 1, got {list(scales)}")
    stages = [(fraction, scale_changes_of(pipe, scales[fraction], adapter_name)) for fraction in sorted(scales)]
    before = [(slot, slot.scale) for _, changes in stages for slot, _ in changes]

    def apply(done: float) -> None:
        for slot, value in before + [change for fraction, changes in stages if fraction <= done for change in changes]:
            slot.scale = value

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = pipe.num_timesteps
        apply((step + 1) / steps if step + 1 < steps else 0)  # of the next step, or of the next call
        return tensors

    try:
        apply(0)
        yield on_step_end
    finally:
        for slot, value in before:
            slot.scale = value
