"""Settings in YAML: values set from a command line, and mistakes in one sentence."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from jaxopt_models.errors import UserError


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


type Globs = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]  # written as one or a list


class Strict(BaseModel):
    """Frozen settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def with_override(
    fields: dict[str, Any],
    assignment: str,
    field_of: Callable[[str], str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """A copy with one "dotted.key=value" set, the value being YAML.

    Args:
      field_of: which field a text stands for in place of fields, by its key; None allows none.
      optional: keys of the whole whose fields all have defaults, so that they may be missing.

    Raises:
      UserError: if it is of another form, or leads nowhere.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override {assignment!r} is not of the form key=value")
    fields = copy.deepcopy(fields)
    node: Any = fields
    *parents, last = key.split(".")
    if parents and parents[0] in optional:
        fields.setdefault(parents[0], {})
    for part in parents:
        node = _descend(node, part, assignment, field_of)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {assignment!r}: the value is not valid YAML") from error
    if isinstance(node, list):
        raise UserError(f"override {assignment!r} ends inside a list; name one of its fields")
    node[last] = value
    return fields


def _descend(node: Any, part: str, assignment: str, field_of: Callable[[str], str] | None) -> Any:
    key: Any = int(part) if isinstance(node, list) and part.isdecimal() else part
    try:
        child = node[key]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"override {assignment!r}: there is no {part!r} there") from error
    if isinstance(child, str) and field_of is not None:
        child = node[key] = {field_of(part): child}
    if not isinstance(child, dict | list):
        raise UserError(f"override {assignment!r}: {part!r} holds a value, not fields")
    return child


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Name of the first setting in which two runs differ."""
    return next((name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)), None)


def read_settings[S: Strict](
    model: type[S], file: str | Path, overrides: Sequence[str], *, kind: str, whole: str, key: str
) -> S:
    """Settings from a YAML file.

    Args:
      model: what they are.
      overrides: "dotted.key=value" with YAML values.
      kind: what the file is called in mistakes.
      whole: what the settings are called where no field is to blame.
      key: one that such a file may have, as an example.

    Raises:
      UserError: for a missing file, YAML that does not parse, an unknown key or a wrong value.
    """
    try:
        fields: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{kind} {file}: cannot be read ({first_line(error)})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{kind} {file}: expected keys such as {key!r}, found {fields!r}")
    for assignment in overrides:
        fields = with_override(fields, assignment, optional=model.model_fields)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{kind} {file}: {explain(error, whole)}") from error


def explain(error: ValidationError, whole: str) -> str:
    """The first problem of a validation as "where: what"; `whole` is where no field is to blame."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; remove it or correct its name"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
