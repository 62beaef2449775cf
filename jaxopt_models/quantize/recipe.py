"""Recipes: ordered rules that say how each weight and its input are quantized.

    description: NVFP4 weights and activations
    rules:
      - match: "*"                      # glob or list of globs on paths of matrices
        weight: nvfp4                   # a format, or {format: …, block_size: …, …}; null: as it is
        activation: {format: fp8, granularity: token}
        algorithm: rtn
    skip: [lm_head/*, embed_tokens/*, "*/router/*"]     # this is the default

The last rule that matches a path decides. A rule that matches nothing is an error.
"""

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec, resolve

_SKIP = ("lm_head/*", "embed_tokens/*", "*/router/*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatChoice(_Strict):
    """A number format with its options; see `formats.QuantSpec`. A bare name is accepted."""

    format: str
    granularity: Literal["tensor", "channel", "token", "block", "block2d"] | None = None
    block_size: StrictInt | None = None
    scale_dtype: str | None = None
    symmetric: StrictBool = True
    mx_rule: Literal["ceil", "floor"] = "ceil"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _resolves(self) -> "FormatChoice":
        self.spec()
        return self

    def spec(self) -> QuantSpec:
        """The decided format."""
        return resolve(**self.model_dump())


class ActivationChoice(FormatChoice):
    """Format of a linear's input.

    Granularity "tensor" (fp8, int8) has a static scale from calibration, "token" and "block" take
    theirs from each token. NVFP4's global scale is static, block scales are always dynamic. A
    dynamic scale for the whole tensor does not exist: a token would depend on its batch.
    """

    @model_validator(mode="after")
    def _is_causal(self) -> "ActivationChoice":
        spec = self.spec()
        if spec.granularity == "block2d" or not spec.symmetric:
            raise ValueError("activations have no 'block2d' granularity and no zero point")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether a static amax is needed."""
        spec = self.spec()
        return spec.granularity == "tensor" or spec.two_level


class Rule(_Strict):
    """What happens to the matrices that `match` selects."""

    match: tuple[str, ...] = Field(min_length=1)
    weight: FormatChoice | None
    activation: ActivationChoice | None = None
    algorithm: Literal["rtn"] = "rtn"

    @field_validator("match", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_weight(self) -> "Rule":
        if self.weight is None and self.activation is not None:
            raise ValueError("an activation format needs a weight format beside it")
        return self


class Recipe(_Strict):
    """An ordered list of rules; see the module's docstring for the YAML form.

    Attributes:
      name: what the recipe is called in reports.
      description: one line for humans.
      skip: globs of paths that no rule may touch.
      rules: the last that matches a path decides.
    """

    name: str = "recipe"
    description: str = ""
    skip: tuple[str, ...] = _SKIP
    rules: tuple[Rule, ...] = Field(min_length=1)

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Reads a preset by name or a YAML file by path.

        Args:
          source: a name in `configs/recipes`, or a path ending in .yaml or .yml.
          overrides: "key=value" with dotted keys and YAML values, as in
            "rules.0.weight.block_size=64".

        Raises:
          UserError: for a missing file, YAML that does not parse, an unknown key or a wrong value.
        """
        name, text = _read(source)
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"recipe {source}: not valid YAML ({_first_line(error)})") from error
        if not isinstance(fields, dict):
            raise UserError(f"recipe {source}: expected keys such as 'rules', found {fields!r}")
        for override in overrides:
            fields = _override(fields, override)
        try:
            return cls.model_validate({"name": name} | fields)
        except ValidationError as error:
            raise UserError(f"recipe {source}: {_explain(error)}") from error

    def plan(self, params: Any) -> dict[str, Rule]:
        """The rule of each weight that is to be quantized, by path in tree order.

        Raises:
          UserError: for a rule that matches no matrix, or a matrix that is already quantized.
        """
        matrices = {
            path: leaf
            for path, leaf in tree.leaves_with_paths(params)
            if path.endswith("/weight") and leaf.ndim >= 2 and not tree.matches(path, self.skip)
        }
        for rule in self.rules:
            for pattern in rule.match:
                if not any(fnmatchcase(path, pattern) for path in matrices):
                    raise UserError(
                        f"recipe {self.name}: {pattern!r} matches no matrix that may be quantized; "
                        f"paths look like {next(iter(matrices), '(none)')!r}, and skip leaves out "
                        f"{', '.join(self.skip)}"
                    )
        chosen = {path: self._last_match(path) for path in matrices}
        plan = {path: rule for path, rule in chosen.items() if rule and rule.weight}
        for path in plan:
            if tree.is_leaf(matrices[path]):
                raise UserError(f"{path} is already quantized; start from the original model")
        return plan

    def _last_match(self, path: str) -> Rule | None:
        return next((r for r in reversed(self.rules) if tree.matches(path, r.match)), None)


def presets() -> tuple[str, ...]:
    """Names of the recipes that come with the library."""
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in _preset_folder().iterdir()))


def _preset_folder() -> Any:
    return resources.files("jaxopt_models") / "configs" / "recipes"


def _read(source: str | Path) -> tuple[str, str]:
    """(name, text) of a preset or a file."""
    if str(source).endswith((".yaml", ".yml")):
        path = Path(source)
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {path}: cannot be read ({_first_line(error)})") from error
    if str(source) not in presets():
        raise UserError(
            f"recipe {str(source)!r} is neither a .yaml file nor one of {', '.join(presets())}"
        )
    return str(source), (_preset_folder() / f"{source}.yaml").read_text(encoding="utf-8")


def _override(fields: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy with one "dotted.key=value" set; shorthands on the way are spelled out."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value")
    fields = copy.deepcopy(fields)
    node: Any = fields
    *parents, last = key.split(".")
    for part in parents:
        node = _descend(node, part, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    if isinstance(node, list):
        raise UserError(f"override {override!r} ends inside a list; name one of its fields")
    node[last] = value
    return fields


def _descend(node: Any, part: str, override: str) -> Any:
    key: Any = int(part) if isinstance(node, list) and part.isdecimal() else part
    try:
        child = node[key]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"override {override!r}: the recipe has no {part!r} there") from error
    if isinstance(child, str):  # "weight: int4" stands for {format: int4}
        child = node[key] = {"format": child}
    if not isinstance(child, dict | list):
        raise UserError(f"override {override!r}: {part!r} holds a value, not fields")
    return child


def _explain(error: ValidationError) -> str:
    """The first problem of a validation as "where: what"."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; remove it or correct its name"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
