"""cuDNN's attention: what takes it, what it is told, and on a GPU that it is the reference."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models.models import flash_attention
from jaxopt_models.models.attention import _attend_in_chunks, self_attend
from jaxopt_models.models.flash_attention import has_flash_attention

CASES = {
    "causal": {},
    "window": {"window": 30},
    "documents": {"documents": True},
    "both": {"window": 30, "documents": True},
}


def arrays(dtype=jnp.bfloat16, batch: int = 2, length: int = 256, heads: int = 4, dim: int = 64):
    shapes = (batch, length, heads, dim), *2 * [(batch, heads // 2, length, dim)]
    made = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]
    return [jnp.asarray(array, dtype) for array in made]


def options(case: str, batch: int = 2, length: int = 256) -> dict:
    chosen = CASES[case] | {"scale": 0.2}
    if chosen.pop("documents", False):
        at = np.arange(length)
        starts = np.stack([np.where(at < 90, 0, 90), np.where(at < 201, 7 * (at // 7), 201)])
        chosen["starts"] = jnp.asarray(np.resize(starts, (batch, length)), jnp.int32)
    return chosen


def loss(attend, *given, **chosen):
    return jnp.sum(jnp.sin(attend(*given, **chosen).astype(jnp.float32)))


def reference(query, key, value, starts=None, window=None, **chosen):
    return _attend_in_chunks(query, key, value, starts, window=window, softcap=None, **chosen)


@pytest.fixture
def ampere(monkeypatch):
    """Traces as beside a GPU with cuDNN."""
    monkeypatch.setattr(flash_attention, "_on_ampere", lambda: True)
    monkeypatch.setattr(cudnn, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91500))


@pytest.mark.parametrize("case", CASES)
def test_gradients_for_a_gpu_keep_no_scores(ampere, case):
    """Under either way of computing layers again."""
    given, chosen = arrays(), options(case)
    attend = partial(loss, self_attend, **chosen)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    for function in (attend, jax.checkpoint(attend, policy=policy)):
        traced = jax.jit(jax.grad(function, argnums=(0, 1, 2))).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        kind = "fmhaScaleBiasSoftmax" if "starts" in chosen else "fmhaSoftmax"
        calls = re.findall(r"__cudnn\$(\w+)", text)
        assert calls == [kind, f"{kind}Backward"]
        assert "dot_general" not in text  # neither of scores, nor of what is no longer reached
        (window,) = set(re.findall(r"sliding_window_length\\22: (\d+)", text))
        alone = "starts" not in chosen
        assert int(window) == (chosen.get("window", 0) if alone else 0)


@pytest.mark.parametrize("case", CASES)
def test_elsewhere_it_is_the_reference_bit_for_bit(ampere, case):
    given, chosen = arrays(length=128, batch=1), options(case, 1, 128)
    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, attend, **chosen), argnums=(0, 1, 2)))(*given)
        for attend in (self_attend, reference)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_the_mask_of_documents_and_windows_is_the_reference_s(case):
    """In XLA's implementation of what cuDNN is asked for."""
    given, chosen = arrays(jnp.float32), options(case)
    with pytest.MonkeyPatch.context() as patch:
        plain = jax.nn.dot_product_attention
        patch.setattr(
            flash_attention.jax.nn,
            "dot_product_attention",
            lambda *a, implementation, **k: plain(*a, **k),
        )
        found, expected = (
            jax.jit(partial(attend, **chosen))(*given)
            for attend in (flash_attention.flash_attention, reference)
        )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")])
def test_rows_and_heads_stay_split(ampere, spec):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto)
    batch, heads = (*spec, None)[:2]
    specs = P(batch, None, heads), P(batch, heads), P(batch, heads)
    given = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
        for array, spec in zip(arrays(), specs, strict=True)
    ]
    run = jax.jit(jax.grad(partial(loss, self_attend, scale=0.2), argnums=(0, 1, 2)))
    text = str(run.lower(*given).compile().as_text())
    assert "all-gather" not in text and "all-to-all" not in text


def test_what_takes_it(ampere):
    assert has_flash_attention(*arrays())
    assert has_flash_attention(*arrays(jnp.float16, dim=128, length=128))
    assert has_flash_attention(*arrays(length=129))
    no = [arrays(jnp.float32), arrays(length=127), arrays(dim=136), arrays(dim=60)]
    assert not any(has_flash_attention(*given) for given in no)
    assert not has_flash_attention(*arrays(), softcap=50.0)
    starts = jnp.zeros((2, 129), jnp.int32)
    assert not has_flash_attention(*arrays(length=129), starts=starts)


def test_a_cpu_has_none():
    assert jax.devices()[0].platform != "cpu" or not has_flash_attention(*arrays())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [128, 256, 1000])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, length, dtype):
    """Values and gradients are as near to float32's as those of the reference in that dtype."""
    sizes = {"batch": 4, "length": length, "dim": 128 if length == 1000 else 64}
    given, chosen = arrays(dtype, **sizes), options(case, 4, length)
    wide = [array.astype(jnp.float32) for array in given]
    assert has_flash_attention(*given, starts=chosen.get("starts"))

    def everything(attend, given):
        of_all = jax.jit(jax.grad(partial(loss, attend, **chosen), argnums=(0, 1, 2)))(*given)
        out = jax.jit(partial(attend, **chosen))(*given)
        return [np.asarray(array, np.float64) for array in (out, *of_all)]

    with jax.default_matmul_precision("highest"):
        exact = everything(reference, wide)
    for found, plain, best in zip(
        everything(self_attend, given), everything(reference, given), exact, strict=True
    ):
        error, known = (np.linalg.norm(array - best) for array in (found, plain))
        assert error <= 2 * known + 1e-3 * np.linalg.norm(best)
