"""`jaxopt-models bench speculative`: what guesses are worth on one's own prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxopt_models import report
from jaxopt_models.cli_options import DtypeOption, ModelArg, ShapeOption
from jaxopt_models.errors import UserError
from jaxopt_models.speculative import DFlash, Drafter, Medusa
from jaxopt_models.speculative.named import Head, as_adaptive, as_tree, load_drafter
from jaxopt_models.speculative.verify import VerificationName


def bench_speculative(
    model: ModelArg,
    prompts: Annotated[
        str, typer.Option(help="A .txt with one a line, or .jsonl, .json, .parquet or hf:.")
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(help="ngram, a head or a smaller model; may be repeated; else ngram."),
    ] = None,
    draft_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a guess; may be repeated; else 4 and 8.")
    ] = None,
    draft_tree: Annotated[
        list[str] | None,
        typer.Option(help="WIDTH,DEPTH,NODES, that heads grow, too; may be repeated."),
    ] = None,
    draft_levels: Annotated[
        list[str] | None,
        typer.Option(help="0,1,3,7: as many of these as pay, too; may be repeated."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts at a time; may be repeated; else 1.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, help="May be repeated; else 0, which is greedy.")
    ] = None,
    draft_verification: Annotated[
        VerificationName, typer.Option(help="coupled, or rejection, which samples other tokens.")
    ] = "coupled",
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt at most.")] = 128,
    count: Annotated[
        int | None, typer.Option(min=1, help="First prompts that are taken; else all.")
    ] = None,
    dtype: DtypeOption = None,
    out: Annotated[
        Path | None, typer.Option(help=".json file, or directory for speculative_<device>.json.")
    ] = None,
) -> None:
    """Time guessing beside plain generation on prompts of yours, and say what to choose.

    Prompts are put into the chat template, if the model has one.
    """
    import jaxopt_models as jom
    from jaxopt_models.bench import speculative
    from jaxopt_models.inference import for_device

    loaded = jom.load(model, dtype=dtype)
    ids = speculative.prompt_ids(loaded, prompts)[:count]
    named = {name: load_drafter(name, loaded.config, dtype) for name in draft or ["ngram"]}
    drafters = _drafters(named, draft_tokens, draft_tree or (), draft_levels or ())
    settings = [
        speculative.Setting(size, warmth, new_tokens, draft_verification)
        for size, warmth in product(batch or [1], temperature or [0.0])
    ]
    speculative.bench_speculative(
        loaded.config,
        for_device(loaded.config, loaded.params),
        ids,
        drafters,
        settings,
        out=out,
        say=report.say,
    )


def bench_pass_cost(
    model: ShapeOption = "llama-8b",
    format: Annotated[
        list[str] | None,
        typer.Option(help="bf16, int4, nvfp4, mxfp4, fp8, int8; may be repeated; else bf16."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows; may be repeated; else 1.")
    ] = None,
    draft_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a guess; may be repeated; else 7.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each row.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of each row.")] = 65,
    out: Annotated[
        Path | None, typer.Option(help=".json file, or directory for pass_cost_<device>.json.")
    ] = None,
) -> None:
    """Time a pass that checks guesses, and the guesses of a head, on random weights."""
    from jaxopt_models.bench import pass_cost

    pass_cost.bench_pass_cost(
        model,
        format or ("bf16",),
        batch or (1,),
        draft_tokens or (7,),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        out=out,
        say=report.say,
    )


def _drafters(
    named: Mapping[str, Any],
    counts: Sequence[int] | None,
    trees: Sequence[str],
    levels: Sequence[str],
) -> dict[str, Drafter]:
    """All that guess, by what tells them apart: of each its numbers of tokens, trees and levels."""
    at_once = Medusa | DFlash  # say as many tokens as they are made for, in one pass
    found: dict[str, Drafter] = {
        f"{name}, K = {tokens}": replace(drafter, count=tokens)
        for name, drafter in named.items()
        for tokens in counts or ((drafter.count,) if isinstance(drafter, at_once) else (4, 8))
    }
    heads = {name: one for name, one in named.items() if isinstance(one, Head)}
    if trees and not heads:
        raise UserError("--draft-tree is of draft heads, trained ones; give one as --draft")
    for name, head in heads.items():
        found |= {f"{name}, tree {shape}": as_tree(head, shape) for shape in trees}
    for name, drafter in named.items():
        found |= {f"{name}, levels {each}": as_adaptive(drafter, each) for each in levels}
    return found
