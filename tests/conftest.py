"""Settings of every test: 8 virtual CPU devices, strict dtypes and ranks, and no network."""

import os

import hypothesis
import jax
import pytest

# The environment and not only jax.config: tests start processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_x64", False)

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("local"), derandomize=True
)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's own cache directory for later runs.

    Most of the suite's time is XLA compiling the same tiny models again: a repeated run takes about
    a quarter of the time. `pytest --cache-clear` empties it. Each worker has a directory of its
    own: entries are not written atomically, and XLA crashes on one that is read half-written.
    """
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is None:  # pytest -p no:cacheprovider
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    for name, value in {
        "jax_compilation_cache_dir": str(cache.mkdir(f"jax-{worker}")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and all(device.platform != "gpu" for device in jax.devices()):
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu")
        for item in on_gpu:
            item.add_marker(skip)
