"""Losses at a position: what they promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from jaxopt_models.distill import losses
from jaxopt_models.errors import UserError

V = 50
DIVERGENCES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": losses.jensen_shannon,
}


def _pair(seed: int = 0, shape: tuple[int, ...] = (3, 4, V)):
    a, b = jax.random.split(jax.random.key(seed))
    return 3 * jax.random.normal(a, shape), 3 * jax.random.normal(b, shape)


def _probabilities(logits: jax.Array, temperature: float) -> np.ndarray:
    return np.exp(log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_their_formulas(temperature):
    student, teacher = _pair()
    p, q = _probabilities(teacher, temperature), _probabilities(student, temperature)
    m = 0.3 * p + 0.7 * q
    expected = {
        "forward_kl": rel_entr(p, q).sum(-1),
        "reverse_kl": rel_entr(q, p).sum(-1),
        "jensen_shannon": 0.3 * rel_entr(p, m).sum(-1) + 0.7 * rel_entr(q, m).sum(-1),
    }
    for name, divergence in DIVERGENCES.items():
        options = {"beta": 0.3} if name == "jensen_shannon" else {}
        found = divergence(student, teacher, temperature=temperature, **options)
        assert found.dtype == jnp.float32 and found.shape == (3, 4)
        np.testing.assert_allclose(found, temperature**2 * expected[name], rtol=2e-5, atol=1e-6)


def test_cross_entropy_is_its_formula():
    student, _ = _pair()
    targets = jnp.arange(12).reshape(3, 4)
    log_q = log_softmax(np.asarray(student, np.float64), axis=-1)
    expected = -np.take_along_axis(log_q, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.cross_entropy(student, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    student, teacher = _pair()
    loss = DIVERGENCES[name]
    shifted = student + 7.0  # the same distribution
    np.testing.assert_allclose(loss(shifted, student), 0.0, atol=2e-6)
    gradient = jax.grad(lambda s: jnp.sum(loss(s, student)))(shifted)
    np.testing.assert_allclose(gradient, 0.0, atol=2e-6)
    assert jnp.all(loss(student, teacher) > 0.01)


def test_temperature_leaves_gradients_their_size():
    student, teacher = _pair()

    def size(temperature: float) -> jax.Array:
        loss = lambda s: jnp.sum(losses.forward_kl(s, teacher, temperature))  # noqa: E731
        return jnp.linalg.norm(jax.grad(loss)(student))

    assert 0.3 < size(8.0) / size(1.0) < 3.0  # 1/64 without the factor


def test_jensen_shannon_is_symmetric_bounded_and_has_both_limits():
    student, teacher = _pair()
    found = losses.jensen_shannon(student, teacher)
    np.testing.assert_allclose(found, losses.jensen_shannon(teacher, student), rtol=1e-5)
    assert jnp.all(found <= np.log(2))
    student, teacher = student / 3, teacher / 3
    for limit, divergence in ((1e-3, losses.forward_kl), (1 - 1e-3, losses.reverse_kl)):
        near = losses.jensen_shannon(student, teacher, limit) / min(limit, 1 - limit)
        np.testing.assert_allclose(near, divergence(student, teacher), rtol=0.05)
    with pytest.raises(UserError, match="take forward_kl or reverse_kl"):
        losses.jensen_shannon(student, teacher, 1.0)


def test_top_k_grows_to_the_whole_divergence():
    student, teacher = _pair()
    whole = losses.forward_kl(student, teacher)
    found = [losses.top_k_kl(student, losses.top_k(teacher, k)) for k in (1, 5, 20, V - 1, V)]
    for less, more in zip(found, found[1:], strict=False):
        assert jnp.all(less <= more + 1e-5)
    np.testing.assert_allclose(found[-2], whole, rtol=1e-5)
    np.testing.assert_allclose(found[-1], whole, rtol=1e-5)
    assert jnp.all(found[0] < whole)


def test_top_k_sees_the_tail():
    """A student that raises tokens which the teacher finds unlikely pays for it."""
    student, teacher = _pair()
    known = losses.top_k(teacher, 5)
    tail = jnp.ones(student.shape).at[..., 0].set(1.0)
    tail = jnp.put_along_axis(tail, known.indices, 0.0, axis=-1, inplace=False)
    loss = lambda s: jnp.sum(losses.top_k_kl(s, known))  # noqa: E731
    assert loss(student + 5 * tail) > loss(student) + 1
    top, whole = jax.grad(loss)(student), jax.grad(partial(_summed, teacher))(student)
    assert jnp.all(jnp.abs(jnp.where(tail > 0, top, 1.0)) > 0)
    assert jnp.sum(top * whole) > 0.7 * jnp.linalg.norm(top) * jnp.linalg.norm(whole)


def _summed(teacher, student):
    return jnp.sum(losses.forward_kl(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_has_the_temperature_of_the_teacher(temperature):
    student, teacher = _pair()
    found = losses.top_k_kl(student, losses.top_k(teacher, V, temperature), temperature)
    np.testing.assert_allclose(found, losses.forward_kl(student, teacher, temperature), rtol=1e-5)


@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k"])
def test_tokens_that_both_exclude_cost_nothing(name):
    student, teacher = _pair()
    narrow = student[..., : V - 9], teacher[..., : V - 9]
    excluded = [jnp.full_like(x, -jnp.inf).at[..., : V - 9].set(x[..., : V - 9]) for x in _pair()]

    def loss(student, teacher):
        if name == "top_k":
            return losses.top_k_kl(student, losses.top_k(teacher, 4))
        return DIVERGENCES[name](student, teacher)

    np.testing.assert_allclose(loss(*excluded), loss(*narrow), rtol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(loss(s, excluded[1])))(excluded[0])
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", [*DIVERGENCES, "top_k"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_not_a_number_does_not_pass_for_agreement(name, whose):
    pair = list(_pair())
    pair[whose == "teacher"] = pair[whose == "teacher"].at[0, 0, 3].set(jnp.nan)
    if name == "top_k":
        found = losses.top_k_kl(pair[0], losses.top_k(pair[1], 4))
    else:
        found = DIVERGENCES[name](*pair)
    assert jnp.isnan(found[0, 0]) and jnp.all(jnp.isfinite(found[1:]))


def test_hidden_states():
    a, b = _pair(shape=(2, 3, 16))
    np.testing.assert_allclose(losses.cosine_distance(3 * a, a), 0.0, atol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(-a, a), 2.0, atol=1e-6)
    assert jnp.all(losses.cosine_distance(0 * a, b) == 1.0)
    np.testing.assert_allclose(losses.mean_square(1.5 * a, a), 0.25, rtol=1e-5)
    for loss in (losses.cosine_distance, losses.mean_square):
        gradient = jax.grad(lambda x, loss=loss: jnp.sum(loss(x, b)))(0 * a)
        assert jnp.all(jnp.isfinite(gradient))


def test_what_is_refused():
    student, teacher = _pair()
    with pytest.raises(UserError, match="the temperature is 0"):
        losses.forward_kl(student, teacher, 0.0)
    with pytest.raises(UserError, match="top_k is 51; choose 1 to 50"):
        losses.top_k(teacher, V + 1)
