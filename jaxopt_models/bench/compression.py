"""What a model is worth at each step of becoming small: cut, taught, quantized, taught again.

    original   as it came
    pruned     what a search leaves of it
    distilled  that, taught by the original
    quantized  that, under a recipe
    qad        that, trained under the recipe and taught by the original

Each step begins with what the one before left, and is made by the code of `prune`, `train distill`
and `train qad`, as a checkpoint or a run of its own. What is finished is not made again; what was
cut off goes on.

Figures of quality are in float32, matrix products included, on windows of another text, as
`evaluate` does. Sizes and times are of what is served: in bfloat16 where it is not quantized, laid
out for the device. Times are those of the decoding loop, see `decode_time`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxopt_models.bench.compression_results import row_line
from jaxopt_models.bench.decode import FEW, check_steps
from jaxopt_models.bench.result_rows import ResultRows
from jaxopt_models.bench.trained import exact_measurement, told_by_name, training_protocol
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import read_metadata
from jaxopt_models.decode_time import decode_seconds
from jaxopt_models.errors import UserError
from jaxopt_models.inference import for_device
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.checkpoint import prune_checkpoint
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import cost_of
from jaxopt_models.settings import first_difference
from jaxopt_models.train.leaves import cast
from jaxopt_models.train.rows import training_rows
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.student import finished, student_of

STAGES = ("original", "pruned", "distilled", "quantized", "qad")
_SERVED = "bfloat16"


def bench_compression(
    plan: PruneSettings,
    distill: RunSettings,
    qad: RunSettings,
    folder: Path,
    *,
    batch: int = 1,
    context: int = 1024,
    steps: int = 136,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prunes a model, teaches it, quantizes it and trains it under quantization.

    Args:
      plan: how to prune. Its evaluation text is reported on in the checkpoint alone.
      distill: who is the original, and how it teaches what is left of it.
      qad: how it teaches that under a recipe; of the same model. Figures are measured as its
        evaluation says. Students of both are what the step before left, whatever they name.
      folder: keeps what is made: pruned, a checkpoint; distilled and qad, runs of `train`.
      batch: rows that are decoded together.
      context: positions of the cache when it is timed, the last of which are decoded.
      steps: of the longer loop that is timed, more than 8 and at most the context.
      out: .json file that is rewritten after each row. One that is there is gone on with.
      say: takes a line for each row.
      progress: wraps loops.

    Returns:
      What `ResultRows.document` says: the protocol, and a row `{number, stage, params, bytes,
      share, perplexity, kl, top1_agreement, batch, context, ms_per_step, tokens_per_s, minutes}`
      for each of `STAGES`. `share` is of the original's bytes, KL is to the original in nats a
      token, `minutes` is what the last process took to make it.

    Raises:
      UserError: for settings that do not go together, a model or text that cannot be read, a folder
        or an `out` of other settings, or a run that is lost.
    """
    _check(distill, qad, context, steps)
    original = load(distill.model)
    decoding = {"batch": batch, "context": context, "steps": steps}
    protocol = _protocol(plan, distill, qad, original) | {"decoding": decoding}
    results = ResultRows(out, protocol, ("number",))
    missing = [number for number in range(len(STAGES)) if not results.has(number)]
    if not missing:
        return results.document()
    measure = exact_measurement(original, qad)
    stages = _stages(original, plan, distill, qad, Path(folder).expanduser(), progress)
    for number in range(missing[-1] + 1):
        begun = time.perf_counter()
        stage, model = next(stages)
        minutes = (time.perf_counter() - begun) / 60
        if number not in missing:
            continue
        row: dict[str, Any] = {"number": number, "stage": stage, "minutes": minutes}
        row |= {"params": cost_of(model.params, "parameters"), "bytes": _size(model)}
        row |= {"share": row["bytes"] / _size(original)}
        row |= measure(model.config, model.params)
        seconds = _decoding(model, batch, context, (FEW, steps))
        row |= {"batch": batch, "context": context}
        row |= {"ms_per_step": seconds * 1e3, "tokens_per_s": batch / seconds}
        results.add(row)
        say(row_line(row))
    return results.document()


def _stages(
    original: Model,
    plan: PruneSettings,
    distill: RunSettings,
    qad: RunSettings,
    folder: Path,
    progress: Progress,
) -> Iterator[tuple[str, Model]]:
    """(name, model) of each of `STAGES`, made when it is asked for."""
    yield "original", original
    yield "pruned", _pruned(original, plan, folder / "pruned", progress)
    taught = distill.model_copy(update={"student": str(folder / "pruned")})
    yield "distilled", _trained("distill", taught, folder / "distilled", progress)
    under = qad.model_copy(update={"student": str(folder / "distilled" / "model")})
    yield "quantized", _quantized(original, under, progress)
    yield "qad", _trained("qad", under, folder / "qad", progress)


def _pruned(original: Model, plan: PruneSettings, out: Path, progress: Progress) -> Model:
    if not out.exists():
        prune_checkpoint(original, plan, out, progress)
    made_by, wanted = read_metadata(out)["recipe"], plan.model_dump(mode="json")
    name = first_difference(made_by or {}, wanted)
    if name is not None:
        raise UserError(
            f"{out} was pruned with another {name}; go on with the same plan, or choose another "
            "folder"
        )
    return load(out)


def _quantized(original: Model, under: RunSettings, progress: Progress) -> Model:
    """The student as QAD begins with it."""
    student = student_of("qad", under, original, progress)
    return replace(student, params=finished(student.params, original.params, under))


def _trained(technique: Technique, settings: RunSettings, out: Path, progress: Progress) -> Model:
    return train(technique, settings, out, resume=out.exists(), progress=progress).model


def _served(model: Model) -> Model:
    """In the dtype that it is run in."""
    config = replace(model.config, dtype=_SERVED)
    return replace(model, config=config, params=cast(model.params, _SERVED))


def _size(model: Model) -> int:
    return cost_of(_served(model).params, "bytes")


def _decoding(model: Model, batch: int, context: int, steps: tuple[int, int]) -> float:
    """Seconds of a step."""
    served = _served(model)
    params = for_device(served.config, served.params)
    return decode_seconds(served.config, params, batch, context, steps)


def _check(distill: RunSettings, qad: RunSettings, context: int, steps: int) -> None:
    if distill.model != qad.model:
        raise UserError(
            f"distill is taught by {distill.model} and qad by {qad.model}; name one original"
        )
    distill.model_copy(update={"student": "pruned"}).check("distill")
    qad.check("qad")
    check_steps(context, steps)


def _protocol(
    plan: PruneSettings, distill: RunSettings, qad: RunSettings, original: Model
) -> dict[str, Any]:
    runs = {"distill": distill, "qad": qad}
    protocols = {
        name: training_protocol(settings, training_rows(original, settings))
        | {"seed": settings.seed}
        for name, settings in runs.items()
    }
    told = told_by_name(plan.model_dump(mode="json"))
    return protocols | {"plan": told, "recipe": qad.recipe}
