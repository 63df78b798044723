"""Tokenizers, one file for each modality: media to integer codes and back."""
