"""The command that continues a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from jaxopt_models import data, report
from jaxopt_models.cli_options import DtypeOption, ModelArg
from jaxopt_models.documents import templated
from jaxopt_models.errors import UserError
from jaxopt_models.speculative.named import as_adaptive, as_tree, load_drafter
from jaxopt_models.speculative.verify import VerificationName


def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most likely tokens kept; 0 is off.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    dtype: DtypeOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="What guesses: ngram, a trained head, or a model of the same vocabulary."
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a guess; else ngram 8, a model 4, EAGLE-3 5, MTP 3, other heads all."
        ),
    ] = None,
    draft_tree: Annotated[
        str | None,
        typer.Option(help="WIDTH,DEPTH,NODES of a tree that a head grows, such as 8,6,32."),
    ] = None,
    draft_levels: Annotated[
        str | None,
        typer.Option(help="0,1,3,7: as many of these as pay; 3:1.2 says what a pass with 3 costs."),
    ] = None,
    draft_verification: Annotated[
        VerificationName,
        typer.Option(help="coupled keeps plain generation's tokens; rejection their distribution."),
    ] = "coupled",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
) -> None:
    """Continue a prompt."""
    import jax

    import jaxopt_models as jom
    from jaxopt_models.checkpoint.tokenizer import text_as_it_comes
    from jaxopt_models.generate import Options
    from jaxopt_models.inference import for_device

    _check_guesses(draft, draft_verification, (draft_tokens, draft_tree, draft_levels))
    with report.working(f"loading {model}"):
        loaded = jom.load(model, dtype=dtype)
    tokenizer = data.tokenizer_of(loaded)
    ids = _ids(tokenizer, prompt, model, chat)
    inputs = loaded.config, for_device(loaded.config, loaded.params), [ids]
    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=jax.random.key(seed),
        verification=draft_verification,
        draft=_drafter(draft, loaded.config, draft_tokens, draft_tree, draft_levels, dtype),
    )
    if stream:
        rows = (piece[0] for piece in jom.stream(*inputs, passes=8, **options))
        for text in text_as_it_comes(tokenizer, rows):
            print(text, end="", flush=True)
        print()
        return
    with report.working("generating"):
        result = jom.generate(*inputs, **options)
    print(tokenizer.decode(result.tokens[0], skip_special_tokens=True))
    if result.acceptance_length is not None:
        per_pass = f"{result.acceptance_length[0]:.2f} tokens a pass of the model"
        report.err.print(per_pass, soft_wrap=True, highlight=False)


def _ids(tokenizer: Any, prompt: str, model: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(prompt)
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; leave out --chat")
    turn = [{"role": "user", "content": prompt}]
    return templated(tokenizer, turn, add_generation_prompt=True).tolist()


def _check_guesses(draft: str | None, verification: str, shapes: Sequence[Any]) -> None:
    """Raises UserError for options that do not go together: what of guesses nobody makes, and more
    than one of --draft-tokens, --draft-tree and --draft-levels."""
    if draft is None and verification != "coupled":
        raise UserError("--draft-verification is of guesses; say whose with --draft")
    given = [shape for shape in shapes if shape is not None]
    if given and draft is None:
        raise UserError(
            "--draft-tokens, --draft-tree and --draft-levels are of guesses; say whose with --draft"
        )
    if len(given) > 1:
        raise UserError("choose one of --draft-tokens, --draft-tree and --draft-levels")


def _drafter(
    draft: str | None,
    target: Any,
    count: int | None,
    tree: str | None,
    levels: str | None,
    dtype: str | None,
) -> Any:
    if draft is None:
        return None
    with report.working(f"loading {draft}"):
        drafter = load_drafter(draft, target, dtype)
    if tree is not None:
        return as_tree(drafter, tree)
    if levels is not None:
        return as_adaptive(drafter, levels)
    return drafter if count is None else replace(drafter, count=count)
