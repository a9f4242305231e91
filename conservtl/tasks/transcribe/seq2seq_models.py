"""Recognizers from sequence to sequence: transformers' Whisper and Speech2Text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.errors import DataError, SpecError, hint
from conservtl.extras import require
from conservtl.functions import IGNORED
from conservtl.tasks.transcribe.features import Features
from conservtl.tasks.transcribe.masked_layers import MaskedConv1d
from conservtl.tasks.transcribe.pretrained_tokens import DecoderTokens
from conservtl.tasks.transcribe.recognizers import Decoded

__all__ = ["SEQ2SEQ", "TransformersSeq2Seq", "build_seq2seq"]

SEQ2SEQ = {"whisper": "whisper", "speech_to_text": "fbank"}
"""Types of AutoModelForSpeechSeq2Seq -> kind of their features."""

_FRAMES = 100  # of Whisper's features in a second; its encoder keeps every second one
_BANDS = {"whisper": "num_mel_bins", "speech_to_text": "input_feat_per_channel"}


class TransformersSeq2Seq(nn.Module):
    """An encoder and a decoder of transformers, trained by the tokens before and read greedily.

    Args:
        network: of ``AutoModelForSpeechSeq2Seq``.
        tokens: by which its decoder begins and ends.
    """

    def __init__(self, network: Any, tokens: DecoderTokens) -> None:
        super().__init__()
        self.network, self.tokens = network, tokens
        self._is_whisper = network.config.model_type == "whisper"
        names = inspect.signature(type(network).forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"
        if not self._is_whisper:
            convs = network.model.encoder.conv.conv_layers
            for place, conv in enumerate(convs):
                convs[place] = MaskedConv1d(conv)

    def teacher(self, labels: Tensor) -> dict[str, Tensor]:
        """Return ``decoder_input_ids``, the beginning and the texts, and ``decoder_attention_mask``.

        Args:
            labels: (N, tokens), negative where padded.

        Raises:
            DataError: a text is longer than the decoder has positions for.
        """
        start = torch.tensor(self.tokens.start, device=labels.device).expand(len(labels), -1)
        ids = torch.cat([start, torch.where(labels < 0, self._padding, labels)], 1)
        if (most := self._positions - start.shape[1]) < labels.shape[1]:
            raise DataError(
                f"a text must have at most {most} tokens, for which the decoder has positions; received "
                f"{labels.shape[1]}. Leave the utterance out, or cut it."
            )
        return {"decoder_input_ids": ids, "decoder_attention_mask": F.pad(labels >= 0, (start.shape[1], 0), value=True)}

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Decoded:
        """Return logits of each next token behind the beginning, and which positions count.

        Args:
            inputs: (N, frames, bands).
            lengths: (N,) frames that are no padding; Whisper takes silence for speech, as it was trained.
            decoder_input_ids: (N, start + tokens); None: the beginning alone.
            decoder_attention_mask: their mask; the decoder needs none, for it sees the tokens before alone.
        """
        start = len(self.tokens.start)
        if decoder_input_ids is None:
            decoder_input_ids = torch.tensor(self.tokens.start, device=inputs.device).expand(len(inputs), -1)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids, dtype=torch.bool)
        arguments = self._arguments(inputs, lengths)
        logits = self.network(**arguments, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        return Decoded(logits[:, start - 1 :], decoder_attention_mask[:, start - 1 :])

    @torch.no_grad()
    def generate(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most probable next token again and again, to the end or the decoder's last position.

        Args:
            inputs: (N, frames, bands).
            lengths: (N,).

        Returns:
            (N, tokens), -100 behind the end, and the mean posterior of the tokens of each text, (N,).
        """
        arguments = self._arguments(inputs, lengths)
        encoded = self.network.get_encoder()(**arguments)
        rest = {"encoder_outputs": encoded, "use_cache": True}
        rest |= {name: value for name, value in arguments.items() if name == "attention_mask"}
        ids = torch.tensor(self.tokens.start, device=inputs.device).expand(len(inputs), -1)
        silent = torch.tensor(self.tokens.silent, dtype=torch.long, device=inputs.device)
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        heard: list[Tensor] = []
        sums = torch.zeros(len(inputs), device=inputs.device)
        cache = None
        for _ in range(self._positions - ids.shape[1]):
            outputs = self.network(decoder_input_ids=ids, **rest, **{self._cache: cache})
            cache = outputs[self._cache]
            scores = outputs.logits[:, -1].float().index_fill(1, silent, -torch.inf)
            best, token = scores.softmax(-1).max(-1)
            done = done | (token == self.tokens.end)
            if bool(done.all()):
                break
            heard.append(token.masked_fill(done, IGNORED))
            sums = sums + best.masked_fill(done, 0.0)
            ids = token.masked_fill(done, self.tokens.end).unsqueeze(1)
        found = torch.stack(heard, 1) if heard else ids.new_empty(len(inputs), 0)
        return found, sums / (found >= 0).sum(1).clamp_min(1)

    def _arguments(self, inputs: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the encoder."""
        if self._is_whisper:
            return {"input_features": inputs.transpose(1, 2)}
        frames = lengths
        for conv in self.network.model.encoder.conv.conv_layers:
            conv.lengths = frames
            frames = (frames - 1) // conv.stride[0] + 1
        valid = torch.arange(inputs.shape[1], device=inputs.device) < lengths.to(inputs.device).unsqueeze(1)
        return {"input_features": inputs, "attention_mask": valid.long()}

    @property
    def _padding(self) -> int:
        return self.tokens.end if self.tokens.pad is None else self.tokens.pad

    @property
    def _positions(self) -> int:
        return int(self.network.config.max_target_positions)


def build_seq2seq(kind: str, args: dict[str, Any], features: Features, tokens: Any, outputs: int) -> nn.Module:
    """Return a recognizer of transformers from sequence to sequence, by its type, with random weights.

    Layers are not dropped at random unless ``args`` say so.

    Args:
        kind: the type.
        args: fields of its configuration.
        features: its inputs.
        tokens: the spec's tokens.
        outputs: number of tokens.

    Raises:
        SpecError: an argument is none of its configuration's, or does not fit.
    """
    library = require("transformers", "transformers")
    plain = library.AutoConfig.for_model(kind)
    if unknown := [field for field in args if not hasattr(plain, field)]:
        raise SpecError(
            f"model.args: a configuration of {kind} has no field {unknown[0]!r}."
            f"{hint(unknown[0], sorted(plain.to_dict()), count=3)}"
        )
    by = tokens.decoder()
    decided = {
        "vocab_size": outputs,
        _BANDS[kind]: features.n_mels,
        "decoder_start_token_id": by.start[0],
        "bos_token_id": by.start[0],
        "eos_token_id": by.end,
        "pad_token_id": by.end if by.pad is None else by.pad,
    }
    if kind == "whisper":
        decided["max_source_positions"] = round(features.seconds * _FRAMES) // 2
    for name in decided.keys() & args.keys():
        if args[name] != decided[name]:
            raise SpecError(
                f"model.args.{name} must be {decided[name]}, as data says; received {args[name]}. Leave it out."
            )
    try:
        config = library.AutoConfig.for_model(kind, **args | decided)
        network = library.AutoModelForSpeechSeq2Seq.from_config(config)
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SpecError(f"model.args: {kind} cannot be built with {args}: {error}. Change model.args.") from error
    if kind == "speech_to_text" and by.pad is None:  # no token is padding: each gets its position
        network.model.decoder.embed_positions.padding_idx = -1
    return TransformersSeq2Seq(network, by)
