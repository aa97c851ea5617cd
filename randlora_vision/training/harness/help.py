"""The help of a script: its options by group, with their types, defaults and names in other scripts."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from randlora_vision.errors import one_line
from randlora_vision.training.harness.config_file import ConfigFile
from randlora_vision.training.harness.flags import Alias, Table, aliases_of

_RARE = frozenset(
    "num_classes fresh_head cache_dir drop drop_path scale ratio hflip vflip color_jitter erasing_mode erasing_count "
    "bce_loss bases init budget epoch_images min_lr beta1 beta2 eps warmup_epochs eval_epochs best_metric "
    "early_stopping_patience ema_decay layer_decay log_every max_grad_norm torch_compile channels_last runs_dir "
    "checkpoint_epochs force_image_size aug_cfg train_logit_scale logit_scale_lr prompts eval_scales val_fraction "
    "split_seed strict_data data_root retention_class_names revision variant max_sequence_length logit_mean logit_std "
    "mode_scale guidance_scale sample_batch_size aspect_ratio_buckets prior_loss_weight num_class_images head_lr "
    "validation_guidance_scale num_inference_steps cache_latents train_fraction overwrite "
    "dropout run_name retention_data checkpoints_total_limit workers snr_gamma weighting_scheme class_data_dir "
    "label_column center_crop split_folders background eval_split init_adapter image_column caption_column "
    "crop_pct mean std interpolation "
    "push_to_hub hub_model_id shuffle_caption keep_tokens caption_dropout_rate exclude_modules target_modules "
    "prediction_type "
    "debiased_estimation_loss noise_offset input_perturbation loss_type huber_c huber_schedule huber_scale "
    "discrete_flow_shift mask_data_dir alpha_mask prior_prompt num_prior_images likeness_encoder".split()
)
"""Options that only --help-all describes."""
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


def help_text(options: type, description: str, table: Table, defaults: Mapping[str, str], everything: bool) -> str:
    """Return the help, with the first clause on each common option, or with everything on all of them."""
    width = max(40, min(shutil.get_terminal_size().columns, 100) - 1)
    aliases = aliases_of(table)
    paragraphs = [textwrap.fill(one_line(part), width, break_on_hyphens=False) for part in description.split("\n\n")]
    lines = ["\n\n".join(paragraphs)]
    left: list[str] = []
    for name, group in [*get_type_hints(options).items(), ("file", ConfigFile)]:
        texts, hints = _texts(group), get_type_hints(group)
        shown: list[str] = []
        for member in fields(group):
            flag = "--" + member.name.replace("_", "-")
            if not everything and member.name in _RARE:
                left.append(flag)
                continue
            text, default = _default(member, texts[member.name], defaults.get(flag))
            also = aliases.get(flag, [])
            shown += _entry(flag, hints[member.name], default, text, also, width, everything)
        if shown:
            lines += ["", f"{one_line((group.__doc__ or name).partition('. ')[0]).rstrip('.')}:", *shown]
    if left:
        lines += ["", *textwrap.wrap(f"Described by --help-all: {', '.join(left)}", width, break_on_hyphens=False)]
    return "\n".join(lines)


def _texts(group: type) -> dict[str, str]:
    """Return the docstring of every field, that of a subclass in place of its base's."""
    found: dict[str, str] = {}
    for part in reversed(group.__mro__[:-1]):
        for parameter in docstring_parser.parse_from_object(part).params:
            found[parameter.arg_name] = one_line(parameter.description or "")
    return found


def _default(member: "Field[Any]", text: str, known: str | None) -> tuple[str, str]:
    """Return the text and the default, which the text may name in a last sentence where it depends on other things."""
    text, _, described = text.partition(" Default: ")
    value = member.default if member.default is not MISSING else None
    if known or described:
        return text, known or described.rstrip(".")
    if value is None or value == ():
        return text, "none"
    return text, {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _entry(
    flag: str, kind: Any, default: str, text: str, aliases: list[Alias], width: int, everything: bool
) -> Iterator[str]:
    names = list(dict.fromkeys([flag, *(str(alias) for alias in aliases if alias.exact and not alias.value)]))
    others = list(dict.fromkeys(str(alias) for alias in aliases if not alias.exact or alias.value))
    if kind is bool and default == "on":
        names.append(f"--no-{flag[2:]}")
    metavar = _metavar(kind)
    head = f"{', '.join(names)}{' ' if metavar else ''}{metavar}  (default: {default})"
    yield from _wrap(head, width, "  ", "    ")
    if not everything:
        text = f"{re.split(r'[.;] ', text, maxsplit=1)[0].rstrip('.')}."
    if others and everything:
        text += f" Also: {', '.join(others)}."
    yield from _wrap(text, width, " " * 6, " " * 6)


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _metavar(kind: Any) -> str:
    if kind is bool:
        return ""
    if get_origin(kind) in (Union, UnionType):
        kinds = [_metavar(part) for part in get_args(kind) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else f"{{{','.join(text.strip('{}') for text in kinds)}}}"
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return f"{_metavar(parts[0])} ..." if parts[1:] == (...,) else " ".join(map(_metavar, parts))
    if get_origin(kind) is Literal:
        return f"{{{','.join(str(value) for value in get_args(kind))}}}"
    return _TYPES[kind]
