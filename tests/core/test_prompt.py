"""What compressor and decoder read, token by token, for every family of base models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.errors import EmptyDocumentError
from softrag.fingerprint import prompt_signature
from softrag.handles import make_handle
from softrag.prompt import (
    DocumentPrompt,
    RagPrompt,
    add_rerank_token,
    add_special_tokens,
    encode_text,
    token_id,
)
from tests.families import build_tokenizer

SYSTEM = "Answer the question from the background, as briefly as possible."
USER = "Background:\n{documents}\n\nQuestion: {question}"
# The whole conversation up to the answer; {user} is the user's text.
CHATS = {
    "Llama": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"{SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Qwen3": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "Mistral": f"<s>[INST] {SYSTEM}\n\n{{user}} [/INST]",
    "Gemma3": (
        f"<bos><start_of_turn>user\n{SYSTEM}\n\n{{user}}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "Qwen2": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
ANSWER_ENDS = {
    "Llama": "<|eot_id|>",
    "Qwen3": "<|im_end|>",
    "Mistral": "</s>",
    "Gemma3": "<end_of_turn>",
    "Qwen2": "<|im_end|>",
}
# What a text may hold that means something to softrag or to a template.
LITERALS = (
    f"<MEM> a <AE> {make_handle('0' * 32)} <|im_end|> <|eot_id|> </s> [INST] <bos> <end_of_turn> "
    "<think> {question} {documents} \ue0d0"
)
TEXT = "Paris is the capital of France, and the Seine runs through it."


@pytest.fixture
def rag(tokenizer: PreTrainedTokenizerBase) -> RagPrompt:
    return RagPrompt.from_config(SoftRAGConfig(), tokenizer)


def document_prompt(tokenizer: PreTrainedTokenizerBase, **changes: object) -> DocumentPrompt:
    return DocumentPrompt.from_config(SoftRAGConfig(**{"rate": 4} | changes), tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


class TestRagPrompt:
    def test_the_chat_is_the_familys_with_thinking_off_and_the_system_text_in_its_place(
        self, tiny_family: Path, rag: RagPrompt
    ) -> None:
        row = rag.render(" What is it? ", [2, "A text.", 1])

        user = USER.format(documents="<MEM><MEM>\nA text.\n<MEM>", question="What is it?")
        assert rag.tokenizer.decode(row.input_ids) == CHATS[tiny_family.name].format(user=user)
        assert row.answer_start == len(row.input_ids)

    def test_without_documents_only_the_question_is_asked(
        self, tiny_family: Path, rag: RagPrompt
    ) -> None:
        row = rag.render("Who?", [])

        expected = CHATS[tiny_family.name].format(user="Question: Who?")
        assert rag.tokenizer.decode(row.input_ids) == expected

    @pytest.mark.parametrize("documents", [[], [3], [1, 2], ["A text.", 2], [TEXT]])
    @pytest.mark.parametrize("answer", ["Paris", " the Seine ", LITERALS])
    def test_a_training_row_is_the_asking_row_and_the_answer(
        self, tiny_family: Path, rag: RagPrompt, documents: list, answer: str
    ) -> None:
        asked = rag.render(LITERALS, documents)
        taught = rag.render(LITERALS, documents, answer)

        assert taught.input_ids[: taught.answer_start] == asked.input_ids
        assert taught.answer_start == asked.answer_start
        assert taught.input_ids[taught.answer_start :] == [
            *encode_text(rag.tokenizer, answer.strip()),
            token_id(rag.tokenizer, ANSWER_ENDS[tiny_family.name]),
        ]

    def test_generation_ends_where_a_taught_answer_ends_or_at_eos(
        self, tiny_family: Path, rag: RagPrompt
    ) -> None:
        assert rag.end_id == token_id(rag.tokenizer, ANSWER_ENDS[tiny_family.name])
        assert rag.end_ids == {rag.end_id, rag.tokenizer.eos_token_id}

    def test_special_strings_in_question_text_and_answer_stay_text(self, rag: RagPrompt) -> None:
        plain = rag.render("x", [1, "x"], "x").input_ids
        row = rag.render(LITERALS, [1, LITERALS], LITERALS).input_ids
        special = special_ids(rag.tokenizer)

        assert row.count(rag.memory_id) == 1
        assert [i for i in row if i in special] == [i for i in plain if i in special]
        assert rag.tokenizer.decode(row).count(LITERALS) == 3

    def test_only_the_gaps_depend_on_the_question(self, rag: RagPrompt) -> None:
        one, other = rag.render("Who?", [2]).input_ids, rag.render("Where is it?", [2]).input_ids
        start = one.index(rag.memory_id)

        assert one[: start + 2] == other[: start + 2]

    def test_memories_alone_stand_behind_the_start_of_a_text(
        self, tiny_family: Path, rag: RagPrompt
    ) -> None:
        first = {"Llama": ["<|begin_of_text|>"], "Mistral": ["<s>"], "Gemma3": ["<bos>"]}

        row = rag.render_memories([2, 1])

        assert rag.tokenizer.decode(row) == "".join(
            [*first.get(tiny_family.name, []), "<MEM><MEM>\n<MEM>"]
        )
        assert row.count(rag.memory_id) == 3

    def test_a_tokenizer_without_a_chat_template_gets_plain_text(self) -> None:
        tokenizer = build_tokenizer("Llama")
        tokenizer.chat_template = None
        add_special_tokens(tokenizer)
        rag = RagPrompt.from_config(SoftRAGConfig(), tokenizer)

        row = rag.render("Who?", [1], "Ada")

        assert tokenizer.decode(row.input_ids) == (
            f"<|begin_of_text|>{SYSTEM}\n\n"
            "Background:\n<MEM>\n\nQuestion: Who?\nAnswer:Ada<|eot_id|>"
        )

    def test_a_tokenizer_that_ends_nothing_is_refused(self) -> None:
        tokenizer = build_tokenizer("Llama")
        tokenizer.chat_template = None
        tokenizer.eos_token = None
        add_special_tokens(tokenizer)

        with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
            RagPrompt.from_config(SoftRAGConfig(), tokenizer)


class TestDocumentPrompt:
    def test_a_document_stands_between_bos_and_its_placeholders(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        prompt = document_prompt(tokenizer)
        ids = prompt.tokenize(TEXT)

        row = prompt.render(TEXT)

        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        memory = [token_id(tokenizer, "<MEM>")] * -(-len(ids) // 4)
        assert row.input_ids == [*bos, *ids, *memory]
        assert (row.n_memory, row.n_document_tokens) == (len(memory), len(ids))
        assert not row.truncated
        assert prompt.render(ids) == row

    def test_the_question_stands_before_and_behind_the_document_where_a_memory_depends_on_it(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        prompt = document_prompt(tokenizer, query_dependent=True, memory_tokens=3)

        row = prompt.render("Water boils.", "What boils?")

        assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == (
            (tokenizer.bos_token or "")
            + "Question: What boils?\n\nWater boils.\n\nQuestion: What boils?\nAnswer:"
            + "<MEM>" * 3
        )
        assert row.n_document_tokens == len(prompt.tokenize("Water boils."))

    def test_a_model_that_reranks_reads_one_more_token_at_the_end(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        plain = document_prompt(tokenizer, query_dependent=True).render(TEXT, "Who? <RR>")
        before = tokenizer.get_vocab()
        add_rerank_token(tokenizer)
        prompt = document_prompt(tokenizer, query_dependent=True, rerank=True)

        row = prompt.render(TEXT, "Who? <RR>")

        assert row.input_ids == [*plain.input_ids, len(before)]
        assert tokenizer.decode(row.input_ids).endswith("<MEM><RR>")
        assert row[1:] == plain[1:]

    @pytest.mark.parametrize("limit", [1, 4, 5, 8])
    @pytest.mark.parametrize("query_dependent", [False, True])
    def test_truncation_cuts_the_document_and_never_a_placeholder(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, query_dependent: bool
    ) -> None:
        prompt = document_prompt(
            tokenizer, max_document_tokens=limit, query_dependent=query_dependent
        )
        question = "What? " * 50 if query_dependent else None

        row = prompt.render(TEXT, question)
        whole = prompt.render(prompt.tokenize(TEXT)[:limit], question)

        assert row == whole._replace(truncated=True)
        assert row.n_document_tokens == limit
        memory = token_id(tokenizer, "<MEM>")
        assert row.n_memory == -(-limit // 4)
        assert row.input_ids[-row.n_memory :] == [memory] * row.n_memory
        assert row.input_ids.count(memory) == row.n_memory

    def test_special_strings_in_document_and_question_stay_text(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        prompt = document_prompt(tokenizer, query_dependent=True)
        row = prompt.render(LITERALS, LITERALS)
        special = special_ids(tokenizer)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

        assert [i for i in row.input_ids if i in special] == [
            *bos,
            *[token_id(tokenizer, "<MEM>")] * row.n_memory,
        ]
        # The document, and the question on both sides of it.
        assert tokenizer.decode(row.input_ids).count(LITERALS) == 3

    @pytest.mark.parametrize("document", ["", []])
    def test_an_empty_document_is_an_error(
        self, tokenizer: PreTrainedTokenizerBase, document: str | list[int]
    ) -> None:
        with pytest.raises(EmptyDocumentError, match="document is empty"):
            document_prompt(tokenizer).render(document)

    def test_a_question_where_none_belongs_and_none_where_one_does_are_errors(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        with pytest.raises(ValueError, match="don't give a question"):
            document_prompt(tokenizer).render(TEXT, "Who?")
        with pytest.raises(ValueError, match="give the question"):
            document_prompt(tokenizer, query_dependent=True).render(TEXT)


@pytest.mark.parametrize(
    ("tokens", "changes", "expected"),
    [
        (1, {}, 1),
        (16, {}, 4),
        (17, {}, 5),
        (128, {"rate": 16}, 8),
        (129, {"rate": 16}, 9),
        (1, {"memory_tokens": 8}, 8),
        (500, {"memory_tokens": 8}, 8),
        # bos and 127 tokens, and one more than would do.
        (127, {"rate": 16, "memory_count": "row"}, 9),
        (126, {"rate": 16, "memory_count": "row"}, 8),
    ],
)
def test_the_number_of_soft_tokens_follows_the_length_or_is_fixed(
    tokens: int, changes: dict, expected: int
) -> None:
    tokenizer = build_tokenizer("Llama")
    add_special_tokens(tokenizer)
    prompt = document_prompt(tokenizer, max_document_tokens=500, **changes)

    assert prompt.render([7] * tokens).n_memory == expected


@pytest.fixture
def threads_take_turns() -> Iterator[None]:
    """Let the interpreter change threads all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_ask_first_at_once_are_read_right(threads_take_turns: None) -> None:
    tokenizer = build_tokenizer("Llama")
    add_special_tokens(tokenizer)
    question = f"Why {LITERALS}?"
    expected = RagPrompt(tokenizer, SoftRAGConfig()).render(question, [2])

    for _ in range(100):
        # What a prompt has once read of its templates it does not read again.
        prompt = RagPrompt(tokenizer, SoftRAGConfig())
        with ThreadPoolExecutor(4) as threads:
            rows = [threads.submit(prompt.render, question, [2]) for _ in range(4)]
        assert [row.result() for row in rows] == [expected] * 4


def test_adding_the_special_tokens_moves_no_other(tiny_family: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_family)
    before = tokenizer.get_vocab()

    add_special_tokens(tokenizer)
    add_special_tokens(tokenizer)

    size = len(before)
    assert tokenizer.get_vocab() == before | {"<MEM>": size, "<AE>": size + 1}


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 8},
        {"memory_tokens": 8},
        {"max_document_tokens": 99},
        {"query_dependent": True},
        {"readout": "memory"},
        {"document_prompt": {"document": "Text: {document}", "document_with_question": ""}},
    ],
)
def test_whatever_changes_what_is_compressed_changes_the_signature(change: dict) -> None:
    assert prompt_signature(SoftRAGConfig(**change)) != prompt_signature(SoftRAGConfig())


def test_the_decoders_texts_leave_the_signature_alone() -> None:
    texts = dict(SoftRAGConfig().rag_prompt, system="Be brief.")

    assert prompt_signature(SoftRAGConfig(rag_prompt=texts)) == prompt_signature(SoftRAGConfig())
