"""Beam search: the text with the largest sum over its paths, of the lexicon's words, by the language model's weight."""

from __future__ import annotations

import math
from itertools import groupby, pairwise, product

import pytest
import torch
from torch.nn import functional as F

import conservtl as ctl
from conservtl.experiments.spec.spec import parse_spec
from conservtl.tasks.transcribe.beam_search import Beam, Greedy
from conservtl.tasks.transcribe.recognizers import Decoded
from conservtl.tasks.transcribe.tokens import Characters

pytest.importorskip("torchaudio", exc_type=ImportError)
pytest.importorskip("flashlight.lib.text.decoder")

TOKENS = Characters(alphabet=" ab")
VOCABULARY = TOKENS.vocabulary(())
FRAMES = 5
# log10 probabilities: "ab" is likely, "a" rare, "b" rarer; after "a" comes "b".
WORDS = r"""
\data\
ngram 1=6
ngram 2=1

\1-grams:
-1.5	<unk>
0	<s>	-0.1
-0.5	</s>
-1.2	a	-0.2
-1.4	b
-0.3	ab

\2-grams:
-0.1	a b

\end\
"""
BIGRAMS = {("a", "b"): -0.1}
UNIGRAMS = {"a": (-1.2, -0.2), "b": (-1.4, 0.0), "ab": (-0.3, 0.0), "</s>": (-0.5, 0.0), "<s>": (0.0, -0.1)}


def logits(seed, count=1):
    return 1.5 * torch.randn(count, FRAMES, len(VOCABULARY), generator=torch.Generator().manual_seed(seed))


def posteriors(scores):
    """The probability of every text, by all paths."""
    found = {}
    for path in product(range(scores.shape[1]), repeat=len(scores)):
        tokens = [token for token, _ in groupby(path) if token]
        text = TOKENS.decode(tokens, VOCABULARY)
        found.setdefault(tuple(tokens), [text, 0.0])[1] += math.exp(
            sum(scores[t, k].item() for t, k in enumerate(path))
        )
    return found


def by_text(scores, words):
    sums = {}
    for text, probability in posteriors(scores).values():
        if set(text.split()) <= set(words):
            sums[text] = sums.get(text, 0.0) + probability
    return sums


def language_model(text):
    """log10 probability of a sentence, with back-off."""
    words = ["<s>", *text.split(), "</s>"]
    return sum(
        BIGRAMS.get((first, second), UNIGRAMS[first][1] + UNIGRAMS[second][0]) for first, second in pairwise(words)
    )


@pytest.fixture
def lexicon(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("ab\nb\na a |\n")
    return file


@pytest.fixture
def arpa(tmp_path):
    file = tmp_path / "words.arpa"
    file.write_text(WORDS)
    return file


def test_the_text_of_the_most_probable_tokens_is_found_where_the_best_path_has_another():
    beaten = 0
    for seed in range(12):
        scores = logits(seed)[0].log_softmax(-1).double()
        text = max(posteriors(scores).values(), key=lambda one: one[1])[0]
        ((found, _),) = Beam(beam=500).texts(logits(seed), TOKENS, VOCABULARY)
        assert found == text
        ((path, _),) = Greedy().texts(logits(seed), TOKENS, VOCABULARY)
        beaten += path != text
    assert beaten > 2


def test_a_lexicon_restricts_the_words(lexicon):
    beam = Beam(lexicon=lexicon, beam=500)
    outside = 0
    for seed in range(12):
        sums = by_text(logits(seed)[0].log_softmax(-1), ("a", "b", "ab"))
        ((found, _),) = beam.texts(logits(seed), TOKENS, VOCABULARY)
        assert found == max(sums, key=sums.get)
        ((path, _),) = Greedy().texts(logits(seed), TOKENS, VOCABULARY)
        outside += not set(path.split()) <= {"a", "b", "ab"}
    assert outside > 2


@pytest.mark.parametrize(("weight", "score"), [(2.0, 0.0), (0.5, 0.7), (4.0, -1.0)])
def test_language_model_and_words_count_by_their_weights(lexicon, arpa, weight, score):
    beam = Beam(lexicon=lexicon, lm=arpa, lm_weight=weight, word_score=score, beam=500)
    changed = 0
    for seed in range(12):
        sums = by_text(logits(seed)[0].log_softmax(-1), ("a", "b", "ab"))
        total = {
            text: math.log(p) + weight * language_model(text) + score * len(text.split()) for text, p in sums.items()
        }
        ((found, _),) = beam.texts(logits(seed), TOKENS, VOCABULARY)
        assert found == max(total, key=total.get)
        changed += found != max(sums, key=sums.get)
    assert changed > 2


def test_a_language_model_of_tokens_needs_no_lexicon(tmp_path):
    (tmp_path / "tokens.arpa").write_text(
        "\\data\\\nngram 1=6\nngram 2=1\n\n\\1-grams:\n-9\t<unk>\n0\t<s>\t0\n-0.5\t</s>\n-0.2\ta\t0\n-2\tb\n-1\t|\n\n"
        "\\2-grams:\n-0.2\ta a\n\n\\end\\\n"
    )
    beam = Beam(lm=tmp_path / "tokens.arpa", beam=500)
    costs = {1: -1.0, 2: -0.2, 3: -2.0}
    for seed in range(8):
        found = posteriors(logits(seed)[0].log_softmax(-1))
        total = {key: math.log(p) + 2 * sum(costs[token] for token in key) for key, (_, p) in found.items()}
        best = max(total, key=total.get)
        assert beam.texts(logits(seed), TOKENS, VOCABULARY)[0][0] == found[best][0]


def test_padding_changes_nothing_and_the_probability_is_that_of_a_token(lexicon):
    values = logits(3, count=2)
    lengths = torch.tensor([FRAMES, 3])
    for beam in (Beam(), Beam(lexicon=lexicon)):
        both = beam.texts((values, lengths), TOKENS, VOCABULARY)
        alone = [beam.texts((values[n : n + 1, :length],), TOKENS, VOCABULARY)[0] for n, length in enumerate(lengths)]
        assert [one[0] for one in both] == [one[0] for one in alone]
        assert [one[1] for one in both] == pytest.approx([one[1] for one in alone])
        text, probability = both[0]
        labels = torch.tensor([TOKENS.encode(text, VOCABULARY)])
        scores = values[:1].log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(scores, labels, torch.tensor([FRAMES]), torch.tensor([labels.shape[1]]), reduction="sum")
        assert probability == pytest.approx(math.exp(-loss / labels.shape[1]), rel=1e-5)


def test_an_utterance_of_silence_has_no_text(lexicon):
    silent = torch.tensor([[[9.0, 0, 0, 0]] * 3])
    for beam in (Beam(), Beam(lexicon=lexicon)):
        ((text, probability),) = beam.texts(silent, TOKENS, VOCABULARY)
        assert text == ""
        assert probability == pytest.approx(1, abs=0.01)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lexicon": None}, r"decoding\.lexicon: there is no file .*none\.txt"),
        ({"lm": None}, r"decoding\.lm: there is no file .*none\.txt"),
        ({"lexicon": "ab\ncab c a b"}, r"line 2: a word must be spelled with the model's tokens; 'cab' has 'c'"),
        ({"lexicon": "ab\nsp |"}, r"line 2: .*'sp' has ''"),
        ({"lexicon": "\n"}, "has no words"),
        ({"lm": "no language model"}, "cannot be read as a KenLM file"),
        ({"lm": WORDS.replace("\tb", "\tbb").replace("a b", "a bb")}, "language model of the tokens; it knows 1 of 3"),
        ({"lm": WORDS, "lexicon": "aa\nbb"}, "language model of the words of decoding.lexicon; it knows 0 of 2"),
    ],
)
def test_files_that_are_missing_or_do_not_fit_are_refused(tmp_path, fields, message):
    files = {
        name: tmp_path / "none.txt" if text is None else write(tmp_path / name, text) for name, text in fields.items()
    }
    with pytest.raises(ctl.DataError, match=message):
        Beam(**files).check(TOKENS, VOCABULARY)


def test_a_lexicon_needs_a_space_among_the_tokens(lexicon):
    with pytest.raises(ctl.DataError, match="needs tokens with a space"):
        Beam(lexicon=lexicon).check(Characters(alphabet="ab"), ("<blank>", "a", "b"))


def test_a_source_model_with_fewer_tokens_hears_the_words_that_it_can_spell(lexicon):
    lexicon.write_text("ab\ncab\n")
    beam = Beam(lexicon=lexicon)
    with pytest.raises(ctl.DataError, match="'cab' has 'c'"):
        beam.check(TOKENS, VOCABULARY)
    beam.check(TOKENS, VOCABULARY, whole=False)
    values = torch.tensor([[[0.0, 0, 9, 0], [0, 0, 0, 9]]])
    assert beam.texts(values, TOKENS, VOCABULARY)[0][0] == "ab"


def test_files_are_refused_for_a_decoder_and_a_length_penalty_for_ctc(lexicon):
    outputs = Decoded(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    assert "must be a recognizer by CTC, because data.decoding has lexicon" in Beam(lexicon=lexicon).fault(outputs)
    assert "must be a recognizer by CTC, because data.decoding has lm" in Beam(lm=lexicon).fault(outputs)
    assert Beam(length_penalty=0.5).fault(outputs) is None
    fault = Beam(length_penalty=0.5).fault((torch.zeros(1, 2, 4), torch.tensor([2])))
    assert "must have a decoder, because data.decoding has length_penalty" in fault
    assert Greedy().fault(outputs) is None
    assert Beam().fault((torch.zeros(1, 2, 4), torch.tensor([2]))) is None


def test_a_changed_file_is_read_again(lexicon):
    beam = Beam(lexicon=lexicon, beam=500)
    values = torch.tensor([[[0.0, 0, 9, 0], [0, 0, 0, 9]]])
    assert beam.texts(values, TOKENS, VOCABULARY)[0][0] == "ab"
    lexicon.write_text("b\n")
    assert beam.texts(values, TOKENS, VOCABULARY)[0][0] == "b"


def test_weights_without_their_files_are_refused_in_a_spec(tmp_path):
    content = {"task": "transcribe", "data": {"kind": "manifest", "root": str(tmp_path), "target": "a"}}
    for fields, message in (
        ({"lm_weight": 1.0}, "lm_weight needs lm"),
        ({"word_score": 1}, "word_score needs lexicon"),
        ({"lm": "a.arpa", "length_penalty": 2}, "length_penalty is for decoders, .* received 2 beside a file"),
    ):
        content["data"]["decoding"] = {"kind": "beam", **fields}
        with pytest.raises(ctl.SpecError, match=rf"data\.(manifest\.)?decoding.*{message}"):
            parse_spec(content)
