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
# # Pruning and distillation: a model that becomes smaller for good
#
# Quantization stores the same numbers in fewer bits. Pruning has fewer numbers: layers, channels,
# neurons and heads go, and the original teaches what is left. This notebook looks, in this order,
# at
#
# 1. what matters least, measured in one pass over text;
# 2. masks, which are the smaller model before it is cut, and the cut, which computes the same;
# 3. a search for the best model of half of the parameters, beside the uniform one;
# 4. distillation, and how much of the loss it gets back;
# 5. zeros in the matrices that are left, by three rules;
# 6. the same as commands.
#
# The model has 0.46 million parameters and is made here, so that all of this takes about three
# minutes on two CPU cores. It is **not** evidence of what pruning costs a real model: such figures
# come from `jaxopt-models prune` and `jaxopt-models train distill` on yours.

# %%
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxopt_models as jom
from jaxopt_models import data, plots
from jaxopt_models.evaluate import reference
from jaxopt_models.prune import (
    Pattern,
    Sparsity,
    Target,
    apply_masks,
    choose,
    damage,
    drop_layers,
    importance,
    keep_all,
    slice_model,
    sparsify,
    without_layers,
)
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.report_pruning import candidates_table, kept_text, totals_line
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.objectives import QAD, QAT, next_token_loss
from jaxopt_models.train.settings import Optimizer
from jaxopt_models.train.step import make_train_step, start

# %% [markdown]
# A small model of Python's documentation, trained as in `02_qat_qad`, narrower and of five layers.

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
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)
rows = data.pack([data.tokenize(tokenizer, text)], 64)


def trained(loss, params, context, steps, rate):
    """Parameters after so many steps on 16 rows each."""
    stream = data.PackedBatches(rows, 16, seed=0)
    optimizer = Optimizer(learning_rate=rate, warmup=0.04, end=0.01).transformation(steps)
    step = make_train_step(loss, optimizer, max_norm=1.0)
    log = Log(None)
    state = fit(
        step,
        start(params, optimizer),
        lambda number: {"tokens": jnp.asarray(stream.batch(number))},
        context,
        Pace(steps, log=steps // 4),
        log=log,
    )
    print("loss", *(f"{line['loss']:.3f}" for line in log.lines))
    return state.params


fresh = jom.init(config, jax.random.key(0))
params = trained(next_token_loss(config, QAT), fresh, None, 250, 1e-2)
model = jom.Model(config, params, tokenizer)
calibration = data.token_batches(model, text, 32, 64, 16)
other = data.load_text("builtin", "evaluation")
evaluation = data.token_batches(model, other, 32, 64, 16)
original = reference(config, params, evaluation)

# %% [markdown]
# ## 1. What matters least
#
# `importance` runs the text once and keeps of every part one number: of a neuron, a head or a
# channel how large it tends to be ([Minitron](https://arxiv.org/abs/2407.14679)); of a layer how
# far it turns its input, `1 − cos(x, layer(x))`. A layer that turns little seems to matter little.
#
# That is an estimate. `damage` measures: what do the predictions lose, in KL, when the layer is
# left out? All five candidates run through one compiled program, since a candidate is an array of
# zeros and ones, and not a program.

# %%
scores = importance(config, params, calibration)
everything = keep_all(config, params)
numbers = range(config.num_layers)
alone = damage(config, params, calibration, without_layers(everything, [[i] for i in numbers]))

figure, panels = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
panels[0].bar(numbers, scores.layers)
panels[0].set(xlabel="layer", ylabel="1 − cos", title="how far it turns its input")
panels[1].bar(numbers, [one.kl for one in alone])
panels[1].set(xlabel="layer", ylabel="KL, nats a token", title="what is lost without it")
plt.show()

# %% [markdown]
# ## 2. Masks, and the cut
#
# Masks are folded into the weights: a neuron goes with its column of `down_proj`, a head with its
# columns of `o_proj`, a channel with the rows of all that writes to it. Only RMSNorm has to know of
# it, since it divides by the number of channels that are left. `slice_model` then cuts for good.
# The law is that both compute the same.

# %%
target = Target(hidden=64, neurons=128, heads=1, multiple=32)
masks = drop_layers(choose(scores, target), [2])
small_config, small = slice_model(config, params, masks)
tokens = jnp.asarray(evaluation[0])
masked = jax.jit(partial(jom.forward, config))(apply_masks(config, params, masks), tokens)
sliced = jax.jit(partial(jom.forward, small_config))(small, tokens)
apart = float(jnp.max(jnp.abs(masked - sliced)) / jnp.max(jnp.abs(masked)))


def count(tree):
    """Parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


print(f"{count(params):,} -> {count(small):,} parameters, logits apart by {apart:.0e}")
assert apart < 1e-5, "the cut computes something else than the mask"

# %% [markdown]
# ## 3. The best of half the size
#
# How much of what? The uniform answer takes from all alike. `prune` draws others, measures all on a
# little text, the better half on more, and so on (successive halving), and cuts out the best one.

# %%
settings = PruneSettings.model_validate(
    {
        "budget": {"parameters": 0.5},
        "axes": ["layers", "hidden", "neurons"],
        "multiple": 16,
        "length": 64,
        "windows": 32,
        "batch": 8,
        "search": {"candidates": 12, "first": 8, "finalists": 3},
    }
)
pruned_config, pruned, found = prune(model, settings, calibration, evaluation)
print(totals_line(found))
candidates_table(found, 6)

# %%
figure = plots.candidates_plot(found.candidates, found.unit)
plt.show()

# %% [markdown]
# ## 4. Taught by the original
#
# The loss is `KL(original ‖ pruned)` of all next tokens; the step is that of QAD, with a student of
# another shape. Both the best candidate and the uniform one are taught for 100 steps, on the text
# that the original was trained on.

# %%
best = found.candidates[0].candidate
uniform = next(one.candidate for one in found.candidates if one.candidate.name == "uniform")
students = {
    f"search: {kept_text(best)}": (pruned_config, pruned),
    f"uniform: {kept_text(uniform)}": slice_model(config, params, uniform.masks(scores)),
}
print(f"original: perplexity {jom.evaluate(config, params, evaluation).perplexity:.2f}")
for name, (its_config, student) in students.items():
    loss = next_token_loss(its_config, QAD, teacher=config)
    taught = trained(loss, student, params, 100, 2e-3)
    before, after = (jom.evaluate(its_config, p, evaluation, original) for p in (student, taught))
    print(
        f"{name}\n  {count(student):,} parameters, perplexity {before.perplexity:.2f} -> "
        f"{after.perplexity:.2f}, KL {before.kl:.3f} -> {after.kl:.3f}"
    )
    assert before.kl and after.kl, "they were measured beside the original"
    assert after.kl < 0.5 * before.kl, "distillation got back less than half of the KL"

# %% [markdown]
# Far more comes back than what the choice was about, and the order of the two may even turn: what
# is cut deep and narrow loses much at first and learns fast. Where that matters, let the search
# look that far: with `search: {distill: {steps: 100}}` every finalist has a short lesson before one
# is chosen.

# %% [markdown]
# ## 5. Zeros
#
# In 2 of 4 neighbouring weights, as tensor cores can skip them. Which ones go is said by their size
# (magnitude), by their size times that of their inputs ([Wanda](https://arxiv.org/abs/2306.11695)),
# or one after the other with the rest making up for each
# ([SparseGPT](https://arxiv.org/abs/2301.00774)). Behind any choice, `exact` solves for the weights
# that are left: the least squares of the layer's output.

# %%
half = Pattern.parse("2:4")
rules = {
    "magnitude": Sparsity(half, "magnitude", "none"),
    "Wanda": Sparsity(half, "wanda", "none"),
    "SparseGPT": Sparsity(half, "sparsegpt", "obs"),
    "Wanda, exact": Sparsity(half, "wanda", "exact"),
}
lost = {}
for name, rule in rules.items():
    zeroed, report = sparsify(config, params, rule, calibration)
    error = sum(row.output_error or 0.0 for row in report) / len(report)
    lost[name] = jom.evaluate(config, zeroed, evaluation, original).kl
    print(f"{name:14} KL {lost[name]:.3f}, output error {error:.3f}")
assert lost["Wanda, exact"] < lost["Wanda"] and lost["SparseGPT"] < lost["magnitude"]

# %% [markdown]
# ## 6. As commands
#
# ```sh
# jaxopt-models prune MODEL --config configs/runs/prune_depth.yaml --out pruned
# jaxopt-models train distill --config RUN.yaml --out taught      # student: pruned, model: MODEL
# jaxopt-models quantize taught/model --recipe nvfp4 --out small
# ```
#
# The result is a model like any other, here saved and loaded again. A model of equal widths is
# exported in the layout of Hugging Face, too.

# %%
with tempfile.TemporaryDirectory() as folder:
    jom.save(Path(folder, "pruned"), pruned_config, pruned, tokenizer)
    again = jom.load(Path(folder, "pruned"))
metrics = jom.evaluate(again.config, again.params, evaluation, original)
assert metrics.kl == jom.evaluate(pruned_config, pruned, evaluation, original).kl
print(f"{metrics.bytes / 2**20:.2f} MiB: perplexity {metrics.perplexity:.2f}, KL {metrics.kl:.4f}")
