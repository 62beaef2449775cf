"""Training: leaves that learn under fake quantization, and the step that quantized training,
distillation and drafts share.
"""
