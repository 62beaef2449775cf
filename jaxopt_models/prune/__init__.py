"""Pruning: what matters least is found, masked, measured, and cut out.

scores = importance(config, params, batches)
masks = choose(scores, Target(hidden=512, neurons=1024, multiple=64))
damage(config, params, batches, [masks])
config, params = slice_model(config, params, masks)
"""

from jaxopt_models.prune.choose import Target, choose
from jaxopt_models.prune.damage import Damage, damage, layer_runs, without_layers
from jaxopt_models.prune.expert_damage import expert_damage
from jaxopt_models.prune.importance import Importance, importance
from jaxopt_models.prune.masks import Masks, apply_masks, drop_layers, keep_all
from jaxopt_models.prune.norm_gains import norm_gains, rescale_norms
from jaxopt_models.prune.patterns import Pattern
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.prune.sparsity import SparseReport, Sparsity, sparsify
from jaxopt_models.prune.taylor import taylor_importance

__all__ = [
    "Damage",
    "Importance",
    "Masks",
    "Pattern",
    "SparseReport",
    "Sparsity",
    "Target",
    "apply_masks",
    "choose",
    "damage",
    "drop_layers",
    "expert_damage",
    "importance",
    "keep_all",
    "layer_runs",
    "norm_gains",
    "rescale_norms",
    "slice_model",
    "sparsify",
    "taylor_importance",
    "without_layers",
]
