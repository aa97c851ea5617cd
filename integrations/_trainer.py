"""Checkpoints of the transformers Trainer that hold the trained numbers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from randlora_vision import check_gradients, save_adapter
from randlora_vision.bases import get_bases
from randlora_vision.checksums import CRC32
from randlora_vision.files import adapter_file
from randlora_vision.files.atomic import replacing
from randlora_vision.injection.record import ModelRecord, check_names, own_record
from randlora_vision.integrations._download import ADAPTER_FILE
from randlora_vision.names import is_adapter_name, listing

_STATE_FILE = "model.safetensors"  # the name under which the Trainer looks for a model without shards
_BASES = "randlora_bases_"  # followed by the algorithm of a checksum, a dot and the name of an adapter
_logger = logging.get_logger(__name__)


class AdapterCheckpoints(TrainerCallback):
    """A Trainer callback with which checkpoints hold the trained numbers, and not the whole base model.

    Pass it when the Trainer is created, after `inject`: ``Trainer(..., callbacks=[AdapterCheckpoints()])``. From then
    on, checkpoints, ``trainer.save_model()`` and ``model.save_pretrained()`` write two files as long as adapters are
    attached: ``adapter.safetensors``, which `load_adapter` reads, and ``model.safetensors`` with everything that is
    trained, which ``trainer.train(resume_from_checkpoint=True)`` and ``load_best_model_at_end`` read. Once the
    adapters are merged or removed, ``save_pretrained`` writes a whole model as usual.

    Before the first step of the optimiser, `check_gradients` names adapters that cannot learn. Each saved adapter is
    read back. Going on from a checkpoint whose adapter differs, or that holds none, is an error.

    Args:
        adapter_name: The adapter in ``adapter.safetensors``; every adapter is in ``model.safetensors``.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self._loader: _Loader | None = None
        self._checked = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take over saving and loading of the model."""
        self._install(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Raise ValueError if training resumes from a checkpoint that the adapters did not come from."""
        self._checked = False
        loader = self._loader or self._install(model)
        if state.global_step and not loader.restored:
            raise ValueError(
                f"training would go on from step {state.global_step} with untrained adapters: the checkpoint holds no "
                "values for them, or AdapterCheckpoints was added after the Trainer was created. Checkpoints that were "
                "written without AdapterCheckpoints can lack them, as transformers renames keys when it saves: start "
                "anew, or from an adapter file (load_adapter(model, path, trainable=True))"
            )
        loader.restored = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the gradients of the first step; raises ValueError as `check_gradients` does."""
        if not self._checked and not args.fp16:  # the first scales of fp16 are meant to overflow
            self._checked = True
            for note in check_gradients(model):
                _logger.warning(note)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Raise ValueError if the adapter file of the checkpoint that was written last cannot be read back."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            if not isinstance(model, PreTrainedModel):  # the Trainer has written its whole state dict
                _write(model, folder, self.adapter_name, model.state_dict())
            adapter_file.read(folder / ADAPTER_FILE)

    def _install(self, model: nn.Module) -> _Loader:
        if own_record(model) is None:
            raise ValueError(f"this {type(model).__name__} has no adapters: call inject before the Trainer is created")
        check_names(model, self.adapter_name)
        self._loader = _Loader(model)
        model.load_state_dict = self._loader  # type: ignore[method-assign]
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = _Saver(model, self.adapter_name)
        return self._loader


class _Saver:
    """Stands for ``model.save_pretrained``: writes the trained numbers while adapters are attached."""

    def __init__(self, model: PreTrainedModel, adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        record = own_record(self.model)
        if record is None or record.switches.merged:
            return type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            state = kwargs.get("state_dict") or self.model.state_dict()
            _write(self.model, Path(save_directory), self.adapter_name, state)


class _Loader:
    """Stands for ``model.load_state_dict``: takes what `_Saver` wrote, and tells whether adapters were in it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.restored = False

    def __call__(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        load, record = type(self.model).load_state_dict, own_record(self.model)
        given = dict(state_dict)
        checksums = {key.removeprefix(_BASES): given.pop(key) for key in state_dict if key.startswith(_BASES)}
        if record is None or not checksums:
            result = load(self.model, state_dict, *args, **kwargs)
            own = {name for name in _trained(self.model) if is_adapter_name(name)}
            self.restored = bool(own) and own <= given.keys()
            return result
        self._check(record, checksums, given)
        result = load(self.model, given, strict=False)
        result.missing_keys.clear()  # the base's own weights are in no checkpoint
        self.restored = True
        return result

    def _check(self, record: ModelRecord, checksums: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the checkpoint has exactly what the model trains."""
        own = _trained(self.model)
        for absent, where in ((own - given.keys(), "model"), (given.keys() - own, "checkpoint")):
            if absent:
                raise ValueError(
                    f"the checkpoint does not fit this {type(self.model).__name__}: {listing(sorted(absent), 3)} in "
                    f"the {where} only; inject with the configuration of the interrupted run"
                )
        current = self.model.state_dict()
        for name, tensor in given.items():
            if current[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} in the checkpoint and {tuple(current[name].shape)} in the model"
                raise ValueError(f"{name} is {shapes}: inject with the configuration of the interrupted run")
        for key, expected in checksums.items():
            algorithm, _, name = key.partition(".")
            if name in record.adapters and not torch.equal(expected, _checksum(record, name, algorithm)):
                raise ValueError(
                    f"the checkpoint of adapter {name!r} belongs to other random bases: inject with the same seed and "
                    "bases as the interrupted run"
                )


def _write(model: nn.Module, folder: Path, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    record = own_record(model)
    assert record is not None
    folder.mkdir(parents=True, exist_ok=True)
    trained = _trained(model)
    extra = trained - _in_adapters(model, record)
    if extra:
        _logger.warning_once(
            f"{listing(sorted(extra), 3)}: trained, and in checkpoints, but not in {ADAPTER_FILE}; name them in "
            "modules_to_save"
        )
    tensors = {name: state[name].detach().cpu().clone().contiguous() for name in sorted(trained)}
    tensors |= {f"{_BASES}{CRC32}.{name}": _checksum(record, name, CRC32) for name in record.adapters}
    with replacing(folder / _STATE_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    save_adapter(model, folder / ADAPTER_FILE, adapter_name)


def _trained(model: nn.Module) -> set[str]:
    """The keys of everything that training can change on purpose."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    record = own_record(model)
    return trained | (_in_adapters(model, record) if record else set())


def _in_adapters(model: nn.Module, record: ModelRecord) -> set[str]:
    """The keys of every adapter's lambda and gamma, and of modules trained in full."""
    saved: Iterable[str] = (path for adapter in record.adapters.values() for path in adapter.saved)
    return {*saved, *(name for name, _ in model.named_parameters() if is_adapter_name(name))}


def _checksum(record: ModelRecord, adapter_name: str, algorithm: str) -> Tensor:
    """The bytes of a checksum of an adapter's bases, uint8 (4,), or (32,) in checkpoints of older versions."""
    digits = get_bases(record.adapters[adapter_name].spec).checksum(algorithm)
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
