"""Prompts without the white space that says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal

from filters.algo.estimate import takes_tokens
from filters.algo.exact_json import is_exact
from filters.algo.prompt_text import squeeze, tokens_saved, with_texts
from sidecar.api import Call, CallFilter, CallNext, FilterConfig, Kit, Rejected, Reply

HEADER = "x-sidecar-prompt-saved"

NO_PROMPTS = frozenset({"completions", "embeddings", "models", "other", "pass_through"})
"""Endpoints whose texts stay: what is continued to the letter, what becomes a vector, and what
nobody knows."""
MARK = b'"cache_control"'
LARGE_BYTES = 16 * 1024
"""A larger body would hold up the event loop: 100 µs for each KB of which every line changes."""


class PromptSaver(CallFilter):
    """Takes redundant white space out of prompts: it is paid for like any other text.

    Switch it on for prompts that are put together by templates, or pasted from documents. Place it
    before all that counts or keeps what is sent: limits, budgets, `token_counter`, `cache`. It
    works on each message for itself, so that a conversation keeps the prefix which the provider has
    in its prompt cache, and leaves alone a request whose caller marks what to cache.
    """

    class Config(FilterConfig):
        """Whose texts to look at."""

        roles: list[Literal["user", "system", "assistant"]] = ["user", "system"]
        """Messages of these; `system` includes developers'. Tool results always stay."""

    config: Config

    def __init__(self, config: Config, kit: Kit) -> None:
        super().__init__(config, kit)
        self._roles = frozenset(config.roles)
        self.is_idle = not self._roles
        tokens = kit.metrics.counter(
            "llm_sidecar_prompt_saver_tokens_saved",
            "Tokens of prompts that were not sent, estimated.",
            ("team",),
        )
        chars = kit.metrics.counter(
            "llm_sidecar_prompt_saver_chars_saved",
            "Characters of prompts that were not sent.",
            ("team",),
        )
        self._tokens, self._chars = tokens.child(kit.team), chars.child(kit.team)

    def handle(self, call: Call, call_next: CallNext) -> Awaitable[Reply]:
        body, endpoint = call.body, call.endpoint
        if not body or not endpoint.has_model or endpoint.name in NO_PROMPTS:
            return call_next(call)
        if MARK in body:  # the mark moves on from message to message, whose text must not change
            return call_next(call)
        try:
            fields = call.json
        except Rejected:  # no JSON object: whoever needs one says so
            return call_next(call)
        if len(body) > LARGE_BYTES:
            return self._save_beside(call, body, fields, call_next)
        self._send(call, Saving(fields, body, self._roles))
        return call_next(call)

    async def _save_beside(
        self, call: Call, body: bytes, fields: dict[str, Any], call_next: CallNext
    ) -> Reply:
        """The same in a thread, while other calls go on."""
        self._send(call, await asyncio.to_thread(Saving, fields, body, self._roles))
        return await call_next(call)

    def _send(self, call: Call, saving: Saving) -> None:
        """Send what is left instead of the bytes that came, if anything is saved."""
        if saving.fields is None:
            return
        call.replace_json(saving.fields)
        if takes_tokens(call):  # to count tokens costs nothing
            self._tokens.value += saving.tokens
            self._chars.value += saving.chars
            call.set_reply_header(HEADER, str(saving.tokens))


class Saving:
    """What is saved of one request: `fields` is what is left of it, None when that is all."""

    __slots__ = ("chars", "fields", "tokens")

    def __init__(self, fields: dict[str, Any], body: bytes, roles: frozenset[str]) -> None:
        self.chars = 0
        self.tokens = 0
        left = with_texts(fields, self.squeeze, roles)
        is_saved = left is not fields and is_exact(body, fields)
        self.fields: dict[str, Any] | None = left if is_saved else None

    def squeeze(self, text: str, is_whole: bool) -> str:
        squeezed = squeeze(text, is_whole)
        if squeezed is not text:
            self.chars += len(text) - len(squeezed)
            self.tokens += tokens_saved(text, squeezed)
        return squeezed
