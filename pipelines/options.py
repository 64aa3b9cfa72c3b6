"""`--set key=value` words against a pydantic model: typed, checked, and refused with the nearest right name."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipelines.errors import Refused, nearest_names

Model = TypeVar("Model", bound=BaseModel)


def parse_pairs(words: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`["a=1", "b=none"]` -> {"a": "1", "b": None}; values stay text for pydantic, `x,y,z` becomes a list.

    Raises:
        Refused: a word without `=`, or a key given twice.
    """
    pairs: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            example = "num_codes=512" if option == "--set" else "size=64"
            raise Refused(f"{option} takes key=value words; {word!r} is not one. Example: {option} {example}")
        if key in pairs:
            raise Refused(f"{option} gives {key!r} twice: {pairs[key]!r} and {value!r}; give it once.")
        pairs[key] = None if value.lower() in ("none", "null") else value.split(",") if "," in value else value
    return pairs


def validated(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """`model(**values)`, or Refused with every mistake in one message: the value given and what is allowed."""
    fields = model.model_fields
    for key in values:
        if key not in fields:
            raise Refused(f"{what} has no setting {key!r}; {nearest_names(key, fields)}")
    values = {key: _as_sequence(fields[key].annotation, value) for key, value in values.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(map(str, e['loc'])) or 'settings'}={e['input']!r}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise Refused(f"{what} cannot take these settings: " + "; ".join(mistakes)) from None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: before -> now` for every key on which two flat or nested requests differ."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{key}: {old!r} -> {new!r}")
    return found


def describe(model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of every setting, for `--help` and the README's tables."""
    return [
        (name, "" if info.is_required() else repr(info.default), info.description or "")
        for name, info in model.model_fields.items()
    ]


def _as_sequence(annotation: Any, value: Any) -> Any:
    """One value for a tuple setting is a sequence of one: `multipliers=1` means (1,)."""
    takes_many = getattr(annotation, "__origin__", None) in (tuple, list)
    return [value] if takes_many and isinstance(value, str) else value
