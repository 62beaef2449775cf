# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speculative decoding: several tokens a pass, and the same ones
#
# A model that generates reads all of its weights for every token. Run on five tokens at once it
# reads them once, too. So something cheap guesses what comes next, the model checks all guesses in
# one pass, and those that are right are kept. This notebook looks, in this order, at
#
# 1. the law: with any guesses, at any temperature, the tokens are those of plain generation;
# 2. a head that is trained to guess (EAGLE-3), on text that the model writes itself;
# 3. guesses in a chain and in a tree, and what they are worth;
# 4. the same as commands, and as files that other engines load.
#
# The model has 0.3 million parameters and is made here, so that all of this takes about three
# minutes on two CPU cores. What is counted is tokens a pass, which does not depend on the machine.
# What a pass costs does: such figures come from `jaxopt-models bench speculative` where you serve.

# %%
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxopt_models as jom
from jaxopt_models import data
from jaxopt_models.speculative import NGram, Target, TreeDrafter, init_eagle3
from jaxopt_models.speculative.eagle3_files import export_eagle3, read_eagle3
from jaxopt_models.train.draft_objective import draft_loss
from jaxopt_models.train.leaves import computed
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.objectives import QAT, next_token_loss
from jaxopt_models.train.settings import Optimizer
from jaxopt_models.train.step import make_train_step, start

# %% [markdown]
# A small model of Python's documentation, trained as in `02_qat_qad`.

# %%
text = data.load_text("builtin", "calibration")
pairs = Tokenizer(models.BPE())
pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
pairs.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
pairs.train_from_iterator(
    [text], trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs)
config = jom.ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "tie_word_embeddings": True,
    }
)


def trained(loss, params, context, rows, steps, rate, prepare=None):
    """Parameters after so many steps on batches of the rows, and the lines of the log."""
    stream = data.PackedBatches(rows, 16, seed=0)
    optimizer = Optimizer(learning_rate=rate, warmup=0.04, end=0.01).transformation(steps)
    step = make_train_step(loss, optimizer, max_norm=1.0, prepare=prepare)
    log = Log(None)
    state = fit(
        step,
        start(params, optimizer),
        lambda number: {"tokens": jnp.asarray(stream.batch(number))},
        context,
        Pace(steps, log=steps // 5),
        log=log,
    )
    return state.params, log.lines


rows = data.pack([data.tokenize(tokenizer, text)], 64)
fresh = jom.init(config, jax.random.key(0))
params, lines = trained(next_token_loss(config, QAT), fresh, None, rows, 250, 1e-2)
for line in lines:
    print(f"step {line['step']}: loss {line['loss']:.2f}")

# %% [markdown]
# ## 1. The law
#
# The noise that a token is sampled with belongs to its request and its position, not to the pass
# that it is sampled in:
#
# $$y_i = \arg\max\,(\text{logits}_i / T + g_{\text{request},\,i}), \qquad g \sim \text{Gumbel}$$
#
# So the token at position $i$ depends on those before it and on $g_i$, and on no guess. A guess
# that equals $y_i$ is right; the first that does not is replaced by $y_i$ itself. Here an *n-gram*
# guesses: what followed the last few words where they stood before.

# %%
beginnings = "The ", "class ", "If the argument is", "\n\n    >>> "
prompts = [tokenizer.encode(words) for words in beginnings]
say = partial(jom.generate, config, params, prompts, max_new_tokens=96)
plain = {temperature: say(temperature=temperature).tokens for temperature in (0.0, 1.0)}


def tokens_a_pass(drafter, temperature):
    """Of each prompt; with the tokens of plain generation."""
    found = say(temperature=temperature, draft=drafter)
    assert found.tokens == plain[temperature], "a token was lost"
    return np.asarray(found.acceptance_length)


for temperature in plain:
    lengths = tokens_a_pass(NGram(count=4), temperature)
    print(f"temperature {temperature:g}: equal; tokens a pass {lengths.round(2)}")
print(tokenizer.decode(plain[0.0][2]))

# %% [markdown]
# ## 2. A head that guesses
#
# An EAGLE-3 head is one layer. It reads what the model thought of the text so far, its residual
# stream behind three layers, and the embedding of the next token; where the model has not been, its
# own output stands for that. It is trained for several steps at once from every place of a text, as
# it will run: `unrolled` makes the head see its own outputs, the loss is the divergence from what
# the model says at each of those places.
#
# It has to learn the model, not the world. So the text is the model's own.

# %%
target = Target(config, params)
first = np.random.default_rng(0).integers(0, 512, (128, 1)).tolist()
own = jom.generate(config, params, first, max_new_tokens=63, temperature=0.8).tokens
written = np.asarray([a + b for a, b in zip(first, own, strict=True)], np.int32)

head = init_eagle3(target, jax.random.key(1), layers=(0, 1, 2), count=4)
size = sum(x.size for x in jax.tree.leaves(head.params))
print(f"{size / 1e6:.2f} million parameters, layers {head.layers} are read")
loss = draft_loss(config, head, steps=4)
prepare = partial(computed, dtype="float32")
learnt, lines = trained(loss, head.params, params, written, 150, 3e-3, prepare)
for line in lines:
    refused = ", ".join(f"{line[f'refused_{s + 1}']:.2f}" for s in range(4))
    print(f"step {line['step']}: loss {line['loss']:.2f}; refused 1 to 4 tokens ahead {refused}")
head = replace(head, params=learnt)

# %% [markdown]
# `refused` is $\frac12 \sum |p - q|$, the share of guesses that sampling has to refuse, whoever
# checks them. The noise is shared here: the head takes its guess with the $g_i$ that the model will
# take, so that both agree more often than two samples would.
#
# ## 3. Chains and trees
#
# A chain of $K$ guesses ends at the first that is wrong. A tree has several at a place: of each
# level its likeliest nodes are continued, and of all that were seen the likeliest are checked, in
# one pass, each seeing those that it continues and no other.

# %%
drafters = {"n-gram, 4": NGram(count=4)}
drafters |= {f"head, {k}": replace(head, count=k) for k in (1, 4)}
drafters |= {f"tree of {n}": TreeDrafter(head, width=4, depth=5, count=n) for n in (12, 32)}
table = {
    (name, temperature): tokens_a_pass(drafter, temperature).mean()
    for name, drafter in drafters.items()
    for temperature in plain
}
for name in drafters:
    print(f"{name:>10}: {table[name, 0.0]:.2f} greedy, {table[name, 1.0]:.2f} sampled")
assert table["head, 4", 0.0] > table["head, 1", 0.0] > 1.3, "the head has learnt nothing"
assert table["tree of 32", 1.0] > table["head, 4", 1.0], "a tree is no better than a chain"

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for shift, temperature in ((-0.2, 0.0), (0.2, 1.0)):
    heights = [table[name, temperature] for name in drafters]
    places = np.arange(len(drafters)) + shift
    axes.barh(places, heights, 0.38, label=f"temperature {temperature:g}")
axes.axvline(1.0, color="black", lw=0.8)
axes.set_yticks(range(len(drafters)), drafters)
axes.set(xlabel="tokens a pass of the model; 1 is plain generation")
axes.invert_yaxis()
axes.legend()
plt.show()

# %% [markdown]
# A head costs a pass of its own for each guess of a chain and for each level of a tree, and a tree
# more to check. Which of them is fastest depends on the model, the batch and the machine.
#
# ## 4. Commands and files
#
# ```
# jaxopt-models corpus MODEL --out talks.jsonl
# jaxopt-models train draft --config configs/runs/draft_eagle3.yaml --out RUN --set text=talks.jsonl
# jaxopt-models bench speculative MODEL --prompts FILE --draft RUN/model --draft ngram
# jaxopt-models generate MODEL --prompt "Once upon a time" --draft RUN/model --draft-tree 8,6,32
# ```
#
# A head is kept as SGLang and vLLM load it, or in the layout of vLLM's speculators.

# %%
with tempfile.TemporaryDirectory() as folder:
    for layout in ("eagle3", "speculators"):
        export_eagle3(Path(folder, layout), head, config, layout, dtype=jnp.float32)
        again = read_eagle3(Path(folder, layout), config, count=4)
        assert (tokens_a_pass(again, 0.0) == tokens_a_pass(head, 0.0)).all()
        print(layout, *sorted(path.name for path in Path(folder, layout).iterdir()))
