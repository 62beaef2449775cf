"""The product as users call it: which kernel it takes, its gradient, batches and shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch, reference, tuning, w4a16
from kernels_pallas.decode_tiling import Tiling


def test_elsewhere_the_reference_answers(weight, activations, relative_error):
    packed, values = weight("nvfp4", 24, 192)
    x = activations(6, 192).reshape(2, 3, 192)
    found = jax.jit(w4a16)(x, packed)
    assert found.shape == (2, 3, 24)
    assert relative_error(found.reshape(6, 24), x.reshape(6, 192), values) < 5e-3


def test_gradient_goes_through_the_values_of_the_weight(weight, activations):
    packed, values = weight("int4", 24, 256)
    x, ahead = activations(3, 256).astype(jnp.float32), jnp.arange(72.0).reshape(3, 24)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(w4a16(x, packed) * ahead)))(x)
    np.testing.assert_allclose(gradient, np.asarray(ahead) @ values, rtol=1e-4, atol=1e-2)


def test_misfits_are_named(weight):
    packed, _ = weight("int4", 16, 512)
    with pytest.raises(ValueError, match="x has 500 columns, the weight 512"):
        w4a16(jnp.zeros((1, 500), jnp.bfloat16), packed)


@pytest.fixture
def hopper(monkeypatch):
    """Lets the dispatch choose as on an H100."""

    class Device:
        platform, compute_capability, core_count = "gpu", "9.0", 132
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(dispatch.jax, "devices", lambda: [Device()])


def chosen(x: jax.Array, packed) -> tuple[str, object]:
    kernel = dispatch._kernel_for(x, packed)
    return ("reference", None) if kernel is None else (kernel.func.__name__, kernel.keywords)


@pytest.mark.parametrize(
    ("m", "n", "kernel"),
    [
        (1, 64, "w4a16_decode"),
        (16, 72, "w4a16_decode"),
        (17, 72, "w4a16_wide"),
        (300, 512, "w4a16_wide"),
        (0, 64, "reference"),
    ],
)
def test_rows_choose_the_kernel(hopper, weight, activations, m, n, kernel):
    packed, _ = weight("mxfp4", n, 1024)
    assert chosen(activations(m, 1024), packed)[0] == kernel


def test_only_bfloat16_has_kernels(hopper, weight, activations):
    packed, _ = weight("int4", 64, 512)
    assert chosen(activations(4, 512).astype(jnp.float32), packed)[0] == "reference"


def test_a_tuned_tiling_comes_first(hopper, weight, activations, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path))
    packed, _ = weight("int4", 64, 1024)
    name = dispatch.jax.devices()[0].device_kind
    problem = tuning.Problem("w4a16_decode", "int4", 8, 64, 1024)
    tuning.remember({problem: {"wn": 1, "wk": 2, "depth": 3}}, tuning.cache_file(name))
    options = chosen(activations(3, 1024), packed)[1]
    assert options == {"tiling": Tiling(1, 2, depth=3), "processors": 132}
    tuning.remember({problem: {"wn": 1, "wk": 4}}, tuning.cache_file(name))
    with pytest.raises(ValueError, match="does not fit.*remove that line and tune again"):
        chosen(activations(3, 1024), packed)


def test_batches_add_to_the_rows(weight, activations):
    packed, _ = weight("nvfp4", 32, 192)
    x = activations(12, 192).reshape(4, 3, 192)
    found = jax.jit(jax.vmap(w4a16, (0, None)))(x, packed)
    np.testing.assert_array_equal(found.reshape(12, 32), w4a16(x.reshape(12, 192), packed))
    gradient = jax.vmap(jax.grad(lambda x: jnp.sum(w4a16(x, packed).astype(jnp.float32))))(x)
    assert gradient.shape == x.shape


def test_batches_of_weights_are_products_of_their_own(weight, activations):
    packed = [weight("int4", 32, 256, seed)[0] for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)
    x = activations(5, 256)
    found = jax.jit(jax.vmap(w4a16, (None, 0)))(x, stacked)
    for each, one in zip(found, packed, strict=True):
        np.testing.assert_array_equal(each, w4a16(x, one))


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    ("n", "k", "where", "collectives"),
    [
        (256, 1024, P("model"), {}),
        (128, 2048, P(None, "model"), {"all-reduce": 1}),
        (128, 2048, P(), {}),
        (128, 768, P(None, "model"), {"all-gather": 3}),  # K is no whole number of steps
        (128, 512, P("model"), {"all-gather": 3}),  # nor N / 4 of blocks
    ],
)
def test_shards_stay_where_they_are(
    weight, activations, relative_error, mesh, kind, n, k, where, collectives
):
    packed, values = weight(kind, n, k)

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    x = put(activations(6, k), P("data", *where[1:]))
    shards = jax.tree.map(lambda leaf: put(leaf, P(*where[: leaf.ndim])), packed)
    product = jax.jit(w4a16)
    text = str(product.lower(x, shards).compile().as_text())
    counts = {name: text.count(f" {name}(") for name in ("all-gather", "all-reduce")}
    assert {name: count for name, count in counts.items() if count} == collectives
    found = product(x, shards)
    along_n = () if "all-gather" in collectives else where[:1]
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data", *along_n)), 2)
    assert relative_error(found, x, values) < 5e-3


@pytest.mark.gpu
def test_dispatch_takes_the_kernel_on_a_gpu(weight, activations, relative_error):
    with jax.default_device(jax.devices("gpu")[0]):
        packed, values = weight("int4", 256, 1024)
        x = activations(4, 1024)
        text = jax.jit(w4a16).lower(x, packed).as_text()
        assert ("mosaic_gpu" in text) == (dispatch.hopper_processors() is not None)
        assert relative_error(jax.jit(w4a16)(x, packed), x, values) < 3e-3
        assert relative_error(reference.w4a16(x, packed), x, values) < 5e-3
