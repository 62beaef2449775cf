"""Recipes: ordered rules that say how each weight and its input are quantized.

    description: NVFP4 weights and activations, AWQ
    rules:
      - match: "*"                      # glob or list of globs on paths of matrices
        weight: nvfp4                   # a format, or {format: …, block_size: …, …}; null: as it is
        activation: {format: fp8, granularity: token}
        smooth: awq                     # then, in this order, each of them optional:
        rotate: 64                      # Hadamard transform of the input, in blocks of 64
        low_rank: 32                    # SVDQuant's correction
        scales: hessian                 # how scales are found
        rounding: gptq                  # how values are rounded
    kv_cache: fp8                       # optional
    skip: [lm_head/*, embed_tokens/*, "*/router/*"]     # this is the default

The last rule that matches a path decides. A rule that matches nothing is an error.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import largest_block
from jaxopt_models.qtensor import DenseTensor
from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.quantize.method import Method
from jaxopt_models.settings import Globs, Strict, explain, first_line, with_override

_SKIP = ("lm_head/*", "embed_tokens/*", "*/router/*")


class Rule(Method):
    """What happens to the matrices that `match` selects."""

    match: Globs = Field(min_length=1)

    @property
    def method(self) -> Method:
        """The rule without its globs: equal for all that is done alike."""
        return Method.model_validate(self.model_dump(exclude={"match"}))


class Rotation(Strict):
    """Rotations that are fused into the weights before all else; see `rotate`.

    `hidden` is R1, of the residual stream; `heads` is R2, of each head's values; `seed` of R1's
    random signs, None for the plain Hadamard matrix.
    """

    hidden: StrictBool = False
    heads: StrictBool = False
    seed: StrictInt | None = None


class Experts(Strict):
    """How experts are calibrated.

    `tokens`: "routed", each on the tokens the router sends it, or "all", each on all tokens.
    An expert that got fewer than `min_tokens` is an error, or with `starved: all` is calibrated on
    all tokens.
    """

    tokens: Literal["routed", "all"] = "routed"
    min_tokens: StrictInt = Field(default=8, ge=1)
    starved: Literal["error", "all"] = "error"


class Recipe(Strict):
    """An ordered list of rules; see the module's docstring for the YAML form.

    Attributes:
      name: what the recipe is called in reports.
      description: one line for humans.
      aliases: other names of a preset: those that ModelOpt and llm-compressor give it.
      skip: globs of paths that no rule may touch.
      rules: the last that matches a path decides.
      kv_cache: format of cached keys and values; None leaves them in the compute dtype.
      rotation: fused into the weights first.
      experts: how experts are calibrated.
      fold: whether smoothing factors go into the norm or linear before, where that is exact; else
        they stay with the leaf and multiply its input.
      propagate: whose activations calibrate a layer: those of the "original" layers before it, or
        of the "quantized" ones. None is "quantized" where GPTQ or AutoRound can make up for the
        layers before, else "original".
    """

    name: str = "recipe"
    description: str = ""
    aliases: tuple[str, ...] = ()
    skip: tuple[str, ...] = _SKIP
    rules: tuple[Rule, ...] = ()
    kv_cache: KVChoice | None = None
    rotation: Rotation = Rotation()
    experts: Experts = Experts()
    fold: StrictBool = True
    propagate: Literal["original", "quantized"] | None = None

    @model_validator(mode="after")
    def _does_something(self) -> "Recipe":
        if not self.rules and self.kv_cache is None:
            raise ValueError("there are neither 'rules' nor a 'kv_cache'; give one of them")
        return self

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed."""
        rules = any(rule.needs_text for rule in self.rules)
        return rules or (self.kv_cache is not None and self.kv_cache.calibrated)

    @property
    def sequential(self) -> bool:
        """Whether a layer is calibrated behind quantized layers."""
        if self.propagate is None:
            return any(rule.rounding.method != "nearest" for rule in self.rules)
        return self.propagate == "quantized"

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
            raise UserError(f"recipe {source}: not valid YAML ({first_line(error)})") from error
        if not isinstance(fields, dict):
            raise UserError(f"recipe {source}: expected keys such as 'rules', found {fields!r}")
        for override in overrides:
            fields = with_override(fields, override, _field_of)
        try:
            return cls.model_validate({"name": name} | fields)
        except ValidationError as error:
            raise UserError(f"recipe {source}: {explain(error, 'recipe')}") from error

    def plan(self, params: Any) -> dict[str, Rule]:
        """The rule of each weight that is to be quantized, by path in tree order.

        Raises:
          UserError: for a rule that matches no matrix, a matrix that is already quantized, and one
            that a rotation, a rank or an algorithm does not fit.
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
        for path, rule in plan.items():
            if isinstance(matrices[path], DenseTensor):
                raise UserError(f"{path} has an adapter; fold it in with adapters.merged first")
            if tree.is_leaf(matrices[path]):
                raise UserError(f"{path} is already quantized; start from the original model")
            _check_fits(path, matrices[path].shape, rule)
        return plan

    def _last_match(self, path: str) -> Rule | None:
        return next((r for r in reversed(self.rules) if tree.matches(path, r.match)), None)


def _check_fits(path: str, shape: Sequence[int], rule: Rule) -> None:
    """Refuses what would fail only after all layers before it are done."""
    if path.startswith("embed_tokens/") and (rule.needs_text or rule.rotate or rule.low_rank):
        raise UserError(
            f"no activation reaches {path}; it cannot be calibrated, smoothed, rotated or "
            "corrected: leave it to 'skip', or give it a rule without these"
        )
    if rule.rotate and (shape[-1] % rule.rotate or rule.rotate & (rule.rotate - 1)):
        raise UserError(
            f"{path}: a rotation of {shape[-1]} channels has no block of {rule.rotate}; set "
            f"'rotate' to a power of two that divides them, {largest_block(shape[-1])} at most"
        )
    if rule.low_rank > min(shape[-2:]):
        raise UserError(
            f"{path}: a matrix {shape[-2]}x{shape[-1]} has no rank {rule.low_rank}; "
            "set 'low_rank' to a smaller one"
        )


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
            raise UserError(f"recipe {path}: cannot be read ({first_line(error)})") from error
    name = _preset_named(str(source))
    return name, (_preset_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _preset_named(name: str) -> str:
    """The preset that has this name or alias, in upper or lower case."""
    if name.lower() in presets():
        return name.lower()
    for preset in presets():
        fields = yaml.safe_load((_preset_folder() / f"{preset}.yaml").read_text(encoding="utf-8"))
        if name.lower() in (alias.lower() for alias in fields.get("aliases", ())):
            return preset
    raise UserError(f"recipe {name!r} is neither a .yaml file nor one of {', '.join(presets())}")


def _field_of(part: str) -> str:
    """What a shorthand is short for: "weight: int4" is {format: int4}, "rounding: gptq" {method:
    gptq}."""
    return "method" if part in ("smooth", "rounding") else "format"
