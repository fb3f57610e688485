"""Other projects' checkpoints compute what their own code computes, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from softrag.batch import collate_documents, collate_prompts
from softrag.errors import CheckpointError
from softrag.model import SoftRAGModel
from softrag.prompt import DocumentPrompt, RagPrompt
from tests.families import build_family
from tests.foreign import SYSTEM, Foreign, Research, build_hub, build_research

DOCUMENTS = [
    "Paris is the capital of France, and the Seine runs through it.",
    "Water boils.",
    "William Shakespeare wrote Hamlet and Macbeth.",
]
QUESTION = "Who wrote Hamlet?"

KINDS = {
    "pisco": {},
    "pisco_without_a_system_role": {"base": "Mistral"},
    "pisco_without_bos_and_with_one_matrix": {"base": "Qwen2"},
    "pisco_with_one_memory_token": {"different_mem_tokens": False},
    "pisco_with_a_fourth_token": {"kbtc_training": True},
    "pisco_with_question": {"question": QUESTION},
    "clara": {"base": "Mistral", "model_type": "CLaRa", "compr_rate": 16},
    "oscar": {"compressor": "Qwen2", "question": QUESTION},
    "oscar_without_question": {"compressor": "Llama"},
    "oscar_first_layer": {"base": "Mistral", "compressor": "Mistral", "trimmed": 1,
                          "question": QUESTION},
    "oscar_first_layer_and_norm": {"compressor": "Mistral", "trimmed": 1, "norm": True,
                                   "question": QUESTION},
    "oscar_with_adapters": {"compressor": "Llama", "lora_compressor": True, "question": QUESTION},
    "oscar_without_connector": {"compressor": "Llama", "connector_hidden": None,
                                "question": QUESTION},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return build_hub(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


@pytest.fixture(scope="module")
def loaded(hub: Foreign) -> SoftRAGModel:
    return SoftRAGModel.from_pretrained(hub.folder, dtype=torch.float32, device="cpu")


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Both in float32, and equal to 1e-5 of the largest value."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def compress(model: SoftRAGModel, documents: list[str], question: str | None) -> torch.Tensor:
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    rows = [prompt.render(document, question) for document in documents]
    with torch.no_grad():
        return model.compress(*collate_documents(rows, 0))


def test_documents_are_laid_out_as_the_original_does(hub: Foreign, loaded: SoftRAGModel) -> None:
    prompt = DocumentPrompt.from_config(loaded.config, loaded.compressor_tokenizer)

    for document in DOCUMENTS:
        assert prompt.render(document, hub.question).input_ids == hub.document_ids(document)


@pytest.mark.parametrize("documents", [1, 3])
def test_prompts_are_laid_out_as_the_original_does(
    hub: Foreign, loaded: SoftRAGModel, documents: int
) -> None:
    prompt = RagPrompt.from_config(loaded.config, loaded.decoder_tokenizer)

    row = prompt.render(QUESTION, [len(hub.memory)] * documents)

    assert row.input_ids == hub.prompt_ids(QUESTION, documents)


@pytest.mark.parametrize("documents", [1, 3])
def test_soft_tokens_and_logits_are_the_originals(
    hub: Foreign, loaded: SoftRAGModel, documents: int
) -> None:
    texts = DOCUMENTS[:documents]
    expected = hub.compress(texts)
    rag = RagPrompt.from_config(loaded.config, loaded.decoder_tokenizer)
    row = rag.render(QUESTION, [len(hub.memory)] * documents)

    soft_tokens = compress(loaded, texts, hub.question)
    with torch.no_grad():
        logits = loaded(
            *collate_prompts([row], 0, side="left")[:2], soft_tokens=soft_tokens
        ).logits[0]

    assert_same(soft_tokens, expected.flatten(0, 1))
    assert_same(logits, hub.logits(QUESTION, expected))


def test_questions_may_have_different_numbers_of_documents(
    hub: Foreign, loaded: SoftRAGModel
) -> None:
    rag = RagPrompt.from_config(loaded.config, loaded.decoder_tokenizer)
    n = len(hub.memory)
    asked = [DOCUMENTS[:1], DOCUMENTS, DOCUMENTS[1:]]
    rows = [rag.render(QUESTION, [n] * len(documents)) for documents in asked]
    soft_tokens = compress(loaded, [d for documents in asked for d in documents], hub.question)

    ids, mask, _ = collate_prompts(rows, 0, side="left")
    with torch.no_grad():
        logits = loaded(ids, mask, soft_tokens=soft_tokens).logits

    for documents, row, found in zip(asked, rows, logits, strict=True):
        expected = hub.logits(QUESTION, hub.compress(documents))
        assert_same(found[-len(row.input_ids) :], expected)


# ---------------------------------------------------------------------- research code of 2026

RESEARCH = {
    "two_families": {},
    "no_system_role": {"base": "Mistral", "compressor": "Llama"},
    "decoder_with_one_matrix": {"base": "Qwen3", "compressor": "Qwen2"},
    "with_question": {"question": QUESTION},
}


@pytest.fixture(scope="module", params=RESEARCH)
def research(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Research:
    return build_research(tmp_path_factory.mktemp(request.param), **RESEARCH[request.param])


@pytest.fixture(scope="module")
def loaded_research(research: Research) -> SoftRAGModel:
    return SoftRAGModel.from_pretrained(research.folder, dtype=torch.float32, device="cpu")


def test_research_checkpoints_lay_out_documents_and_prompts_as_their_code(
    research: Research, loaded_research: SoftRAGModel
) -> None:
    documents = DocumentPrompt.from_config(
        loaded_research.config, loaded_research.compressor_tokenizer
    )
    rag = RagPrompt.from_config(loaded_research.config, loaded_research.decoder_tokenizer)
    rows = [documents.render(document, research.question) for document in DOCUMENTS]
    lengths = [row.n_memory for row in rows]

    assert [row.input_ids for row in rows] == [research.document_ids(d) for d in DOCUMENTS]
    assert len(set(lengths)) > 1
    for k in (1, 3):
        expected = research.prompt_ids_for(QUESTION, lengths[:k])
        assert rag.render(QUESTION, lengths[:k]).input_ids == expected


def test_research_checkpoints_compute_what_their_code_computes(
    research: Research, loaded_research: SoftRAGModel
) -> None:
    rag = RagPrompt.from_config(loaded_research.config, loaded_research.decoder_tokenizer)
    asked = [DOCUMENTS[:1], DOCUMENTS, DOCUMENTS[1:]]
    expected = {document: research.compress_one(document) for document in DOCUMENTS}
    used = [document for documents in asked for document in documents]
    rows = [rag.render(QUESTION, [len(expected[d]) for d in documents]) for documents in asked]

    soft_tokens = compress(loaded_research, used, research.question)
    ids, mask, _ = collate_prompts(rows, 0, side="left")
    with torch.no_grad():
        logits = loaded_research(ids, mask, soft_tokens=soft_tokens).logits

    assert_same(soft_tokens, torch.cat([expected[document] for document in used]))
    for documents, row, found in zip(asked, rows, logits, strict=True):
        reference = research.logits_for(QUESTION, [expected[d] for d in documents])
        assert_same(found[-len(row.input_ids) :], reference)


# ---------------------------------------------------------------------- golden prompts

MEMORIES = "<MEM0><MEM1><MEM2><MEM3><MEM4><MEM5><MEM6><MEM7><SEP>"
GOLDEN = {
    "Llama": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM + "<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBackground:\n" + MEMORIES * 2
        + "\n\nQuestion:Who wrote Hamlet?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Mistral": (
        "<s>[INST] " + SYSTEM + "\nBackground:\n" + MEMORIES * 2
        + "\n\nQuestion:Who wrote Hamlet? [/INST]"
    ),
    "sentencepiece": (
        "<s>[INST] " + SYSTEM + "\nBackground:\n" + MEMORIES * 2
        + "\n\nQuestion:Who wrote Hamlet? [/INST]"
    ),
}  # fmt: skip
NO_SYSTEM_ROLE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- endfor -%}
"""


def build_sentencepiece(folder: Path) -> Path:
    """A tiny Llama whose tokenizer puts a mark before every text, special tokens between or not.

    As the releases that PISCO was trained on; the class that is named here does it otherwise in
    transformers 5.
    """
    base = build_family("Mistral", folder)
    old = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size()
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        [*DOCUMENTS, SYSTEM, QUESTION, "Background:\n\n\nQuestion: [INST] [/INST]"],
        trainers.BpeTrainer(vocab_size=old - 3, special_tokens=byte_tokens, show_progress=False),
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    assert backend.get_vocab_size() <= old
    backend.save(str(base / "tokenizer.json"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "chat_template": NO_SYSTEM_ROLE,
    }
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    return base


@pytest.mark.parametrize("name", GOLDEN)
def test_piscos_prompts_are_these_strings_as_the_tokenizer_file_reads_them(
    name: str, tmp_path: Path
) -> None:
    base = build_sentencepiece(tmp_path / "base") if name == "sentencepiece" else build_family(name)
    pisco = build_hub(tmp_path / "pisco", base, doc_max_length=128, compr_rate=16)
    special = [*(f"<MEM{i}>" for i in range(8)), "<AE>", "<ENC>", "<SEP>"]
    raw = Tokenizer.from_file(str(base / "tokenizer.json"))
    size = raw.get_vocab_size()
    raw.add_special_tokens(special)

    model = SoftRAGModel.from_pretrained(pisco.folder, load_compressor=False)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    documents = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)

    assert [raw.token_to_id(token) for token in special] == list(range(size, size + 11))
    ids = rag.render(QUESTION, [8, 8]).input_ids
    assert ids == raw.encode(GOLDEN[name], add_special_tokens=False).ids
    bos, eos = ("<|begin_of_text|>", "<|eot_id|>") if name == "Llama" else ("<s>", "</s>")
    text = f"<ENC>{bos}{DOCUMENTS[0]}{eos}" + MEMORIES.removesuffix("<SEP>")
    row = documents.render(DOCUMENTS[0])
    assert row.input_ids == raw.encode(text, add_special_tokens=False).ids
    assert row.n_memory == 8


def test_special_tokens_in_texts_and_questions_are_letters(tmp_path: Path) -> None:
    pisco = build_hub(tmp_path, doc_max_length=64, compr_rate=16)
    model = SoftRAGModel.from_pretrained(tmp_path)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    documents = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    special = {
        pisco.tokenizer.id(t) for t in [*pisco.memory, "<AE>", "<ENC>", "<SEP>", "<|eot_id|>"]
    }
    literal = "<MEM0> <SEP> <ENC> <|eot_id|> {question} {document} \U00100000"

    def count(ids: list[int]) -> int:
        return sum(token in special for token in ids)

    assert count(documents.render(literal).input_ids) == count(documents.render("a").input_ids)
    plain, odd = (rag.render(question, [4, "a"]).input_ids for question in ("a", literal))
    assert count(odd) == count(plain)
    assert count(rag.render("a", [4, literal]).input_ids) == count(plain)
    assert literal[:-2] in model.decoder_tokenizer.decode(odd)


# ---------------------------------------------------------------------- long documents


def test_long_documents_are_split_and_every_word_is_read(tmp_path: Path) -> None:
    from softrag.asking import split_for
    from softrag.compressor import Compressor

    build_hub(tmp_path)
    compressor = Compressor(SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32))
    text = " ".join(DOCUMENTS)

    pieces = split_for(compressor, text)
    memories = compressor.compress(pieces)

    assert len(pieces) > 1
    assert " ".join(pieces) == text
    assert all(memory.n_document_tokens <= 32 for memory in memories)
    assert [len(memory) for memory in memories] == [4] * len(pieces)


def test_the_engine_splits_unless_it_is_told_to_cut(tmp_path: Path) -> None:
    from softrag.engine import SoftRAG
    from tests.embedders import HashingEmbedder

    build_hub(tmp_path)
    text = " ".join(DOCUMENTS)
    for cut, chunks in ((False, 2), (True, 1)):
        with SoftRAG.from_pretrained(tmp_path, embedder=HashingEmbedder(), cut=cut) as rag:
            assert rag.add([text]).chunks_added == chunks
            answer = rag.ask(QUESTION, max_new_tokens=4)
            assert answer.usage.soft_tokens == 4 * chunks
            for mode in ("text", "closed"):
                assert rag.ask(QUESTION, mode=mode, max_new_tokens=4).usage.soft_tokens == 0


def test_a_switch_cuts_long_documents_as_the_original_does(hub: Foreign) -> None:
    from softrag.asking import split_for
    from softrag.compressor import Compressor

    model = SoftRAGModel.from_pretrained(hub.folder, dtype=torch.float32)
    compressor = Compressor(model, cut=True)
    text = " ".join(DOCUMENTS * 3)
    asked = None if hub.question is None else [hub.question]

    assert split_for(compressor, text) == [text]
    assert compressor.prompt.render(text, hub.question).input_ids == hub.document_ids(text)
    (memory,) = compressor.compress([text], asked)
    expected = hub.compress([text])[0].to(torch.bfloat16)
    torch.testing.assert_close(memory.values, expected, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="longer than the 32 tokens"):
        Compressor(model).compress([text], asked)


# ---------------------------------------------------------------------- hub names


@pytest.mark.parametrize("inside", ["", "compression-16"])
def test_hub_names_load_from_the_cache_without_a_network(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "models--maker--model"
    hub = build_hub(repo / "snapshots" / "0123abcd" / inside)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    by_name = SoftRAGModel.from_pretrained(f"maker/model/{inside}".rstrip("/"), device="cpu")

    by_folder = SoftRAGModel.from_pretrained(hub.folder, device="cpu")
    assert by_name.fingerprint == by_folder.fingerprint


def test_a_folder_that_a_hub_repository_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="maker/model/nowhere"):
        SoftRAGModel.from_pretrained("maker/model/nowhere")
