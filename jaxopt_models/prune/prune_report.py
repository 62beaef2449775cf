"""What pruning did and what it cost, as data."""

from dataclasses import asdict, dataclass
from typing import Any

from jaxopt_models.evaluate import Metrics
from jaxopt_models.prune.candidates import Candidate
from jaxopt_models.prune.damage import Damage
from jaxopt_models.prune.per_layer import Block
from jaxopt_models.prune.search import Scored
from jaxopt_models.prune.sizes import Unit
from jaxopt_models.prune.sparsity import SparseReport


@dataclass(frozen=True)
class Latency:
    """What times of decode steps were measured of.

    Attributes:
      batch: rows that are decoded together.
      context: positions of their caches.
      device: that they were measured on.
      original: nanoseconds of the original.
      scale: that by what its parts add up to.
    """

    batch: int
    context: int
    device: str
    original: int
    scale: float


@dataclass(frozen=True)
class PruneReport:
    """What was done, and what it cost.

    Attributes:
      unit: of costs of candidates.
      budget: largest cost; None without a search.
      candidates: best first, see `search.halve`; empty without a search.
      blocks: what layers could have become, with scores; empty without `search.per_layer`.
      chosen: None where nothing was cut.
      parameters, bytes: before and after; zeros in matrices count like other weights.
      sparsity: a row for each weight that got zeros.
      original, pruned: measured on other text, the pruned model beside the original.
      uniform: the uniform candidate likewise, taught if finalists are, without zeros; None without
        a search, and where it was chosen or does not fit the budget.
      latency: of a budget in nanoseconds; candidates' costs are then computed from times of parts,
        and those of finalists measured as well.
      seconds: of each step, in the process that ended the run.
    """

    unit: Unit
    budget: int | None
    candidates: tuple[Scored, ...]
    blocks: tuple[Block, ...]
    chosen: Candidate | None
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    sparsity: tuple[SparseReport, ...]
    original: Metrics
    pruned: Metrics
    uniform: Damage | None
    latency: Latency | None
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        before_after = {
            name: dict(zip(("before", "after"), getattr(self, name), strict=True))
            for name in ("parameters", "bytes")
        }
        measured = {"original": self.original.as_dict(), "pruned": self.pruned.as_dict()}
        if self.uniform is not None:
            measured["uniform"] = asdict(self.uniform)
        return before_after | {
            "unit": self.unit,
            "budget": self.budget,
            "latency": None if self.latency is None else asdict(self.latency),
            "chosen": None if self.chosen is None else self.chosen.as_dict(),
            "candidates": [scored_dict(one) for one in self.candidates],
            "blocks": [one.as_dict() for one in self.blocks],
            "sparsity": [row.as_dict() for row in self.sparsity],
            "evaluation": measured,
            "seconds": self.seconds,
        }


def scored_dict(scored: Scored) -> dict[str, Any]:
    """A row of the table of candidates."""
    row = scored.candidate.as_dict() | asdict(scored.damage) | {"windows": scored.windows}
    if scored.measured is not None:
        row["measured"] = scored.measured
    if scored.taught is not None:
        row |= {f"taught_{name}": value for name, value in asdict(scored.taught).items()}
    return row
