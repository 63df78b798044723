"""An audio encoder pretrained on AudioSet, for `audio_encoder` of a config: the first layers of YAMNet.

    pip install tflite
    python build_audio_encoder.py --weights yamnet.tflite --out runs/yamnet

`--weights` is YAMNet for TensorFlow Lite, as TensorFlow Hub and MediaPipe publish it (Apache License 2.0,
https://github.com/tensorflow/models/tree/master/research/audioset/yamnet). The one that `demos/starter` began with has SHA-256
687f226c147a2caab4706fbbab5e9cecb14b9a368264bf61108078b1fddf68f5: 8 bits a weight, batch norms folded into the convolutions.
"""

import argparse
import io
import json
import math
import re
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from safetensors.torch import save_file
from torch import Tensor

from mmtx.config import MobileNetConfig, MobileNetShape, SeparableLayer
from mmtx.modality.base import load_tokenizer
from mmtx.modality.log_mel import FLOOR
from mmtx.modality.mobilenet import MobileNet, band_places

MELS, LOW, HIGH, RATE, WINDOW, FFT = 64, 125.0, 7500.0, 16_000, 400, 512  # of YAMNet's spectrograms: bands, Hz, samples
CONV_2D, DEPTHWISE = 3, 4  # operators of TensorFlow Lite
INT8 = 9                   # its type
LAYERS, STRIDED = range(2, 11), (3, 5, 7)  # of YAMNet's 14, by its own numbers; the first is the stem
# A linear layer on the outputs of one layer tells the instrument of a soundfont that it was not trained on, from 21,899 notes of
# others: 0.60 to 0.62 with layers 5, 6 and 8, 0.57 with 10, 0.48 with 12, and 0.64 with 5, 8 and 10 together.
OUTPUTS = (6, 8, 10)


def layers_of(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution in a file of TensorFlow Lite, such as "layer3/depthwise_conv"."""
    import tflite

    model = tflite.Model.GetRootAsModel(path.read_bytes(), 0)
    graph = model.Subgraphs(0)

    def values(index: int) -> Tensor:
        tensor = graph.Tensors(index)
        raw = model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes()
        array = np.frombuffer(raw, np.int8 if tensor.Type() == INT8 else np.float32).reshape(tensor.ShapeAsNumpy())
        if tensor.Type() == INT8:
            scale, shape = tensor.Quantization(), [1] * array.ndim
            shape[scale.QuantizedDimension()] = -1
            array = array * scale.ScaleAsNumpy().reshape(shape)
        return torch.from_numpy(array.astype(np.float32))

    found = {}
    for index in range(graph.OperatorsLength()):
        operator = graph.Operators(index)
        code = model.OperatorCodes(operator.OpcodeIndex())
        kind = code.BuiltinCode() or code.DeprecatedBuiltinCode()
        if kind in (CONV_2D, DEPTHWISE):
            name = re.search(r"layer\d+/(depthwise_|pointwise_)?conv", graph.Tensors(operator.Inputs(1)).Name().decode())
            order = (0, 3, 1, 2) if kind == CONV_2D else (3, 0, 1, 2)
            if name:
                found[name[0]] = values(operator.Inputs(1)).permute(order).contiguous(), values(operator.Inputs(2))
    return found


def gains(tokenizer: str) -> Tensor:
    """By how much YAMNet's log-mel exceeds the tokenizer's at the same place, (MELS,): the mean over harmonic tones."""
    audio = load_tokenizer(tokenizer)
    time = torch.arange(RATE) / RATE
    tones = []
    for pitch in np.geomspace(60, 2000, 60):
        partials = torch.arange(1, int(RATE / 2 / pitch))[:, None]
        tone = (torch.sin(2 * math.pi * pitch * partials * time) / partials).sum(0)
        tones.append(tone / tone.abs().max() * 0.7)
    waves = torch.stack(tones)
    spectrum = torch.stft(waves, FFT, 160, WINDOW, torch.hann_window(WINDOW), center=True, return_complex=True).abs().mT
    theirs = (spectrum @ AF.melscale_fbanks(FFT // 2 + 1, LOW, HIGH, MELS, RATE, mel_scale="htk")).clamp_min(FLOOR).log()
    c = audio.config
    places = band_places(MELS, LOW, HIGH, c.mels, c.low, c.high).round().long().clamp(0, c.mels - 1)
    ours = audio.to_log(audio.log_mel(waves))[..., places]
    return theirs[:, 10:-10].mean((0, 1)) - ours[:, 10:-10].mean((0, 1))


@torch.no_grad()
def standardize(network: MobileNet, tokenizer: str) -> None:
    """Scale each feature so that over the patches of the starter's sounds it has a mean of 0 and a standard deviation of 1."""
    audio, features = load_tokenizer(tokenizer), []
    for path in sorted(Path(__file__).with_name("starter").glob("s*-train-*.tar.gz")):
        with tarfile.open(path) as tar:
            for member in [member for member in tar.getmembers() if member.name.endswith(".ogg")][::20]:
                samples, _ = soundfile.read(io.BytesIO(tar.extractfile(member).read()), dtype="float32")
                [encoding] = audio.embed_batch([torch.from_numpy(samples)], patches=True, codes=False)
                features.append(network(encoding.features.flatten(0, 1), [encoding.features.shape[:2]]))
    deviation, mean = torch.std_mean(torch.cat(features), 0)
    network.scale.copy_(1 / (deviation + 1e-2))
    network.shift.copy_(-mean * network.scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="YAMNet for TensorFlow Lite")
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--tokenizer", default="demos/starter/audio", help="audio tokenizer that it is for (default: %(default)s)")
    options = parser.parse_args()
    found = layers_of(options.weights)
    made = {"gain": gains(options.tokenizer)}
    pairs = {"stem": "layer1/conv"}
    for index, layer in enumerate(LAYERS):
        pairs |= {f"layers.{index}.mix": f"layer{layer}/depthwise_conv", f"layers.{index}.project": f"layer{layer}/pointwise_conv"}
    for name, there in pairs.items():
        if there not in found:
            raise SystemExit(f"{options.weights}: found no {there}, expected YAMNet for TensorFlow Lite")
        made[f"{name}.weight"], made[f"{name}.bias"] = found[there]
    layers = tuple(SeparableLayer(len(made[f"layers.{index}.project.bias"]), 2 if layer in STRIDED else 1)
                   for index, layer in enumerate(LAYERS))
    shape = MobileNetShape(MELS, LOW, HIGH, len(made["stem.bias"]), layers, tuple(LAYERS.index(layer) for layer in OUTPUTS))
    audio = load_tokenizer(options.tokenizer)
    network = MobileNet(MobileNetConfig(**vars(shape), patches=audio.encoder_config, patch_frames=audio.config.patch_frames,
                                        patch_mels=audio.config.patch_mels, from_low=audio.config.low, from_high=audio.config.high))
    network.load_state_dict({**network.state_dict(), **made})
    standardize(network, options.tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, options.out / "model.safetensors")
    (options.out / "config.json").write_text(json.dumps({"kind": "mobilenet", **asdict(shape)}, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {sum(weight.numel() for weight in network.parameters()):,} parameters")


if __name__ == "__main__":
    main()
