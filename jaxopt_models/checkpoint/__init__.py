"""Model files: Hugging Face directories, GGUF files and this library's own checkpoints."""
