"""Post-training quantization: recipes, algorithms and the driver that applies them."""
