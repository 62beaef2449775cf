"""Static description of a decoder-only transformer, read from Hugging Face's `config.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxopt_models.errors import UserError

AttentionKind = Literal["full", "sliding"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle of pair i at position p is `p * f_i`, `f_i = theta^(-2i/d)`,
    rescaled by `kind`.

    `linear` divides every frequency by `factor` (arXiv:2306.15595); `llama3` divides only
    wavelengths longer than
    `original_max_position / low_freq_factor` and blends up to `original_max_position /
    high_freq_factor` (arXiv:2407.21783).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model; frozen and hashable, hence usable as a static argument.

    Widths here are those of the published architecture. The forward pass takes the number of heads
    and the feed-forward
    width of each layer from its arrays, so that pruned layers may differ from one another.

    Attributes:
      attention_kinds: "full" or "sliding" for each layer.
      sliding_window: number of keys, the query's own included, that a sliding layer sees.
      rope, local_rope: rotary embedding of full and of sliding layers.
      query_scale: factor on q·k.
      unit_offset_norm: RMSNorm multiplies by (1 + w) instead of w (Gemma).
      sandwich_norm: norms after attention and feed-forward as well as before (Gemma).
      embed_scale: factor on token embeddings.
      attention_softcap, final_softcap: `c * tanh(x / c)` on attention scores or on logits; None is
        off.
      moe_layers: indices of the layers whose feed-forward is a mixture of experts.
      dtype: compute dtype of activations; weights keep the dtype they are stored in.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    local_rope: Rope
    attention_kinds: tuple[AttentionKind, ...]
    sliding_window: int | None
    query_scale: float
    rms_norm_eps: float = 1e-6
    max_position: int = 2048
    tie_word_embeddings: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_offset_norm: bool = False
    sandwich_norm: bool = False
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_router: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> "ModelConfig":
        """Reads the contents of a `config.json`.

        Args:
          hf: the parsed file; a multimodal Gemma 3 file is read through its `text_config`.
          ignore: names of keys that are known not to change the computation.

        Raises:
          UserError: for an architecture, an option or a key that this library does not implement.
        """
        # It builds this class, so it cannot be imported above.
        from jaxopt_models.models import hf_config

        return hf_config.read_hf(hf, ignore)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a `config.json` that `from_hf` and transformers read to the same model."""
        from jaxopt_models.models import hf_config

        return hf_config.write_hf(self)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_json`: lists become tuples again, rotary embeddings become `Rope`."""
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()
        }
        try:
            ropes: dict[str, Any] = {key: Rope(**fields[key]) for key in ("rope", "local_rope")}
            return cls(**(values | ropes))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the stored model description does not fit this version of the library ({error}); "
                "read it with the version that wrote it"
            ) from error
