"""Prompts go out without redundant white space, and everything else as it came."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from filters.prompt_saver import PromptSaver
from sidecar.dialects import ANTHROPIC
from tests.support.harness import MODEL, FakeUpstream, Harness, Run, Use

HEADER = "x-sidecar-prompt-saved"
TOKENS = "llm_sidecar_prompt_saver_tokens_saved"
CHARS = "llm_sidecar_prompt_saver_chars_saved"

CHAT = "/v1/chat/completions"
WIDE = "Some    words,\n\n\n\nmore words. \nAnd more.\n\n\n"
NARROW = "Some words,\n\nmore words.\nAnd more."


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


async def run(harness: Harness, body: Any, path: str = CHAT) -> Run:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return await harness.run(harness.call(data, path=path))


def sent(harness: Harness) -> bytes:
    return harness.upstream.sent[-1].body


async def test_redundant_white_space_is_not_sent() -> None:
    async with Harness(PromptSaver) as harness:
        await run(harness, user(WIDE, temperature=0.5, unknown={"b": [1, None], "a": "x  y"}))
        assert orjson.loads(sent(harness)) == (
            user(NARROW, temperature=0.5, unknown={"b": [1, None], "a": "x  y"})
        )


async def test_what_was_saved_is_reported() -> None:
    async with Harness(PromptSaver) as harness:
        done = await run(harness, user(WIDE))
        assert done.client.headers[HEADER] == "3"
        assert harness.value(TOKENS, team="tests") == 3
        assert harness.value(CHARS, team="tests") == len(WIDE) - len(NARROW)


async def test_a_large_body_is_worked_on_beside_the_other_calls() -> None:
    async with Harness(PromptSaver) as harness:
        done = await run(harness, user("Some words, \nmore words.\n\n\n\n" * 3000))
        assert orjson.loads(sent(harness)) == user("\n\n".join(["Some words,\nmore words."] * 3000))
        assert int(done.client.headers[HEADER]) == harness.value(TOKENS, team="tests") > 3000


async def test_a_body_with_nothing_to_save_passes_as_the_very_bytes_that_came() -> None:
    body = b'{ "messages":[{"content":"a b","role":"user"}],  "model": "gpt-4o-mini"}'
    async with Harness(PromptSaver) as harness:
        done = await run(harness, body)
        assert sent(harness) == body
        assert HEADER not in done.client.headers
        assert harness.value(TOKENS, team="tests") == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "gpt-4o-mini", "seed": 99999999999999999999, "messages": '
        b'[{"role": "user", "content": "a  b"}]}',
        b'{"model": "gpt-4o-mini", "seed": 1, "seed": 2, "messages": '
        b'[{"role": "user", "content": "a  b"}]}',
        b'{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a  b",'
        b' "cache_control": {"type": "ephemeral"}}]}',
        b'{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "a  b"}, '
        b'{"role": "user", "content": [{"text": "c", "cache_control": {}}]}]}',
        b"no JSON  at all",
    ],
    ids=["a big number", "a name twice", "a marked message", "a marked part", "no JSON"],
)
async def test_a_body_that_must_not_be_written_anew_passes_untouched(body: bytes) -> None:
    async with Harness(PromptSaver) as harness:
        call = harness.call(user("hi"))
        call.body, call._json = body, None
        await harness.run(call)
        assert sent(harness) == body


async def test_code_tool_results_and_answers_stay() -> None:
    messages = [
        {"role": "user", "content": "```\na  b\n```"},
        {"role": "assistant", "content": "a  b"},
        {"role": "tool", "tool_call_id": "c", "content": "a  b"},
    ]
    body = orjson.dumps({"model": MODEL, "messages": messages})
    async with Harness(PromptSaver) as harness:
        await run(harness, body)
        assert sent(harness) == body


async def test_roles_say_whose_texts_are_looked_at() -> None:
    messages = [
        {"role": "system", "content": WIDE},
        {"role": "user", "content": WIDE},
        {"role": "assistant", "content": WIDE},
    ]
    async with Harness(Use(PromptSaver, {"roles": ["assistant"]})) as harness:
        await run(harness, {"model": MODEL, "messages": messages})
        texts = [each["content"] for each in orjson.loads(sent(harness))["messages"]]
        assert texts == [WIDE, WIDE, NARROW]


def test_without_roles_it_is_idle() -> None:
    (saver,) = Harness(Use(PromptSaver, {"roles": []})).filters
    assert saver.is_idle


async def test_a_conversation_keeps_its_prefix_as_it_grows() -> None:
    """What a provider has in its prompt cache is found by the beginning of the bytes."""
    turns = [
        {"role": role, "content": f"{WIDE}{number}\n```\na  b\n```\n  x   y"}
        for number, role in enumerate(["system", *["user", "assistant"] * 4])
    ]
    async with Harness(PromptSaver) as harness:
        before: list[Any] = []
        for length in range(1, len(turns) + 1):
            await run(harness, {"model": MODEL, "messages": turns[:length]})
            messages = orjson.loads(sent(harness))["messages"]
            assert len(messages) == length
            assert messages[: length - 1] == before
            before = messages


async def test_anthropic_system_and_blocks_are_squeezed_and_counted_alike() -> None:
    body = {
        "model": MODEL,
        "max_tokens": 9,
        "system": WIDE,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": WIDE},
                    {"type": "tool_result", "tool_use_id": "t", "content": WIDE},
                ],
            }
        ],
    }
    async with Harness(PromptSaver, upstream=FakeUpstream(dialect=ANTHROPIC)) as harness:
        await run(harness, body, "/v1/messages")
        saved = orjson.loads(sent(harness))
        assert saved["system"] == NARROW
        assert [each.get("text") for each in saved["messages"][0]["content"]] == [NARROW, None]
        assert saved["messages"][0]["content"][1]["content"] == WIDE
        tokens = harness.value(TOKENS, team="tests")
        assert tokens == 6
        done = await run(harness, body, "/v1/messages/count_tokens")
        assert orjson.loads(sent(harness)) == saved
        assert HEADER not in done.client.headers  # nothing was paid for
        assert harness.value(TOKENS, team="tests") == tokens


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")]
)
async def test_texts_that_are_continued_or_measured_stay(path: str, name: str) -> None:
    body = orjson.dumps({"model": MODEL, name: WIDE})
    async with Harness(PromptSaver) as harness:
        await run(harness, body, path)
        assert sent(harness) == body


async def test_responses_have_their_input_squeezed() -> None:
    async with Harness(PromptSaver) as harness:
        await run(harness, {"model": MODEL, "instructions": WIDE, "input": WIDE}, "/v1/responses")
        saved = orjson.loads(sent(harness))
        assert (saved["instructions"], saved["input"]) == (NARROW, NARROW)
