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
# # Training under quantization: from the text (QAT), and from the unquantized model (QAD)
#
# Rounding costs a model something. Training while the weights are rounded gets part of it back.
# This notebook looks, in this order, at
#
# 1. one jitted step, by which a small model is trained here;
# 2. the leaf that is trained in float32 and computes as if it were quantized;
# 3. QAT and QAD from the same start, on the same text, and what each gets back;
# 4. the same as one call, killed on the way and resumed.
#
# The model has 0.3 million parameters and knows the documentation of Python a little. It is there
# so that all of this takes two or three minutes on two CPU cores, and so that the curves can be run
# again by everybody. It is **not** evidence of what QAD does for a real model, which is larger and
# has learnt from far more text: such figures come from `jaxopt-models bench qad` on a GPU.

# %%
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxopt_models as jom
from jaxopt_models import data, report, tree
from jaxopt_models.evaluate import reference
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.formats import resolve
from jaxopt_models.train.leaves import computed, fake_quantized, fold
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.objectives import QAD, QAT, next_token_loss
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import Optimizer, RunSettings
from jaxopt_models.train.step import make_train_step, start

# %% [markdown]
# ## 1. One step
#
# The text is what every Python ships: docstrings of the standard library to train on, and the
# language reference to measure on. A byte-pair tokenizer of 512 tokens is made from the first.

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
rows = data.pack([data.tokenize(tokenizer, text)], 64)
stream = data.PackedBatches(rows, 16, seed=0)


def batch(step):
    """Of a step: 16 rows of 64 tokens, shuffled."""
    return {"tokens": jnp.asarray(stream.batch(step))}


# %% [markdown]
# `make_train_step` takes a loss and any optimizer of optax, and returns a jitted function
#
# `step(state, context, batch) -> (state, metrics)`.
#
# - The **state** is a `TrainState`, a pytree: parameters that are trained, those that are frozen,
#   the optimizer's moments, and counters.
# - The **context** is what the loss reads and nobody trains: a teacher, or nothing.
# - The **loss** comes from `next_token_loss(config, terms)`. The terms `QAT` are the cross-entropy
#   of the text's next token, `−log q(next)`. The terms `QAD` are the divergence from what the
#   teacher says of it, `KL(p‖q) = Σ p (log p − log q)` over all tokens: where the text has one
#   right answer, a teacher has an opinion of all 512.
#
# Nothing in a step asks whether leaves are quantized. So the first model is trained, in float32,
# by the same step: its cross-entropy is the loss that QAT will have.

# %%
steps = 250
optimizer = Optimizer(learning_rate=1e-2, warmup=0.04, end=0.01).transformation(steps)
step = make_train_step(next_token_loss(config, QAT), optimizer, max_norm=1.0)
state = start(jom.init(config, jax.random.key(0)), optimizer)
log = Log(None)
state = fit(step, state, batch, None, Pace(steps, log=50), log=log)
model = jom.Model(config, state.params, tokenizer)
for line in log.lines:
    print(f"step {line['step']}: loss {line['loss']:.2f}")

# %% [markdown]
# ## 2. A leaf that acts as if it were quantized
#
# Post-training quantization (PTQ) rounds the model to MXFP4: weights *and* inputs of every linear
# in 4 bits, with a power of two as the scale of each 32 values. It is a hard format, so there is
# something to get back.
#
# `fake_quantized` puts a float32 weight behind every quantized leaf. The result is a `FakeTensor`:
# in the forward pass `Ŵ = s · round(W / s)`, in the backward pass `dL/dW = dL/dŴ`, as if rounding
# were not there. That is the straight-through estimator: the true slope of a staircase is 0, and
# nothing would ever learn.

# %%
sweep = jnp.linspace(-1.0, 1.0, 801)[:, None]
block = jnp.concatenate([jnp.ones((801, 1)), jnp.tile(sweep, (1, 31))], axis=1)  # 1 sets the scale
leaf = FakeTensor(block, spec=resolve("mxfp4"))


def total(leaf):
    """Of the rounded weight, so that its gradient is 1 everywhere."""
    return jnp.sum(leaf.dequantize())


slope = jax.grad(total)(leaf).weight
assert (slope == 1.0).all(), "the gradient does not go straight through"

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(sweep[:, 0], leaf.dequantize()[:, 1], label="Ŵ, the forward pass")
axes.plot(sweep[:, 0], sweep[:, 0], "--", label="what the gradient sees: slope 1")
axes.set(xlabel="W", ylabel="Ŵ", title="MXFP4, in a block whose largest weight is 1")
axes.legend()
plt.show()

# %% [markdown]
# `fold` turns every `FakeTensor` into the `QTensor` that it acted like. The law is that the forward
# pass stays the same, bit for bit: what was trained is what is served. And before the first step,
# the folded leaf is the one that PTQ made, so training starts where PTQ ended.

# %%
quantized, _ = jom.quantize(model, jom.Recipe.load("mxfp4"))
fakes = fake_quantized(model.params, quantized)
name = "layers/0/mlp/down_proj/weight"
print(name, "is a", type(dict(tree.leaves_with_paths(fakes))[name]).__name__)


def same_bits(one, other):
    """Whether all arrays of two trees are equal, bit for bit."""
    both = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in both)


logits = jax.jit(partial(jom.forward, config))
tokens = batch(0)["tokens"]
assert same_bits(logits(fakes, tokens), logits(fold(fakes), tokens)), "folding changes the model"
assert same_bits(fold(fakes), quantized), "training would not start where PTQ ended"

# %% [markdown]
# ## 3. QAT and QAD from the same start
#
# Both train the same leaves, for 60 steps, on the same batches, at the same learning rate; only
# the loss differs. Every 20 steps the folded model is measured on the language reference, which
# nobody was trained on:
#
# - **KL**, in nats a token: how far its predictions are from the unquantized model's;
# - **perplexity**: how well it predicts the text.
#
# `computed` rounds each weight once a step for all that reads it; the forward pass is the same.

# %%
settings = RunSettings.of(
    {
        "model": "model",  # a directory, in section 4
        "recipe": "mxfp4",
        "length": 64,
        "batch": 16,
        "steps": 60,
        "optimizer": {"learning_rate": 3e-4},
        "evaluation": {"windows": 64, "length": 64, "every": 20},
        "save": 30,
    }
)
reference_text = data.load_text("builtin", "evaluation")
evaluation = data.token_batches(model, reference_text, 64, 64, 16)
original = reference(config, model.params, evaluation)


def measure(params):
    """Of parameters once they are folded, on text that is not trained on."""
    found = jom.evaluate(config, fold(params), evaluation, original)
    return {"kl": found.kl, "perplexity": found.perplexity}


def trained(terms, teacher):
    """(the model after training, its measurements from step 0)."""
    optimizer = settings.optimizer.transformation(settings.steps)
    step = make_train_step(
        next_token_loss(config, terms),
        optimizer,
        max_norm=settings.max_norm,
        prepare=partial(computed, dtype=config.dtype),
    )
    log, pace = Log(None), Pace(settings.steps, evaluate=settings.evaluation.every)
    state = start(fakes, optimizer)
    state = fit(step, state, batch, teacher, pace, evaluate=measure, log=log)
    curve = [{"step": 0} | measure(fakes), *(line for line in log.lines if "kl" in line)]
    return fold(state.params), curve


params, curves = {}, {}
params["QAT"], curves["QAT"] = trained(QAT, None)
params["QAD"], curves["QAD"] = trained(QAD, model.params)

# %%
perplexity = jom.evaluate(config, model.params, evaluation).perplexity
figure, panels = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
for axes, key in zip(panels, ("kl", "perplexity"), strict=True):
    for name, curve in curves.items():
        axes.plot([at["step"] for at in curve], [at[key] for at in curve], "o-", label=name)
    axes.axhline(curves["QAD"][0][key], color="grey", ls=":", label="PTQ")
    axes.set(xlabel="step", ylabel="KL, nats a token" if key == "kl" else key)
panels[0].set_ylim(bottom=0.0)
panels[1].axhline(perplexity, color="black", ls="--", label="not quantized")
panels[1].legend()
plt.show()

# %% [markdown]
# What each gets back of PTQ's loss: of the KL, `1 − KL / KL of PTQ`; of the perplexity, the share
# of the way from PTQ's back to the unquantized model's.

# %%
rows_of_table = [
    ("not quantized", jom.evaluate(config, model.params, evaluation, original), None),
    ("PTQ", jom.evaluate(config, quantized, evaluation, original), None),
    *((name, jom.evaluate(config, p, evaluation, original), None) for name, p in params.items()),
]
before = curves["QAD"][0]
for name, curve in curves.items():
    of_kl = 1.0 - curve[-1]["kl"] / before["kl"]
    lost, left = (at["perplexity"] - perplexity for at in (before, curve[-1]))
    print(f"{name} gets back {of_kl:.0%} of the KL and {1.0 - left / lost:.0%} of the perplexity")
assert curves["QAD"][-1]["kl"] < before["kl"], "QAD is no closer to the model than PTQ"
assert curves["QAD"][-1]["kl"] < curves["QAT"][-1]["kl"], "QAD is no closer than QAT"

report.metrics_table("A small model in MXFP4, 64 × 64 tokens", rows_of_table)

# %% [markdown]
# The two losses get back different things. QAD goes back to the model that was quantized: its KL
# falls by far the most. QAT goes wherever the text says: its perplexity falls further, but not by
# return. Part of what it gains is new, from a text that the model had read half of, and takes
# it away from the model that was quantized: its KL falls little, or rises. So QAT's perplexity
# says more of what was left to learn here than of what was lost. A model that has learnt from far
# more text than there is to train on has more to lose: train it by QAT for a task whose text you
# have, and by QAD to keep what it is.
#
# Little of a weight has to move for this. Of the codes that are stored, QAD changed

# %%
changed = total_codes = 0
for (_, was), (_, now) in zip(
    tree.leaves_with_paths(quantized), tree.leaves_with_paths(params["QAD"]), strict=True
):
    if isinstance(was, jom.QTensor):
        changed += int(jnp.sum(was.unpack() != now.unpack()))
        total_codes += was.size
print(f"{changed / total_codes:.1%} of {total_codes:,}")

# %% [markdown]
# ## 4. All of it in one call, killed and resumed
#
# `train("qad", settings, out)` loads, quantizes, trains, measures, logs and saves; the command is
# `jaxopt-models train qad --config FILE --out DIR`, with the same settings in YAML. Here it is
# killed after 40 steps. Its last checkpoint is of step 30, and from there it goes on with
# `resume=True`: batches depend on the number of the step alone, so nothing tells the run that it
# was interrupted. It ends with the very model that the cells above made.


# %%
def killed(items, description):
    """Progress of a run that does not survive its 40th item."""
    for number, item in enumerate(items):
        if number == 40:
            raise KeyboardInterrupt
        yield item


folder = tempfile.TemporaryDirectory()
source, out = Path(folder.name, "model"), Path(folder.name, "qad")
jom.save(source, config, model.params, tokenizer)
settings = settings.model_copy(update={"model": str(source)})
with suppress(KeyboardInterrupt):
    train("qad", settings, out, progress=killed)
print("left behind:", sorted(path.name for path in out.iterdir()))
assert not (out / "model").exists()

result = train("qad", settings, out, resume=True)
print("at the end:", sorted(path.name for path in out.iterdir()))
assert same_bits(result.model.params, params["QAD"]), "the resumed run ended with another model"

# %% [markdown]
# What is saved holds codes and scales, and no float32 weights of the linears. Loaded again it gives
# the figures that the run measured at its end:

# %%
restored = jom.load(out / "model")
metrics = jom.evaluate(restored.config, restored.params, evaluation, original)
last = result.log[-1]
assert (metrics.kl, metrics.perplexity) == (last["kl"], last["perplexity"])
print(f"{metrics.bytes / 2**20:.2f} MiB: perplexity {metrics.perplexity:.2f}, KL {metrics.kl:.4f}")
folder.cleanup()
