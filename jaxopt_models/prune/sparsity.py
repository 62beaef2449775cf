"""Zeros in weights, layer by layer: choose places, update what stays, move the text on.

The input of each layer is that of the layers before it as they have become, so later layers make up
for earlier ones. Shapes stay, and so does the time that dense products take.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream, check
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.masks import check_plain
from jaxopt_models.prune.patterns import Pattern, magnitude_mask, wanda_mask
from jaxopt_models.prune.refit import refit
from jaxopt_models.prune.sparsegpt import sparsegpt
from jaxopt_models.quantize.groups import leader_tap
from jaxopt_models.statistics import Wanted

Method = Literal["magnitude", "wanda", "sparsegpt"]
Update = Literal["none", "obs", "exact"]
_DECODER = ("layers/*_proj/weight",)


@dataclass(frozen=True)
class Sparsity:
    """What to do; static.

    Attributes:
      pattern: of zeros.
      method: chooses their places; see `patterns` and `sparsegpt`.
      update: what becomes of the other weights. "none" leaves them, "obs" is SparseGPT's own update
        and goes with that method only, "exact" is the least-squares optimum (`refit`).
      damping: on the diagonal of E[x xᵀ], in units of its mean.
      weights: globs of weight paths in decoder layers.
    """

    pattern: Pattern
    method: Method = "sparsegpt"
    update: Update = "obs"
    damping: float = 0.01
    weights: tuple[str, ...] = _DECODER

    def __post_init__(self) -> None:
        for name, kinds in (("method", Method), ("update", Update)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise UserError(f"sparsity {name} {value!r} is unknown; choose one of {known}")
        if self.update == "obs" and self.method != "sparsegpt":
            raise UserError(
                f"update 'obs' belongs to method 'sparsegpt', not to {self.method!r}; choose "
                "'none' or 'exact'"
            )

    @property
    def needs_text(self) -> bool:
        return self.method != "magnitude" or self.update != "none"


@dataclass(frozen=True)
class SparseReport:
    """What was done to one weight.

    Attributes:
      path: its leaf path.
      sparsity: share of zeros.
      output_error: ‖(W - Ŵ) X‖ / ‖W X‖ on the text; None without text.
      damping: what was used, relative to the mean of the diagonal; None where nothing was.
    """

    path: str
    sparsity: float
    output_error: float | None
    damping: float | None

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        return asdict(self)


def sparsify(
    config: ModelConfig,
    params: Any,
    sparsity: Sparsity,
    batches: Iterable[Any] | None = None,
    progress: Progress = silent,
) -> tuple[Any, list[SparseReport]]:
    """A model with zeros in its decoder's matrices.

    Args:
      config: the architecture.
      params: the model, in plain arrays; those of the host come back to the host.
      sparsity: what to do.
      batches: int32 [B, T] token arrays; may be None for magnitudes without an update.
      progress: wraps the loop over layers, as `tqdm` would.

    Returns:
      (parameters of the same shapes and dtypes that share what was left alone; a row for each
      weight, in tree order).

    Raises:
      UserError: for globs that match nothing or something else than matrices of decoder layers, for
        rows that are no whole groups, missing text, an input that is zero or not finite, an expert
        that no token is sent to, and for a second moment that has no factor.
    """
    check_plain(params)
    chosen = tree.select(params, sparsity.weights)
    for path, leaf in chosen.items():
        if not tree.is_decoder_matrix(path, leaf):
            raise UserError(f"{path} is no matrix of a decoder layer; leave it out of `weights`")
        sparsity.pattern.check(path, leaf.shape)
    if batches is None and sparsity.needs_text:
        raise UserError(
            f"method {sparsity.method!r} with update {sparsity.update!r} reads text; give batches"
        )
    stream = None if batches is None else Stream(config, params, batches)
    found: dict[str, Any] = {}
    reports: list[SparseReport] = []
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, f"sparsifying by {sparsity.method}"):
        prefix = f"layers/{i}/"
        paths = [path for path in chosen if path.startswith(prefix)]
        layer = jax.device_put(layer)
        moments = _moments(stream, layer, kind, prefix, paths) if stream else {}
        own = {path.removeprefix(prefix): chosen[path] for path in paths}
        for name in own:
            new, report = _matrix(prefix + name, jnp.asarray(own[name]), sparsity, moments)
            own[name], reports = new, [*reports, report]
        if stream is not None:
            stream.advance(tree.replace(layer, own), kind)
        for name, new in own.items():
            host = isinstance(chosen[prefix + name], np.ndarray)
            found[prefix + name] = np.asarray(new) if host else new
    return tree.replace(params, found), reports


def _moments(
    stream: Stream, layer: Any, kind: Any, prefix: str, paths: Sequence[str]
) -> dict[str, jax.Array]:
    """E[x xᵀ] of the input of each weight, [K, K] or [E, K, K], by path."""
    taps = {path: leader_tap(path.removeprefix(prefix).removesuffix("/weight")) for path in paths}
    wants = dict.fromkeys(taps.values(), Wanted(second_moment=True))
    found = stream.observe(layer, kind, wants)
    moments = {}
    for path, tap in taps.items():
        check(path, found[tap])
        empty = np.flatnonzero(np.asarray(found[tap].count) == 0)
        if len(empty):
            raise UserError(
                f"expert {empty[0]} of {path} saw no token, so nothing says which of its weights "
                "matter; use more text"
            )
        moment = found[tap].second_moment
        assert moment is not None
        moments[path] = moment
    return moments


def _matrix(
    path: str, weight: jax.Array, sparsity: Sparsity, moments: Mapping[str, jax.Array]
) -> tuple[jax.Array, SparseReport]:
    """One weight with its zeros, in its dtype, and its row."""
    moment = moments.get(path)
    of_one = partial(_sparse, sparsity=sparsity)
    if weight.ndim == 3:
        count = range(weight.shape[0])
        each = [of_one(weight[e], None if moment is None else moment[e]) for e in count]
        found = jnp.stack([one for one, _ in each])
        used = max((damping for _, damping in each if damping is not None), default=None)
        bad = any(damping is not None and damping != damping for _, damping in each)
    else:
        found, used = of_one(weight, moment)
        bad = used is not None and used != used
    if bad or not bool(jnp.all(jnp.isfinite(found))):
        raise UserError(
            f"{path}: no weights can be found, since its input's second moment has no Cholesky "
            "factor; use more text or more damping"
        )
    found = found.astype(weight.dtype)
    error = None if moment is None else float(_output_error(weight, found, moment))
    return found, SparseReport(path, float(jnp.mean(found == 0)), error, used)


def _sparse(
    weight: jax.Array, moment: jax.Array | None, sparsity: Sparsity
) -> tuple[jax.Array, float | None]:
    """(float32 [N, K], damping used) of one matrix."""
    pattern, used = sparsity.pattern, None
    if sparsity.method == "magnitude" or moment is None:
        mask = magnitude_mask(weight, pattern)
    elif sparsity.method == "wanda":
        mask = wanda_mask(weight, moment, pattern)
    else:
        found, mask, damping = sparsegpt(weight, moment, pattern, damping=sparsity.damping)
        used = float(damping)
        if sparsity.update == "obs":
            return found, used
    if sparsity.update == "exact" and moment is not None:
        damping = sparsity.damping if used is None else used
        return refit(weight, moment, mask, damping), damping
    return jnp.where(mask, weight.astype(jnp.float32), 0.0), used


@jax.jit
def _output_error(weight: jax.Array, found: jax.Array, moment: jax.Array) -> jax.Array:
    """sqrt(tr(Δ H Δᵀ) / tr(W H Wᵀ)), over all experts together."""

    def energy(matrix: jax.Array) -> jax.Array:
        matrix = matrix.astype(jnp.float32)
        return jnp.sum(jnp.matmul(matrix, moment, precision="highest") * matrix)

    lost = energy(weight.astype(jnp.float32) - found.astype(jnp.float32))
    return jnp.sqrt(jnp.maximum(lost, 0.0) / energy(weight))
