"""Damage is that of the smaller model; gradients are those of masks; experts that nobody misses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, masks_of, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.transformer import forward, forward_with_taps, hidden_states, output_head
from jaxopt_models.prune.damage import damage, layer_runs, masked_sums, without_layers
from jaxopt_models.prune.expert_damage import expert_damage
from jaxopt_models.prune.masks import apply_masks, keep_all
from jaxopt_models.prune.norm_gains import rescale_norms
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.prune.taylor import taylor_importance


def test_damage_is_that_of_the_smaller_model():
    config, params = CONFIGS["tied"], params_of("tied")
    batches = [tokens(2, seed=1), tokens(2, seed=2)]
    masks = masks_of("tied", ("hidden", "layers", "groups", "neurons"))
    nothing, found = damage(config, params, batches, [keep_all(config, params), masks])
    small, cut = slice_model(config, params, masks)
    expected = evaluate(small, cut, batches, reference(config, params, batches))
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.top1_agreement == expected.top1_agreement
    assert nothing.kl == pytest.approx(0, abs=1e-6) and nothing.top1_agreement == 1
    # What is masked may have been changed before: it is compared with the original all the same.
    louder = rescale_norms(config, params, {"norm/weight": 1.1})
    (changed,) = damage(config, louder, batches, [keep_all(config, params)], params)
    expected = evaluate(config, louder, batches, reference(config, params, batches))
    assert changed.kl == pytest.approx(expected.kl, rel=1e-3) and changed.kl > 1e-4


def test_runs_of_layers_are_left_out():
    assert layer_runs(3) == [range(0, 1), range(1, 2), range(2, 3), range(0, 2), range(1, 3)]
    assert layer_runs(4, longest=1) == [range(i, i + 1) for i in range(4)]
    config, params, text = CONFIGS["tied"], params_of("tied"), tokens()
    # A layer that adds nothing is missed by nobody, alone; with another it costs what that costs.
    idle = tree.map_with_path(
        lambda path, x: x * 0 if path.startswith("layers/1/") and x.ndim == 2 else x, params
    )
    runs = [range(1, 2), range(0, 1), range(0, 2)]
    none, first, both = damage(config, idle, [text], without_layers(keep_all(config, idle), runs))
    assert none.kl == pytest.approx(0, abs=1e-6)
    assert first.kl > 1e-3
    assert both.kl == pytest.approx(first.kl, rel=1e-4)


def test_many_candidates_run_in_one_loop_on_the_device():
    config, params, text = CONFIGS["tied"], params_of("tied"), tokens()
    candidates = without_layers(keep_all(config, params), layer_runs(3))
    found = damage(config, params, [text], candidates)
    stacked = jax.tree.map(lambda *masks: jnp.stack(masks), *candidates)
    original = output_head(params), hidden_states(config, params, text)
    together = jax.lax.map(lambda m: masked_sums(config, params, m, text, original), stacked)
    sums = np.asarray([[d.nll, d.kl, d.top1_agreement] for d in found]) * 2 * 11
    np.testing.assert_allclose(together, sums, rtol=1e-4)


@pytest.fixture(scope="module", params=["tied", "gemma3", "mixtral"])
def gradients(request):
    config, params = CONFIGS[request.param], params_of(request.param)
    return request.param, taylor_importance(config, params, [tokens(2)])


def test_gradients_are_those_of_the_loss_by_masks(gradients):
    """By central differences, for one entry of each axis."""
    name, scores = gradients
    config, params, text = CONFIGS[name], params_of(name), tokens(2)
    ones = keep_all(config, params)

    @jax.jit
    def losses(masks):
        masked = apply_masks(config, params, masks)
        # `apply_masks` stretches by what is kept, which is no part of the derivative.
        logits = forward(config, masked, text)[:, :-1]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], axis=-1)
        return jnp.mean(nll[..., 0], axis=1)

    # So small that no token changes its experts, which is a jump.
    step = 0.002 if config.moe_layers else 0.02

    def difference(moved):
        return (losses(moved(step)) - losses(moved(-step))) / (2 * step)

    def moved(field, layer, step):
        value = getattr(ones, field)
        if layer is None:
            return dataclasses.replace(ones, **{field: value.at[1].add(step)})
        one = value[layer].at[(0,) * value[layer].ndim].add(step)
        return dataclasses.replace(ones, **{field: (*value[:layer], one, *value[layer + 1 :])})

    expected = {"layers": scores.layers[1], "heads": scores.heads[1][0, 0]}
    expected["neurons"] = scores.neurons[1].reshape(-1)[0]
    for field, score in expected.items():
        layer = None if field == "layers" else 1
        slope = difference(partial(moved, field, layer))
        want = float(jnp.sqrt(jnp.mean(slope**2)))
        assert float(score) == pytest.approx(want, rel=0.02, abs=5e-4), field


def test_parts_that_do_nothing_have_no_gradient():
    config, params = CONFIGS["tied"], params_of("tied")
    path = "layers/1/mlp/down_proj/weight"
    still = tree.replace(params, {path: tree.select(params, path)[path].at[:, 5].set(0.0)})
    neurons = taylor_importance(config, still, [tokens()]).neurons[1]
    assert neurons[5] == 0 and float(jnp.min(jnp.delete(neurons, 5))) > 0


def test_experts_that_another_replaces_are_not_missed():
    config, params = CONFIGS["mixtral"], params_of("mixtral")
    prefix = "layers/1/mlp/experts/"
    twins = {
        path: leaf.at[3].set(leaf[2]) for path, leaf in tree.select(params, f"{prefix}*").items()
    }
    # Both twins see the same logits, so a token goes to both or to neither.
    router = "layers/1/mlp/router/weight"
    twins[router] = (
        params["layers"][1]["mlp"]["router"]["weight"]
        .at[3]
        .set(params["layers"][1]["mlp"]["router"]["weight"][2])
    )
    scores = expert_damage(config, tree.replace(params, twins), [tokens(4)])
    assert len(scores) == 3 and all(score is not None and score.shape == (4,) for score in scores)
    (_, _, third, fourth) = np.asarray(scores[1])
    assert third == pytest.approx(fourth, rel=1e-4)


def test_damage_of_an_expert_is_by_its_formula():
    config, params, text = CONFIGS["mixtral"], params_of("mixtral"), tokens(2)
    masks = keep_all(config, params)
    scores = expert_damage(config, params, [text])
    # In the last layer nothing else changes: expert 1 removed by a mask moves the stream by y - y'.
    rest = jnp.asarray([1.0, 0, 1, 1])
    without = dataclasses.replace(masks, experts=(*masks.experts[:2], rest))
    taps = ["layers/2/output", "layers/2/post_attention_layernorm/unnormed"]
    _, whole = forward_with_taps(config, params, text, taps)
    _, less = forward_with_taps(config, apply_masks(config, params, without), text, taps)
    y, y_less = (found[taps[0]] - found[taps[1]] for found in (whole, less))
    expected = jnp.sum((y - y_less) ** 2) / jnp.sum(y**2)
    assert np.asarray(scores[2])[1] == pytest.approx(float(expected), rel=1e-3)


def test_what_cannot_be_measured_is_refused():
    config, params, text = CONFIGS["mixtral"], params_of("mixtral"), tokens()
    masks = keep_all(config, params)
    with pytest.raises(UserError, match="nothing to measure"):
        damage(config, params, [], [masks])
    with pytest.raises(UserError, match="nothing to measure"):
        damage(config, params, [text], [])
    one = jnp.asarray([0.0, 1, 0, 0])
    few = dataclasses.replace(masks, experts=(one, *masks.experts[1:]))
    with pytest.raises(UserError, match="candidate 1 keeps 1 experts of layer 0"):
        damage(config, params, [text], [masks, few])
    all_of_them = dataclasses.replace(config, experts_per_token=4)
    with pytest.raises(UserError, match="layer 0 sends every token to all of its 4 experts"):
        expert_damage(all_of_them, params, [text])
    with pytest.raises(UserError, match="no batches"):
        taylor_importance(config, params, [])
