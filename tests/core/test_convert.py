"""Converted checkpoints: the same memories and answers, safetensors only, the source's licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from softrag.card import read_licence
from softrag.cli.app import app
from softrag.compressor import Compressor
from softrag.convert import convert
from softrag.decoder.prompts import PromptBuilder
from softrag.errors import CheckpointError
from softrag.model import SoftRAGModel
from softrag.prompt import DocumentPrompt, RagPrompt
from tests.core.test_layouts import (
    DOCUMENTS,
    KINDS,
    QUESTION,
    assert_same,
    build_sentencepiece,
    compress,
)
from tests.foreign import build_hub, build_research

NAVER_CARD = """\
---
license: cc-by-4.0
pipeline_tag: text-generation
---
# PISCO
This work is licensed under CC BY-NC 4.0.
"""


def load(folder: Path) -> SoftRAGModel:
    return SoftRAGModel.from_pretrained(folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_makes_the_same_memories_and_logits(
    kind: str, tmp_path: Path
) -> None:
    hub = build_hub(tmp_path / "source", **KINDS[kind])

    convert(hub.folder, tmp_path / "own")
    before, after = load(hub.folder), load(tmp_path / "own")

    assert after.fingerprint == before.fingerprint
    found, expected = (compress(model, DOCUMENTS, hub.question) for model in (after, before))
    assert torch.equal(found, expected)
    ids = torch.tensor([hub.prompt_ids(QUESTION, 3)])
    soft_tokens = torch.randn(3 * len(hub.memory), 32)
    mask = torch.ones_like(ids)
    assert torch.equal(
        after(ids, mask, soft_tokens=soft_tokens).logits,
        before(ids, mask, soft_tokens=soft_tokens).logits,
    )
    assert not [f for f in (tmp_path / "own").rglob("*") if f.suffix in (".pth", ".pt", ".bin")]


def test_a_research_checkpoint_converts_without_its_compressors_base(tmp_path: Path) -> None:
    research = build_research(tmp_path / "source")
    before = load(research.folder)
    path = research.folder / "config.json"
    path.write_text(path.read_text().replace("Qwen3", "gone"))

    convert(research.folder, tmp_path / "own", merge=True)
    after = load(tmp_path / "own")

    found, expected = (compress(model, DOCUMENTS, None) for model in (after, before))
    assert torch.equal(found, expected)


def test_tokens_stay_what_the_tokenizer_file_made_them(tmp_path: Path) -> None:
    base = build_sentencepiece(tmp_path / "base")
    hub = build_hub(tmp_path / "source", base)

    convert(hub.folder, tmp_path / "own", merge=True)
    model = load(tmp_path / "own")

    documents = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    assert documents.render(DOCUMENTS[0]).input_ids == hub.document_ids(DOCUMENTS[0])
    assert rag.render(QUESTION, [4]).input_ids == hub.prompt_ids(QUESTION, 1)
    plain = AutoTokenizer.from_pretrained(tmp_path / "own" / "decoder")
    text = "<s>[INST] Who wrote Hamlet?<MEM0><SEP>"
    assert plain.encode(text, add_special_tokens=False) == hub.tokenizer.ids(text)


@pytest.mark.parametrize("base", ["Llama", "Mistral", "Qwen2"])
def test_the_merged_decoder_is_a_plain_model_with_the_originals_logits(
    base: str, tmp_path: Path
) -> None:
    hub = build_hub(tmp_path / "source", base)

    convert(hub.folder, tmp_path / "own", merge=True)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "own" / "decoder")
    ids = torch.tensor([hub.prompt_ids(QUESTION, 2)])
    hub.decoder.set_adapter("decoder_adapter")
    with torch.no_grad():
        assert_same(plain(ids).logits, hub.decoder(ids).logits)
        hub.decoder.set_adapter("encoder_adapter")
        other = hub.decoder(ids).logits
    assert (plain(ids).logits - other).abs().max() > 0.01


def test_prompts_for_a_server_are_those_of_the_model(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")
    own = convert(hub.folder, tmp_path / "own", merge=True)
    model = load(own)
    (memory,) = Compressor(model).compress(DOCUMENTS[:1])

    builder = PromptBuilder.from_pretrained(own)
    built = builder.build(QUESTION, [memory, memory])
    sent = builder.load_embeddings(own / "decoder").embed(built)

    ids = torch.tensor([hub.prompt_ids(QUESTION, 2)])
    soft_tokens = torch.cat([memory.values.float()] * 2)
    with torch.no_grad():
        expected = model.embed_prompt(ids, torch.ones_like(ids), soft_tokens)[0]
    assert built.input_ids == ids[0].tolist()
    assert torch.equal(sent, expected)
    with pytest.raises(ValueError, match="Export it first"):
        builder.load_embeddings()


def test_a_merge_is_refused_where_the_adapters_are_empty(tmp_path: Path) -> None:
    # The script that goes round gives load_state_dict keys that peft ignores: nothing is merged.
    hub = build_hub(tmp_path / "source")
    adapters = torch.load(hub.folder / "adapters.pth", weights_only=True)
    for name, tensor in adapters["decoder_adapter"].items():
        if "lora_B" in name:
            tensor.zero_()
    torch.save(adapters, hub.folder / "adapters.pth")

    with pytest.raises(CheckpointError, match="changed no weight"):
        convert(hub.folder, tmp_path / "own", merge=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_the_script_that_merges_nothing_would_be_noticed(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")
    state = torch.load(hub.folder / "adapters.pth", weights_only=True)["decoder_adapter"]
    base = AutoModelForCausalLM.from_pretrained(hub.base)
    from peft import LoraConfig, get_peft_model

    silent = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    report = silent.load_state_dict(
        {f"base_model.model.{name}": tensor for name, tensor in state.items()}, strict=False
    )
    untouched = silent.merge_and_unload().state_dict()
    assert len(report.unexpected_keys) == len(state)

    convert(hub.folder, tmp_path / "own", merge=True)

    merged = load_file(tmp_path / "own" / "decoder" / "model.safetensors")
    for name in {key.split(".lora_")[0] + ".weight" for key in state}:
        assert not torch.equal(merged[name], untouched[name]), name


def test_weights_are_stored_as_they_were_or_as_asked(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")

    convert(hub.folder, tmp_path / "same")
    convert(hub.folder, tmp_path / "half", dtype=torch.bfloat16, merge=True)

    kinds = {
        folder: {t.dtype for t in load_file(tmp_path / folder / "model.safetensors").values()}
        for folder in ("same", "half", "half/decoder")
    }
    assert kinds == {
        "same": {torch.float32},
        "half": {torch.bfloat16},
        "half/decoder": {torch.bfloat16},
    }
    assert load(tmp_path / "half").fingerprint == load(tmp_path / "same").fingerprint


def test_the_card_keeps_the_stricter_licence_and_says_where_it_comes_from(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")
    (hub.folder / "README.md").write_text(NAVER_CARD)
    (hub.folder / "LICENSE.txt").write_text("the terms")

    convert(hub.folder, tmp_path / "own")

    metadata = metadata_load(tmp_path / "own" / "README.md")
    card = (tmp_path / "own" / "README.md").read_text()
    assert metadata["license"] == "cc-by-nc-4.0"
    assert metadata["library_name"] == "softrag"
    assert f"Converted from `{hub.folder}`" in card
    assert "forbids commercial use, its metadata says cc-by-4.0" in card
    assert (tmp_path / "own" / "LICENSE.txt").read_text() == "the terms"
    assert (tmp_path / "own" / "SOURCE_README.md").read_text() == NAVER_CARD
    assert read_licence(tmp_path / "own").name == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (None, None),
        ("# No metadata", None),
        ("---\nlicense: apache-2.0\n---\nFree.", "apache-2.0"),
        ("---\nlicense: [\n---\nDamaged.", None),
        ("---\nlicense: cc-by-nc-sa-4.0\n---\nCC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
        ("For non-commercial use.", "cc-by-nc-4.0"),
    ],
)
def test_a_licence_is_read_from_the_card_and_never_guessed(
    card: str | None, name: str | None, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)

    assert read_licence(tmp_path).name == name


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")

    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(hub.folder, tmp_path / "source")


# ---------------------------------------------------------------------- command line


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_converts_and_tells_what_it_wrote(tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source")
    (hub.folder / "README.md").write_text(NAVER_CARD)

    done = run(
        "convert", hub.folder, tmp_path / "own", "--merge", "--dtype", "bfloat16", "--json",
        "--device", "cpu",
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["fingerprint"] == load(tmp_path / "own").fingerprint
    assert Path(told["decoder"], "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["pisco", "oscar_first_layer", "clara", "own"])
def test_info_tells_what_any_checkpoint_is(kind: str, tmp_path: Path) -> None:
    hub = build_hub(tmp_path / "source", **KINDS.get(kind, {}))
    (hub.folder / "README.md").write_text(NAVER_CARD)
    folder = convert(hub.folder, tmp_path / "own") if kind == "own" else hub.folder

    done = run("info", folder, "--json", "--store", tmp_path / "none", "--load")

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["model"]
    assert told["family"] == {"own": "softrag", "clara": "CLaRa"}.get(kind, "COCOM")
    assert told["decoder"] == str(hub.base)
    compressor = hub.config.get("compr_base_model_name")
    assert told["compressor"] == (compressor or "shared")
    assert told["rate"] == hub.config["compr_rate"]
    assert told["soft_tokens_per_document"] == len(hub.memory)
    assert told["licence"] == "cc-by-nc-4.0"
    assert told["bytes"] > 100_000
    assert told["fingerprint"] == load(folder).fingerprint


def test_info_without_loading_leaves_the_fingerprint_open(tmp_path: Path) -> None:
    research = build_research(tmp_path / "source")

    done = run("info", research.folder, "--store", tmp_path / "none")

    assert done.exit_code == 0, done.output
    assert "--load" in done.stdout
    assert "1 for 4 tokens" in done.stdout
