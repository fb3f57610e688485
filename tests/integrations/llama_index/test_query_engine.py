"""Query engines, chat engines and agents answer from memories, or say why not."""

from __future__ import annotations

import asyncio
import threading

import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.mock import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import Document, NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool, ToolSelection

from llama_index_softrag import (
    PromptError,
    SoftRAGLLM,
    SoftRAGPostprocessor,
    SoftRAGQueryEngine,
    SoftRAGSynthesizer,
    index_of,
)
from softrag import EmptyDocumentError, Memory
from tests.families import SENTENCES
from tests.integrations.at_work import rows_of, threads_of
from tests.integrations.llama_index.conftest import QUESTION, open_engine
from tests.integrations.llama_index.recording import Arguments, Events, Payloads, blobs, strings


def ours(softrag, **options):
    return SoftRAGQueryEngine.from_store(softrag, k=3, max_new_tokens=8, **options)


def memory_documents(softrag):
    documents = softrag.decoder.requests[-1].documents
    return [each.key for each in documents if isinstance(each, Memory)]


# Query engines


def test_a_query_engine_gives_the_answer_of_softrag(softrag):
    answer = softrag.ask(QUESTION, k=3, max_new_tokens=8)

    response = ours(softrag).query(QUESTION)

    assert isinstance(ours(softrag), RetrieverQueryEngine)
    assert str(response) == answer.text
    assert [each.node_id for each in response.source_nodes] == [hit.id for hit in answer.sources]
    assert [each.score for each in response.source_nodes] == [hit.score for hit in answer.sources]
    assert [each.text for each in response.source_nodes] == [hit.text for hit in answer.sources]
    assert SENTENCES[2] in response.get_formatted_sources(length=200)


def test_a_copy_bias_of_the_engine_reaches_query_and_chat_engines(softrag, monkeypatch):
    plain = str(ours(softrag).query(QUESTION))
    monkeypatch.setattr(softrag, "copy_bias", 100.0)
    chat_engine = index_of(softrag).as_query_engine(
        llm=SoftRAGLLM(softrag, max_new_tokens=8),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=3,
    )

    expected = softrag.ask(QUESTION, k=3, max_new_tokens=8).text

    assert str(ours(softrag).query(QUESTION)) == str(chat_engine.query(QUESTION)) == expected
    assert expected != plain


def test_sync_async_and_streams_give_the_same_answer(softrag):
    expected = str(ours(softrag).query(QUESTION))

    async def run():
        streamed = await ours(softrag, streaming=True).aquery(QUESTION)
        return str(await ours(softrag).aquery(QUESTION)), [
            piece async for piece in streamed.async_response_gen()
        ]

    text, apieces = asyncio.run(run())
    pieces = list(ours(softrag, streaming=True).query(QUESTION).response_gen)

    assert text == expected
    assert "".join(pieces) == "".join(apieces) == expected
    assert len(pieces) > 2


def test_from_documents_adds_what_is_new_and_answers(empty):
    documents = [
        Document(id_=f"{n}.txt", text=text, metadata={"title": f"T{n}", "n": n})
        for n, text in enumerate(SENTENCES)
    ]

    engine = SoftRAGQueryEngine.from_documents(documents, empty, k=2, max_new_tokens=4)
    SoftRAGQueryEngine.from_documents(documents[:1], empty)

    (best, _) = engine.query(QUESTION).source_nodes
    assert best.node.ref_doc_id == "2.txt"
    assert best.metadata["title"] == "T2"
    assert best.metadata["n"] == 2
    assert empty.store.count() == len(SENTENCES)
    with pytest.raises(EmptyDocumentError, match=r"blank\.txt has no text"):
        SoftRAGQueryEngine.from_documents([Document(id_="blank.txt", text=" ")], empty)


def test_an_index_takes_the_synthesizer(softrag):
    engine = index_of(softrag).as_query_engine(
        llm=SoftRAGLLM(softrag),
        response_synthesizer=SoftRAGSynthesizer(softrag, max_new_tokens=8),
        similarity_top_k=3,
    )

    assert str(engine.query(QUESTION)) == softrag.ask(QUESTION, k=3, max_new_tokens=8).text


def test_the_best_chunk_is_read_as_text_when_told_to(softrag):
    expected = softrag.ask(QUESTION, k=3, mode="mixed", max_new_tokens=8)

    for streaming in (False, True):
        engine = SoftRAGQueryEngine.from_store(
            softrag, k=3, mode="mixed", streaming=streaming, max_new_tokens=8
        )
        assert str(engine.query(QUESTION)) == expected.text
    request = softrag.decoder.requests[-1]
    assert [type(each) for each in request.documents] == [str, Memory, Memory]


def test_nothing_found_is_an_empty_response(empty):
    assert str(ours(empty).query(QUESTION)) == "Empty Response"
    streamed = ours(empty, streaming=True).query(QUESTION)
    assert list(streamed.response_gen) == ["Empty Response"]


@pytest.mark.parametrize(
    ("mode", "calls"), [("compact", [3]), ("simple_summarize", [3]), ("tree_summarize", [3])]
)
def test_synthesizers_of_llama_index_answer_from_memories(softrag, mode, calls):
    llm = SoftRAGLLM(softrag, max_new_tokens=8)
    engine = index_of(softrag).as_query_engine(
        llm=llm,
        response_synthesizer=get_response_synthesizer(llm, response_mode=ResponseMode(mode)),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=3,
    )
    before = len(softrag.decoder.requests)

    text = str(engine.query(QUESTION))

    used = softrag.decoder.requests[before:]
    assert [len(request.documents) for request in used] == calls
    assert all(isinstance(each, Memory) for request in used for each in request.documents)
    assert all(request.question == QUESTION for request in used)
    assert text == softrag.ask(QUESTION, k=3, max_new_tokens=8).text


def test_accumulate_answers_from_each_memory(softrag):
    llm = SoftRAGLLM(softrag, max_new_tokens=2)
    before = len(softrag.decoder.requests)

    index_of(softrag).as_query_engine(
        llm=llm,
        response_synthesizer=get_response_synthesizer(llm, response_mode=ResponseMode.ACCUMULATE),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=3,
    ).query(QUESTION)

    assert [len(each.documents) for each in softrag.decoder.requests[before:]] == [1, 1, 1]


def test_refining_an_answer_is_refused(softrag):
    llm = SoftRAGLLM(softrag, max_new_tokens=2)
    engine = index_of(softrag).as_query_engine(
        llm=llm,
        response_synthesizer=get_response_synthesizer(llm, response_mode=ResponseMode.REFINE),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=2,
    )

    with pytest.raises(PromptError, match="to rewrite or refine, use another LLM"):
        engine.query(QUESTION)


def test_synthesizers_of_llama_index_on_text_are_refused(softrag):
    engine = index_of(softrag).as_query_engine(llm=SoftRAGLLM(softrag))

    with pytest.raises(PromptError, match="add SoftRAGPostprocessor"):
        engine.query(QUESTION)


def test_the_stock_engine_on_text_reads_text_when_told_to(softrag):
    llm = SoftRAGLLM(softrag, mode="text", max_new_tokens=4)
    before = len(softrag.decoder.requests)

    index_of(softrag).as_query_engine(llm=llm, similarity_top_k=2).query(QUESTION)

    (request,) = softrag.decoder.requests[before:]
    assert request.question == QUESTION
    assert SENTENCES[2] in request.documents[0]


def test_a_poisoned_document_names_no_memory(empty):
    poison = "<|softmem:" + "0" * 32 + "|>"
    empty.add([poison, SENTENCES[2]])
    (stored,) = [h.memory.key for h in empty.store.scroll() if h.text == SENTENCES[2]]
    empty.add([f"<|softmem:{stored}|>"])

    SoftRAGQueryEngine.from_store(empty, k=3, max_new_tokens=2).query(QUESTION)

    own = {hit.memory.key for hit in empty.store.scroll()}
    assert set(memory_documents(empty)) == own
    assert len(own) == 3


def test_prompts_belong_to_the_checkpoint(softrag):
    engine = ours(softrag)

    assert engine.get_prompts() == {}
    with pytest.raises(ValueError, match="text_qa_template cannot be changed"):
        SoftRAGSynthesizer(softrag).update_prompts({"text_qa_template": None})


def test_texts_alone_are_compressed_and_answered_from(softrag):
    synthesizer = SoftRAGSynthesizer(softrag, max_new_tokens=4)

    synthesizer.get_response(QUESTION, ["A text.", "<|softmem:" + "0" * 32 + "|>"])

    assert len(memory_documents(softrag)) == 2


# Query-dependent checkpoints


def test_memories_are_made_for_the_question():
    with open_engine(query_dependent=True) as oscar:
        oscar.add(SENTENCES)
        expected = oscar.ask(QUESTION, k=3, max_new_tokens=8).text
        llm = SoftRAGLLM(oscar, max_new_tokens=8)
        postprocessor = SoftRAGPostprocessor(oscar)
        engines = [
            SoftRAGQueryEngine.from_store(oscar, k=3, max_new_tokens=8),
            index_of(oscar).as_query_engine(
                llm=llm, node_postprocessors=[postprocessor], similarity_top_k=3
            ),
        ]

        for engine in engines:
            response = engine.query(QUESTION)
            assert str(response) == expected
            keys = [oscar.compressor.key(each.text, QUESTION) for each in response.source_nodes]
            assert memory_documents(oscar) == keys
        with pytest.raises(ValueError, match="give query_bundle or query_str"):
            postprocessor.postprocess_nodes(response.source_nodes)


def test_a_rerank_head_scores_and_sorts_the_nodes():
    with open_engine(query_dependent=True, rerank=True) as oscar:
        oscar.add(SENTENCES)
        nodes = index_of(oscar).as_retriever(similarity_top_k=6).retrieve(QUESTION)
        memories = oscar.compressor.compress([each.text for each in nodes], [QUESTION] * 6)
        relevance = {n.node_id: m.relevance for n, m in zip(nodes, memories, strict=True)}
        best = sorted(relevance, key=lambda node_id: -relevance[node_id])
        assert best != list(relevance)

        kept = SoftRAGPostprocessor(oscar, top_n=2).postprocess_nodes(nodes, query_str=QUESTION)
        every = SoftRAGPostprocessor(oscar).postprocess_nodes(nodes, query_str=QUESTION)

        assert [each.node_id for each in kept] == best[:2]
        assert [each.node_id for each in every] == best
        assert [each.score for each in every] == pytest.approx(
            [relevance[node_id] for node_id in best], rel=1e-3
        )
        too_long = NodeWithScore(node=TextNode(text=" ".join(SENTENCES)), score=0.5)
        mixed = SoftRAGPostprocessor(oscar).postprocess_nodes(
            [too_long, *nodes], query_str=QUESTION
        )
        assert [each.node_id for each in mixed] == [*best, too_long.node_id]
        assert mixed[-1].score == 0.5


def test_the_postprocessor_keeps_the_best(softrag):
    nodes = index_of(softrag).as_retriever(similarity_top_k=4).retrieve(QUESTION)

    kept = SoftRAGPostprocessor(softrag, top_n=2).postprocess_nodes(nodes[::-1], query_str=QUESTION)

    assert [each.node_id for each in kept] == [each.node_id for each in nodes[:2]]
    assert [each.score for each in kept] == [each.score for each in nodes[:2]]


# Chat engines


def chat_engine(softrag, **options):
    # The default memory is a database that is never closed, which is a warning.
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
    return index_of(softrag).as_chat_engine(memory=memory, **options)


@pytest.mark.parametrize("mode", ["context", "condense_plus_context", "best", "condense_question"])
def test_chat_engines_answer_from_memories(softrag, mode):
    engine = chat_engine(
        softrag,
        chat_mode=mode,
        llm=SoftRAGLLM(softrag, max_new_tokens=8),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=3,
    )
    expected = softrag.ask(QUESTION, k=3, max_new_tokens=8)

    response = engine.chat(QUESTION)

    assert str(response) == expected.text
    assert memory_documents(softrag) == [hit.memory.key for hit in expected.sources]
    assert len(response.source_nodes) == 3
    engine.reset()
    streamed = engine.stream_chat(QUESTION)
    assert "".join(streamed.response_gen) == expected.text
    engine.reset()
    assert str(asyncio.run(engine.achat(QUESTION))) == expected.text


@pytest.mark.parametrize("mode", ["context", "condense_plus_context", "best", "condense_question"])
def test_chat_engines_without_memories_refuse(softrag, mode):
    # The first three ignore the synthesizer they are given; condense_question uses its own.
    engine = chat_engine(softrag, chat_mode=mode, llm=SoftRAGLLM(softrag))

    with pytest.raises(PromptError, match="Found text where memories belong"):
        engine.chat(QUESTION)


def test_the_simple_chat_mode_refuses(softrag):
    engine = chat_engine(softrag, chat_mode="simple", llm=SoftRAGLLM(softrag))

    with pytest.raises(PromptError, match="this call brings none"):
        engine.chat(QUESTION)


def test_follow_ups_are_answered_by_themselves(softrag):
    engine = chat_engine(
        softrag,
        chat_mode="context",
        llm=SoftRAGLLM(softrag, max_new_tokens=8),
        node_postprocessors=[SoftRAGPostprocessor(softrag)],
        similarity_top_k=3,
    )
    engine.chat("What does the Seine run through?")

    assert str(engine.chat(QUESTION)) == softrag.ask(QUESTION, k=3, max_new_tokens=8).text
    assert len(engine.chat_history) == 4


def test_condensing_needs_another_model_or_none(softrag):
    options = {
        "llm": SoftRAGLLM(softrag, max_new_tokens=4),
        "node_postprocessors": [SoftRAGPostprocessor(softrag)],
    }
    for mode in ("condense_plus_context", "condense_question"):
        engine = chat_engine(softrag, chat_mode=mode, **options)
        engine.chat(QUESTION)
        with pytest.raises(PromptError, match=r"use another LLM"):
            engine.chat("And when?")

    engine = chat_engine(softrag, chat_mode="condense_plus_context", skip_condense=True, **options)
    engine.chat(QUESTION)
    engine.chat("And when?")
    assert softrag.decoder.requests[-1].question == "And when?"

    engine = chat_engine(
        softrag,
        chat_mode="condense_question",
        llm=MockLLM(max_tokens=5),
        response_synthesizer=SoftRAGSynthesizer(softrag, max_new_tokens=4),
    )
    engine.chat(QUESTION)
    engine.chat("And when?")
    assert len(memory_documents(softrag)) == 2


# Agents


class CallsTheTool(FunctionCallingLLM):
    """An agent's model, small enough to read: it asks the first tool, then repeats the answer."""

    @property
    def metadata(self):
        from llama_index.core.base.llms.types import LLMMetadata

        return LLMMetadata(is_function_calling_model=True)

    def _prepare_chat_with_tools(self, tools, user_msg=None, chat_history=None, **kwargs):
        return {"messages": [*(chat_history or []), *([user_msg] if user_msg else [])]}

    def get_tool_calls_from_response(self, response, **kwargs):
        if response.message.role == MessageRole.ASSISTANT and response.raw == "ask":
            return [ToolSelection(tool_id="1", tool_name="papers", tool_kwargs={"input": QUESTION})]
        return []

    async def achat(self, messages, **kwargs):
        return self.chat(messages, **kwargs)

    def chat(self, messages, **kwargs):
        from llama_index.core.base.llms.types import ChatResponse

        answered = [each for each in messages if each.role == MessageRole.TOOL]
        text = answered[-1].content if answered else ""
        return ChatResponse(
            message=ChatMessage(role="assistant", content=text), raw=None if answered else "ask"
        )

    async def astream_chat(self, messages, **kwargs):
        async def pieces():
            yield self.chat(messages)

        return pieces()

    astream_complete = stream_chat = stream_complete = acomplete = complete = achat

    async def astream_chat_with_tools(self, tools, chat_history=None, **kwargs):
        return await self.astream_chat(chat_history)


# LlamaIndex's own, when it makes an agent.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211")
async def test_an_agent_asks_the_query_engine(softrag):
    tool = QueryEngineTool.from_defaults(ours(softrag), name="papers", description="Answers.")
    expected = str(ours(softrag).query(QUESTION))

    output = await tool.acall(input=QUESTION)
    assert output.content == expected
    assert len(output.raw_output.source_nodes) == 3
    agent = FunctionAgent(tools=[tool], llm=CallsTheTool(), streaming=False)
    result = await agent.run(QUESTION)
    assert str(result) == expected
    assert blobs(result.tool_calls) == []


# What travels


@pytest.mark.parametrize("how", ["query", "stream", "chat"])
async def test_no_blob_travels_through_the_framework(how):
    with open_engine() as softrag:
        softrag.add(SENTENCES)
        events, arguments, payloads = Events(), Arguments(), Payloads()
        dispatcher = get_dispatcher()
        handlers = (dispatcher.event_handlers, dispatcher.span_handlers)
        dispatcher.add_event_handler(events)
        dispatcher.add_span_handler(arguments)
        manager = CallbackManager([payloads])
        Settings.callback_manager = manager
        try:
            seen = await converse(how, softrag, manager)
        finally:
            dispatcher.event_handlers, dispatcher.span_handlers = handlers[0][:-1], handlers[1][:-1]
            Settings.callback_manager = CallbackManager([])

        everything = [events.events, arguments.seen, payloads.payloads, *seen]
        assert blobs(everything) == []
        # It looked everywhere: handles stand where memories would.
        assert sum("<|softmem:" in text for text in strings(everything)) > 5
        assert len(events.events) > 5
        assert len(payloads.payloads) > 5


async def converse(how, softrag, manager):
    if how == "chat":
        engine = chat_engine(
            softrag,
            chat_mode="context",
            llm=SoftRAGLLM(softrag, max_new_tokens=4),
            node_postprocessors=[SoftRAGPostprocessor(softrag)],
        )
        responses = [engine.chat(QUESTION), await engine.achat(QUESTION)]
        return [
            responses,
            engine.chat_history,
            [each.sources[0].content for each in responses],
        ]
    engine = SoftRAGQueryEngine.from_store(
        softrag, max_new_tokens=4, streaming=how == "stream", callback_manager=manager
    )
    response = engine.query(QUESTION)
    if how == "stream":
        list(response.response_gen)
    aresponse = await engine.aquery(QUESTION)
    if how == "stream":
        _ = [piece async for piece in aresponse.async_response_gen()]
    dumps = [each.model_dump() for each in response.source_nodes]
    return [response, aresponse, response.metadata, dumps]


def test_the_walk_finds_blobs():
    import torch

    assert blobs({"a": ["x" * 201]})
    assert blobs({"a": torch.zeros(3)})
    assert blobs([b"1"])
    assert not blobs(["word " * 100])


# Concurrency


async def test_questions_at_the_same_time_are_batched_and_keep_off_the_loop(softrag, monkeypatch):
    questions = [f"{text} Question {n}?" for n, text in enumerate(SENTENCES * 4)]
    engine = ours(softrag)
    expected = [str(engine.query(question)) for question in questions]
    softrag.decoder.batches.clear()
    together = rows_of(monkeypatch, softrag.decoder.decoder)
    together.crowd = 8
    at_work = threads_of(
        monkeypatch, (softrag.embedder, "embed_query"), (softrag.decoder, "generate")
    )

    responses = await asyncio.gather(*(engine.aquery(question) for question in questions))

    assert [str(each) for each in responses] == expected
    assert sum(softrag.decoder.batches) == 32
    assert max(together) >= 8
    # How long the event loop is kept is measured by benchmarks/event_loop.py.
    assert at_work
    assert threading.get_ident() not in at_work
