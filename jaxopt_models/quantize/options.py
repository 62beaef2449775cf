"""What the parts of a model may become, what each of that costs, and what was chosen."""

from typing import Literal, NamedTuple

from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.settings import Strict

ORIGINAL = "original"
Unit = Literal["bits", "bytes", "latency"]
UNITS: dict[Unit, str] = {"bits": "bits a weight", "bytes": "bytes", "latency": "seconds"}


class Option(Strict):
    """One candidate in one group.

    Attributes:
      candidate: its name.
      score: divergence it causes by itself, nats a token; see `sensitivity`.
      bits: stored, of all weights of the group, scales and corrections included.
      nanoseconds: of the group's products; None if not measured.
    """

    candidate: str
    score: float
    bits: int
    nanoseconds: int | None = None


class Group(Strict):
    """Linears that engines fuse, which therefore share one choice.

    Attributes:
      name: for people, "layers/0/self_attn/q_proj+k_proj+v_proj".
      paths: of its matrices.
      weights: their number of weights.
      options: one for each candidate, in their order.
    """

    name: str
    paths: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]


class CacheOption(Strict):
    """One format of cached keys and values, for all layers.

    Attributes:
      choice: the format; None is the compute dtype.
      score: divergence it causes by itself, nats a token.
      bits: of its static scales.
      bits_a_token: of the keys and values of one token in all layers.
    """

    choice: KVChoice | None
    score: float
    bits: int
    bits_a_token: int


class Fixed(Strict):
    """What no choice changes.

    Attributes:
      weights, bits, nanoseconds: of decoder matrices that no candidate quantizes.
      other_bits: of all else, such as embeddings and norms.
    """

    weights: int = 0
    bits: int = 0
    nanoseconds: int = 0
    other_bits: int = 0


class Choice(NamedTuple):
    """One candidate for each group.

    Attributes:
      picks: names of candidates, in the order of the groups.
      score: sum of the scores, nats a token.
      bits: stored bits for each weight of the decoder's matrices, as `tree.bits_per_weight` counts.
      bytes: stored size of the whole model, as `evaluate` counts, and of the cache of the context.
      latency: seconds of all the decoder's products, one after another; None if not measured.
      kv_cache: the format of cached keys and values.
    """

    picks: tuple[str, ...]
    score: float
    bits: float
    bytes: int
    latency: float | None
    kv_cache: KVChoice | None = None


class Point(NamedTuple):
    """A budget, what the best choice within it costs in the same unit, and that choice's score."""

    budget: float
    cost: float
    score: float
