"""The state of an optimiser as JSON and tensors, by the names of the parameters.

By hand, because `Optimizer.state_dict` numbers the parameters, and PyTorch's own writers pickle it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora_vision.json_values import check_object
from randlora_vision.names import listing, printable

_NUMBERS = (Tensor, bool, int, float)
_TENSOR = "__tensor__"  # marks the name of a tensor in JSON


@dataclass(frozen=True)
class State:
    """The state needed to resume training after `step`: JSON values, and tensors on the CPU by name."""

    step: int
    values: dict[str, Any]
    tensors: dict[str, Tensor]


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> State:
    """Return the state of an optimiser: JSON by parameter name with the numbers of its groups, and its tensors."""
    content = optimizer.state_dict()
    memory = {
        name: content["state"][index]
        for index, name in enumerate(_order(optimizer, names))
        if index in content["state"]
    }
    return packed(memory, content["param_groups"])


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], state: State) -> None:
    """Load the result of `optimizer_state` into an optimiser over the same parameters; raise ValueError for others."""
    content = optimizer.state_dict()
    memory = unpacked(state, content["param_groups"])
    content["state"] = {index: memory[name] for index, name in enumerate(_order(optimizer, names)) if name in memory}
    optimizer.load_state_dict(content)


def packed(memory: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]) -> State:
    """Return what an optimiser keeps for each parameter, by name, and the numbers of its groups."""
    tensors: dict[str, Tensor] = {}

    def name_of(value: object) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise ValueError(f"the optimiser keeps a {type(value).__name__}, which a checkpoint cannot hold")
        name = f"optimizer/{len(tensors)}"
        tensors[name] = to_cpu(value)
        return {_TENSOR: name}

    numbers = [{key: value for key, value in group.items() if isinstance(value, _NUMBERS)} for group in groups]
    return State(0, json.loads(json.dumps({"memory": memory, "groups": numbers}, default=name_of)), tensors)


def unpacked(state: State, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what `packed` got for each parameter and write the numbers into `groups`; raise ValueError for others."""
    where = f"the checkpoint of step {state.step}, optimizer"

    def tensor_of(part: dict[str, Any]) -> Any:
        if part.keys() != {_TENSOR}:
            return part
        if part[_TENSOR] not in state.tensors:
            raise ValueError(f"{where}: there is no tensor {printable(repr(part[_TENSOR]), 200)}")
        return state.tensors[part[_TENSOR]]

    values = json.loads(json.dumps(state.values), object_hook=tensor_of)
    check_object(values, {"memory": dict[str, dict], "groups": list[dict]}, where)
    if len(values["groups"]) != len(groups):
        raise ValueError(f"{where}: it has {len(values['groups'])} groups, here are {len(groups)}")
    for group, numbers in zip(groups, values["groups"], strict=True):
        wrong = [key for key, value in numbers.items() if key == "params" or not isinstance(value, _NUMBERS)]
        if wrong:
            raise ValueError(f"{where}, groups: {listing(wrong)} is not a number")
        group.update(numbers)
    memory: dict[str, dict[str, Any]] = values["memory"]
    return memory


def _order(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> list[str]:
    """Return the names in the order in which `Optimizer.state_dict` numbers the parameters."""
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()
