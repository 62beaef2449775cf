"""How fast models are trained, beside plain bfloat16 training and beside the devices' peak rate.

    bf16         next tokens, masters in float32, products in bfloat16, AdamW
    qat_FORMAT   the same with the decoder's matrices rounded to a format
    qad_FORMAT   that, for the divergence from a teacher of the same shape
    distill      unquantized, for the divergence from a teacher of the same shape

Weights and text are random, of a published shape. What a device holds, with N weights, in bytes:

    16 N    masters, two moments, gradients          2 N    weights as they are multiplied
    2 N     gradients before they are widened        2 N    the teacher
    L · rows · length · 2 (3 D + 2 H d + 2 G d + 2 F)       with remat "products"

and about 4 GiB of logits: 45 GB for 8 x 2048 tokens of a Llama of 1.2 billion weights.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxopt_models import numerics, tree
from jaxopt_models.bench.decode import MODELS
from jaxopt_models.bench.quality_results import device_file
from jaxopt_models.bench.training_results import TrainingResults, row_line
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.formats import resolve
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import Remat, init
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.sharding_rules import batch_spec, rows_spec
from jaxopt_models.train import flops
from jaxopt_models.train.leaves import computed, looped
from jaxopt_models.train.objectives import QAD, QAT, next_token_loss
from jaxopt_models.train.step import TrainState, make_train_step, start

MODES = ("bf16", "qat_nvfp4", "qat_int4", "qad_nvfp4", "distill")
_DTYPE = jnp.dtype(jnp.bfloat16)
_WARM = 2  # steps before those that are timed


@dataclass(frozen=True)
class Setting:
    """What is trained how.

    Attributes:
      model: a key of `bench.decode.MODELS`.
      batch: rows of a part on each device.
      length: tokens of a row.
      parts: of a step, whose gradients are accumulated.
      remat: see `transformer.Remat`.
      steps: that are timed.
      scan_layers: whether layers run in a loop, or each is compiled; see `repeated`.
    """

    model: str = "llama-1b"
    batch: int = 8
    length: int = 2048
    parts: int = 4
    remat: Remat = "products"
    steps: int = 10
    scan_layers: bool = True

    @property
    def config(self) -> ModelConfig:
        return replace(ModelConfig.from_hf(MODELS[self.model]), dtype=_DTYPE.name)


def bench_training(
    setting: Setting = Setting(),
    modes: Sequence[str] = MODES,
    gpus: Sequence[int] = (1,),
    *,
    limit: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times steps of training, a mode and a number of devices at a time.

    Args:
      setting: see there.
      modes: of those above; bf16 first gives the others their baseline.
      gpus: numbers of devices, the first ones of those there are; each holds all weights and has
        rows of its own.
      limit: seconds after which nothing is begun that might not end in time.
      out: a .json file or a directory for `training_<device>.json`, gone on with if it is there,
        rewritten after each row.
      say: is told each row.

    Returns:
      `{rows, device, versions, date}`, see `training_results`.

    Raises:
      UserError: for an unknown model or mode, or more devices than there are; and, when all others
        are measured and saved, for what failed.
    """
    _check(setting, modes, gpus)
    begun, longest, failed = time.monotonic(), 0.0, []
    results = TrainingResults(out and device_file(out, "training"))
    for count, mode in product(gpus, modes):
        start = time.monotonic()
        if limit is not None and start - begun + longest > limit:
            say(f"the limit is reached before {mode} on {count}; finished rows are kept")
            break
        try:
            say(row_line(results.add(_measured(setting, mode, count))))
        except RuntimeError as error:  # of which JAX's and cuDNN's are
            failed.append(_failure(setting, mode, count, error))
            say(failed[-1])
        longest = max(longest, time.monotonic() - start)
        gc.collect()  # before the next weights are made
    if failed:
        raise UserError("; ".join(failed))
    return results.document()


def _failure(setting: Setting, mode: str, gpus: int, error: RuntimeError) -> str:
    """What went wrong, without the error, whose frames hold weights."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"{mode} on {gpus} with {setting.batch} x {setting.length} tokens a part and remat "
            f"{setting.remat} does not fit in memory: choose a smaller --batch, or --remat layers"
        )
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{mode} on {gpus} failed: {lines[0]}"


def _measured(setting: Setting, mode: str, gpus: int) -> dict[str, Any]:
    found = _timed(setting, mode, gpus)
    tokens = gpus * setting.parts * setting.batch * setting.length
    least = flops.least_seconds(tokens * found.flops, jax.devices()[:gpus])
    names = ("model", "batch", "length", "parts", "remat", "scan_layers")
    return {name: getattr(setting, name) for name in names} | {
        "mode": mode,
        "gpus": gpus,
        "ms_per_step": found.seconds * 1e3,
        "tokens_per_s": tokens / found.seconds,
        "mfu": None if least is None else least / found.seconds,
        "teacher_flops": found.teacher_flops,
        "bytes": found.bytes,
        "compile_s": found.compile_seconds,
    }


@dataclass(frozen=True)
class _Timed:
    """Seconds of a step; operations of a token, and which part of the student's the teacher adds;
    bytes of a device that are in use."""

    seconds: float
    compile_seconds: float
    flops: float
    teacher_flops: float | None
    bytes: int | None


def _timed(setting: Setting, mode: str, gpus: int) -> _Timed:
    config, taught = setting.config, mode.startswith("qad") or mode == "distill"
    mesh = None if gpus == 1 else make_mesh({"data": gpus, "model": 1})
    optimizer = optax.adamw(1e-5, b2=0.95)
    state = start(random_masters(config, _format(mode), mesh), optimizer)
    teacher = _made(partial(init, config, dtype=_DTYPE), 1, mesh) if taught else None
    each = flops.training_flops(config, state.params, state.trained, setting.length)
    extra = flops.forward_flops(config, teacher, setting.length) if taught else 0.0
    batch = {"tokens": _tokens(setting, gpus, mesh)}
    loss = next_token_loss(config, QAD if taught else QAT, remat=setting.remat)
    loop = partial(looped, config=config, scan_layers=setting.scan_layers)
    prepare = loop(partial(computed, dtype=config.dtype))
    teacher = teacher and loop(lambda params: params)(teacher)
    rows = None if mesh is None else NamedSharding(mesh, rows_spec(mesh))
    options = {"parts": setting.parts, "max_norm": 1.0, "prepare": prepare, "rows": rows}
    step = make_train_step(loss, optimizer, **options)
    begun = time.perf_counter()
    compiled = step.lower(state, teacher, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    compile_seconds = time.perf_counter() - begun
    seconds = _seconds_per_step(compiled, state, teacher, batch, setting.steps)
    part = extra / each if taught else None
    return _Timed(seconds, compile_seconds, each + extra, part, _bytes(compiled))


def _seconds_per_step(step: Any, state: TrainState, teacher: Any, batch: Any, steps: int) -> float:
    """The host waits for the last one only."""
    for _ in range(_WARM):
        state, _ = step(state, teacher, batch)
    jax.block_until_ready(state)
    begun = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, teacher, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - begun) / steps


def random_masters(config: ModelConfig, format: str | None, mesh: Any = None) -> Any:
    """Float32 parameters to train, the decoder's matrices under fake quantization to a format.

    Scales are dynamic, under a second level as calibration would have fixed it.
    """
    spec = None if format is None else resolve(format)

    @jax.jit
    def overall(weight: jax.Array) -> jax.Array | None:
        assert spec is not None
        return numerics.overall_amax(numerics.find_scales(weight, spec), spec)

    def leaf(path: str, weight: jax.Array) -> Any:
        if spec is None or not tree.is_decoder_matrix(path, weight):
            return weight
        return FakeTensor(weight, overall=overall(weight), spec=spec)

    return _made(lambda key: tree.map_with_path(leaf, init(config, key)), 0, mesh)


def _made(make: Callable[[jax.Array], Any], seed: int, mesh: Any) -> Any:
    """Parameters, a leaf at a time: leaves of one shape share what is compiled."""
    params = make(jax.random.key(seed))
    return params if mesh is None else shard(params, mesh)


def _tokens(setting: Setting, gpus: int, mesh: Any) -> jax.Array:
    shape = (setting.parts, gpus * setting.batch, setting.length)
    tokens = np.random.default_rng(0).integers(0, setting.config.vocab_size, shape, np.int32)
    tokens = tokens if setting.parts > 1 else tokens[0]
    if mesh is None:
        return jnp.asarray(tokens)
    spec = batch_spec(rows_spec(mesh), setting.parts)
    return jax.device_put(tokens, NamedSharding(mesh, spec))


def _bytes(compiled: Any) -> int | None:
    """Of arguments and of all that is alive beside them, on one device."""
    memory = compiled.memory_analysis()
    return memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _format(mode: str) -> str | None:
    return mode.partition("_")[2] or None


def _check(setting: Setting, modes: Sequence[str], gpus: Sequence[int]) -> None:
    for kind, names, known in (("model", [setting.model], MODELS), ("mode", modes, MODES)):
        for name in names:
            if name not in known:
                raise UserError(f"{kind} {name!r} is unknown; choose {', '.join(known)}")
    found = len(jax.devices())
    if min(gpus) < 1 or max(gpus) > found:
        raise UserError(f"{max(gpus)} devices were asked for and there are {found}")
