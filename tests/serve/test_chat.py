"""What chat completions promise: the official client works, and answers are the engine's."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from softrag.handles import make_handle
from tests.serve.conftest import ACME

QUESTION = "Who wrote Hamlet and Macbeth?"
ASKED = {"role": "user", "content": QUESTION}


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key=ACME, max_retries=0) as client:
        yield client


@pytest.fixture
def engine(served):
    return served.engines["acme"]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "softrag"


def test_an_answer_is_the_engines_with_sources_and_usage(client, engine):
    expected = engine.ask(QUESTION, k=3, max_new_tokens=8)

    completion = client.chat.completions.create(
        model="tiny", messages=[ASKED], max_tokens=8, extra_body={"softrag": {"k": 3}}
    )

    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    usage = completion.usage
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == expected.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.soft_tokens == expected.usage.soft_tokens > 0
    assert usage.text_prompt_tokens == expected.usage.text_prompt_tokens
    sources = completion.softrag["sources"]
    assert [source["id"] for source in sources] == [hit.id for hit in expected.sources]
    assert sources[0]["source"] == "notes/2.txt"
    assert sources[0]["text"].startswith("William Shakespeare")
    assert completion.softrag["timings"]["total_s"] > 0


def test_a_stream_is_the_same_answer_in_pieces(client, engine):
    expected = engine.ask(QUESTION, max_new_tokens=12)

    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[ASKED],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[0].softrag["sources"][0]["source"] == "notes/2.txt"
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert "".join(texts) == expected.text
    assert last.choices[0].finish_reason == expected.finish_reason
    assert last.softrag["timings"]["first_token_s"] > 0
    assert usage.choices == []
    assert usage.usage.completion_tokens == expected.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_says_its_usage_only_when_asked(client):
    chunks = client.chat.completions.create(
        model="tiny", messages=[ASKED], max_tokens=3, stream=True
    )

    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_the_async_client_works_and_its_answers_are_not_mixed_up(served, engine):
    questions = [f"{QUESTION} {number}" for number in range(8)]
    expected = [engine.ask(question, max_new_tokens=6).text for question in questions]

    async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key=ACME) as client:

        async def ask(question: str) -> str:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": question}],
                max_tokens=6,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*map(ask, questions))

    assert texts == expected


def test_options_of_the_answer_reach_the_engine(client, engine):
    expected = engine.ask(QUESTION, k=1, mode="text", max_new_tokens=9, temperature=0.8, seed=7)

    completion = client.chat.completions.create(
        model="tiny",
        messages=[ASKED],
        max_completion_tokens=9,
        temperature=0.8,
        seed=7,
        extra_body={"softrag": {"k": 1, "mode": "text"}},
    )

    assert completion.choices[0].message.content == expected.text
    assert completion.usage.soft_tokens == 0
    assert completion.softrag["mode"] == "text"


def test_a_stop_string_ends_the_answer(client, engine):
    whole = engine.ask(QUESTION, max_new_tokens=12).text
    middle = whole[len(whole) // 2]

    completion = client.chat.completions.create(
        model="tiny", messages=[ASKED], max_tokens=12, stop=middle
    )

    assert completion.choices[0].message.content == whole[: whole.index(middle)]
    assert completion.choices[0].finish_reason == "stop"


def test_chunks_are_filtered(client):
    completion = client.chat.completions.create(
        model="tiny",
        messages=[ASKED],
        max_tokens=2,
        extra_body={"softrag": {"where": {"source": ["notes/4.txt", "notes/5.txt"]}}},
    )

    found = {source["source"] for source in completion.softrag["sources"]}
    assert found == {"notes/4.txt", "notes/5.txt"}


def test_the_last_message_is_the_question_and_the_others_are_counted(client, engine):
    messages = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Where is Paris?"},
        {"role": "assistant", "content": "In France.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]

    completion = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)

    assert completion.choices[0].message.content == engine.ask(QUESTION, max_new_tokens=8).text
    assert completion.softrag["unread_messages"] == 3


def test_a_handle_or_a_placeholder_in_a_question_is_text(client, engine):
    memory = engine.retrieve(QUESTION, k=1)[0].memory
    engine.cache.put(memory)
    for question in (make_handle(memory.key), "<MEM><MEM>"):
        completion = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            max_tokens=2,
            extra_body={"softrag": {"mode": "closed"}},
        )

        assert completion.usage.soft_tokens == 0
        assert completion.softrag["sources"] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_p": 0.5}, "top_p"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"softrag": {"k": 0}}}, "softrag.k"),
    ],
)
def test_what_the_server_cannot_honour_is_refused_by_name(client, options, named):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[ASKED], **options)

    assert refused.value.param == named
    assert named in refused.value.message


def test_parameters_that_ask_for_nothing_are_let_through(client):
    completion = client.chat.completions.create(
        model="tiny",
        messages=[ASKED],
        max_tokens=2,
        n=1,
        top_p=1.0,
        presence_penalty=0,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        user="somebody",
    )

    assert completion.choices[0].index == 0


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [ASKED, {"role": "assistant", "content": "Shakespeare."}],
        [{"role": "user", "content": "  "}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "tool_call_id": "1", "content": "x"}, ASKED],
    ],
)
def test_messages_that_ask_nothing_readable_are_refused(client, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_another_model_does_not_exist(client):
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4o' does not exist.*'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=[ASKED])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../tiny")


def test_a_prompt_that_does_not_fit_is_a_wrong_request(client):
    with pytest.raises(openai.BadRequestError, match="the decoder reads"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "word " * 5000}],
            extra_body={"softrag": {"mode": "closed"}},
        )


def test_events_end_with_done(served):
    body = {"model": "tiny", "messages": [ASKED], "max_tokens": 2, "stream": True}
    with served.client() as client:
        response = client.post("/v1/chat/completions", json=body)

    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for event in events:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"
