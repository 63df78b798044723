"""Speech in pieces: long sounds are cut at pauses, and what is quiet around speech is left out.

Shapes: S samples.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

SILENCE = 1e-4        # peak of a sound without any (-80 dB, three steps of 16 bit): to normalise it would amplify noise
PAUSE_WINDOW = 0.1    # seconds over which a pause is measured
FRAME = 0.025         # seconds, long enough for the lowest voice
NOISE_QUANTILE = 0.1  # quantile of the power of a sound's frames that counts as its noise
SPEECH_TO_NOISE = 4.0           # least power of speech, relative to noise,
THRESHOLD_RANGE = 1e-4, 0.03    # clamped to these shares of the power of the loudest frame
MARGIN = 0.1          # seconds around speech: words begin and end more quietly


class Piece(NamedTuple):
    """A piece of a sound."""

    first: int       # index of its first sample in the sound
    samples: Tensor  # (S,)


def cut_at_pauses(sound: Tensor, rate: int, seconds: float) -> list[Piece]:
    """A sound (S,) -> pieces of at most so many seconds, in order, each cut where its second half is quietest.

    Quiet ends of pieces are left out, since a decoder would hear words in them; silence gives no piece. A constant offset, which
    some recorders add, is removed: with one of 0.02 of full scale, demos/speech had more than twice as many characters wrong.
    """
    if not len(sound) or (sound := sound - sound.mean()).abs().amax() <= SILENCE:
        return []
    loudness = _loudness(sound, rate)
    noise, loudest = loudness.quantile(NOISE_QUANTILE), loudness.amax()
    least = float((SPEECH_TO_NOISE * noise).clamp(*(loudest * share for share in THRESHOLD_RANGE)))
    pieces, start, longest = [], 0, round(seconds * rate)
    while len(sound) - start > longest:
        end = start + quietest(sound[start:start + longest].square(), rate, min(longest // 2, longest - round(PAUSE_WINDOW * rate)))
        pieces.append((start, end))
        start = end
    return [speech for start, end in (*pieces, (start, len(sound))) if (speech := _speech(sound[start:end], start, rate, least))]


def quietest(power: Tensor, rate: int, first: int) -> int:
    """The middle of the window, from sample `first` on, in which the power (S,) of a sound is least."""
    window, hop = round(PAUSE_WINDOW * rate), round(PAUSE_WINDOW * rate / 4)
    return first + int(F.avg_pool1d(power[None, None, first:], window, hop).argmin()) * hop + window // 2


def _loudness(sound: Tensor, rate: int) -> Tensor:
    """The power (mean square) of each frame of a sound (S,)."""
    frame = round(FRAME * rate)
    return F.pad(sound, (0, -len(sound) % frame)).view(-1, frame).square().mean(1)


def _speech(sound: Tensor, start: int, rate: int, least: float) -> Piece | None:
    """A piece (S,) from a margin before the first moment of at least the power `least` to one after the last, if there is any."""
    loud = (_loudness(sound, rate) >= least).nonzero()[:, 0].tolist()
    if not loud:
        return None
    frame, margin = round(FRAME * rate), round(MARGIN * rate)
    first = max(0, loud[0] * frame - margin)
    return Piece(start + first, sound[first:(loud[-1] + 1) * frame + margin])
