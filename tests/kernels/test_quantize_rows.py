"""Activations become the codes that the numeric definition gives them, bit for bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxopt_models.formats import resolve
from jaxopt_models.qtensor import quantize_array
from kernels_pallas import quantize_rms_norm, quantize_rows, quantize_silu_mul, rms_norm
from kernels_pallas.eight_bit import KINDS, decode, quotient
from kernels_pallas.quantize_rows import quantize_kernel, quantize_reference

SPECS = {
    "fp8": resolve("fp8", granularity="channel"),
    "int8": resolve("int8", granularity="channel"),
    "fp8_block": resolve("fp8", granularity="block", block_size=128),
}
EPS = 1e-6


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(11, 512)).astype(np.float32)
    return {
        "normal": normal,
        "spread": normal * 10.0 ** rng.uniform(-38, 37, size=(11, 1)).astype(np.float32),
        "ties": rng.integers(-24, 25, size=(11, 512)).astype(np.float32) / 4,
        "zeros": 0 * normal,
        "subnormal": normal * np.float32(1e-39),
        "tiny": normal * np.float32(1e-36),
    }


def bits(codes: jax.Array) -> np.ndarray:
    return np.asarray(codes).view(np.uint8)


def defined(x: jax.Array, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes' bits and scales by `jaxopt_models.numerics`."""
    leaf = jax.jit(partial(quantize_array, format=SPECS[kind]))(x)
    scale = np.asarray(leaf.scale)
    return bits(leaf.codes), scale.T if kind == "fp8_block" else scale[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_and_scales_are_those_of_the_definition(kind, name, dtype):
    x = jnp.asarray(inputs()[name]).astype(dtype)
    codes, scales = jax.jit(quantize_rows, static_argnums=1)(x, kind)
    expected, expected_scales = defined(x, kind)
    np.testing.assert_array_equal(bits(codes), expected)
    np.testing.assert_array_equal(scales[..., : len(x)], expected_scales)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("amax", [0.0, 1e-39, 1e-36, 2.0, 1e30])
def test_by_a_given_amax_as_well(kind, name, amax):
    """Values beyond it saturate."""
    x, amax = jnp.asarray(inputs()[name]), jnp.float32(amax)
    codes, scales = jax.jit(quantize_rows, static_argnums=1)(x, kind, amax)
    leaf = jax.jit(partial(quantize_array, format=resolve(kind)))(x, amax=amax)
    np.testing.assert_array_equal(bits(codes), bits(leaf.codes))
    assert scales.shape == (11,) and np.all(scales == leaf.scale[0])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_given_amax_hides_no_nan(kind):
    x = jnp.ones((3, 256)).at[0, 3].set(jnp.nan).at[1, 3].set(jnp.inf)
    values = np.asarray(decode(*quantize_rows(x, kind, jnp.float32(2)), kind))
    assert np.isnan(values[0, 3]) and np.all(np.isfinite(values[1:]))
    assert values[1, 3] == 2 and np.all(np.abs(values[2] - 1) <= 1 / 127)


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_a_product_is_quantizing_what_it_stores(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    x, up = (jax.random.normal(key, (5, 256), jnp.bfloat16) for key in keys[:2])
    weight = jax.random.normal(keys[2], (256,), jnp.bfloat16)
    gated = (jax.nn.silu(x.astype(jnp.float32)) * up.astype(jnp.float32)).astype(jnp.bfloat16)
    fused = quantize_rms_norm(x, weight, EPS, kind), quantize_silu_mul(x, up, kind)
    apart = [quantize_rows(stored, kind) for stored in (rms_norm(x, weight, EPS), gated)]
    for (codes, scales), expected in zip(fused, apart, strict=True):
        found, wanted = decode(codes, scales, kind), decode(*expected, kind)
        # Functions that are a last place off may round a value to the next bfloat16, or code.
        largest = np.abs(np.asarray(wanted)).max()
        np.testing.assert_allclose(found, wanted, rtol=0.08, atol=largest / 127)
        assert np.mean(bits(codes) != bits(expected[0])) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["rows", "rms_norm", "silu_mul"])
@pytest.mark.parametrize(("m", "k"), [(3, 512), (2, 3072), (1, 9216)])
def test_interpreted(source, kind, m, k):
    arrays = random_arrays(source, m, k)
    codes, scales = quantize_kernel(source, kind, EPS, *arrays, interpret=True)
    expected, expected_scales = quantize_reference(source, kind, EPS, *arrays)
    assert np.mean(bits(codes) != bits(expected)) < (0.02 if source == "rms_norm" else 1e-9)
    np.testing.assert_allclose(scales[..., :m], expected_scales[..., :m], rtol=5e-3)
    if source == "rows":
        np.testing.assert_array_equal(scales[..., :m], expected_scales[..., :m])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", inputs())
def test_interpreted_on_special_values(kind, name):
    x = jnp.asarray(inputs()[name]).astype(jnp.bfloat16)
    codes, scales = quantize_kernel("rows", kind, 0.0, x, interpret=True)
    expected, expected_scales = defined(x, kind)
    np.testing.assert_array_equal(bits(codes), expected)
    np.testing.assert_array_equal(scales[..., : len(x)], expected_scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["rows", "rms_norm", "silu_mul"])
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (5, 1536), (2048, 14336), (1, 28672)])
def test_lowers_for_hopper(source, kind, m, k):
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    shapes = jax.eval_shape(lambda: random_arrays(source, m, k))
    run = partial(quantize_kernel, source, kind, EPS)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def random_arrays(source: str, m: int, k: int) -> tuple[jax.Array, ...]:
    first, second = jax.random.split(jax.random.key(m))
    x = jax.random.normal(first, (m, k), jnp.bfloat16)
    others = {"rows": [], "rms_norm": [(k,)], "silu_mul": [(m, k)]}[source]
    return (x, *(jax.random.normal(second, shape, jnp.bfloat16) for shape in others))


def test_quotients_are_the_nearest():
    rng = np.random.default_rng(0)
    a, b = (2.0 ** rng.uniform(-60, 60, 10_000) for _ in range(2))
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = (a.astype(np.float64) / b).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(quotient)(a, b), exact)


def test_infinity_is_noticed():
    x = jnp.ones((2, 256)).at[0, 3].set(jnp.inf)
    for kind in KINDS:
        codes, scales = quantize_rows(x, kind)
        values = np.asarray(decode(codes, scales, kind))
        assert np.isnan(values[0, :128]).all() and np.isfinite(values[1]).all()


def test_misfits_are_named():
    x = jnp.zeros((3, 200), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"shape \(3, 200\); needed is \[M, K\], K a multiple"):
        quantize_rows(x, "fp8_block")
    with pytest.raises(ValueError, match=r"weight has shape \(100,\); x of shape \(3, 200\)"):
        quantize_rms_norm(x, jnp.zeros((100,)), EPS, "fp8")
    with pytest.raises(ValueError, match=r"gate has shape \(3, 200\), up \(2, 200\)"):
        quantize_silu_mul(x, x[:2], "fp8")
    with pytest.raises(ValueError, match=r"no kernel for \['bfloat16\(3, 200\)'\]; needed are"):
        quantize_kernel("rows", "fp8", 0.0, x)
    with pytest.raises(ValueError, match=r"\(3, 200\) in fp8 by an amax \(3,\); needed are"):
        quantize_rows(x, "fp8", jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(3, 200\) in fp8_block by an amax \(\); needed are"):
        quantize_rows(x, "fp8_block", jnp.float32(1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    for name, array in inputs().items():
        with jax.default_device(jax.devices("gpu")[0]):
            x = jnp.asarray(array).astype(jnp.bfloat16)
            codes, scales = quantize_kernel("rows", kind, 0.0, x)
        with jax.default_device(jax.devices("cpu")[0]):
            expected, expected_scales = quantize_reference(
                "rows", kind, 0.0, jnp.asarray(array).astype(jnp.bfloat16)
            )
        np.testing.assert_array_equal(bits(codes), bits(expected), err_msg=name)
        np.testing.assert_array_equal(scales[..., :11], expected_scales[..., :11], err_msg=name)
    with jax.default_device(jax.devices("gpu")[0]):
        for source in ("rms_norm", "silu_mul"):
            arrays = random_arrays(source, 64, 14336)
            codes, scales = quantize_kernel(source, kind, EPS, *arrays)
            expected, expected_scales = quantize_reference(source, kind, EPS, *arrays)
            assert np.mean(bits(codes) != bits(expected)) < 0.02
            np.testing.assert_allclose(scales, expected_scales, rtol=5e-3)
