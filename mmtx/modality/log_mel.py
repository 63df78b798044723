"""The scale of log-mel spectrograms, which the audio tokenizer makes and encoders of sounds read."""

FLOOR = 1e-3              # mel magnitudes below it count as silence: 70 dB under a full-scale tone
CENTRE, SPREAD = -4.5, 2  # scale log magnitudes of peak-normalised sound to about [-1, 3]
