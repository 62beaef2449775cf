"""The reference implementation's figures, and which of them a recipe is compared with."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxopt_models.quantize.recipe import Recipe


@dataclass(frozen=True)
class PeerFigures:
    """Published configurations of the reference on one model; see `results/reference_quality.json`.

    Attributes:
      windows, length: the sizes in its protocol; see `quality.Windows`.
      teacher_ppl: perplexity of the original model there.
      rows: configuration -> {ppl, kl, top1, calib_seconds}.
    """

    windows: dict[str, int]
    length: int
    teacher_ppl: float
    rows: dict[str, dict[str, float]]

    @classmethod
    def of(cls, model: str) -> "PeerFigures | None":
        """The figures of a built-in model; None for others."""
        published = _published()
        found = published["models"].get(model)
        if found is None:
            return None
        return cls(found["windows"], found["length"], found["teacher"]["ppl"], found["rows"])

    def counterpart(self, recipe: Recipe) -> dict[str, Any] | None:
        """The reference's row for a recipe: `{config, ppl, kl, top1, calib_seconds,
        best_of_format}`.

        That of the same name where the reference has it, else (`best_of_format`) its row of lowest
        KL among those of the recipe's format; None where it has no such format.
        """
        published = _published()
        config = published["recipes"].get(recipe.name)
        same = config in self.rows and published["formats"][config] == format_name(recipe)
        if not same:
            formats = published["formats"]
            rivals = [c for c in self.rows if formats[c] == format_name(recipe)]
            config = min(rivals, key=lambda c: self.rows[c]["kl"], default=None)
        if config is None:
            return None
        return {"config": config} | self.rows[config] | {"best_of_format": not same}


def format_name(recipe: Recipe) -> str:
    """What a recipe stores: "nvfp4/nvfp4" for weights/inputs, " kv fp8" after it for a cache.

    Integers of 4 bits name their block, "int4-g128", since the reader could not guess it. Rules
    that differ are joined by "+".
    """
    names = [_rule_format(rule) for rule in recipe.rules if rule.weight is not None]
    parts = ["+".join(dict.fromkeys(names))] if names else []
    if recipe.kv_cache is not None:
        parts.append(f"kv {recipe.kv_cache.spec().format}")
    return " ".join(parts)


def _rule_format(rule: Any) -> str:
    weight = rule.weight.spec()
    block = f"-g{weight.block_size}" if weight.format == "int4" and weight.block_size else ""
    inputs = f"/{rule.activation.spec().format}" if rule.activation else ""
    return weight.format + block + inputs


def _published() -> dict[str, Any]:
    file = resources.files("jaxopt_models") / "bench" / "results" / "reference_quality.json"
    return json.loads(file.read_text(encoding="utf-8"))
