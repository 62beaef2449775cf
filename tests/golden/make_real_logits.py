"""Write `hf/smollm2_real.npz`, `hf/gemma3_real.npz` and `hf/tokenizers.json` from real checkpoints.

Each directory is in the Hugging Face layout: the GGUF file dequantized, rounded to bf16, with a
tokenizer built from the GGUF token list. The model runs in float32 with eager attention.

    text         the paragraph below
    tokens       int32 [1, 64], the first ids of it (Gemma: BOS and 63 ids)
    argmax       int32 [1, 64], the most likely next token at each position
    top_ids      int32 [1, 64, 64], the 64 most likely next tokens, best first
    top_logits   float32 [1, 64, 64], their logits
    logits       float32 [1, n, V], all logits of the last n positions (4, or 1 for Gemma)
    greedy       int32 [1, 16], the greedy continuation of tokens

`tokenizers.json` has for each model `bos` (the id put in front, or null), `cases` (text and its ids
without special tokens, each of which decodes to the text again) and, where the model has a chat
template, `chat` (messages, the text they render to with the generation prompt, its ids).

    torch-env/bin/python tests/golden/make_real_logits.py SMOLLM2_DIR GEMMA3_DIR

The environment is the one of `make_hf_logits.py`.
"""

# pyright: reportMissingImports=false
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "hf"
LENGTH, TOP, NEW = 64, 64, 16
PARAGRAPH = (
    "The old lighthouse stood at the end of a narrow road, and every evening the keeper climbed "
    "its 142 steps to light the lamp. In winter the wind came straight from the sea; in summer, "
    "boats from the village passed so close that he could hear people talking. He wrote down the "
    "weather, the number of ships and the colour of the sky, because somebody, he thought, might "
    "one day want to know."
)
MESSAGES = [{"role": "user", "content": "Which is larger, 9.11 or 9.8?"}]
TEXTS = [
    "Hello world",
    " leading space and trailing space ",
    "In 2024 there were 1234567 of them, 3.14 each.",
    "don't, we'll, I'M, they've",
    "two  three   four    spaces",
    "one\ntwo\n\nthree\n\n\n\nfive\n",
    "def add(a, b):\n    return a + b  # sum\n\n\tif x == 10:\r\n",
    "na\u00efve caf\u00e9, \u00c5ngstr\u00f6m, stra\u00dfe",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0, \u4e2d\u6587, "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439, \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\u00bd cup, x\u00b2, \u0663\u0664, \u2167, 10\u20ac",
    "zero\u200bwidth, no\u00a0break, \u201cquotes\u201d \u2014 dash\u2026",
    'https://example.org/a?b=1&c=%20 {"key": [1, 2, null]}',
    "<b>bold</b> <table> &amp; <unknown>",
]


def ids_of(tokenizer, text: str) -> list[int]:
    """Return the ids of `text` without BOS and EOS."""
    return tokenizer(text, add_special_tokens=False).input_ids


def real_logits(directory: Path, positions: int, bos: int | None) -> dict[str, np.ndarray]:
    """Return the arrays of one golden file, with full logits at the last `positions` positions."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = ([] if bos is None else [bos]) + ids_of(tokenizer, PARAGRAPH)
    if len(ids) < LENGTH:
        raise SystemExit(f"{directory}: the paragraph has only {len(ids)} tokens")
    tokens = torch.tensor([ids[:LENGTH]])
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = model(input_ids=tokens, use_cache=False).logits
    top = logits.topk(TOP, dim=-1)
    new = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    return {
        "text": np.array(PARAGRAPH),
        "tokens": tokens.numpy().astype(np.int32),
        "argmax": logits.argmax(-1).numpy().astype(np.int32),
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_logits": top.values.numpy(),
        "logits": logits[:, -positions:].numpy(),
        "greedy": new[:, LENGTH:].numpy().astype(np.int32),
    }


def tokenizer_facts(directory: Path, bos: int | None) -> dict:
    """Return what the tokenizer in `directory` gives for the texts above."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    cases = [{"text": text, "ids": ids_of(tokenizer, text)} for text in TEXTS]
    for case in cases:
        if tokenizer.decode(case["ids"]) != case["text"]:
            raise SystemExit(f"{directory}: {case['text']!r} does not survive encode and decode")
    facts = {"bos": bos, "cases": cases}
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        facts["chat"] = {"messages": MESSAGES, "text": text, "ids": ids_of(tokenizer, text)}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden files of the real models.")
    parser.add_argument("smollm2", type=Path, help="SmolLM2-135M-Instruct in the HF layout")
    parser.add_argument("gemma3", type=Path, help="Gemma 3 270M in the HF layout")
    arguments = parser.parse_args()
    models = {
        "smollm2": (arguments.smollm2, 4, None),
        "gemma3": (arguments.gemma3, 1, 2),
    }
    for name, (directory, positions, bos) in models.items():
        with torch.no_grad():
            arrays = real_logits(directory, positions, bos)
        path = OUT / f"{name}_real.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MB")
    facts = {name: tokenizer_facts(directory, bos) for name, (directory, _, bos) in models.items()}
    lines = json.dumps(facts, indent=1, ensure_ascii=True)
    (OUT / "tokenizers.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
