"""The streaming pass: one layer's weights and one layer's activations at a time.

Only the residual stream of the calibration text is kept between layers, [tokens, D], on the host.
Weights may be host arrays, memory-mapped files among them: a layer is put onto the device when its
turn comes. Each kind of layer is compiled once.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_models import tree
from jaxopt_models.data import token_arrays
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, final_norm, positions_of
from jaxopt_models.progress import Progress, silent
from jaxopt_models.statistics import InputStatistics, Wanted, empty, finished, update

Wants = Mapping[str, Wanted]
Pairs = tuple[tuple[str, Wanted], ...]


class Stream:
    """The residual stream of the calibration text at the input of one layer.

    Args:
      config: the architecture.
      params: anything with "embed_tokens".
      batches: int32 [B, T] token arrays.
      mesh: if given, the rows of each batch are spread over its axis "data" and stay on the
        devices; else they wait on the host.

    Raises:
      UserError: without batches, for token ids outside the vocabulary, for a mesh without an axis
        "data", and for weights that are bound to other devices than those of the mesh.
    """

    def __init__(
        self, config: ModelConfig, params: Any, batches: Iterable[Any], mesh: Mesh | None = None
    ):
        tokens = token_arrays(config, batches)
        if not tokens:
            raise UserError("calibration needs text: no batches were given")
        if mesh is not None:
            _check_mesh(mesh, params)
        self.config = config
        self._mesh = mesh
        table = {"embed_tokens": jax.device_put(params["embed_tokens"])}
        self.values = [self._kept(embed_tokens(config, table, batch)) for batch in tokens]

    def __len__(self) -> int:
        return len(self.values)

    def fork(self) -> "Stream":
        """Another stream that stays where this one is now."""
        twin = copy.copy(self)
        twin.values = list(self.values)
        return twin

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(x.shape[0] * x.shape[1] for x in self.values)

    def observe(
        self,
        layer: Any,
        kind: Any,
        wants: Wants,
        advance: bool = False,
        scales: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, InputStatistics]:
        """Runs a layer over the text for the statistics of its taps.

        Args:
          layer: its weights.
          kind: its kind of attention.
          wants: what to remember, by tap name relative to the layer ("self_attn/q_proj/input").
          advance: whether to move on to the layer's output.
          scales: [K] by tap, multiplies an input before it is looked at.

        Returns:
          Statistics by tap name.
        """
        wanted = tuple(sorted(wants.items(), key=lambda item: item[0]))
        totals = None
        for i, x in enumerate(self.values):
            if totals is None:
                totals = _no_totals(self.config, layer, x, kind, wanted, len(self.values))
            number = jnp.int32(i)
            out, totals = _observe(
                self.config,
                layer,
                x,
                totals,
                number,
                dict(scales or {}),
                batches=len(self.values),
                kind=kind,
                wanted=wanted,
                advance=advance,
            )
            if advance:
                self.values[i] = self._kept(out)
        return {tap: finished(total) for tap, total in (totals or {}).items()}

    def reduce(
        self,
        layer: Any,
        kind: Any,
        taps: frozenset[str],
        measure: Callable[..., Any],
        merge: Callable[[Any, Any], Any] | None = None,
        beside: Sequence[Any] | None = None,
        advance: bool = False,
    ) -> Any:
        """Any other statistic: `measure` of a batch's taps, merged over batches.

        Args:
          layer, kind: of which layer.
          taps: names relative to the layer.
          measure: of the taps by name; it is compiled with the layer, so pass the same function for
            all layers of a kind.
          merge: of two results; None adds them up.
          beside: a second argument of `measure` for each batch, if it takes one.
          advance: whether to move on to the layer's output.
        """
        total, merge = None, merge or partial(jax.tree.map, jnp.add)
        for i, x in enumerate(self.values):
            more = () if beside is None else (beside[i],)
            out, part = _measure(self.config, layer, x, kind, taps, measure, advance, *more)
            total = part if total is None else merge(total, part)
            if advance:
                self.values[i] = self._kept(out)
        return total

    def advance(self, layer: Any, kind: Any) -> None:
        """Moves on to the output of a layer."""
        for i, x in enumerate(self.values):
            self.values[i] = self._kept(_run(self.config, layer, x, kind))

    def outputs(self, layer: Any, kind: Any) -> list[Any]:
        """The output of a layer on each batch, without moving on."""
        return [self._kept(_run(self.config, layer, x, kind)) for x in self.values]

    def _kept(self, x: jax.Array) -> Any:
        if self._mesh is None:
            return np.asarray(x)
        even = x.shape[0] % self._mesh.shape["data"] == 0
        spec = PartitionSpec("data") if even else PartitionSpec()
        return jax.device_put(x, NamedSharding(self._mesh, spec))


def calibrate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    wants: Mapping[str, Wanted],
    progress: Progress = silent,
    mesh: Mesh | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of linears, from one pass over the unquantized model.

    Args:
      config: the architecture.
      params: the model; leaves may be host arrays.
      batches: int32 [B, T] token arrays.
      wants: what to remember of the input of each weight, by weight path, such as
        "layers/3/self_attn/q_proj/weight" or "lm_head/weight".
      progress: wraps the loop over layers, as `tqdm` would.
      mesh: spreads the text over its "data" axis.

    Returns:
      `InputStatistics` by weight path.

    Raises:
      UserError: without batches, for token ids outside the vocabulary, for a path that no
        activation reaches, and for inputs that are not finite or always zero.
    """
    stream = Stream(config, params, batches, mesh)
    found: dict[str, InputStatistics] = {}
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, "calibrating"):
        prefix = f"layers/{i}/"
        inside = {
            tap_of(p.removeprefix(prefix)): w for p, w in wants.items() if p.startswith(prefix)
        }
        for tap, statistics in stream.observe(jax.device_put(layer), kind, inside, True).items():
            found[prefix + tap.removesuffix("input") + "weight"] = statistics
    if "lm_head/weight" in wants:
        found["lm_head/weight"] = head_statistics(stream, params, wants["lm_head/weight"])
    missing = sorted(wants.keys() - found.keys())
    if missing:
        raise UserError(f"no activation reaches {missing[0]}; it cannot be calibrated")
    for path, statistics in found.items():
        check(path, statistics)
    return found


def head_statistics(stream: Stream, params: Any, wanted: Wanted) -> InputStatistics:
    """Statistics of the output head's input, when the stream is past the last layer."""
    width, batches = stream.values[0].shape[-1], len(stream.values)
    totals = empty(wanted, width, batches)
    for i, x in enumerate(stream.values):
        normed = final_norm(stream.config, params, jnp.asarray(x))
        totals = update(totals, normed, jnp.int32(i), batches)
    return finished(totals)


def tap_of(weight: str) -> str:
    """Name of the tap in front of a weight."""
    return weight.removesuffix("weight") + "input"


def check(path: str, statistics: InputStatistics) -> None:
    """Refuses what no scale can be made of.

    Raises:
      UserError: if the input of the weight at `path` is not finite, or zero on the whole text.
    """
    amax = float(jnp.max(statistics.amax))
    if not np.isfinite(amax):
        raise UserError(f"the input of {path} is not finite on the calibration text")
    if amax == 0:
        raise UserError(
            f"the input of {path} is zero on all calibration text; use more or other text"
        )


def _check_mesh(mesh: Mesh, params: Any) -> None:
    if "data" not in mesh.shape:
        raise UserError(
            "calibration text is spread over the axis 'data', and the mesh has "
            f"{tuple(mesh.shape)}; name an axis of it 'data'"
        )
    devices = set(mesh.devices.flat)
    for path, leaf in tree.leaves_with_paths(params):
        for array in jax.tree.leaves(leaf):
            if isinstance(array, jax.Array) and array.committed and array.devices() != devices:
                raise UserError(
                    f"{path} is bound to other devices than those of the calibration mesh; load "
                    "the model onto that mesh, or onto the host"
                )


def _no_totals(
    config: ModelConfig, layer: Any, x: Any, kind: Any, wanted: Pairs, batches: int
) -> dict[str, InputStatistics]:
    """Empty totals for each wanted tap, from the shapes that the layer's taps will have."""
    names = frozenset(tap for tap, _ in wanted)
    x = jnp.asarray(x)
    shapes = jax.eval_shape(
        lambda layer, x: block(config, layer, x, positions_of(x), kind=kind, wanted=names)[2],
        layer,
        x,
    )
    totals = {}
    for tap, how in wanted:
        if tap not in shapes:
            weight = tap.removesuffix("input") + "weight"
            raise UserError(f"no activation reaches {weight}; it cannot be calibrated")
        experts = layer["mlp"]["router"]["weight"].shape[0] if "/experts/" in tap else 0
        totals[tap] = empty(how, shapes[tap].shape[-1], batches, experts)
    return totals


@partial(
    jax.jit,
    static_argnames=("config", "batches", "kind", "wanted", "advance"),
    donate_argnames="totals",
)
def _observe(
    config: ModelConfig,
    layer: Any,
    x: jax.Array,
    totals: dict[str, InputStatistics],
    index: jax.Array,
    scales: dict[str, jax.Array],
    *,
    batches: int,
    kind: Any,
    wanted: Pairs,
    advance: bool,
) -> tuple[jax.Array | None, dict[str, InputStatistics]]:
    """One layer forward on one batch; taps are reduced before anything is stored."""
    names = frozenset(tap for tap, _ in wanted)
    grouped = any("/experts/" in tap for tap in names)
    names |= {"mlp/experts/group_sizes"} if grouped else set()
    out, _, taps = block(config, layer, x, positions_of(x), kind=kind, wanted=names)
    sizes = taps.get("mlp/experts/group_sizes")
    new = {}
    for tap, how in wanted:
        rows = taps[tap]
        if tap in scales:
            scale = scales[tap].astype(rows.dtype)  # as a leaf's pre_scale is applied
            rows = rows * scale.reshape((1,) * (rows.ndim - 1) + (-1,))
        if how.rotate:
            rows = hadamard(rows, how.rotate)
        groups = sizes if "/experts/" in tap else None
        new[tap] = update(totals[tap], rows, index, batches, groups)
    # Without the output, XLA drops the last product.
    return (out if advance else None), new


@partial(jax.jit, static_argnums=(0, 3))
def _run(config: ModelConfig, layer: Any, x: jax.Array, kind: Any) -> jax.Array:
    return block(config, layer, x, positions_of(x), kind=kind)[0]


@partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def _measure(
    config: ModelConfig,
    layer: Any,
    x: jax.Array,
    kind: Any,
    taps: frozenset[str],
    measure: Callable[..., Any],
    advance: bool,
    *beside: Any,
) -> tuple[jax.Array | None, Any]:
    out, _, found = block(config, layer, x, positions_of(x), kind=kind, wanted=taps)
    return (out if advance else None), measure(found, *beside)
