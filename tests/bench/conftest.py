"""A model of one layer whose tokens are bytes, and an interpreter that plays peers."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
)


@pytest.fixture(scope="session")
def tiny_model(byte_tokenizer) -> Model:
    return Model(CONFIG, init(CONFIG, jax.random.key(0), jnp.float32), byte_tokenizer, "tiny")


@pytest.fixture(scope="session")
def sure_model(tiny_model) -> Model:
    """As sure of its predictions as a trained one."""
    table = tiny_model.params["embed_tokens"]["weight"]
    return replace(tiny_model, params=tiny_model.params | {"embed_tokens": {"weight": 20 * table}})


# An interpreter that, whatever script it is to run, answers for three peers of which one crashes.
PYTHON = """#!{python}
import json, os, sys, time
def tell(**line): print(json.dumps(line), flush=True)
assert "PYTHONPATH" not in os.environ and sys.argv[1].endswith("peer_kernels.py")
print("chatter", file=sys.stderr)
tell(versions={{"torch": "9"}}, device="a card")
for line in sys.stdin:
    problem = json.loads(line)
    if "ceilings" in problem:
        tell(start="torch int8")
        tell(peer="torch int8", m=8192, reason="no kernel")
        tell(ceilings={{"bf16_tflops": 790.0}})
    else:
        for name in ("steady", "crashing", "late"):
            if name in problem["without"] or problem["only"] and name not in problem["only"]:
                continue
            tell(start=name)
            for m in problem["ms"]:
                if name == "crashing" and m == 4:
                    {crash}
                tell(peer=name, m=m, us=float(m), clock="CUPTI", error=0.1)
    tell(done=True)
"""


@pytest.fixture
def peer_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")

    def make(crash: str) -> str:
        file = tmp_path / "python"
        file.write_text(PYTHON.format(python=sys.executable, crash=crash))
        file.chmod(0o755)
        return str(file)

    return make
