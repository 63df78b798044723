"""Pretrained language models in, transformers and GGUF out."""
