"""Adapt a CTC recognizer of connected words to one speaker, with its outputs conserved frame by frame.

python transcribe_speaker.py [ROOT SPEAKER [STEPS]]    recordings under ROOT; else synthetic voices
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import edit_distance

import conservtl as ctl
from conservtl.data import Examples
from conservtl.tasks import speech

Padded = tuple[Tensor, Tensor]  # padded rows and their lengths


class Recognizer(nn.Sequential):
    """Returns scores (N, frames, words + 1), 0 the blank, and lengths in frames, as torchaudio's models do."""

    def forward(self, frames: Tensor, lengths: Tensor) -> Padded:
        """Return one frame of scores for four frames of features."""
        return self[2](self[1](self[0](frames).mT)[0]), lengths // 4


def recognizer(words: int) -> Recognizer:
    blocks = [(nn.Conv1d(n, 128, 5, 2, 2), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3)) for n in (40, 128)]
    memory = nn.GRU(128, 128, batch_first=True)
    return Recognizer(nn.Sequential(*blocks[0], *blocks[1]), memory, nn.Linear(128, words + 1))


def utterances(examples: Examples, count: int) -> tuple[Padded, Padded]:
    """Return features and texts of utterances of two to four random words."""
    drawn = [torch.randint(len(examples.labels), (int(torch.randint(2, 5, ())),)) for _ in range(count)]
    frames = [torch.cat(list(examples.inputs[words]), 1).mT for words in drawn]
    frame_counts, word_counts = (torch.tensor([len(each) for each in parts]) for parts in (frames, drawn))
    texts = pad_sequence([examples.labels[words] + 1 for words in drawn], batch_first=True)
    return (pad_sequence(frames, batch_first=True).mT, frame_counts), (texts, word_counts)


def train(adaptation: ctl.Adaptation, examples: Examples, steps: int) -> None:
    optimizer = adaptation.optimizer(torch.optim.AdamW, lr=1e-3)
    for _ in range(steps):
        inputs, (texts, word_counts) = utterances(examples, 16)
        scores, lengths = outputs = adaptation.model(*inputs)
        loss = nn.functional.ctc_loss(scores.log_softmax(-1).transpose(0, 1), texts, lengths, word_counts)
        adaptation.loss(loss, outputs, inputs).backward()  # padding counts in neither loss
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def word_errors(model: nn.Module, examples: Examples) -> str:
    inputs, (texts, word_counts) = utterances(examples, 200)
    scores, lengths = model.eval()(*inputs)
    heard = [torch.unique_consecutive(best[:n]) for best, n in zip(scores.argmax(-1), lengths, strict=True)]
    wrong = [edit_distance(h[h > 0], text[:n]) for h, text, n in zip(heard, texts, word_counts, strict=True)]
    return f"{100 * sum(wrong) / int(word_counts.sum()):.1f} % of words wrong"


def main() -> None:
    torch.manual_seed(0)
    folder = len(sys.argv) > 2
    section = speech.FolderData(root=sys.argv[1], target=sys.argv[2]) if folder else speech.EspeakData()
    data, steps = speech.load(section, seed=0), int(sys.argv[3]) if len(sys.argv) > 3 else 1000
    models = {"before": (source := recognizer(len(data.labels)))}
    train(ctl.adapt(source, ctl.itself(missing=[])), data.source_train, steps)
    for name, strategies in {"plain": [], "outputs conserved": [ctl.OutputConservation(rho=0.2)]}.items():
        adaptation = ctl.adapt(recognizer(len(data.labels)), source, strategies)
        adaptation.model.eval()  # batch norms keep the source's statistics
        train(adaptation, data.shots, steps // 5)
        models[name] = adaptation.model
    for name, model in models.items():
        print(f"{name}: target {word_errors(model, data.target_test)}, source {word_errors(model, data.source_test)}")


if __name__ == "__main__":
    main()
