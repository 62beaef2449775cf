"""Names of tensors in Hugging Face checkpoints for the leaf paths of this library.

Both trees use the same vocabulary, so a path turns into a name by swapping separators; what differs
is the mixture of experts, which is one stacked leaf here and a tensor for each expert there:

    layers/3/self_attn/q_proj/weight       model.layers.3.self_attn.q_proj.weight
    layers/3/mlp/experts/gate_proj/weight  model.layers.3.mlp.experts.{0, 1, …}.gate_proj.weight
"""

from collections.abc import Iterable

from jaxopt_models.models.config import ModelConfig

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Prefixes of body and head: a language model alone, and inside the multimodal Gemma 3 as older and
# as newer versions of transformers write it.
_PLAIN = ("model.", "lm_head.")
_LAYOUTS = (
    _PLAIN,
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
)
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.")


def hf_names(config: ModelConfig, path: str) -> tuple[str, ...]:
    """Names of the tensors that make up a leaf: one, or one for each expert in their order.

    The last key of the path is kept as it is, so that names of scales follow those of weights.
    """
    if not path.startswith("layers/"):
        name = path.replace("/", ".")
        return (name if path.startswith("lm_head/") else f"model.{name}",)
    _, layer, *keys = path.split("/")
    prefix = f"model.layers.{layer}"
    if keys[:2] == ["mlp", "router"]:
        return (f"{prefix}.{_moe_block(config)}.gate.{keys[2]}",)
    if keys[:2] == ["mlp", "experts"]:
        _, _, projection, leaf = keys
        if config.model_type == "mixtral":
            projection = _MIXTRAL[projection]
        block = f"{prefix}.{_moe_block(config)}.experts"
        return tuple(f"{block}.{e}.{projection}.{leaf}" for e in range(config.num_experts))
    return (".".join([prefix, *keys]),)


def _moe_block(config: ModelConfig) -> str:
    return "block_sparse_moe" if config.model_type == "mixtral" else "mlp"


def text_tensors(names: Iterable[str]) -> dict[str, str]:
    """Stored names of the language model's tensors, by the names that `hf_names` gives.

    The layout is the one under whose prefix `embed_tokens.weight` is stored. Tensors of the other
    towers of a multimodal model are left out; the rest is kept, so that nothing goes unnoticed.
    """
    names = tuple(names)
    layouts = (pair for pair in _LAYOUTS if f"{pair[0]}embed_tokens.weight" in names)
    layout = next(layouts, _PLAIN)
    if layout != _PLAIN:
        names = tuple(n for n in names if not n.removeprefix("model.").startswith(_OTHER_TOWERS))
    return {_plain_name(name, layout): name for name in names}


def _plain_name(name: str, layout: tuple[str, str]) -> str:
    for stored, plain in zip(layout, _PLAIN, strict=True):
        if name.startswith(stored):
            return plain + name.removeprefix(stored)
    return name


def may_be_ignored(config: ModelConfig, name: str) -> bool:
    """True for tensors that repeat what the model already has.

    These are rotary frequencies, which the config gives, and an output head that is the embedding.
    """
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )
