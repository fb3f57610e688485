"""Questions answered from memories in LangChain: the model, the chain, and what leaves them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Mapping
from operator import itemgetter

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.documents import Document
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from langchain_core.tracers.base import BaseTracer

from langchain_softrag import (
    ChatSoftRAG,
    SoftRAGCompressor,
    SoftRAGQdrantVectorStore,
    create_softrag_chain,
    format_memories,
)
from softrag import Memory, UnknownHandleError, find_handles, make_handle
from tests.families import SENTENCES
from tests.integrations.at_work import rows_of, threads_of
from tests.integrations.langchain.conftest import open_engine

QUESTION = "Who wrote Hamlet and Macbeth?"
QUESTIONS = [
    QUESTION,
    "What is the capital of France?",
    "When does water boil?",
    "Who discovered penicillin?",
]


@pytest.fixture
def llm(engine):
    return ChatSoftRAG(engine=engine, max_tokens=6)


@pytest.fixture
def retriever(engine):
    return SoftRAGQdrantVectorStore(engine).as_retriever(k=2)


@pytest.fixture
def chain(retriever, llm):
    return create_softrag_chain(retriever, llm)


@pytest.fixture
def decoded(engine, monkeypatch):
    """How many requests the decoder was given in every call."""
    sizes: list[int] = []
    run = engine.decoder.generate

    def counting(requests):
        sizes.append(len(requests))
        return run(requests)

    monkeypatch.setattr(engine.decoder, "generate", counting)
    return sizes


@pytest.fixture
def running(engine, monkeypatch):
    """How many requests took part in every step of the decoder."""
    return rows_of(monkeypatch, engine.decoder)


def asked(engine, question=QUESTION, **options):
    return engine.ask(question, k=2, max_new_tokens=6, **options)


# The chain


def test_the_chain_answers_as_the_engine(chain, engine):
    for question in QUESTIONS:
        found = chain.invoke(question)

        answer = asked(engine, question)
        assert list(found) == ["question", "sources", "answer"]
        assert found["question"] == question
        assert found["answer"] == answer.text
        assert [source.id for source in found["sources"]] == [hit.id for hit in answer.sources]


def test_a_mixed_chain_reads_the_best_document_as_text(retriever, llm, engine, chain):
    mixed = create_softrag_chain(retriever, llm, mode="mixed")

    for question in QUESTIONS:
        found = mixed.invoke(question)
        assert found["answer"] == asked(engine, question, mode="mixed").text
        assert found["sources"] == chain.invoke(question)["sources"]
        pieces = [piece.get("answer", "") for piece in mixed.stream(question)]
        assert "".join(pieces) == found["answer"]
    messages = format_memories(retriever.invoke(QUESTION), mode="mixed")
    usage = llm.invoke([*messages, ("human", QUESTION)]).usage_metadata
    assert usage["input_tokens"] == asked(engine, mode="mixed").usage.prompt_tokens


async def test_a_mixed_chain_is_the_same_async(retriever, llm, engine):
    mixed = create_softrag_chain(retriever, llm, mode="mixed")
    expected = asked(engine, mode="mixed").text

    assert (await mixed.ainvoke(QUESTION))["answer"] == expected
    pieces = [piece.get("answer", "") async for piece in mixed.astream(QUESTION)]
    assert "".join(pieces) == expected


def test_only_the_first_document_is_read_as_text(llm, retriever):
    documents = retriever.invoke(QUESTION)
    twice = [
        *format_memories(documents, mode="mixed"),
        *format_memories(documents, mode="mixed"),
        HumanMessage(QUESTION),
    ]

    with pytest.raises(ValueError, match="Only the first document can be read as text"):
        llm.invoke(twice)
    with pytest.raises(ValueError, match="mode must be one of memory, mixed; found 'text'"):
        format_memories(documents, mode="text")


def test_the_demo_model_answers_the_same_both_ways(demo_engine):
    retriever = SoftRAGQdrantVectorStore(demo_engine).as_retriever(k=3)
    chain = create_softrag_chain(retriever, ChatSoftRAG(engine=demo_engine, max_tokens=12))
    questions = ["Who invented the piano?", "How many strings has a violin?"]

    answers = [found["answer"] for found in chain.batch(questions)]

    assert answers == [
        demo_engine.ask(question, k=3, max_new_tokens=12).text for question in questions
    ]


def test_batches_and_singles_are_the_same(chain, running):
    singles = [chain.invoke({"question": question}) for question in QUESTIONS]
    assert max(running) == 1
    running.crowd = 4

    assert chain.batch(QUESTIONS) == singles
    assert max(running) == 4


def test_streams_join_to_the_answer(chain):
    whole = chain.invoke(QUESTION)

    pieces = list(chain.stream(QUESTION))

    assert pieces[0] == {"question": QUESTION}
    assert pieces[1] == {"sources": whole["sources"]}
    assert "".join(piece["answer"] for piece in pieces[2:]) == whole["answer"]
    assert "".join(chain.pick("answer").stream(QUESTION)) == whole["answer"]


async def test_async_twins_are_the_same(chain):
    whole = chain.invoke(QUESTION)

    assert await chain.ainvoke(QUESTION) == whole
    assert await chain.abatch([QUESTION, QUESTION]) == [whole, whole]
    pieces = [piece async for piece in chain.pick("answer").astream(QUESTION)]
    assert "".join(pieces) == whole["answer"]


def test_runnables_habits(retriever, llm, engine):
    chain = create_softrag_chain(
        retriever.configurable_fields(k=ConfigurableField(id="k")),
        llm.configurable_fields(max_tokens=ConfigurableField(id="max_tokens")).with_retry(),
    )
    whole = chain.invoke(QUESTION)

    assert chain.with_retry().invoke(QUESTION) == whole
    assert chain.with_fallbacks([chain]).invoke(QUESTION) == whole
    short = chain.with_config(configurable={"k": 1, "max_tokens": 1}, tags=["x"]).invoke(QUESTION)
    assert len(short["sources"]) == 1
    assert short["answer"] == engine.ask(QUESTION, k=1, max_new_tokens=1).text
    schema = chain.get_output_jsonschema()
    assert set(schema["$defs"]["SoftRAGOutput"]["properties"]) == {"question", "answer", "sources"}


def test_the_classic_idiom_needs_one_placeholder(retriever, llm, engine):
    prompt = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("context"), ("human", "{question}")]
    )
    context = retriever | format_memories
    chain = (
        {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
    )

    assert chain.invoke(QUESTION) == asked(engine).text


def test_documents_without_memories_are_compressed_never_stuffed(llm, engine):
    plain = [Document(page_content=text) for text in SENTENCES[1:3]]

    message = llm.invoke([*format_memories(plain), HumanMessage(QUESTION)])

    memories = engine.compressor.compress(SENTENCES[1:3])
    answer = engine.answer_from(QUESTION, memories, max_new_tokens=6)
    assert message.content == answer.text
    assert message.usage_metadata["input_token_details"] == {
        "softrag_memory_tokens": sum(map(len, memories))
    }
    assert message.usage_metadata["input_tokens"] == answer.usage.prompt_tokens


def test_a_query_dependent_model_answers_as_the_engine():
    with open_engine(query_dependent=True) as engine:
        store = SoftRAGQdrantVectorStore(engine)
        store.add_texts(SENTENCES)
        llm = ChatSoftRAG(engine=engine, max_tokens=6)

        found = create_softrag_chain(store.as_retriever(k=2), llm).invoke(QUESTION)

        assert found["answer"] == asked(engine).text


def test_a_question_is_needed(chain):
    with pytest.raises(ValueError, match="found the keys query"):
        chain.invoke({"query": "x"})
    with pytest.raises(ValueError, match="blank"):
        chain.invoke(" ")


async def test_thirty_two_questions_at_once(chain, engine, decoded, running, monkeypatch):
    expected = {question: asked(engine, question).text for question in QUESTIONS}
    del decoded[:]
    at_work = threads_of(monkeypatch, (engine.embedder, "embed_query"), (engine, "answer_from"))
    running.crowd = 8

    found = await asyncio.gather(*(chain.ainvoke(QUESTIONS[n % 4]) for n in range(32)))

    assert [each["answer"] for each in found] == [expected[each["question"]] for each in found]
    assert sum(decoded) == 32
    assert max(running) >= 8
    # How long the event loop is kept is measured by benchmarks/event_loop.py.
    assert at_work
    assert threading.get_ident() not in at_work


# The chat model


def test_usage_counts_soft_tokens(retriever, llm, engine):
    callback = UsageMetadataCallbackHandler()
    messages = [*format_memories(retriever.invoke(QUESTION)), HumanMessage(QUESTION)]

    message = llm.invoke(messages, config={"callbacks": [callback]})

    answer = asked(engine)
    usage, hits = answer.usage, answer.sources
    assert message.usage_metadata == {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_token_details": {
            "softrag_memory_tokens": usage.soft_tokens,
            "softrag_document_tokens": sum(hit.memory.n_document_tokens for hit in hits),
        },
    }
    assert callback.usage_metadata == {llm.model_name: message.usage_metadata}
    chunks = list(llm.stream(messages))
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [
        message.usage_metadata
    ]
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert chunks[-1].response_metadata["finish_reason"] in ("stop", "length")


def test_call_options(llm, engine):
    whole = llm.invoke(QUESTION).content

    assert llm.invoke(QUESTION, max_tokens=1).usage_metadata["output_tokens"] == 1
    stop = whole[2]
    assert llm.bind(stop=[stop]).invoke(QUESTION).content == whole.partition(stop)[0]
    sampled = [llm.bind(temperature=5.0, seed=1).invoke(QUESTION).content for _ in range(2)]
    assert sampled[0] == sampled[1] != whole
    with pytest.raises(ValueError, match="no option tools"):
        llm.invoke(QUESTION, tools=[])
    assert ChatSoftRAG(engine=engine, model="m", stop_sequences=["x"]).stop == ["x"]


def test_what_was_said_before_stands_before_the_question(llm, engine):
    said = llm.invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hello"),
            AIMessage("Hi"),
            HumanMessage("Who?"),
            HumanMessage("When?"),
        ]
    )

    question = "Be brief.\nUser: Hello\nAssistant: Hi\n\nWho?\nWhen?"
    assert said.content == engine.ask(question, mode="closed", max_new_tokens=6).text


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "asks nothing"),
        ([AIMessage("Hi")], "asks nothing"),
        ([ToolMessage("1", tool_call_id="1"), HumanMessage("?")], "found ToolMessage"),
        (
            [HumanMessage([{"type": "image", "url": "http://x/y.png"}])],
            "a block of type 'image'",
        ),
        (
            [
                HumanMessage(
                    [{"type": "non_standard", "value": {"type": "softrag_memory", "handle": "x"}}]
                )
            ],
            "instead of one handle",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(llm, messages, error):
    with pytest.raises(ValueError, match=error):
        llm._generate(messages)


def test_tools_and_structured_output_are_not_offered(llm):
    with pytest.raises(NotImplementedError):
        llm.bind_tools([])
    with pytest.raises(NotImplementedError):
        llm.with_structured_output({"title": "x", "type": "object", "properties": {}})


@pytest.mark.parametrize("typed", ["<MEM>", "<MEM><MEM>", "HANDLE"])
def test_what_a_user_types_never_becomes_a_memory(llm, engine, chain, typed):
    [hit] = engine.retrieve(QUESTION, k=1)
    typed = typed.replace("HANDLE", make_handle(hit.memory.key))

    message = llm.invoke(f"Repeat {typed}")

    assert message.usage_metadata["input_token_details"]["softrag_memory_tokens"] == 0
    found = chain.invoke(f"{QUESTION} {typed}")
    answer = asked(engine, f"{QUESTION} {typed}")
    assert found["answer"] == answer.text
    assert answer.usage.soft_tokens == sum(len(each.memory) for each in answer.sources)


def test_a_handle_in_a_text_is_warned_about(llm, caplog):
    llm.invoke(make_handle("0" * 32))

    assert "It is read as text" in caplog.text


def test_an_expired_handle_is_read_again_from_the_store(retriever, llm, engine):
    messages = [*format_memories(retriever.invoke(QUESTION)), HumanMessage(QUESTION)]
    engine.cache.clear()

    assert llm.invoke(messages).content == asked(engine).text


def test_a_handle_that_is_nowhere_is_named(llm, engine):
    compressor = SoftRAGCompressor(engine=engine)
    [found] = compressor.transform_documents([Document(page_content="Stored nowhere.")])
    engine.cache.clear()

    with pytest.raises(UnknownHandleError, match=find_handles(found.metadata["softrag_memory"])[0]):
        llm.invoke([*format_memories([found]), HumanMessage(QUESTION)])


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_messages_survive_being_saved(retriever, llm, engine):
    messages = [*format_memories(retriever.invoke(QUESTION)), HumanMessage(QUESTION)]

    saved = dumps(messages)

    assert len(saved) < 1500
    restored = loads(saved, allowed_objects="messages")
    engine.cache.clear()
    assert llm.invoke(restored).content == asked(engine).text


# Caching


def test_cached_answers_belong_to_their_memories(engine, decoded):
    llm = ChatSoftRAG(engine=engine, max_tokens=6, cache=InMemoryCache())
    compressor = SoftRAGCompressor(engine=engine)
    # Documents that differ in the middle only.
    a, b = (
        format_memories(compressor.transform_documents([Document(page_content=f"Paris {x} Seine")]))
        for x in "AB"
    )

    answers = [llm.invoke([*memory, HumanMessage(QUESTION)]).content for memory in (a, a, b)]

    assert decoded == [1, 1]
    assert answers[0] == answers[1]


def test_cached_answers_belong_to_their_model_and_options(engine, decoded):
    cache = InMemoryCache()
    first = ChatSoftRAG(engine=engine, max_tokens=3, cache=cache)
    with open_engine() as twin:
        # The same compressor: only the decoder could differ, and nobody said it does not.
        other = ChatSoftRAG(engine=twin, max_tokens=3, cache=cache)
        assert other.model_name == first.model_name

        for llm in (first, first, first.model_copy(update={"max_tokens": 2}), other):
            llm.invoke(QUESTION)
        first.invoke(QUESTION, temperature=0.5)
        first.invoke(QUESTION, stop=["x"])

        assert decoded == [1, 1, 1, 1]
        assert len(cache._cache) == 5


def test_a_named_model_shares_answers_between_processes(engine, decoded):
    cache = InMemoryCache()
    ChatSoftRAG(engine=engine, max_tokens=3, cache=cache, model="mine").invoke(QUESTION)
    with open_engine() as twin:
        ChatSoftRAG(engine=twin, max_tokens=3, cache=cache, model="mine").invoke(QUESTION)

    assert len(cache._cache) == 1
    with open_engine(copy_bias=4.0) as copying:
        ChatSoftRAG(engine=copying, max_tokens=3, cache=cache, model="mine").invoke(QUESTION)

    assert len(cache._cache) == 2


# Nothing large leaves


def walk(value, seen=None):
    """Yield every string, and everything that is no plain value, inside a value."""
    seen = set() if seen is None else seen
    if value is None or isinstance(value, bool | int | float) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(key, seen)
            yield from walk(inner, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from walk(inner, seen)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        yield value
        yield repr(value)
        if not isinstance(value, type):
            yield from walk(vars(value), seen)
    else:
        yield value


def check_small(value):
    found = 0
    for inner in walk(value):
        found += 1
        assert not isinstance(inner, Memory | bytes | bytearray | memoryview), type(inner)
        assert not hasattr(inner, "__array__"), type(inner)
        if isinstance(inner, str):
            # A document's text has spaces; a blob has none.
            assert max(map(len, inner.split()), default=0) <= 200, inner[:300]
    return found


class Recorder(BaseCallbackHandler):
    """Keeps the payload of every callback."""

    def __init__(self):
        self.payloads = []

    def _keep(self, *args, **kwargs):
        self.payloads.append((args, kwargs))

    on_chain_start = on_chain_end = on_chat_model_start = on_llm_end = _keep
    on_llm_new_token = on_retriever_start = on_retriever_end = _keep


class Tracer(BaseTracer):
    """Keeps every finished trace."""

    def __init__(self):
        super().__init__()
        self.runs = []

    def _persist_run(self, run):
        self.runs.append(run)


async def test_no_blob_leaves_in_events_callbacks_traces_messages_and_cache_keys(retriever, engine):
    cache = InMemoryCache()
    llm = ChatSoftRAG(engine=engine, max_tokens=6, cache=cache)
    chain = create_softrag_chain(retriever, llm)
    recorder, tracer = Recorder(), Tracer()
    config = {"callbacks": [recorder, tracer]}

    events = [event async for event in chain.astream_events(QUESTION, version="v2")]
    found = chain.invoke(QUESTION, config)
    streamed = list(chain.stream(QUESTION, config))

    assert {"on_retriever_end", "on_chat_model_stream", "on_chat_model_end", "on_chain_end"} <= {
        event["event"] for event in events
    }
    assert max(len(str(event)) for event in events) < 10_000
    assert len(recorder.payloads) > 10
    assert len(tracer.runs) == 2
    for value in (
        events,
        found,
        streamed,
        recorder.payloads,
        [run.model_dump() for run in tracer.runs],
        list(cache._cache.items()),
        format_memories(found["sources"]),
        llm.model_dump(),
        repr(chain),
    ):
        assert check_small(value) > 0


def test_the_walk_finds_blobs():
    for blob in ("x" * 201, b"x", [{"a": ("y" * 300,)}]):
        with pytest.raises(AssertionError):
            check_small(blob)


def test_sources_name_their_text_and_metadata(chain):
    source = chain.pick("sources").invoke(QUESTION)[0]

    assert source.page_content == SENTENCES[2]
    assert itemgetter("source", "number")(source.metadata) == ("2.txt", 2)


def test_a_copy_bias_of_the_engine_reaches_the_chain(engine, chain, monkeypatch):
    plain = chain.invoke(QUESTION)["answer"]
    monkeypatch.setattr(engine, "copy_bias", 100.0)

    copied = chain.invoke(QUESTION)["answer"]

    assert copied == engine.ask(QUESTION, k=2, max_new_tokens=6).text
    assert copied != plain
