"""The command that has a model write its own training text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

import jaxopt_models as jom
from jaxopt_models import report
from jaxopt_models.cli_options import JsonOption, ModelArg
from jaxopt_models.files import write_json


def corpus(
    model: ModelArg,
    out: Annotated[Path, typer.Option("--out", help="File to write, a .jsonl.")],
    count: Annotated[
        int | None, typer.Option(help="Documents to write; of given prompts, all by default.")
    ] = None,
    kind: Annotated[
        Literal["conversations", "texts"], typer.Option(help="What the model writes.")
    ] = "conversations",
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts to answer: .txt (one a line), .jsonl, .json, .parquet or hf:."),
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="Of a prompt, at most.")] = 128,
    max_answer_tokens: Annotated[int, typer.Option(help="Of an answer or text, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Documents at a time; hundreds on a GPU.")
    ] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="Of activations; else the checkpoint's. GPUs: bfloat16.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Have a model write text to train on: conversations, texts, or answers to prompts."""
    from jaxopt_models.corpus import write_corpus
    from jaxopt_models.corpus_requests import read_prompts

    given = read_prompts(prompts) if prompts else None
    with report.working(f"loading {model}"):
        loaded = jom.load(model, dtype=dtype)
    result = write_corpus(
        loaded,
        out,
        count,
        kind=kind,
        prompts=given,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch,
        progress=report.progress,
    )
    if json:
        write_json(json, asdict(result))
    dropped = ", ".join(f"{times} {reason}" for reason, times in result.dropped.items())
    report.out.print(
        f"{result.documents} {kind}, {result.tokens} tokens, {result.tokens_per_second:.0f} "
        f"tokens/s, {result.cut} cut; dropped: {dropped or 'none'} -> {out}",
        soft_wrap=True,
    )
