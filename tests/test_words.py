"""Words that stand for others are words, and the sentences stay sentences."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, load_tiny

from memorization.errors import InputError
from memorization.mitigations import rewrite
from memorization.mitigations.base import make_mitigation
from memorization.mitigations.perturbation import whole_words
from memorization.mitigations.rewrite import Rewrite, as_written, replaceable
from memorization.mitigations.words import encoded, ending, nearest_words, read_words, real_words, with_articles

ROOT = GOLDEN.parent.parent


class Vocabulary:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_ends_of_words_are_no_words():
    tokens = Vocabulary(
        "blossom</w>", "ssom</w>", "kite</w>", "kit", "nifying</w>", "Harbour1</w>", "an</w>", "boats</w>"
    )
    assert real_words(tokens) == ("blossom", "kite", "boats")
    assert real_words(Vocabulary("qzx</w>", "vvv</w>")) == ("qzx", "vvv")  # of a language that the list has not


def test_the_shipped_vocabulary_gives_words_alone():
    path = ROOT / "testbed" / "models" / "testbed-eps" / "tokenizer" / "vocab.json"
    vocabulary = Vocabulary(*json.loads(path.read_text(encoding="utf-8")))
    words = real_words(vocabulary)
    assert len(words) > 300 and {"fountain", "umbrella", "tiger"} <= set(words)
    assert not {"ssom", "bster", "ching", "ffic"} & set(words) and "ssom" in whole_words(vocabulary)


def test_a_list_of_ones_own_is_taken_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("# of mine\nzeppelin\n\nice cream\nzeppelin\n")
    assert real_words(Vocabulary("kite</w>"), tmp_path / "mine.txt") == ("zeppelin", "ice cream")
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no word"):
        make_mitigation("rewrite", {"words": str(tmp_path / "none.txt")})
    records = [make_mitigation("rewrite", {"words": str(tmp_path / name)}).record() for name in ("mine.txt",)]
    assert records[0]["words"].startswith("sha256:") and Rewrite().record()["words"] is None
    with pytest.raises(InputError, match="no such file"):
        read_words(tmp_path / "missing.txt")


def test_a_word_is_encoded_as_the_whole_prompt_would_be():
    pipe, words = load_tiny("tiny-eps"), ["kite", "boats", "clockmaker"]
    whole = pipe.embed(words)
    ends = [pipe.tokenizer(word).input_ids.index(pipe.tokenizer.eos_token_id) for word in words]
    assert len(set(ends)) > 1
    assert torch.allclose(encoded(pipe, words), torch.stack([whole[i, end] for i, end in enumerate(ends)]), atol=1e-5)


def test_nearest_words_are_those_of_the_text_encoder_and_of_one_ending(monkeypatch):
    places = {"kite": (1.0, 0.0), "balloon": (0.9, 0.2), "kites": (1.0, 0.1), "stone": (-1.0, 0.0), "glass": (0.0, 1.0),
              "Kite": (1.0, 0.0), "sail": (0.8, 0.5)}  # fmt: skip
    monkeypatch.setattr("memorization.mitigations.words.encoded",
                        lambda pipe, words: torch.tensor([places[word] for word in words]))  # fmt: skip
    words = ("stone", "glass", "kites", "sail", "balloon", "Kite")
    assert nearest_words(object(), "kite", words, 2) == ["balloon", "sail"]
    assert nearest_words(object(), "kite", words, 9) == ["balloon", "sail", "stone", "glass"]  # about the mean of all


def test_endings_articles_and_case():
    assert [ending(word) for word in ("Walking", "painted", "softly", "boats", "glass", "kite")] == [
        "ing", "ed", "ly", "s", "", ""]  # fmt: skip
    assert with_articles(["A", "apple", "on", "an", "table"], 1) == ["An", "apple", "on", "an", "table"]
    assert with_articles(["a", "red", "an", "table"], 3)[2] == "a" and with_articles(["red"], 0) == ["red"]
    assert (as_written("owl", "Kite"), as_written("owl", "KITE"), as_written("owl", "kite")) == ("Owl", "OWL", "owl")
    assert [word for word in ("kite,", "over", "'The", "1840", "it's", '"Kite"') if replaceable(word)] == [
        "kite,", '"Kite"']  # fmt: skip


class Case:
    """A sentence scores 1 for each of the words in ``bad``; the first word is the most significant."""

    pipe = SimpleNamespace(tokenizer=None, embed=lambda texts: SentencesOf(texts))

    def __init__(self, *bad):
        self.bad = bad

    def score(self, name, sentences):
        found = [sum(word.strip(",.").lower() in self.bad for word in text.split()) for text in sentences]
        return torch.tensor(found, dtype=torch.float32)


class SentencesOf(list):
    def float(self):
        return self


@pytest.fixture
def offered(monkeypatch):
    near = {"kite": ["owl", "balloon"], "harbour": ["inlet", "dock"], "lamp": ["kite", "torch"]}
    monkeypatch.setattr(rewrite, "word_order", lambda case, prompt: list(range(len(prompt.split()))))
    monkeypatch.setattr(rewrite, "real_words", lambda tokenizer, path: ())
    monkeypatch.setattr(rewrite, "nearest_words", lambda pipe, word, words, count: near.get(word.lower(), [])[:count])


@pytest.mark.parametrize(("prompt", "bad", "expected"), [
    ("A kite, in the harbour.", ["kite"], ("An owl, in the harbour.", 1)),  # the nearest word that will do
    ("A kite, in the harbour.", ["kite", "owl"], ("A balloon, in the harbour.", 1)),
    ("A kite, in the harbour.", ["kite", "harbour"], ("An owl, in the inlet.", 2)),
    ("The LAMP and a kite", ["lamp"], ("The TORCH and a kite", 1)),  # no word twice
    ("The tower", ["tower"], ("The tower", 0)),  # nothing is offered
])  # fmt: skip
def test_sentences_stay_sentences(offered, prompt, bad, expected):
    assert Rewrite(share=1.0)._rewrite(Case(*bad), prompt, 0) == expected


def test_at_most_a_share_of_the_words_is_changed(offered):
    text, changes = Rewrite(share=0.2)._rewrite(Case("kite", "harbour", "lamp"), "kite harbour lamp in red", 0)
    assert (text, changes) == ("owl harbour lamp in red", 1)


def test_a_rewritten_prompt_holds_words_of_the_vocabulary():
    from test_mitigations import PROMPTS, case_of

    pipe = load_tiny("tiny-eps")
    case = case_of(pipe)
    new = Rewrite(candidates=4)(case).prompts[0]
    known = {word.lower() for word in real_words(pipe.tokenizer)} | set(PROMPTS[0].split()) | {"an"}
    assert set(re.findall(r"\w+", new.lower())) <= known and len(new.split()) == 6
