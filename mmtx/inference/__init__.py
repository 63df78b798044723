"""Inference: engines that score the next id of a batch, sampling, and the generation loop."""
