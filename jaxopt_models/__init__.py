"""Model optimization for JAX: quantize, measure, save, generate — pure functions over parameters.

model = load("smollm2-135m")
params, report = quantize(model, Recipe.load("nvfp4"), batches)
evaluate(model.config, params, batches, reference=model.params)
generate(model.config, params, prompts)
save("out", model.config, params, model.tokenizer)
"""

from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics, evaluate
from jaxopt_models.generate import Generation, generate, stream
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.qtensor import QTensor, dequantize, fake_quant, pack, quantize_array, unpack
from jaxopt_models.quantize.ptq import Report, quantize
from jaxopt_models.quantize.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Generation",
    "Metrics",
    "Model",
    "ModelConfig",
    "QTensor",
    "Recipe",
    "Report",
    "UserError",
    "dequantize",
    "evaluate",
    "export_hf",
    "fake_quant",
    "forward",
    "generate",
    "init",
    "load",
    "pack",
    "quantize",
    "quantize_array",
    "save",
    "stream",
    "unpack",
]
