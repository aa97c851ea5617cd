"""RandLoRA (full-rank parameter-efficient fine-tuning, arXiv 2502.00987) for vision models.

from randlora_vision import RandLoRAConfig, inject, save_adapter

report = inject(model, RandLoRAConfig(rank=32, target_modules="all-linear"))
print(report)
...  # train: only lambda and gamma require gradients
save_adapter(model, "adapter.safetensors")
"""

from randlora_vision.adapters.arithmetic import set_weights as set_weights
from randlora_vision.adapters.arithmetic import weighted_sum as weighted_sum
from randlora_vision.adapters.arithmetic import weighted_sum_files as weighted_sum_files
from randlora_vision.adapters.checkpoint import load_adapter as load_adapter
from randlora_vision.adapters.checkpoint import save_adapter as save_adapter
from randlora_vision.compute.cache import cached as cached
from randlora_vision.config import RandLoRAConfig as RandLoRAConfig
from randlora_vision.injection.control import adapter_parameters as adapter_parameters
from randlora_vision.injection.control import count_parameters as count_parameters
from randlora_vision.injection.control import set_active as set_active
from randlora_vision.injection.control import set_scale as set_scale
from randlora_vision.injection.gradients import check_gradients as check_gradients
from randlora_vision.injection.inject import delete_adapter as delete_adapter
from randlora_vision.injection.inject import inject as inject
from randlora_vision.injection.inject import plan as plan
from randlora_vision.injection.inject import remove as remove
from randlora_vision.injection.learning_rate import suggest_lr as suggest_lr
from randlora_vision.injection.merge import disabled as disabled
from randlora_vision.injection.merge import merge as merge
from randlora_vision.injection.merge import unmerge as unmerge
from randlora_vision.injection.per_sample import per_sample as per_sample
from randlora_vision.report import InjectionReport as InjectionReport
from randlora_vision.report import Target as Target

__version__ = "0.1.0"

__all__ = [
    "InjectionReport",
    "RandLoRAConfig",
    "Target",
    "adapter_parameters",
    "cached",
    "check_gradients",
    "count_parameters",
    "delete_adapter",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "per_sample",
    "plan",
    "remove",
    "save_adapter",
    "set_active",
    "set_scale",
    "set_weights",
    "suggest_lr",
    "unmerge",
    "weighted_sum",
    "weighted_sum_files",
]
