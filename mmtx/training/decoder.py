"""Training of the decoder.

Shapes: N tokens of a batch, M supervised tokens, V vocabulary.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from mmtx.atomic_folder import replace_folder
from mmtx.config import CodeRange, DecoderConfig
from mmtx.data.packing import Batch
from mmtx.data.sample import Sample
from mmtx.data.storage import scrub
from mmtx.data.tokens import to_documents
from mmtx.errors import InputError
from mmtx.loss import TokenLoss, next_token_loss
from mmtx.modality.pretrained_encoder import MEDIA
from mmtx.model import Decoder
from mmtx.model_folder import model_files
from mmtx.pipeline import Model
from mmtx.schema import typed, within
from mmtx.training.adapters import LoRA, MergedWeights, adapt, merged, parameters_by_group, save_adapter
from mmtx.training.ctc import CTCConfig, ctc_loss, states_behind
from mmtx.training.decoder_data import TokenizerFolders, with_media
from mmtx.training.dpo import DPOConfig, PairLoss, pair_loss, reference_of
from mmtx.training.initial_decoder import InitialDecoder
from mmtx.training.module import Means, TrainingModule, sum_over_ranks
from mmtx.training.mup import scaled
from mmtx.training.optimizer import OptimizerConfig, configure
from mmtx.training.sharding import shard
from mmtx.vocabulary import Vocabulary
from mmtx.weights import weights_of


@typed
@with_media(float, 1.0, "weight of {} codes.")
@dataclass(frozen=True)
class LossWeights:
    """Weight of a target in the loss, by its modality.

    Args:
        special: weight of the tokens that delimit the others.
        text: weight of text.
    """

    special: float = 1.0
    text: float = 1.0

    def __post_init__(self):
        for kind, weight in asdict(self).items():
            if not 0 <= weight < math.inf:
                raise InputError(f"loss_weights.{kind}: found {weight}, expected a finite number of 0 or more")
        if not any(asdict(self).values()):
            raise InputError("loss_weights: found 0 for all modalities, expected more for one of them")


class DecoderModule(TrainingModule):
    """Next-token training of the decoder; sizes that depend on the tokenizers are filled in."""

    @typed
    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        z_loss: float = 1e-5,
        continuous_inputs: bool = False,
        loss_weights: LossWeights = LossWeights(),
        init_from: str | None = None,
        tokenizers: TokenizerFolders | None = None,
        train_encoder: bool = False,
        encoders_from: str | None = None,
        image_encoder: str | None = None,
        image_encoder_lr: float | None = None,
        audio_encoder: str | None = None,
        audio_encoder_lr: float | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        mup_base_width: int | None = None,
        ctc: CTCConfig | None = None,
        dpo: DPOConfig | None = None,
        merge_size: dict[str, tuple[int, int]] | None = None,
    ):
        """
        Args:
            decoder: sizes of the network; `vocabulary_size`, `composed`, `features` and `encoders` come from the tokenizers.
            optimizer: learning rate and schedule.
            z_loss: weight of the squared log-sum-exp of the logits, which keeps them from drifting.
            continuous_inputs: feed pictures and sounds of user turns as features, which their encoder computes before the
                quantizer, instead of codes. Generated media consist of codes either way.
            merge_size: with `continuous_inputs`, how many neighbouring features are one token, by kind: rows and columns, such as
                `{image: [2, 2], audio: [4, 1]}`, which needs a quarter of the tokens. A model in `init_from` may be one without.
            train_encoder: with `continuous_inputs`, give the decoder encoders of its own, trained jointly: copies of the codecs',
                or those of the model in `init_from`. The tokenizers, and so all codes, do not change.
            encoders_from: folder of a finished model whose encoders, of any size, to start from: those trained with a small
                decoder can serve a large one.
            image_encoder: folder of a pretrained image encoder, such as `demos/data/build_image_encoder.py` makes, or of a
                finished model that has one, to start from in place of the codec's and those of `init_from` and `encoders_from`.
                From a model as wide as this one, the projection of its features is taken as well.
            image_encoder_lr: AdamW's learning rate for the image encoder, usually lower for a pretrained one; by default that
                of everything else.
            audio_encoder: folder of a pretrained network of sounds, such as `demos/data/build_audio_encoder.py` makes, or of a
                finished model that has one; its features stand beside those of the encoder of patches, which stays.
            audio_encoder_lr: AdamW's learning rate for the pretrained network of sounds; by default that of everything else.
            loss_weights: weights of targets by modality; the loss is the weighted mean over all targets.
            init_from: folder of a finished model with this configuration and text tokenizer, whose weights to start from.
                Its other tokenizers may have been retrained: what their codes mean is then learnt anew. It may be a model of
                codes alone, such as `mmtx convert` makes: projections of features are then initialised. With `train_encoder`
                it may be a model of frozen features, whose tokenizers must then be the same.
            tokenizers: folders of the tokenizers, if batches come from a plain loader; by default those of the data.
            lora: train low-rank adapters, projections and encoders of features, and the embedding rows of ids that are not text;
                everything else stays frozen as in `init_from`.
            gradient_checkpointing: recompute each block in the backward pass: less memory, a third more time.
            mup_base_width: width at which the learning rates were tuned, to transfer them to this width (muP). Keep depth, head
                width and batch size as they were there. None: the rates are for this width.
            ctc: with `continuous_inputs`, an auxiliary CTC loss by which the decoder learns to transcribe; none by default.
            dpo: learn which of two answers is better, from rows with both, in place of predicting the next token; `init_from` is
                what it starts from, and may not stray too far from. `z_loss` does not apply. None by default.
        """
        super().__init__()
        if lora is not None and init_from is None:
            raise InputError("model.init_args.init_from: found none with lora, expected the model that is to be adapted")
        if dpo is not None and init_from is None:
            raise InputError("model.init_args.init_from: found none with dpo, expected the model whose answers are to improve")
        if dpo is not None and ctc is not None:
            raise InputError("ctc: found one with dpo, expected none: it is a loss of transcripts")
        if mup_base_width is not None:
            within("mup_base_width", mup_base_width, 1, 2**16)
        if lora is not None and mup_base_width is not None:
            raise InputError("mup_base_width: found one with lora, expected none: adapters have rates of their own")
        self.initial = InitialDecoder(init_from, encoders_from, image_encoder, audio_encoder, continuous_inputs, train_encoder,
                                      lora is not None and lora.load_in_4bit, mup_base_width)
        self.lora, self.gradient_checkpointing, self.mup_base_width = lora, gradient_checkpointing, mup_base_width
        self.tokenizers = None if tokenizers is None else tokenizers.load()
        self.config, self.optimizer_config = decoder, optimizer
        self.encoder_rates = {kind: rate for kind, rate in (("image", image_encoder_lr), ("audio", audio_encoder_lr))
                              if rate is not None}
        # These determine what the data give.
        self.continuous_inputs, self.train_encoder, self.merge_size = continuous_inputs, train_encoder, dict(merge_size or {})
        self.z_loss, self.ctc, self.dpo, self.weights_by_kind = z_loss, ctc, dpo, asdict(loss_weights)
        self.decoder: Decoder | None = None
        self.begun: InitialDecoder | None = None  # what a finished run began with
        if merge_size and not continuous_inputs:
            raise InputError("merge_size: found one with continuous_inputs: false, expected continuous_inputs: true, since codes "
                             "cannot be merged")
        if train_encoder and not continuous_inputs:
            raise InputError("train_encoder: found true with continuous_inputs: false, expected continuous_inputs: true, since "
                             "codes need no encoder")
        if ctc is not None and not continuous_inputs:
            raise InputError("ctc: found one with continuous_inputs: false, expected continuous_inputs: true, since it is of "
                             "sounds that enter as features")
        if ctc is not None and ctc.blocks > decoder.depth:
            raise InputError(f"ctc.blocks: found {ctc.blocks}, expected at most {decoder.depth}, decoder.depth")
        for name, value in (("model.init_args.encoders_from", encoders_from), ("model.init_args.image_encoder", image_encoder),
                            ("model.init_args.audio_encoder", audio_encoder), ("image_encoder_lr", image_encoder_lr),
                            ("audio_encoder_lr", audio_encoder_lr)):
            if value is not None and not train_encoder:
                raise InputError(f"{name}: found one with train_encoder: false, expected train_encoder: true")
        for kind, rate in self.encoder_rates.items():
            within(f"{kind}_encoder_lr", rate, 0, 100)
            if lora is not None and lora.freeze_encoder:
                raise InputError(f"{kind}_encoder_lr: found one with lora.freeze_encoder: true, expected none")

    def prepare_data(self) -> None:
        """Raise InputError for a folder without a model now, before the data are read, which may take minutes."""
        self.initial.check_folders()

    def configure_model(self) -> None:
        self._take_tokenizers()  # also of a module that is built already, but for other data
        if self.decoder is not None:
            return
        vocabulary = self.vocabulary
        # Not a buffer: a run in bfloat16 would round it.
        self.weights_on_device: Tensor | None = None
        self.loss_weights = tuple(self.weights_by_kind[kind] for kind in vocabulary.modality_names)
        levels = {kind: levels for kind in vocabulary.kinds if (levels := vocabulary.levels(kind))}
        for kind in self.encoder_rates.keys() - levels:
            raise InputError(f"{kind}_encoder_lr: found one, expected none: there is no tokenizer of {MEDIA[kind]}")
        config = replace(self.config, vocabulary_size=vocabulary.size, ctc_blocks=None if self.ctc is None else self.ctc.blocks,
                         composed=tuple(CodeRange(vocabulary.range(kind).start, found) for kind, found in levels.items()))
        self.decoder = self.initial.build(config, self.tokenizers, vocabulary, self._announce)
        self.config = self.decoder.config
        self.decoder.gradient_checkpointing = self.gradient_checkpointing
        if self.lora is not None:
            if self.device_mesh is not None:
                raise InputError("trainer.strategy: found sharded with lora, expected another")
            adapt(self.decoder, self.lora, vocabulary.range("special").start)
        if self.dpo is not None:
            if self.device_mesh is not None:
                raise InputError("trainer.strategy: found sharded with dpo, expected another")
            start = self.decoder if self.begun is None else self.begun.build(config, self.tokenizers, vocabulary,
                                                                                                 lambda _: None)
            self.reference = [reference_of(start)]  # in a list, so that checkpoints and optimizers leave it out
        if self.device_mesh is not None:
            shard(self.decoder, self.device_mesh["data_parallel"])

    def _take_tokenizers(self) -> None:
        theirs = getattr(self.data, "tokenizers", None)
        if self.tokenizers is None and theirs is None:
            raise InputError("model.init_args.tokenizers: found none, expected folders of tokenizers, since the data have none")
        found, expected = ({kind: tokenizer.fingerprint for kind, tokenizer in (some or {}).items()}
                           for some in (self.tokenizers, theirs))
        if self.tokenizers is not None and theirs is not None and found != expected:
            raise InputError(f"model.init_args.tokenizers: found others ({', '.join(found)}) than those of the data "
                             f"({', '.join(expected)}), expected the same or none")
        self.tokenizers = theirs if self.tokenizers is None else self.tokenizers
        self.vocabulary = Vocabulary.build(self.tokenizers).merging(self.merge_size)

    def restore(self, folder: Path) -> None:
        """Load the finished model in a folder when the decoder is built; it must match this configuration and its tokenizers."""
        self.begun = replace(self.initial)
        self.initial.restore(folder)

    def on_fit_start(self) -> None:
        self._announce(parameters_by_group(self.decoder))

    def _announce(self, line: str) -> None:
        if self.global_rank == 0:
            print(f"mmtx: {line}", file=sys.stderr)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        base, config, steps, precision = self.mup_base_width, self.optimizer_config, self.trainer.max_steps, self.trainer.precision
        more = []
        for kind, rate in self.encoder_rates.items():
            encoder = self.decoder.encoders[kind]
            members = [p for p in getattr(encoder, "network", encoder).parameters() if p.requires_grad]
            more += [{"params": [p for p in members if (p.dim() > 1) is decays], "lr": rate,
                      "weight_decay": config.weight_decay if decays else 0.0} for decays in (True, False)]
        if base is None:
            return configure(self.decoder, config, steps, more, precision=precision)
        return configure(self.decoder, config, steps, more, scaled(self.decoder), base / self.config.width, precision)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        weights = self._weights()[batch.modality]
        if self.dpo is None:
            found = self._losses(batch, weights)
            tokens, loss, weight = found, (found.loss * weights).sum(), weights.sum()
        else:
            found = self._pair_loss(batch, weights)
            tokens, loss, weight = found.tokens, found.loss.sum(), torch.tensor(float(len(found.loss)), device=self.device)
            self.log("train/accuracy", (found.margin > 0).float().mean(), prog_bar=True)
        self.seen = tokens.loss, tokens.log_sum  # for telemetry
        self.total += weight
        self.log("train/loss", ratio(loss, weight), prog_bar=True)
        # The sum, not the mean: `on_before_optimizer_step` divides by the weights of all targets of the step at once.
        return (found.total + self._idle(batch)) * self.trainer.accumulate_grad_batches

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over the targets of a batch, or over its pairs with DPO, for a loop without a trainer.

        In training it is what a trainer minimises, with z-loss and CTC; after `eval` it is what validations log as loss.
        """
        self.built()
        weights = self._weights()[batch.modality]
        if self.dpo is not None:
            pairs = self._pair_loss(batch, weights)
            return (pairs.total + self._idle(batch)) / len(pairs.loss)
        total, loss, _ = self._losses(batch, weights)
        return ratio(total + self._idle(batch) if self.training else (loss * weights).sum(), weights.sum())

    def _pair_loss(self, batch: Batch, weights: Tensor) -> PairLoss:
        return pair_loss(self.dpo, self.decoder, self.reference[0].to(self.device), batch, weights)

    def _idle(self, batch: Batch) -> Tensor | float:
        """0, with a gradient of 0 for all that the batch leaves out: ranks must agree on which weights have a gradient."""
        absent = [modules[kind] for modules in (self.decoder.projections, self.decoder.encoders) for kind in modules
                  if kind not in batch.features]
        return 0.0 * sum(parameter.sum() for module in absent for parameter in module.parameters())

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if index % self.trainer.accumulate_grad_batches == 0:
            self.total = torch.zeros((), dtype=torch.float32, device=self.device)
        self.seed_step(index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Ranks average their gradients; the right divisor is the weight of the targets of all ranks.
        total = sum_over_ranks(self.total)
        self.gradient_scale = ratio(torch.full_like(total, self.trainer.world_size), total)
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.gradient_scale)

    def on_validation_epoch_start(self) -> None:
        self.means = Means()

    def validation_step(self, batch: Batch, index: int) -> None:
        if self.dpo is not None:
            if len(batch.samples):
                pairs = self._pair_loss(batch, self._weights()[batch.modality])
                for name, values in (("loss", pairs.loss), ("accuracy", pairs.margin > 0), ("margin", pairs.margin)):
                    self.means.add(name, values.double().sum(), len(values))
            return
        loss = self._losses(batch).loss.double().cpu()
        if not len(batch.samples):
            return
        names = self.vocabulary.modality_names
        targets = batch.modality.bincount(minlength=len(names)).tolist()
        losses = torch.zeros(len(names), dtype=torch.double).index_add_(0, batch.modality.cpu(), loss).tolist()
        for kind, weight, total, count in zip(names, self.loss_weights, losses, targets, strict=True):
            self.means.add(f"loss_{kind}", total, count)
            self.means.add("loss", weight * total, weight * count)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.means.compute().items():
            self.log(f"{self.split}/{name}", value, prog_bar=name != "loss", sync_dist=True)

    def on_predict_start(self) -> None:
        self.captioner = self.model()

    def predict_step(self, samples: list[Sample], index: int) -> list[dict[str, str]]:
        """Caption samples -> one row each: its source, the predicted caption and the true one."""
        captions = self.captioner.caption_documents(to_documents(samples, self.tokenizers, patches=self.config.encoders))
        return [{"where": scrub(sample.where), "predicted": caption, "true": sample.caption}
                for sample, caption in zip(samples, captions, strict=True)]

    def _weights(self) -> Tensor:
        """`loss_weights` on the device, float32, copied there once: each copy stalls a GPU."""
        if self.weights_on_device is None or self.weights_on_device.device != self.device:
            self.weights_on_device = torch.tensor(self.loss_weights, dtype=torch.float32, device=self.device)
        return self.weights_on_device

    def _losses(self, batch: Batch, weights: Tensor | None = None) -> TokenLoss:
        """The loss of all targets, with their `weights` (M,) in its total.

        Where the grammar allows no codes, their logits are left out of the softmax: they are most of the vocabulary,
        and generation never uses them there.
        """
        output = self.decoder.output or self.decoder.embedding
        ctc = self.ctc if self.training else None
        with states_behind(self.decoder, None if ctc is None else ctc.blocks) as found:
            hidden = self.decoder(batch.ids, batch.positions, batch.packing, batch.features).flatten(0, 1)
        loss = next_token_loss(output, hidden[batch.supervised], batch.targets, batch.plain, weights, self.z_loss)
        if ctc is not None:
            # Scaled like the final hidden states, so that the same output matrix applies.
            heard = self.decoder.norm(found[0]).flatten(0, 1)
            return TokenLoss(loss.total + ctc.weight * ctc_loss(output, heard, batch, self.vocabulary), loss.loss, loss.log_sum)
        return loss

    def built(self) -> Decoder:
        """The decoder. Raises InputError if it is not built yet, since its sizes come from the tokenizers."""
        if self.decoder is None:
            raise InputError(f"{type(self).__name__}: found no decoder yet, expected Trainer(...).fit(model, data) or "
                             "data.attach(model, steps=...) before")
        return self.decoder

    def model(self) -> Model:
        """The decoder with its tokenizers, for captions during training and for saving."""
        decoder = self.built() if self.lora is None else merged(self.built())
        return Model(decoder, self.vocabulary, self.tokenizers)

    def save(self, folder: str | Path) -> None:
        weights = weights_of(self.built()) if self.lora is None else MergedWeights(self.built())
        replace_folder(folder, model_files(self.config, weights, self.vocabulary, self.tokenizers))
        if self.lora is not None and self.lora.parts:
            save_adapter(self.decoder, self.lora, Path(folder).with_name("adapter"))


def ratio(total: Tensor, weight: Tensor) -> Tensor:
    """Total / weight, or 0 where the weight is 0."""
    return (total / weight).masked_fill(weight <= 0, 0.0)
