"""Tokens by real vocabularies: the right one, in bounded work, and what happens without it."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splintr import Tokenizer

from filters.algo import tokens
from filters.algo.estimate import tokens_of_text
from filters.algo.tokens import (
    GEMINI,
    MAX_BYTES,
    NEW_CLAUDE,
    OLD_CLAUDE,
    RATES,
    Vocabularies,
    Vocabulary,
    family_of,
)

TEXTS = {
    path.stem: path.read_text()
    for path in sorted((Path(__file__).parents[2] / "data" / "texts").glob("*.txt"))
}
OF = {
    "o200k_base": "gpt-4o",
    "cl100k_base": "gpt-4",
    "qwen3": "qwen-plus",
    "deepseek_v3": "deepseek-chat",
    "kimi_k2": "kimi-k2",
    "glm4": "glm-4.5",
    "llama3": "llama-3.3-70b",
    "mistral_v3": "mistral-large",
}
"""A model of each vocabulary."""


def loaded(*models: str) -> Vocabularies:
    """With the vocabularies of these: for all tests of the file, and so by no event loop."""
    vocabularies = Vocabularies(len(models))
    for model in models:
        vocabularies.local_count(model, "load it")
    for thread in vocabularies._loading.values():
        thread.join()
    return vocabularies


@pytest.fixture(scope="module")
def all_of_them() -> Vocabularies:
    return loaded(*OF.values())


@pytest.fixture(scope="module")
def o200k() -> Vocabularies:
    return loaded("gpt-4o")


# Which vocabulary


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        *((model, vocabulary) for vocabulary, model in OF.items()),
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("openai/gpt-oss-120b", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("gpt-35-turbo-16k", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("text-embedding-v3", "qwen3"),
        ("Qwen/QwQ-32B", "qwen3"),
        ("deepseek-r1-distill-qwen-7b", "qwen3"),
        ("deepseek-r1-distill-llama-8b", "llama3"),
        ("moonshot-v1-8k", "kimi_k2"),
        ("codestral-latest", "mistral_v3"),
        ("ernie-4.5-turbo", "o200k_base"),
        ("*", "o200k_base"),
        ("qwen-*", "qwen3"),
    ],
)
def test_a_model_is_counted_by_the_vocabulary_of_its_family(model: str, vocabulary: str) -> None:
    assert family_of(model).vocabulary == vocabulary
    assert family_of(model).rate is RATES[vocabulary]


@pytest.mark.parametrize(
    ("model", "is_new"),
    [
        ("claude-2.1", False),
        ("claude-3-5-sonnet-20241022", False),
        ("anthropic.claude-3-haiku-20240307-v1:0", False),
        ("claude-sonnet-4-20250514", False),
        ("claude-sonnet-4@20250514", False),
        ("claude-opus-4-6", False),
        ("claude-opus-4-7", True),
        ("claude-opus-4.8", True),
        ("claude-sonnet-5", True),
        ("claude-haiku-latest", True),
    ],
)
def test_claude_has_two_families(model: str, is_new: bool) -> None:
    assert family_of(model) is (NEW_CLAUDE if is_new else OLD_CLAUDE)


def test_gemini_is_counted_at_the_rate_of_gemma() -> None:
    assert family_of("gemini-2.5-pro") == family_of("gemma-3-27b") == GEMINI


# Exact counts


@pytest.mark.parametrize(
    ("model", "text", "count"),
    [
        # OpenAI's cookbook, "How to count tokens with tiktoken".
        ("gpt-4", "tiktoken is great!", 6),
        ("gpt-4", "antidisestablishmentarianism", 6),
        ("gpt-4", "2 + 2 = 4", 7),
        ("gpt-4", "お誕生日おめでとう", 9),
        ("gpt-4o", "antidisestablishmentarianism", 6),
        ("gpt-4o", "2 + 2 = 4", 7),
        ("gpt-4o", "お誕生日おめでとう", 8),
        # The README of tiktoken has it as [24912, 2375].
        ("gpt-4o", "hello world", 2),
    ],
)
def test_counts_are_those_that_are_published(
    all_of_them: Vocabularies, model: str, text: str, count: int
) -> None:
    assert all_of_them.local_count(model, text) == count


def test_no_text_has_no_tokens(all_of_them: Vocabularies) -> None:
    assert all_of_them.local_count("gpt-4o", "") == 0
    assert Vocabularies(0).local_count("gpt-4o", "") == 0


def test_what_looks_like_a_control_token_is_text(all_of_them: Vocabularies) -> None:
    for model in OF.values():
        assert all_of_them.local_count(model, "<|endoftext|><|im_start|><|im_end|>") > 9


def test_qwen_reads_composed_and_decomposed_letters_alike(all_of_them: Vocabularies) -> None:
    composed = "Où l'été déjà s'achève. 한국어 문장 " * 9
    decomposed = unicodedata.normalize("NFD", composed)
    count = all_of_them.local_count("qwen-plus", composed)
    assert all_of_them.local_count("qwen-plus", decomposed) == pytest.approx(count, rel=0.05)
    assert all_of_them.local_count("gpt-4o", decomposed) > 1.3 * count


def test_a_surrogate_that_stands_alone_is_counted(all_of_them: Vocabularies) -> None:
    for model in OF.values():
        assert all_of_them.local_count(model, "a \ud800 b") >= 3


# Bounded work


class Spied:
    """A vocabulary that notes how much it is given at once."""

    def __init__(self, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._encode = vocabulary._encode
        monkeypatch.setattr(vocabulary, "_encode", self.encode)

    def encode(self, text: str) -> list[int]:
        self.most = max(self.most, len(text.encode()))
        return self._encode(text)


@pytest.mark.parametrize("name", ["o200k_base", "qwen3", "deepseek_v3"])
def test_one_count_hands_over_a_bounded_text(
    all_of_them: Vocabularies, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = all_of_them._loaded[name]
    spied = Spied(vocabulary, monkeypatch)
    most = MAX_BYTES // 2 if name == "deepseek_v3" else MAX_BYTES

    @given(st.text(min_size=1, max_size=40), st.integers(1, 3000))
    @settings(max_examples=60)
    def check(text: str, times: int) -> None:
        assert all_of_them.local_count(OF[name], text * times) >= 1
        # Normalised, a letter may take three times as much: U+0958 and its like fall apart.
        assert spied.most <= most * (3 if name == "qwen3" else 1)

    check()
    assert spied.most > most // 2


def test_marks_upon_marks_are_normalised_in_slices(
    all_of_them: Vocabularies, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    def spy(form: str, text: str) -> str:
        nonlocal most
        most = max(most, len(text))
        return text

    monkeypatch.setattr(tokens, "normalize", spy)
    all_of_them.local_count("qwen-plus", "a" + "\u0301" * 2000 + "\u0323" * 2000)
    assert 0 < most <= 64


def test_what_is_not_counted_is_like_the_beginning(o200k: Vocabularies) -> None:
    exact = o200k._loaded["o200k_base"]._encode
    for text in (TEXTS["english_chat"] * 40, TEXTS["python_parser"] * 40):
        assert o200k.local_count("gpt-4o", text) == pytest.approx(len(exact(text)), rel=0.05)


def test_other_scripts_behind_the_beginning_are_seen(o200k: Vocabularies) -> None:
    text = TEXTS["english_harbour"] * 10 + TEXTS["chinese_news"] * 30
    exact = len(o200k._loaded["o200k_base"]._encode(text))
    assert o200k.local_count("gpt-4o", text) == pytest.approx(exact, rel=0.15)


def test_a_vocabulary_does_not_remember_what_it_was_given(
    o200k: Vocabularies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_REMEMBERED_CHARS", 1000)
    vocabulary = o200k._loaded["o200k_base"]
    for number in range(200):
        vocabulary.count(f"zqx{number}k" * 10)
    vocabulary.count("a" * 1001)
    assert vocabulary._encode.__self__.cache_len <= 1  # type: ignore[attr-defined]


# Without the right vocabulary


def test_gemma_is_met_without_its_vocabulary(o200k: Vocabularies) -> None:
    gemma = Tokenizer.from_pretrained("gemma3").encode_ordinary
    for text in TEXTS.values():
        assert o200k.local_count("gemini-2.5-pro", text) == pytest.approx(
            len(gemma(text)), rel=0.12
        )


@pytest.mark.parametrize("name", TEXTS)
def test_another_vocabulary_stands_in(
    o200k: Vocabularies, all_of_them: Vocabularies, name: str
) -> None:
    for model in OF.values():
        exact = all_of_them.local_count(model, TEXTS[name])
        assert o200k.local_count(model, TEXTS[name]) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("name", TEXTS)
async def test_without_any_the_estimate_of_the_family_stands_in(
    all_of_them: Vocabularies, name: str
) -> None:
    none = Vocabularies(0)
    for model in OF.values():
        exact = all_of_them.local_count(model, TEXTS[name])
        assert none.local_count(model, TEXTS[name]) == pytest.approx(exact, rel=0.15)
    assert await none.warm(["gpt-4o"]) == ()


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [("english", 1.10, 1.72), ("python", 1.19, 1.49), ("chinese", 1.39, 1.41), ("json", 1.0, 1.13)],
)
def test_claude_takes_more_tokens_than_o200k(
    o200k: Vocabularies, kind: str, old: float, new: float
) -> None:
    text = "".join(text for name, text in TEXTS.items() if name.startswith(kind))[:2500]
    base = o200k.local_count("gpt-4o", text)
    assert o200k.local_count("claude-sonnet-4-5", text) / base == pytest.approx(old, rel=0.12)
    assert o200k.local_count("claude-opus-4-7", text) / base == pytest.approx(new, rel=0.12)


# Loading


async def test_a_vocabulary_is_loaded_beside_the_first_count() -> None:
    vocabularies, text = Vocabularies(1), TEXTS["english_chat"]
    assert vocabularies.local_count("gpt-4o", text) == tokens_of_text(text)
    await vocabularies.settled()
    assert await vocabularies.warm([]) == ("o200k_base",)
    assert vocabularies.local_count("gpt-4o", text) == 367


async def test_no_more_vocabularies_are_loaded_than_there_is_room_for() -> None:
    vocabularies = Vocabularies(1)
    assert await vocabularies.warm(["gpt-4", "gpt-4o", "gpt-3.5-turbo"]) == ("cl100k_base",)
    vocabularies.local_count("gpt-4o", "hello")
    await vocabularies.settled()
    assert await vocabularies.warm(["qwen-plus"]) == ("cl100k_base",)


async def test_without_the_package_tokens_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "splintr", None)  # what an import then raises is ImportError
    vocabularies, text = Vocabularies(), TEXTS["chinese_news"]
    assert await vocabularies.warm(["gpt-4o"]) == ()
    assert vocabularies.local_count("gpt-4o", text) == tokens_of_text(text)
