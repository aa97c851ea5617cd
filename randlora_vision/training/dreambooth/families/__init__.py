"""The families of diffusion pipelines: one small class per family with everything that differs in training.

A new family is one file in this folder with a subclass of `Family` or `FlowFamily`: it is found by itself.
"""

import importlib
import pkgutil

from randlora_vision.training.dreambooth.families.base import Encoded as Encoded
from randlora_vision.training.dreambooth.families.base import Family as Family
from randlora_vision.training.dreambooth.families.base import Takes as Takes
from randlora_vision.training.dreambooth.families.seen import Seen as Seen
from randlora_vision.training.dreambooth.families.seen import with_image_of as with_image_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

FAMILIES = Family.registered
