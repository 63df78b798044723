"""Answers: engines that score the next id of a batch, sampling among the scores, and the loop that writes ids."""
