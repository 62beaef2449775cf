"""Settings of every test: 8 virtual CPU devices, strict dtypes and ranks, and no network."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest

# The environment and not only jax.config: tests start processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile far longer than they compute. Without LLVM's optimizations, and with XLA's older
# emitter of fusions instead of the one by MLIR, that takes a third of the time; and what one
# module, worker or run has compiled the next ones read from disk.
_QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
# A worker inherits what its parent has set.
_FLAGS = os.environ.get("XLA_FLAGS", "").replace(_QUICK_COMPILATION, "").strip()
os.environ["XLA_FLAGS"] = f"{_QUICK_COMPILATION} {_FLAGS}"
_COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# This process has read the environment by now.
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_x64", False)

# Files that take a worker minutes come first, so that none of them is what all wait for at the end.
_LONGEST = (
    "test_notebooks.py",
    "test_inference.py",
    "test_cache.py",
    "test_speculative.py",
    "test_w4a16_decode.py",
    "test_sensitivity.py",
    "test_run.py",
    "test_step.py",
    "test_draft.py",
    "test_repeated.py",
)

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("local"), derandomize=True
)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


@pytest.fixture(scope="session")
def users_environment() -> dict[str, str]:
    """Of a process that compiles as a user's does, on the CPU and without a network."""
    return os.environ | {"XLA_FLAGS": _FLAGS}


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Drops what a module compiled when its last test is done.

    Each program on CPU holds three memory mappings or more, Linux grants a process 65,530, and XLA
    ends with a segmentation fault on the first that it does not get.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    # Here, since importing it reads the environment that is set above.
    from jaxopt_models import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxopt-models", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Of transformers; its ids are the 256 bytes."""
    # Here, since they read the environment that is set above.
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: longest.get(item.path.name, len(longest)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and all(device.platform != "gpu" for device in jax.devices()):
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu")
        for item in on_gpu:
            item.add_marker(skip)
