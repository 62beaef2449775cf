"""Write `hf/export.json`: what transformers makes of the directories that `export_hf` writes.

    models:  {name: {"config":  the config.json that was exported,
                     "tensors": {name: [dtype, shape]} as transformers saves the opened model,
                     "float32": largest difference of logits from ours, computed in float32,
                     "bfloat16": root mean square of what computing in bfloat16 changes in theirs,
                                 relative to that of the logits,
                     "bfloat16_ours": the same of ours}}
    transformers, torch: versions

for each golden model of `make_hf_logits.py`. Both libraries are needed, in their own environments:

    python tests/golden/make_hf_export.py write /tmp/exported
    torch-env/bin/python tests/golden/make_hf_export.py check /tmp/exported

`check` fails where transformers misses or ignores a tensor, where logits differ by more than 1e-4,
or where bfloat16 changes theirs by more than twice what it changes ours.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "hf"


def write(directory: Path) -> None:
    """Export every golden model, and keep the logits of our forward pass beside it."""
    import jax.numpy as jnp

    from jaxopt_models.checkpoint import huggingface
    from jaxopt_models.checkpoint.export import export_hf
    from jaxopt_models.checkpoint.safetensors_writer import write_sharded
    from jaxopt_models.models.model import Model
    from jaxopt_models.models.transformer import forward

    for path in sorted(OUT.glob("*.npz")):
        arrays = dict(np.load(path))
        if "config" not in arrays:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            Path(temporary, "config.json").write_text(str(arrays["config_published"]))
            write_sharded(temporary, {key: a for key, a in arrays.items() if "." in key})
            config = huggingface.read_config(temporary)
            params = huggingface.read_params(temporary, config)
        export_hf(directory / path.stem, Model(config, params))
        tokens = jnp.asarray(arrays["tokens"])
        logits = {
            dtype: np.asarray(forward(dataclasses.replace(config, dtype=dtype), params, tokens))
            for dtype in ("float32", "bfloat16")
        }
        np.savez(directory / f"{path.stem}.npz", tokens=arrays["tokens"], **logits)
        print(f"{path.stem}: exported", flush=True)


def check(directory: Path) -> None:
    """Open every export with transformers and compare."""
    import torch
    import transformers
    from make_hf_logits import softcapped_gemma3

    torch.set_num_threads(1)
    models = {}
    for path in sorted(directory.glob("*.npz")):
        with torch.no_grad(), softcapped_gemma3():
            models[path.stem] = check_one(directory / path.stem, dict(np.load(path)))
        found = models[path.stem]
        print(
            f"{path.stem}: {found['float32']:.1e} {found['bfloat16']:.1e} "
            f"{found['bfloat16_ours']:.1e}",
            flush=True,
        )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in models.items()]
    text = '{"models": {\n' + ",\n".join(lines) + "},\n" + json.dumps(versions)[1:]
    (OUT / "export.json").write_text(text + "\n")


def check_one(directory: Path, ours: dict[str, np.ndarray]) -> dict:
    from safetensors import safe_open

    reference = ours["float32"]
    exact = float(np.abs(logits(directory, ours["tokens"], "float32") - reference).max())
    theirs = relative_error(logits(directory, ours["tokens"], "auto"), reference)
    own = relative_error(ours["bfloat16"], reference)
    if exact > 1e-4 or theirs > 2 * own:
        raise SystemExit(f"{directory.name}: logits differ by {exact:.2g}; {theirs:.2g}, {own:.2g}")
    with tempfile.TemporaryDirectory() as temporary:
        open_model(directory, "auto").save_pretrained(temporary)
        with safe_open(Path(temporary, "model.safetensors"), "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: [s.get_dtype(), s.get_shape()] for name, s in slices.items()}
    return {
        "config": json.loads((directory / "config.json").read_text()),
        "tensors": tensors,
        "float32": exact,
        "bfloat16": theirs,
        "bfloat16_ours": own,
    }


def relative_error(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sqrt(np.mean((logits - reference) ** 2) / np.mean(reference**2)))


def logits(directory: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch

    model = open_model(directory, dtype)
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def open_model(directory: Path, dtype: str):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"{directory.name} did not load exactly: {wrong}")
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check exports with transformers.")
    parser.add_argument("step", choices=["write", "check"])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    {"write": write, "check": check}[arguments.step](arguments.directory)
