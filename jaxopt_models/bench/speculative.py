"""What guesses are worth on one's own prompts: tokens a pass, tokens a second, and what to choose.

Plain generation of the same prompts in the same batches is timed first; a row of figures is a
drafter at a batch size and temperature. Times are of whole calls, the prompts' pass included and
compilation not.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_models.bench.greedy import differences
from jaxopt_models.bench.peer import circumstances
from jaxopt_models.bench.quality_results import device_file
from jaxopt_models.corpus_requests import read_prompts
from jaxopt_models.data import tokenizer_of
from jaxopt_models.decoding import ENDLESS, decode_loop, new_tokens, start
from jaxopt_models.documents import templated
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import Drafter, begin, speculate
from jaxopt_models.speculative.verify import VerificationName, verification_of

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Setting:
    """How prompts are continued.

    Attributes:
      batch: prompts at a time.
      temperature: 0 is greedy.
      new_tokens: of a prompt at most; an end-of-sequence id ends it before.
      verification: which guesses are kept, see `speculative.verify`.
    """

    batch: int = 1
    temperature: float = 0.0
    new_tokens: int = 128
    verification: VerificationName = "coupled"

    @property
    def same_tokens(self) -> bool:
        """Whether they are to be those of plain generation."""
        return self.verification == "coupled" or self.temperature == 0


@dataclass(frozen=True)
class Run:
    """New tokens of each prompt; passes of the model in which it was alive, and in how many of them
    each guess was accepted, int [P] and [P, K]; passes that its batch took, int [P]; seconds, and
    those of them behind the prompts' passes."""

    tokens: list[list[int]]
    passes: np.ndarray
    accepted: np.ndarray
    rounds: np.ndarray
    seconds: float
    behind_prompts: float

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def seconds_per_pass(self) -> float:
        """Of a row, the prompt's aside: those of a batch count for each."""
        return self.behind_prompts / max(int(self.rounds.sum()), 1)


def bench_speculative(
    config: ModelConfig,
    params: Any,
    prompts: Prompts,
    drafters: Mapping[str, Drafter],
    settings: Sequence[Setting] = (Setting(),),
    *,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures each drafter in each setting beside plain generation.

    Args:
      config, params: the model that decides, as it is to be served.
      prompts: token ids; a whole number of batches is taken, at least one.
      drafters: by a name that says what differs, such as "ngram, K = 4".
      settings: see there.
      out: a .json file or a directory for `speculative_<device>.json`, rewritten after each row.
      say: takes a line for each row and for each choice.

    Returns:
      `{rows, choices, device, versions, date}`. A row is `{drafter, K, tree, verification,
      temperature, batch, prompts, new_tokens, acceptance_length, accepted, straggling, pass_cost,
      plain_ms, tokens_per_s, plain_tokens_per_s, ratio, mismatches, near_ties}`: levels of a tree,
      None of a chain; tokens that a pass gives, on average over all; of each place of a guess, the
      share of passes that accept it and all before; the share of a batch's passes in which a row
      was done already; time of a pass in passes of plain generation, which `speculative.Adaptive`
      takes as its costs, and milliseconds of such a plain one; prompts whose tokens are not those
      of plain generation, None where they need not be; and how many of these first differ where
      bfloat16 itself cannot tell two tokens apart (`greedy.Difference`; None where tokens are
      sampled or computed in float32). `choices` has for each setting the fastest, "off" included,
      and in how many prompts plain generation differs from that in the first batch size of the same
      temperature: what rounding alone does.

    Raises:
      UserError: for fewer prompts than a batch, or a drafter that does not go with the model.
    """
    for drafter, setting in product(drafters.values(), settings):
        drafter.check(config)
        verification_of(setting.verification).check(drafter)
    result: dict[str, Any] = {"rows": [], "choices": []} | circumstances({})
    file = out and device_file(out, "speculative")
    firsts: dict[Setting, Run] = {}  # by the setting without its batch size
    for setting in settings:
        if len(prompts) < setting.batch:
            raise UserError(
                f"a batch of {setting.batch} needs as many prompts, and there are {len(prompts)}; "
                "give more, or a smaller batch"
            )
        taken = prompts[: len(prompts) // setting.batch * setting.batch]
        plain = run_all(config, params, taken, None, setting)
        speeds = {"off": plain.tokens_per_s}
        for name, drafter in drafters.items():
            run = run_all(config, params, taken, drafter, setting)
            row = _row(name, drafter, setting, run, plain)
            row |= {"near_ties": _near_ties(config, params, taken, setting, plain, run)}
            speeds[name] = run.tokens_per_s
            result["rows"].append(row)
            say(row_line(row))
            if file:
                write_json(file, result)
        best = max(speeds, key=lambda name: speeds[name])
        first = firsts.setdefault(replace(setting, batch=1), plain)
        choice = {"batch": setting.batch, "temperature": setting.temperature, "choice": best}
        shared = min(len(first.tokens), len(plain.tokens))  # but those that fill no batch
        differ = _mismatches(first.tokens[:shared], plain.tokens[:shared])
        result["choices"].append(choice | {"plain_differs": differ})
        say(f"batch {setting.batch}, temperature {setting.temperature:g}: choose {best}")
    if file:
        write_json(file, result)
    return result


def prompt_ids(model: Model, source: str) -> list[list[int]]:
    """Token ids of the prompts of a source, as `read_prompts` takes it, in the model's chat
    template; without one, of each prompt's last message as it is.

    Raises:
      UserError: it cannot be read, holds no prompt, or the template refuses one.
    """
    tokenizer = tokenizer_of(model)
    found = read_prompts(source)
    if not found:
        raise UserError(f"{source} holds no prompts")
    if not tokenizer.chat_template:
        return [tokenizer.encode(messages[-1]["content"]) for messages in found]
    return [templated(tokenizer, one, add_generation_prompt=True).tolist() for one in found]


def row_line(row: Mapping[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    differ = f"{row['mismatches']} of {row['prompts']} answers differ"
    return (
        f"batch {row['batch']}, temperature {row['temperature']:g}, {row['drafter']}: "
        f"{row['acceptance_length']:.2f} tokens a pass, {row['tokens_per_s']:,.0f} tokens/s, "
        f"{row['ratio']:.2f} x plain; "
        + (differ if row["mismatches"] is not None else "answers are others of the same kind")
    )


def _row(name: str, drafter: Drafter, setting: Setting, run: Run, plain: Run) -> dict[str, Any]:
    given = sum(len(tokens) - 1 for tokens in run.tokens)  # the prompt's pass gives the first
    passes = int(run.passes.sum())
    return {
        "drafter": name,
        "K": drafter.count,
        "tree": drafter.depth if drafter.depth < drafter.count else None,
        "verification": setting.verification,
        "temperature": setting.temperature,
        "batch": setting.batch,
        "prompts": len(run.tokens),
        "new_tokens": setting.new_tokens,
        "acceptance_length": given / passes if passes else 1.0,
        "accepted": (run.accepted.sum(axis=0) / max(passes, 1)).tolist(),
        "straggling": 1.0 - passes / max(int(run.rounds.sum()), 1),
        "pass_cost": run.seconds_per_pass / plain.seconds_per_pass,
        "plain_ms": plain.seconds_per_pass * 1e3,
        "tokens_per_s": run.tokens_per_s,
        "plain_tokens_per_s": plain.tokens_per_s,
        "ratio": run.tokens_per_s / plain.tokens_per_s,
        "mismatches": _mismatches(run.tokens, plain.tokens) if setting.same_tokens else None,
    }


def _mismatches(found: Sequence[list[int]], expected: Sequence[list[int]]) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=True))


def _near_ties(
    config: ModelConfig, params: Any, prompts: Prompts, setting: Setting, plain: Run, run: Run
) -> int | None:
    if setting.temperature or config.dtype != "bfloat16":
        return None
    found = differences(config, params, prompts, plain.tokens, run.tokens)
    return sum(one.near_tie for one in found)


def run_all(
    config: ModelConfig, params: Any, prompts: Prompts, drafter: Drafter | None, setting: Setting
) -> Run:
    """All prompts, in batches with room for the longest of all; the first batch once before, so
    that what is compiled is not timed."""
    size = setting.batch
    room = max(map(len, prompts))

    def batch(first: int) -> Run:
        own = prompts[first : first + size]
        return _batch(config, params, own, first, room, drafter, setting)

    batch(0)
    batches = [batch(first) for first in range(0, len(prompts), size)]
    tokens = [row for batch in batches for row in batch.tokens]
    passes, accepted, rounds = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("passes", "accepted", "rounds")
    )
    seconds, behind = (
        sum(getattr(batch, name) for batch in batches) for name in ("seconds", "behind_prompts")
    )
    return Run(tokens, passes, accepted, rounds, seconds, behind)


def _batch(
    config: ModelConfig,
    params: Any,
    prompts: Prompts,
    first: int,
    room: int,
    drafter: Drafter | None,
    setting: Setting,
) -> Run:
    size = len(prompts)
    ids = list(range(first, first + size))
    sampler = make_sampler(size, temperature=setting.temperature, request_ids=ids)
    stops = tuple(config.eos_token_ids)
    begun = time.perf_counter()
    given = config, params, prompts, setting.new_tokens, sampler, stops
    if drafter is None:
        decode, _ = jax.block_until_ready(start(*given, room))
        ran = time.perf_counter()
        decode = jax.block_until_ready(decode_loop(config, params, decode, sampler, stops))
        end = time.perf_counter()
        passes = np.asarray(decode.length) - [len(prompt) + 1 for prompt in prompts]
        accepted = np.zeros((size, 0), np.int32)
    else:
        state = jax.block_until_ready(begin(*given, drafter, room))
        ran = time.perf_counter()
        rule = verification_of(setting.verification)
        given = state, drafter, sampler, stops, ENDLESS, rule
        state = jax.block_until_ready(speculate(config, params, *given))
        end = time.perf_counter()
        decode = state.decode
        passes, accepted = np.asarray(state.passes), np.asarray(state.accepted)
    rounds = np.full(size, passes.max())
    new = new_tokens(decode, [len(prompt) for prompt in prompts])
    return Run(new, passes, accepted, rounds, end - begun, end - ran)
