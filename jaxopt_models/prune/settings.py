"""Settings of pruning, as users write them down.

    budget: {parameters: 0.8}         # or a number of them, or bytes, or the time of a decode step:
                                      # {latency: 0.8, batch: 1, context: 1024}; searched for
    axes: [layers, hidden, neurons]   # that may be cut
    keep: {layers: 24}                # in place of a budget: this, without a search
    sparsity: {pattern: "2:4", method: wanda, update: exact}   # zeros in what is left
    text: builtin                     # or a file, or hf:NAME: importance and search
    windows: 64
    length: 512
    batch: 4
    multiple: 64                      # of widths
    uniform: true                     # equal widths in all layers, as exports need
    rescale_norms: false              # gains of norms for the narrower stream
    search: {candidates: 32, first: 4, finalists: 4, least: 0.4}
                                      # per_layer: {widths: 2, windows: 4} gives each layer its own
                                      # distill: {steps: 100, learning_rate: 1.0e-4} for finalists
    seed: 0
    evaluation: {text: builtin, windows: 16}

One of `budget`, `keep` and `sparsity` is needed; `sparsity` goes with both others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from jaxopt_models.prune.choose import Target
from jaxopt_models.prune.patterns import Pattern
from jaxopt_models.prune.sizes import Axis, Unit
from jaxopt_models.prune.sparsity import Method, Sparsity, Update
from jaxopt_models.settings import Globs, Strict, read_settings

type _Count = StrictInt | tuple[StrictInt, ...]


class Budget(Strict):
    """Largest cost of the pruned model: below 1 a share of the original's, else a number.

    Attributes:
      latency: of a decode step on the device that searches; a number is milliseconds.
      batch: rows that are decoded together, for latency.
      context: positions of their caches, the last of which are decoded.
    """

    parameters: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    bytes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    latency: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch: StrictInt = Field(default=1, ge=1)
    context: StrictInt = Field(default=1024, ge=64)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = self.parameters, self.bytes, self.latency
        if sum(value is not None for value in given) != 1:
            raise ValueError("give 'parameters', 'bytes' or 'latency', one of them")
        for name in ("batch", "context") if self.latency is None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name!r} goes with 'latency'; leave it out")
        return self

    @property
    def unit(self) -> Unit:
        if self.latency is not None:
            return "nanoseconds"
        return "bytes" if self.parameters is None else "parameters"

    def of(self, whole: int) -> int:
        """The number that it is of a model of cost `whole`, in its unit."""
        value = self.parameters or self.bytes or self.latency
        assert value is not None  # `_one`
        return int(value * whole) if value < 1 else int(value * _IN_UNITS[self.unit])


_IN_UNITS: dict[Unit, int] = {"parameters": 1, "bytes": 1, "nanoseconds": 10**6}


class Keep(Strict):
    """How much stays; see `choose.Target`. Layers of least influence go."""

    layers: StrictInt | None = None
    hidden: StrictInt | None = None
    neurons: _Count | None = None
    heads: _Count | None = None
    groups: _Count | None = None
    experts: _Count | None = None
    expert_neurons: _Count | None = None

    def target(self, multiple: int) -> Target:
        return Target(**self.model_dump(), multiple=multiple)


class Zeros(Strict):
    """Zeros in weights; see `sparsity.Sparsity`."""

    pattern: StrictStr | float
    method: Method = "sparsegpt"
    update: Update | None = None
    damping: float = Field(default=0.01, gt=0)
    weights: Globs = Sparsity.__dataclass_fields__["weights"].default

    def sparsity(self) -> Sparsity:
        """What to do; without a word on it, SparseGPT updates weights and others leave them.

        Raises:
          UserError: for an unknown pattern, and an update that does not go with the method.
        """
        update = self.update or ("obs" if self.method == "sparsegpt" else "none")
        pattern = Pattern.parse(self.pattern)
        return Sparsity(pattern, self.method, update, self.damping, self.weights)


class PerLayer(Strict):
    """A candidate of which each layer has a choice of its own, see `per_layer`.

    Attributes:
      widths: of each axis, besides the whole.
      windows: that choices are scored on.
    """

    widths: StrictInt = Field(default=2, ge=1)
    windows: StrictInt = Field(default=4, ge=1)


class Distill(Strict):
    """A lesson for each finalist, see `teaching`; the best behind it is chosen, as it was taught.

    Attributes:
      steps: of AdamW.
      batch: rows of each, of the same length as windows.
      learning_rate: the highest; it rises in a share of steps, `warmup`, and falls to a tenth.
    """

    steps: StrictInt = Field(default=100, ge=1)
    batch: StrictInt = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)


class Search(Strict):
    """
    Attributes:
      candidates: drawn, beside the uniform one, those of single axes and runs of layers.
      first: windows of the first round.
      finalists: how many are measured on all windows.
      least: share of each axis that stays at least.
      per_layer: None leaves it out.
      distill: None chooses among finalists as they are cut.
    """

    candidates: StrictInt = Field(default=32, ge=0)
    first: StrictInt = Field(default=4, ge=1)
    finalists: StrictInt = Field(default=4, ge=1)
    least: float = Field(default=0.4, gt=0, le=1)
    per_layer: PerLayer | None = None
    distill: Distill | None = None


class Evaluation(Strict):
    """Text that nothing was chosen by."""

    text: str = "builtin"
    windows: StrictInt = Field(default=16, ge=1)


class PruneSettings(Strict):
    """See the module's docstring.

    Attributes:
      axes: None is all that the model has, but key-value groups.
      equal_sites, weighted: see `importance.importance`.
    """

    budget: Budget | None = None
    keep: Keep | None = None
    sparsity: Zeros | None = None
    axes: tuple[Axis, ...] | None = None
    multiple: StrictInt = Field(default=64, ge=1)
    uniform: StrictBool = True
    rescale_norms: StrictBool = False
    equal_sites: StrictBool = False
    weighted: StrictBool = False
    text: str = "builtin"
    windows: StrictInt = Field(default=64, ge=1)
    length: StrictInt = Field(default=512, ge=2)
    batch: StrictInt = Field(default=4, ge=1)
    search: Search = Search()
    seed: StrictInt = Field(default=0, ge=0)
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _what(self) -> Self:
        if self.budget is not None and self.keep is not None:
            raise ValueError("'budget' searches for what 'keep' says; leave out one of them")
        if self.budget is None and self.keep is None and self.sparsity is None:
            raise ValueError("nothing is to be removed; give a 'budget', 'keep' or 'sparsity'")
        if self.keep is not None and self.keep == Keep():
            raise ValueError("'keep' is empty; say how much stays, as {layers: 24}")
        for name in ("axes", "search") if self.budget is None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name!r} is for a search; give a 'budget' or leave it out")
        if self.axes is not None and (not self.axes or len(set(self.axes)) < len(self.axes)):
            raise ValueError("'axes' is empty or names one twice; name each that may be cut")
        if (
            self.search.per_layer is not None
            and self.uniform
            and "layers" not in (self.axes or ("layers",))
        ):
            raise ValueError(
                "'search.per_layer' can leave out layers where they are 'uniform', and 'axes' does "
                "not name them; add 'layers', or let widths differ with uniform: false"
            )
        if self.sparsity is not None:
            self.sparsity.sparsity()
        return self

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = ()) -> "PruneSettings":
        """Reads a YAML file.

        Args:
          overrides: "dotted.key=value" with YAML values.

        Raises:
          UserError: for a missing file, YAML that does not parse, an unknown key or a wrong value.
        """
        naming = {"kind": "pruning", "whole": "settings", "key": "budget"}
        return read_settings(cls, file, overrides, **naming)
