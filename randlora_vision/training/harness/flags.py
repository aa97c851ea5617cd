"""Flags of other training scripts, rewritten as those of this package from one table per script.

A table maps a flag to what it means here: a template of flags ("--weight-decay {}"; one {} per value that it takes,
none for a switch, and nothing at all for what happens here anyway), a template per value, a function that chooses a
template from all flags given, the meaning that it has beside another flag, or the reason why there is no such option.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Union, get_args, get_origin, get_type_hints

from randlora_vision.training.harness.config_file import ConfigFile


class Refused(str):
    """Why a flag has no meaning here, and what to give instead."""


Given = Mapping[str, Sequence[str]]  # flag -> its values
Meaning = Union[str, Mapping[str, str], Callable[["Given"], str], "With"]
Table = Mapping[str, Meaning]


@dataclass(frozen=True)
class With:
    """The meaning of a flag beside another one; without that, it has no effect in the other script either."""

    other: str
    meaning: str | Mapping[str, str] | Callable[[Given], str]


_OTHER_NAME = re.compile(r"(--[\w-]+) \{\}")  # the template of a flag that is just another name

HUGGING_FACE: Table = {
    "--max-steps": "--steps {}",
    "--max-train-steps": "--steps {}",
    "--num-train-epochs": "--epochs {}",
    "--train-batch-size": "--batch-size {}",
    "--learning-rate": "--lr {}",
    "--scale-lr": "--lr-images 1 --lr-scaling linear",
    "--adam-weight-decay": "--weight-decay {}",
    "--adam-beta1": "--beta1 {}",
    "--adam-beta2": "--beta2 {}",
    "--adam-epsilon": "--eps {}",
    "--lr-warmup-steps": "--warmup-steps {}",
    "--lr-scheduler": {
        **{
            name: f"--schedule {name}"
            for name in ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant")
        },
        "constant_with_warmup": "--schedule constant",
        "piecewise_constant": Refused("give --schedule multistep with --decay-steps and --decay-rate"),
    },
    "--validation-steps": "--eval-every {}",
    "--dataloader-num-workers": "--workers {}",
    "--checkpointing-steps": "--checkpoint-every {}",
    "--resume-from-checkpoint": "--resume {}",
    "--lora-alpha": "--alpha {}",
    "--lora-dropout": "--dropout {}",
}
"""Names of the Hugging Face libraries, which every script knows."""


def only(*usual: str, otherwise: str) -> dict[str, str]:
    """Return the meaning of a flag for which only the usual values are supported."""
    return {**dict.fromkeys(usual, ""), "*": Refused(otherwise)}


@dataclass(frozen=True)
class Alias:
    """A flag of another script, as the help shows it."""

    flag: str
    template: str
    value: str = ""

    @property
    def exact(self) -> bool:
        """Whether it is just another name of an option."""
        return _OTHER_NAME.fullmatch(self.template) is not None or self.template.count(" ") == 0

    def __str__(self) -> str:
        words = self.template.replace(" {}", "")
        return self.flag if self.exact and not self.value else f"{' '.join((self.flag, self.value)).strip()} ({words})"


def aliases_of(table: Table) -> dict[str, list[Alias]]:
    """Return the flags of other scripts that set an option, by its flag."""
    found: dict[str, list[Alias]] = {}
    for flag, meaning in table.items():
        meaning = _usual(meaning)
        for value, template in meaning.items() if isinstance(meaning, Mapping) else [("", meaning)]:
            if isinstance(template, Refused) or not flag:
                continue
            for target in re.findall(r"--[\w-]+", template):
                if target == flag:
                    continue
                same = template in (f"{target} {value}", f"{target} {{}}")
                found.setdefault(target, []).append(
                    Alias(flag, f"{target} {{}}" if same else template, value * (not same))
                )
    return found


@dataclass
class _Word:
    """A flag with the words that follow it; the flag is empty for words before the first one."""

    flag: str
    values: list[str] = field(default_factory=list)
    joined: bool = False  # --flag=value

    def words(self) -> list[str]:
        """Return it as given, with hyphens."""
        first = [f"{self.flag}={self.values[0]}", *self.values[1:]] if self.joined else [self.flag, *self.values]
        return first if self.flag else self.values


def translate(words: Sequence[str], options: type, table: Table) -> list[str]:
    """Return a command line with the flags in `table` replaced by what they mean.

    A flag that is just another name stays in its place. The others come first, in the order of the table, so that
    the result does not depend on the order in which they were given. Words that belong to no flag are given to the
    entry "" of the table, if it has one. Raises ValueError with the reason for a flag that has no meaning here.
    """
    own = _value_counts(options)
    counts = {**own, **{flag: _value_count(meaning, own) for flag, meaning in table.items()}}
    parsed = list(_split(words, counts, positional="" in table))
    given = {word.flag: word.values for word in parsed}
    front: dict[str, list[str]] = {}
    rest: list[str] = []
    for word in parsed:
        if word.flag not in table:
            rest += word.words()
            continue
        meaning = table[word.flag]
        template = _template(word, meaning, given)
        if isinstance(template, Refused):
            name = word.flag if not isinstance(meaning, Mapping) else " ".join([word.flag, *word.values])
            raise ValueError(f"{name or word.values[0]}: {template}")
        used = [] if counts[word.flag] != 0 and "{}" not in template else word.values
        (rest if "{}" in template else front.setdefault(word.flag, [])).extend(_fill(template, used))
    return [new for flag in table for new in front.get(flag, [])] + rest


def _value_counts(options: type) -> dict[str, int | None]:
    """Return how many values each flag takes; None: as many as follow."""
    counts: dict[str, int | None] = {"--config": 1}
    for group in (*get_type_hints(options).values(), ConfigFile):
        hints = get_type_hints(group)
        for member in fields(group):
            kind, flag = hints[member.name], "--" + member.name.replace("_", "-")
            several = any(get_origin(part) is tuple for part in (kind, *get_args(kind)))
            counts[flag] = None if several else int(kind is not bool)
            counts[f"--no-{flag[2:]}"] = 0
    return counts


def _usual(meaning: Meaning) -> str | Mapping[str, str]:
    """Return the meaning of a flag beside no others but the one that it needs."""
    meaning = meaning.meaning if isinstance(meaning, With) else meaning
    return meaning({}) if callable(meaning) else meaning


def _value_count(meaning: Meaning, own: Mapping[str, int | None]) -> int | None:
    template = _usual(meaning)
    if isinstance(template, Refused):
        return None
    if isinstance(template, Mapping):
        return 1
    return own.get(name[1], 1) if (name := _OTHER_NAME.fullmatch(template)) else template.count("{}")


def _split(words: Sequence[str], counts: Mapping[str, int | None], positional: bool) -> Iterator[_Word]:
    current = _Word("")
    wanted: int | None = 0
    for word in words:
        if re.match(r"-(?![\d.])", word):
            if current.words():
                yield current
            flag, equals, value = word.partition("=")
            current = _Word(flag.replace("_", "-"), [value] if equals else [], bool(equals))
            wanted = counts.get(current.flag)
        elif positional and wanted is not None and len(current.values) >= wanted:
            yield _Word("", [word])
        else:
            current.values.append(word)
    if current.words():
        yield current


def _template(word: _Word, meaning: Meaning, given: Given) -> str:
    if isinstance(meaning, With):
        return _template(word, meaning.meaning, given) if meaning.other in given else ""
    if isinstance(meaning, Mapping):
        value = word.values[0] if word.values else ""
        if value in meaning:
            return meaning[value]
        if "*" in meaning:
            return meaning["*"]
        known = [name for name, template in meaning.items() if not isinstance(template, Refused)]
        raise ValueError(f"{word.flag} must be one of {', '.join(known)}, got {value or 'nothing'}")
    return meaning if isinstance(meaning, str) else meaning(given)


def _fill(template: str, given: Sequence[str]) -> Iterator[str]:
    """Yield the words of a template; a flag whose value is missing stays without it, for the parser to complain."""
    if (name := _OTHER_NAME.fullmatch(template)) and len(given) > 1:
        yield from (name[1], *given)
        return
    values = iter(given)
    for flag, words in re.findall(r"(--[\w-]+)((?: (?!--)\S+)*)", template):
        filled = [
            word.replace("{}", text) for word in words.split() if (text := next(values, "") if "{}" in word else word)
        ]
        yield from [f"{flag}={filled[0]}"] if len(filled) == 1 else [flag, *filled]
    yield from values
