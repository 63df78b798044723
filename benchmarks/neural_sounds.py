"""How good is a waveform codec compared with the audio tokenizer, trained equally long on the same sounds, at equal bit rates?

    python benchmarks/neural_sounds.py --minutes 8

Ours, from scratch: the codec of configs/starter/audio.yaml for half of the minutes on one core, then the vocoder of
configs/starter/vocoder.yaml for the other half; 80 codes of 15 bits per second. The peer is a small version of DAC (Kumar et al.
2023, https://arxiv.org/abs/2306.06546) in transformers: 50 steps per second with two codes of 12 bits each. It trains with spectral
losses at three resolutions and in mel bands, as our vocoder does, and with its own codebook losses; neither has a discriminator.
Reported for unseen sounds: whether pYIN's pitch of notes is within 50 cents of the original's, the distance of mel spectrograms in
dB, and intelligibility of speech (STOI, Taal et al. 2011). Needs the extra `bench` and `pip install pystoi`. Writes
results/neural_sounds.json.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from audio_quality import NOTES, SPEECH, read
from classic_sounds import aligned, judged_notes
from measure import require, write_result
from torch import Tensor, nn

from mmtx.data.augment import AudioAugmentation
from mmtx.data.collection import DataSource, read_source
from mmtx.data.sample import Media
from mmtx.data.tokens import load_media
from mmtx.modality.audio import AudioConfig, AudioTokenizer
from mmtx.modality.autoencoder import NetworkConfig
from mmtx.modality.base import load_tokenizer
from mmtx.modality.vocoder import VocoderConfig
from mmtx.shipped_files import find_shipped
from mmtx.training.codec import AudioCodecModule
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.training.vocoder import TRAINING, VocoderModule, stft_distance

CODEC, VOCODER = "configs/starter/audio.yaml", "configs/starter/vocoder.yaml"
TRAIN = ("sounds-train-*.tar.gz", "speech-train-*.tar.gz")
CUT = 32 * 400                                      # samples in a cut: a chunk of our codec
BATCH = {"codec": 32, "vocoder": 8, "DAC": 4}
COMMITMENT, CODEBOOK = 0.25, 1.0                    # weights of DAC's losses, as published


def cuts(sounds: list[Tensor], size: int) -> Iterator[Tensor]:
    """Batches of cuts (B, S), half of them augmented; sounds are drawn in proportion to their length."""
    generator, augment = torch.Generator().manual_seed(0), AudioAugmentation(speed=5)
    weights = torch.tensor([float(len(sound)) for sound in sounds])
    while True:
        batch = []
        for number in torch.multinomial(weights, size, replacement=True, generator=generator).tolist():
            sound = nn.functional.pad(sounds[number], (0, max(0, CUT - len(sounds[number]))))
            first = int(torch.randint(len(sound) - CUT + 1, (), generator=generator))
            cut = sound[first:first + CUT]
            batch.append(augment(cut, 16_000, generator) if torch.rand((), generator=generator) < 0.5 else cut)
        yield torch.stack(batch)


def fit(made: dict, warmup: int, minutes: float, batches: Iterator[Tensor], loss: Callable[[Tensor], Tensor]) -> int:
    """Train for `minutes` of processor time, with learning rates that decay to zero -> the number of steps."""
    optimizer, start, step = made["optimizer"], time.process_time(), 0
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    while (passed := (time.process_time() - start) / (60 * minutes)) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / warmup) * (1 - passed)
        optimizer.zero_grad()
        loss(next(batches)).backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        step += 1
    return step


def ours(sounds: list[Tensor], minutes: float, folder: Path) -> tuple[AudioTokenizer, str]:
    """Our codec and vocoder, trained from scratch, and their numbers of steps."""
    codec, vocoder = (yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]["init_args"] for path in (CODEC, VOCODER))
    shape = dict(codec["tokenizer"])
    torch.manual_seed(0)
    module = AudioCodecModule(AudioConfig(**{**shape, "network": NetworkConfig(**shape["network"])}))
    tokenizer, rates = module.tokenizer.train(), OptimizerConfig(**codec["optimizer"])

    def loss(waveforms: Tensor) -> Tensor:
        given = tokenizer.spectrogram(waveforms)
        return module.loss(given, tokenizer(given).output)

    first = fit(configure(tokenizer, rates, 1), rates.warmup_steps, minutes / 2, cuts(sounds, BATCH["codec"]), loss)
    tokenizer.eval().save(folder)
    rates = OptimizerConfig(**vocoder["optimizer"])
    second = VocoderModule(str(folder), VocoderConfig(**vocoder["vocoder"]))
    second.log_dict = lambda *given, **more: None  # logs are not used here
    step = lambda waveforms: second.training_step(SimpleNamespace(media=waveforms), 0)
    steps = fit(configure(second.tokenizer.vocoder, rates, 1), rates.warmup_steps, minutes / 2, cuts(sounds, BATCH["vocoder"]), step)
    return second.tokenizer.eval(), f"{first} and {steps}"


def dac(sounds: list[Tensor], minutes: float, judge: AudioTokenizer):
    """DAC's architecture, trained from scratch, and its steps. `judge` computes the mel spectrograms of its loss."""
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    network = DacModel(DacConfig(encoder_hidden_size=16, downsampling_ratios=[2, 4, 5, 8], decoder_hidden_size=192, n_codebooks=2,
                                 codebook_size=4096, codebook_dim=8, sampling_rate=16_000, hop_length=320, quantizer_dropout=0.0,
                                 commitment_loss_weight=COMMITMENT, codebook_loss_weight=CODEBOOK)).train()

    def loss(waveforms: Tensor) -> Tensor:
        made = network(waveforms[:, None])
        output = made.audio_values.flatten(1)
        wanted = waveforms[:, :output.shape[1]]
        mel = (judge.log_mel(output) - judge.log_mel(wanted)).abs().mean()
        return stft_distance(output, wanted, TRAINING) + mel + made.loss.mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.8, 0.99))
    steps = fit({"optimizer": optimizer}, 50, minutes, cuts(sounds, BATCH["DAC"]), loss)
    return network.eval(), str(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of a core for each")
    parser.add_argument("--limit", type=int, default=48, help="of notes and of sentences that are judged")
    parser.add_argument("--work", type=Path, default=Path("runs/neural_sounds"), help="folder for our codec")
    parser.add_argument("--no_write", action="store_true")
    options = parser.parse_args()
    require("pystoi", "pystoi")
    torch.set_num_threads(1)
    judge = load_tokenizer(find_shipped("tokenizers/audio"))
    folder = find_shipped("demos/data/starter")
    samples = read_source(DataSource([str(folder / name) for name in TRAIN]))
    sounds = [load_media(part, {"audio": judge}) for sample in samples for turn in sample.turns for part in turn.parts
              if isinstance(part, Media)]
    sets = {name: read(path, judge, options.limit) for name, path in (("speech", SPEECH), ("notes", NOTES))}
    tokenizer, our_steps = ours(sounds, options.minutes, options.work)
    network, steps = dac(sounds, options.minutes, judge)

    @torch.inference_mode()
    def through_dac(waveform: Tensor) -> Tensor:
        padded = nn.functional.pad(waveform, (0, -len(waveform) % 320 + 640))
        return network(padded[None, None]).audio_values.flatten()

    ways = {"ours": lambda waveform: tokenizer.decode(tokenizer.encode_batch([waveform])[0]), "DAC's architecture": through_dac}
    result: dict = {"name": "neural_sounds", "date": date.today().isoformat(), "minutes": options.minutes, "limit": options.limit,
                    "steps": {"ours": our_steps, "DAC's architecture": steps}, "codecs": {}}
    for name, through in ways.items():
        pairs = {kind: [(aligned(through(waveform), waveform), waveform) for _, waveform in some] for kind, some in sets.items()}
        result["codecs"][name] = {"notes": judged_notes(pairs["notes"], judge), "speech": judged_speech(pairs["speech"], judge)}
        print(f"{name}, {result['steps'][name]} steps: {result['codecs'][name]}", flush=True)
    if not options.no_write:
        write_result(result)


def judged_speech(pairs: list[tuple[Tensor, Tensor]], judge: AudioTokenizer) -> dict[str, float]:
    """Intelligibility of sentences, from pairs (sound, original), and the distance of their mel spectrograms."""
    from pystoi import stoi

    far = [float(judge.decibels((judge.log_mel(sound) - judge.log_mel(waveform)).abs().mean())) for sound, waveform in pairs]
    heard = [stoi(waveform.numpy(), sound.numpy(), 16_000) for sound, waveform in pairs]
    return {"STOI": round(float(sum(heard)) / len(heard), 3), "mel distance, dB": round(sum(far) / len(far), 2)}


if __name__ == "__main__":
    main()
