"""The decoder as an LLM: what it answers, what it counts, what it refuses."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.schema import MetadataMode
from pydantic import BaseModel

from llama_index_softrag import PromptError, SoftRAGLLM, SoftRAGPostprocessor, index_of
from llama_index_softrag.memories import memories_of
from softrag import SoftRAG, UnknownHandleError, find_handles, make_handle
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.integrations.llama_index.conftest import DOCUMENTS, QUESTION, open_engine
from tests.integrations.llama_index.recording import Payloads


def views(softrag, k=3, question=QUESTION):
    nodes = index_of(softrag).as_retriever(similarity_top_k=k).retrieve(question)
    return SoftRAGPostprocessor(softrag).postprocess_nodes(nodes, query_str=question)


def messages(softrag, question=QUESTION, k=3):
    context = "\n".join(each.node.handle for each in views(softrag, k))
    return [
        ChatMessage(role="system", content=context),
        ChatMessage(role="user", content=question),
    ]


def test_the_chat_calls_answer_as_softrag_does(softrag):
    expected = softrag.ask(QUESTION, k=3, max_new_tokens=8)
    llm = SoftRAGLLM(softrag, max_new_tokens=8)
    asked = messages(softrag)

    async def run():
        return await llm.achat(asked), [each async for each in await llm.astream_chat(asked)]

    response = llm.chat(asked)
    pieces = list(llm.stream_chat(asked))
    aresponse, apieces = asyncio.run(run())

    for each in (response, pieces[-1], aresponse, apieces[-1]):
        assert each.message.content == expected.text
        assert each.raw["usage"] == {
            "prompt_tokens": expected.usage.prompt_tokens,
            "soft_tokens": expected.usage.soft_tokens,
            "text_prompt_tokens": expected.usage.text_prompt_tokens,
            "completion_tokens": expected.usage.completion_tokens,
            "total_tokens": expected.usage.prompt_tokens + expected.usage.completion_tokens,
        }
    for streamed in (pieces, apieces):
        assert "".join(each.delta for each in streamed) == expected.text
        assert len(streamed) > 2


def test_the_best_node_is_read_as_text_when_told_to(softrag):
    expected = softrag.ask(QUESTION, k=3, mode="mixed", max_new_tokens=8)

    response = SoftRAGLLM(softrag, mode="mixed", max_new_tokens=8).chat(messages(softrag))

    assert response.message.content == expected.text
    assert response.raw["mode"] == "mixed"
    assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_the_completion_calls_answer_without_context_when_told_to(softrag):
    expected = softrag.ask(QUESTION, mode="closed", max_new_tokens=8).text
    llm = SoftRAGLLM(softrag, mode="closed", max_new_tokens=8)

    async def run():
        return await llm.acomplete(QUESTION), [
            each async for each in await llm.astream_complete(QUESTION)
        ]

    pieces = list(llm.stream_complete(QUESTION))
    aresponse, apieces = asyncio.run(run())

    assert llm.complete(QUESTION).text == expected
    assert pieces[-1].text == expected
    assert "".join(each.delta for each in pieces) == expected
    assert aresponse.text == expected
    assert apieces[-1].text == expected
    assert apieces[-1].raw["usage"]["soft_tokens"] == 0


def test_text_is_read_when_told_to(softrag):
    texts = [hit.text for hit in softrag.retrieve(QUESTION, k=2)]
    llm = SoftRAGLLM(softrag, mode="text", max_new_tokens=4)

    response = llm.chat(
        [ChatMessage(role="system", content=texts[0]), ChatMessage(role="user", content=QUESTION)]
    )

    assert response.raw["mode"] == "text"
    assert softrag.decoder.requests[-1].documents == (texts[0],)


def test_calls_may_change_the_decoding(softrag):
    llm = SoftRAGLLM(softrag)

    response = llm.chat(messages(softrag), max_tokens=2, temperature=0.7, seed=3, stop="x")

    request = softrag.decoder.requests[-1]
    assert response.raw["usage"]["completion_tokens"] <= 2
    assert (request.max_new_tokens, request.temperature, request.seed) == (2, 0.7, 3)
    assert list(request.stop) == ["x"]
    with pytest.raises(PromptError, match="found top_k"):
        llm.chat(messages(softrag), top_k=3)


def test_one_call_is_one_event_and_counts_its_soft_tokens(softrag):
    counter = TokenCountingHandler()
    payloads = Payloads()
    llm = SoftRAGLLM(softrag, max_new_tokens=4)
    llm.callback_manager = CallbackManager([counter, payloads])

    usage = llm.chat(messages(softrag)).raw["usage"]

    assert len(payloads.payloads) == 2
    (event,) = counter.llm_token_counts
    assert event.prompt_token_count == usage["prompt_tokens"]
    assert event.completion_token_count == usage["completion_tokens"]


def test_a_handle_typed_by_a_user_stays_text(softrag):
    (best, *_) = views(softrag)
    stored = find_handles(best.metadata["softrag_memory"])[0]
    for typed in (best.node.handle, make_handle(stored), "<MEM><MEM>"):
        question = f"{QUESTION} {typed}"
        SoftRAGLLM(softrag, max_new_tokens=2).chat(messages(softrag, question, k=1))

        request = softrag.decoder.requests[-1]
        assert request.question == question
        assert len(request.documents) == 1
        row = softrag.decoder.decoder._render(request.question, request.documents)
        memory_id = softrag.decoder.decoder.prompt.memory_id
        assert row.input_ids.count(memory_id) == len(request.documents[0])


def test_a_stored_key_is_no_handle(softrag):
    (best, *_) = views(softrag)
    stored = best.metadata["softrag_memory"]

    with pytest.raises(UnknownHandleError, match=find_handles(stored)[0]):
        SoftRAGLLM(softrag).chat(
            [ChatMessage(role="system", content=stored), ChatMessage(role="user", content="Who?")]
        )


def test_an_expired_memory_is_read_from_the_store(softrag):
    asked = messages(softrag)
    llm = SoftRAGLLM(softrag, max_new_tokens=8)
    before = llm.chat(asked).message.content
    memories_of(softrag).cache.clear()

    assert llm.chat(asked).message.content == before
    assert len(memories_of(softrag).cache) == 3


def test_an_expired_memory_that_was_deleted_is_made_again_or_named(tmp_path):
    with open_engine(tmp_path) as engine:
        engine.add(DOCUMENTS)
        asked = messages(engine, k=1)
        engine.delete_source("notes/2.txt")
        memories_of(engine).cache.clear()
        assert SoftRAGLLM(engine, max_new_tokens=2).chat(asked).raw["usage"]["soft_tokens"] > 0
        engine.add(DOCUMENTS)
    with SoftRAG.from_pretrained(
        build_checkpoint(),
        store=tmp_path,
        embedder=HashingEmbedder(),
        device="cpu",
        load_compressor=False,
    ) as reader:
        (best,) = views(reader, k=1)
        key = find_handles(best.metadata["softrag_memory"])[0]
        asked = messages(reader, k=1)
        reader.delete_source("notes/2.txt")
        memories_of(reader).cache.clear()
        with pytest.raises(UnknownHandleError, match=key):
            SoftRAGLLM(reader).chat(asked)


def test_handles_of_another_engine_are_unknown(softrag, empty):
    with pytest.raises(UnknownHandleError, match="only handles of nodes retrieved"):
        SoftRAGLLM(empty).chat(messages(softrag))


def test_text_in_the_place_of_memories_is_refused(softrag):
    asked = messages(softrag)
    asked[0] = ChatMessage(role="system", content=f"Be brief.\n{asked[0].content}")

    with pytest.raises(PromptError, match=r"Found text where memories belong \('Be brief.'"):
        SoftRAGLLM(softrag).chat(asked)


def test_a_call_without_memories_is_refused(softrag):
    with pytest.raises(PromptError, match="this call brings none"):
        SoftRAGLLM(softrag).complete(QUESTION)
    with pytest.raises(PromptError, match="must be the user's question"):
        SoftRAGLLM(softrag).chat([ChatMessage(role="assistant", content="Hello")])
    with pytest.raises(PromptError, match="reads no context"):
        SoftRAGLLM(softrag, mode="closed").chat(messages(softrag))


def test_images_are_refused(softrag):
    blocks = [TextBlock(text="What is this?"), ImageBlock(image=b"")]

    with pytest.raises(PromptError, match="block of type 'image'"):
        SoftRAGLLM(softrag).chat([ChatMessage(role="user", blocks=blocks)])


def test_templates_that_are_no_questions_are_refused(softrag):
    llm = SoftRAGLLM(softrag)

    with pytest.raises(PromptError, match="template of chat_history, question"):
        llm.predict(PromptTemplate("{chat_history} {question}"), chat_history="", question="")


def test_structured_output_is_refused(softrag):
    class City(BaseModel):
        """A city."""

        name: str

    llm = SoftRAGLLM(softrag)
    with pytest.raises(NotImplementedError, match="plain text"):
        llm.as_structured_llm(City)
    with pytest.raises(NotImplementedError, match="plain text"):
        llm.structured_predict(City, PromptTemplate("{x}"), x="")
    with pytest.raises(NotImplementedError, match="plain text"):
        asyncio.run(llm.astructured_predict(City, PromptTemplate("{x}"), x=""))


def test_a_view_is_its_node_for_everything_but_a_model(softrag):
    (best, *_) = views(softrag)

    assert best.node.get_content(MetadataMode.LLM) == best.node.handle
    assert (
        best.node.get_content()
        == best.text
        == "William Shakespeare wrote Hamlet, Macbeth " + ("and King Lear between 1599 and 1606.")
    )
    assert best.node.class_name() == "TextNode"
    copy = best.node.model_copy()
    assert copy.get_content(MetadataMode.LLM) == best.node.handle


def test_a_stream_that_is_left_stops_the_model(softrag):
    stream = SoftRAGLLM(softrag, max_new_tokens=500).stream_chat(messages(softrag))
    next(stream)
    stream.close()

    # The model's lock is free again.
    assert SoftRAGLLM(softrag, max_new_tokens=2).chat(messages(softrag)).message.content


def test_an_engine_that_is_gone_takes_its_memories_along():
    engine = open_engine()
    engine.add(DOCUMENTS)
    views(engine)
    memories = weakref.ref(memories_of(engine))
    engine.close()
    del engine
    gc.collect()

    assert memories() is None


def test_a_name_in_place_of_an_engine_says_how_to_load_one():
    with pytest.raises(TypeError, match=r"found 'softrag-demo'. Load one: SoftRAG.from_pretrained"):
        SoftRAGLLM("softrag-demo")
