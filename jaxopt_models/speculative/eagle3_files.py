"""EAGLE-3 heads in files: the directories that vLLM, SGLang and speculators load.

Layout "eagle3" is that of the reference and of SpecForge, which SGLang and vLLM read, with the
layer under midlayer.*; "speculators" is vLLM's own, with layers.0.* and another config.json. Both
give the tokens of the head as d2t, int64 [V] to add to 0, 1, …, and t2d, bool over the model's.

They differ in what a layer's number means: behind layer i of the model is i under eagle_config,
and i + 1, the input of the next, in speculators. Ours is i. The rotary embedding is the head's own;
a config.json without rope_theta means 10000, whatever the model has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_params import abstract_eagle3, default_layers
from jaxopt_models.speculative.head_files import (
    HeadTensors,
    config_of,
    read_config,
    stored,
    with_own_embedding,
    write_head,
)
from jaxopt_models.tree import leaves_with_paths, map_with_path

Layout = Literal["eagle3", "speculators"]

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator")
# Keys of a head's config.json that are read here, or say what every head does.
_OWN_KEYS = (
    "draft_vocab_size",
    "target_hidden_size",
    "eagle_config",
    "norm_before_residual",
    "norm_output",
    "auto_map",
    "bias",
)
# What a head may be made with, and is not here.
_OPTIONS = ("fc_norm", "norm_before_fc", "parallel_drafting")


def is_eagle3(directory: Path) -> bool:
    """Whether it holds such a head, by its config.json."""
    named = config_of(directory).get("architectures") or ()
    return not set(_ARCHITECTURES).isdisjoint(named)


def read_eagle3(
    directory: str | Path,
    target: ModelConfig,
    *,
    count: int = 5,
    dtype: str = "float32",
) -> Eagle3:
    """A head from a directory of either layout.

    Args:
      directory: with config.json and safetensors.
      target: the model that it was made for.
      count: tokens of a guess.
      dtype: of its activations; weights keep the stored one.

    Raises:
      UserError: for a file or tensor that is missing, misshapen, left over or not finite, and for
        options that are not supported.
    """
    directory = Path(directory).expanduser()
    fields = read_config(directory)
    config, layers, before = _described(directory / "config.json", fields, target)
    config = replace(config, dtype=dtype)
    reads = len(layers) * target.hidden_size
    shapes = abstract_eagle3(config, reads, jnp.float32)
    params = _read(HeadTensors(directory, "a draft head"), shapes, target)
    head = Eagle3(config, params, layers, count, before)
    head.check(target)
    return head


def export_eagle3(
    directory: str | Path,
    head: Eagle3,
    target: ModelConfig,
    layout: Layout = "eagle3",
    *,
    dtype: Any = jnp.bfloat16,
    verifier: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a head; the directory appears only when it is complete.

    Args:
      directory: must not exist yet, unless it may be overwritten.
      head: leaves of any kind, whose values are written.
      target: the model that it was made for.
      layout: see above.
      dtype: of the weights.
      verifier: name or path of the model, which speculators keeps.
      overwrite: whether a directory may be there.

    Raises:
      UserError: for an unknown layout, a directory that exists, and weights that are not finite in
        the dtype.
    """
    if layout not in get_args(Layout):
        raise UserError(f"layout {layout!r} is unknown; choose {', '.join(get_args(Layout))}")
    fields = _fields(head, target, jnp.dtype(dtype).name)
    if layout == "speculators":
        fields = _speculators(head, fields, verifier)
    tensors = _tensors(head, target, layout, np.dtype(dtype))
    write_head(directory, fields, tensors, overwrite=overwrite)


# Reading


def _described(
    file: Path, fields: Mapping[str, Any], target: ModelConfig
) -> tuple[ModelConfig, tuple[int, ...], bool]:
    """(config of the head, layers of the model that it reads, norm_before_residual)."""
    theirs = fields.get("speculators_model_type") is not None
    own = dict(fields["transformer_layer_config"]) if theirs else dict(fields)
    wanted = [name for name in _OPTIONS if fields.get(name)]
    # With SpecForge it says that the head has a norm at all, with speculators that its output is
    # fed back behind it.
    if bool(fields.get("norm_output", not theirs)) == theirs:
        wanted.append("norm_output")
    if wanted:
        raise UserError(f"{file}: option {wanted[0]!r} of a draft head is not supported")
    if own.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{file}: a draft head of {own['num_hidden_layers']} layers, not of one")
    vocab_size = fields.get("draft_vocab_size") or own["vocab_size"]
    own |= {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": vocab_size}
    own["tie_word_embeddings"] = False
    config = ModelConfig.from_hf(own, ignore=(*_OWN_KEYS, *_OPTIONS))
    ids = fields.get("eagle_aux_hidden_state_layer_ids")
    if not theirs:
        ids = (fields.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        layers = default_layers(target.num_layers)
    else:
        layers = tuple(int(i) - 1 if theirs else int(i) for i in ids)
    return config, layers, bool(fields.get("norm_before_residual", False))


def _read(tensors: HeadTensors, shapes: Any, target: ModelConfig) -> Any:
    prefixed = any(name.startswith("midlayer.") for name in tensors.names)
    layer = "midlayer" if prefixed else "layers.0"

    def leaf(path: str, expected: Any) -> jax.Array:
        if path == "vocabulary":
            return jnp.asarray(_vocabulary(tensors, expected.shape[0], target), jnp.int32)
        return tensors.weight(_name(path, layer), expected.shape)

    shapes = with_own_embedding(shapes, tensors, "embed_tokens.weight", target.vocab_size)
    params = map_with_path(leaf, shapes)
    tensors.check_left_over("an EAGLE-3 head", ("t2d",))
    return params


def _vocabulary(tensors: HeadTensors, count: int, target: ModelConfig) -> np.ndarray:
    if "d2t" not in tensors.names and count == target.vocab_size:
        return np.arange(count)
    found = tensors.raw("d2t").astype(np.int64) + np.arange(count)
    inside = (found >= 0) & (found < target.vocab_size)
    if found.shape != (count,) or not inside.all() or (np.diff(found) <= 0).any():
        raise UserError(
            f"{tensors.path}: tensor 'd2t' does not name {count} rising tokens among the model's "
            f"{target.vocab_size}; the head was made for another model"
        )
    if "t2d" in tensors.names and not np.array_equal(np.flatnonzero(tensors.raw("t2d")), found):
        raise UserError(f"{tensors.path}: tensors 'd2t' and 't2d' name different tokens")
    return found


def _name(path: str, layer: str) -> str:
    """In a file, of a path in the parameters."""
    return path.replace("layers/0", layer).replace("/", ".")


# Writing


def _tensors(
    head: Eagle3, target: ModelConfig, layout: Layout, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    layer = "midlayer" if layout == "eagle3" else "layers.0"
    for path, leaf in leaves_with_paths(head.params):
        name = _name(path, layer)
        if path != "vocabulary":
            yield name, stored(name, leaf, dtype)
    vocabulary = np.asarray(head.params["vocabulary"], np.int64)
    said = np.zeros(target.vocab_size, np.bool_)
    said[vocabulary] = True
    yield "d2t", vocabulary - np.arange(len(vocabulary))
    yield "t2d", said


def _fields(head: Eagle3, target: ModelConfig, dtype: str) -> dict[str, Any]:
    own = head.config.to_hf() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "vocab_size": target.vocab_size,
        "draft_vocab_size": head.config.vocab_size,
        "torch_dtype": dtype,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": next(iter(target.eos_token_ids), None),
    }
    own["eagle_config"] = {
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        "use_aux_hidden_state": True,
    }
    if target.hidden_size != head.config.hidden_size:
        own["target_hidden_size"] = target.hidden_size
    if head.norm_before_residual:
        own["norm_before_residual"] = True
    return {key: value for key, value in own.items() if value is not None}


def _speculators(head: Eagle3, fields: dict[str, Any], verifier: str | None) -> dict[str, Any]:
    apart = ("architectures", "draft_vocab_size", "eagle_config", "norm_before_residual")
    layer = {key: value for key, value in fields.items() if key not in apart}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": head.count,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": head.config.vocab_size,
        "norm_before_residual": head.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in head.layers],
        "torch_dtype": fields["torch_dtype"],
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }
