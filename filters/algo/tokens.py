"""Tokens of a text by the vocabulary of its model: for calls that no provider counted.

Built on splintr (extra `tokens`): the vocabularies are compiled into its wheel, nothing is fetched,
and its counts equal tiktoken's. toktok and quicktok are as fast but know fewer families, tiktoken
and tokenizers take 6 to 20 times as long and download what they need. Without splintr, and until a
vocabulary is loaded, `estimate` weighs the characters instead, corrected for the family.

Counting is sync: the count is wanted when a call ends. It holds the interpreter (splintr lets go of
it in batches alone, so a thread would not help), so what one call hands over is bounded. Measured
for the most that is, in a text never seen before, in µs on one core of CPython 3.11:

==========================  =========================  ==============================
text                        o200k_base, ... (8 KiB)    deepseek_v3, mistral_v3 (4 KiB)
==========================  =========================  ==============================
English, Python             140 to 270                 130 to 170
Chinese                     470 to 590                 670 to 740
random letters, base64      370 to 850                 290 to 450
one letter, one mark        310 to 540                 100 to 220
spaces, line ends           390 to 540                 330 to 440
random Chinese, emoji       330 to 1,110               390 to 610
any other that was tried    70 to 900                  70 to 590
==========================  =========================  ==============================

A vocabulary takes 20 to 45 MB. Loading it holds the interpreter for 8 to 40 ms once,
in whichever thread; building its tables, 20 to 60 ms more, does not. `warm` has it done early.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from functools import lru_cache
from threading import Thread
from typing import NamedTuple
from unicodedata import normalize

from filters.algo.estimate import ASCII, MARK, tokens_of_text

MAX_BYTES = 8 * 1024
"""A longer text is counted up to there; the rest has as many as the beginning, by what it is made
of."""
_MAX_BYTES_SLOW = 4 * 1024
_SLOW = frozenset({"deepseek_v3", "mistral_v3"})
"""These take twice the time, so they count half as much."""
_REMEMBERED_CHARS = 1024 * 1024
"""Splintr remembers 130,000 words, however long, at 22 KB for one of 8 KiB: it is made to forget
them after so much text, in 0.25 ms."""

_IN_NFC = frozenset({"qwen3"})
"""What its tokenizer reads is normalised; splintr leaves that to us."""
_NFC_CHARS = 64
"""Normalised at once: marks upon marks take the square of their number, 16 ms for 4,096."""

_REHEARSAL = (
    'Warm up: 今天天气很好 龘靐 zxqvjkw 12345 \t\n\n  {"a": [1]} é привет 안녕 😀 ' + "a" * 64
)
"""Splintr builds tables at the first rare word and at the first Chinese one."""


class Rate(NamedTuple):
    """Tokens for each of o200k's, by the kind of text. Measured over the samples of the tests and
    some 500 pieces of manuals, programs and JSON, but for Claude."""

    ascii: float
    """Of ASCII text without a mark or digit..."""
    per_mark: float
    """... and so much more, or less, in one of nothing else: half a page of JSON has a third."""
    other: float
    """Of text beyond ASCII: Chinese."""


RATES = {
    "o200k_base": Rate(1.0, 0.0, 1.0),
    "cl100k_base": Rate(1.0, 0.0, 1.5),
    "qwen3": Rate(1.0, 0.25, 0.82),  # each digit is a token
    "deepseek_v3": Rate(1.01, 0.2, 0.75),
    "kimi_k2": Rate(1.0, 0.0, 0.74),
    "glm4": Rate(1.0, 0.0, 0.8),
    "llama3": Rate(1.0, 0.0, 1.05),
    "mistral_v3": Rate(1.02, 0.3, 1.22),
}
"""By splintr's name of the vocabulary."""

CLAUDE = Rate(1.1, 0.0, 1.39)
CLAUDE_4_7 = Rate(1.8, -2.0, 1.41)
"""Claude has no public vocabulary. These approximate what others measured with Anthropic's counting
endpoint (the package `ctok`): up to 4.6 English takes 1.10 of o200k's tokens, code 1.19, Chinese
1.39, JSON 1.00; from 4.7 on 1.72, 1.49, 1.41, 1.13."""


GEMMA = Rate(1.04, 0.5, 0.89)
"""Its own vocabulary, which Gemini's resembles, takes splintr 130 µs for each KB of English."""


class Family(NamedTuple):
    """Models that count alike: by a vocabulary, times the rate at which theirs differs."""

    vocabulary: str
    rate: Rate


def _family(vocabulary: str) -> Family:
    return Family(vocabulary, RATES[vocabulary])


OLD_CLAUDE = Family("o200k_base", CLAUDE)
NEW_CLAUDE = Family("o200k_base", CLAUDE_4_7)
GEMINI = Family("o200k_base", GEMMA)
DEFAULT = _family("o200k_base")

# The first that is found in a model's name decides: `deepseek-r1-distill-qwen-7b` is a Qwen.
_FAMILIES = [
    (re.compile(pattern), family)
    for pattern, family in (
        (r"qwen|qwq|qvq|tongyi|text-embedding-v\d", _family("qwen3")),
        (r"llama", _family("llama3")),
        (r"deepseek", _family("deepseek_v3")),
        (r"kimi|moonshot", _family("kimi_k2")),
        (r"glm", _family("glm4")),
        (r"mistral|mixtral|ministral|magistral|codestral|devstral|pixtral", _family("mistral_v3")),
        (r"gemma|gemini", GEMINI),
        (r"gpt-4(?!o|\.\d)|gpt-3\.?5|text-embedding-(?:ada|3)", _family("cl100k_base")),
    )
]
_CLAUDE_VERSION = re.compile(r"claude\D*(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)").search


@lru_cache(1024)
def family_of(model: str) -> Family:
    """The family of a model by its name, or by a pattern of names: o200k's for unknown ones."""
    name = model.lower()
    if "claude" in name:
        found = _CLAUDE_VERSION(name)
        version = (int(found[1]), int(found[2] or 0)) if found else (4, 7)
        return NEW_CLAUDE if version >= (4, 7) else OLD_CLAUDE
    for pattern, family in _FAMILIES:
        if pattern.search(name):
            return family
    return DEFAULT


class Vocabularies:
    """Vocabularies in memory, at most `max_vocabularies` of them; 0: none.

    One that is missed is loaded beside the calls if there is room. Until then, and beyond, its
    models are counted by another one at the rate at which the two differ, which is right within
    some 10 %; by `estimate` when there is none.
    """

    def __init__(self, max_vocabularies: int = 2) -> None:
        self._room = max_vocabularies
        self._loaded: dict[str, Vocabulary] = {}
        self._first: Vocabulary | None = None
        self._loading: dict[str, Thread] = {}

    def local_count(self, model: str, text: str) -> int:
        """Tokens of `text` for `model`, as its provider names it; of any length, within 2 ms."""
        if not text:
            return 0
        family = family_of(model)
        vocabulary = self._loaded.get(family.vocabulary)
        if vocabulary is None:
            self._load(family.vocabulary)
            vocabulary = self._first
            if vocabulary is None:
                return round(tokens_of_text(text) * _rate(family.rate, text)) or 1
        head = _head(text, vocabulary.max_bytes)
        tokens: float = vocabulary.count(head)
        if len(head) < len(text):
            tokens *= tokens_of_text(text) / tokens_of_text(head)
        if family.rate is not vocabulary.rate:
            tokens *= _rate(family.rate, text) / _rate(vocabulary.rate, text)
        return round(tokens) or 1

    async def warm(self, models: Iterable[str]) -> tuple[str, ...]:
        """Load the vocabularies of `models`, in this order and as far as there is room, before they
        are needed. Gives those that are there, by splintr's names; none without splintr."""
        for model in models:
            self._load(family_of(model).vocabulary)
        await self.settled()
        return tuple(self._loaded)

    async def settled(self) -> None:
        """Return once nothing is being loaded."""
        for thread in list(self._loading.values()):
            await asyncio.to_thread(thread.join)

    def _load(self, name: str) -> None:
        if name not in self._loading and len(self._loading) < self._room:
            # Its own thread, which ends: a pool's would stay.
            thread = Thread(target=self._load_here, args=(name,), name=f"load {name}", daemon=True)
            self._loading[name] = thread  # there for good: it is not loaded twice
            thread.start()

    def _load_here(self, name: str) -> None:
        try:
            vocabulary = Vocabulary(name)
        except ImportError:
            self._room = 0
            return
        self._loaded[name] = vocabulary
        if self._first is None:
            self._first = vocabulary


class Vocabulary:
    """One that has nothing left to build. Raises ImportError without splintr."""

    def __init__(self, name: str) -> None:
        from splintr import Tokenizer  # an extra

        tokenizer = Tokenizer.from_pretrained(name)
        tokenizer.encode_batch([_REHEARSAL])
        # "Ordinary": what looks like a control token in a text is no such token at a provider.
        self._encode = tokenizer.encode_ordinary
        self._forget = tokenizer.clear_cache
        self._chars = 0  # since it last forgot
        self._is_nfc = name in _IN_NFC
        self.max_bytes = _MAX_BYTES_SLOW if name in _SLOW else MAX_BYTES
        self.rate = RATES[name]

    def count(self, text: str) -> int:
        """Tokens of a text of at most `max_bytes`."""
        self._chars += len(text)
        if self._chars > _REMEMBERED_CHARS:
            self._forget()
            self._chars = 0
        return len(self._encode(_nfc(text) if self._is_nfc else text))


def _head(text: str, max_bytes: int) -> str:
    """As much of the beginning as has `max_bytes` in UTF-8; surrogates that stand alone become
    question marks."""
    if len(text) <= max_bytes and text.isascii():
        return text
    return text[:max_bytes].encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


def _nfc(text: str) -> str:
    """Exact but for marks at the seams."""
    if text.isascii():
        return text
    parts = range(0, len(text), _NFC_CHARS)
    return "".join([normalize("NFC", text[at : at + _NFC_CHARS]) for at in parts])


def _rate(rate: Rate, text: str) -> float:
    """The rate for a text, by how its beginning is made up."""
    head = text[:MAX_BYTES]
    plain = head.encode("ascii", "ignore").decode()
    total, of_ascii = tokens_of_text(head), tokens_of_text(plain)
    if not total:
        return 1.0
    marks = (of_ascii - ASCII * len(plain)) / (MARK * len(plain)) if plain else 0.0
    by_ascii = max(1.0, rate.ascii + rate.per_mark * min(max(marks, 0.0), 1.0))
    share = min(of_ascii / total, 1.0)
    return by_ascii * share + rate.other * (1.0 - share)
