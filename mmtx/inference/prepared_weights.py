"""A decoder's weights laid out for decoding, once for many answers, and again if they have changed."""

import threading
from typing import Any

from mmtx.errors import InputError
from mmtx.inference.row import prepack_weights
from mmtx.inference.weights import Weights
from mmtx.model import Decoder

_LAYING_OUT = threading.Lock()  # shared by all models: a model with a lock of its own could not be pickled


class PreparedWeights:
    """The laid-out weights of one model, if `prepare` was called; changes through `Parameter.data` are not detected."""

    def __init__(self) -> None:
        self.in_8_bits: bool | None = None  # None: not prepared
        self._made: tuple[tuple, Weights | None] = ((), None)  # `_versions` when they were made, and the weights

    def __getstate__(self) -> dict[str, Any]:
        # The laid-out weights are views of parameters, which can be remade but not copied.
        return {"in_8_bits": self.in_8_bits, "_made": ((), None)}

    def prepare(self, decoder: Decoder, in_8_bits: bool) -> None:
        """Lay the weights out. Raises InputError for 8 bits on a device other than a CPU."""
        device = decoder.embedding.weight.device
        if in_8_bits and device.type != "cpu":
            raise InputError(f"load_in_8bit: found the device {device}, expected cpu")
        if device.type == "cpu":
            prepack_weights(decoder)
        weights = Weights.of(decoder, fixed=True, load_in_8bit=in_8_bits)
        self.in_8_bits, self._made = in_8_bits, (_versions(decoder), weights)

    def of(self, decoder: Decoder) -> Weights | None:
        """The laid-out weights, laid out again if they have changed; None if `prepare` was not called."""
        if self.in_8_bits is None:
            return None
        versions, weights = self._made
        if versions != (now := _versions(decoder)):
            with _LAYING_OUT:
                if self._made[0] != now:
                    self.prepare(decoder, self.in_8_bits)
                weights = self._made[1]
        return weights


def _versions(decoder: Decoder) -> tuple[tuple[int, int], ...]:
    """The address of each weight of the decoder, and how often it was written to."""
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in decoder.parameters())
