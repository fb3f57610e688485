"""The merged decoder is a plain checkpoint that answers as the adapted one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from softrag.adapters import is_lora_weight
from softrag.errors import CheckpointError
from softrag.export import export_decoder
from softrag.model import SoftRAGModel
from softrag.prompt import AUTO_ENCODING_TOKEN, MEMORY_TOKEN, RagPrompt
from tests.checkpoints import build_model
from tests.families import FAMILIES

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_gives_the_adapted_decoders_logits(family: str, tmp_path: Path) -> None:
    model = build_model(family)

    folder = export_decoder(model, tmp_path / "decoder")

    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        plain(input_ids=IDS).logits, model.decoder(input_ids=IDS).logits, rtol=1e-3, atol=1e-4
    )
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]


def test_a_decoder_that_was_merged_already_is_written_as_it_is(tmp_path: Path) -> None:
    model = build_model().merge_adapters()

    folder = export_decoder(model, tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(plain(IDS).logits, model.decoder(IDS).logits, rtol=0, atol=0)


def test_the_model_keeps_its_adapters(tmp_path: Path) -> None:
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    export_decoder(model, tmp_path, dtype=torch.bfloat16)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_are_written_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    export_decoder(build_model(), tmp_path, dtype=torch.bfloat16)

    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_tokenizer_knows_only_tokens_that_the_decoder_has_rows_for(tmp_path: Path) -> None:
    model = build_model("Llama")

    export_decoder(model, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0]
    assert len(tokenizer) <= rows
    assert MEMORY_TOKEN not in tokenizer.get_vocab()
    assert AUTO_ENCODING_TOKEN not in tokenizer.get_vocab()
    text = "Who wrote Hamlet?"
    assert tokenizer.encode(text) == model.decoder_tokenizer.encode(text)


def test_generation_ends_where_the_prompts_answers_end(tmp_path: Path) -> None:
    model = build_model("Llama")

    export_decoder(model, tmp_path)

    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    assert prompt.end_ids <= set(ends)
    assert set(model.decoder.generation_config.eos_token_id) <= set(ends)


def test_a_merge_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    model = build_model()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if is_lora_weight(name):
                parameter.zero_()

    with pytest.raises(CheckpointError, match="changed no weight: the adapters are empty"):
        export_decoder(model, tmp_path / "decoder")

    assert list((tmp_path / "decoder").iterdir()) == []


def test_a_merge_with_other_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softrag import export

    # What the merge script that circulates does: the base weights, whatever the adapters say.
    changed = iter([1.0])
    monkeypatch.setattr(
        export,
        "merged_weight",
        lambda layer: layer.get_base_layer().weight + next(changed, 0.0),
    )

    with pytest.raises(CheckpointError, match="logits differ"):
        export_decoder(build_model(), tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_model_without_its_decoder_is_refused(tmp_path: Path) -> None:
    model = build_model()
    model.save_pretrained(tmp_path / "model")
    loaded = SoftRAGModel.from_pretrained(tmp_path / "model", load_decoder=False)

    with pytest.raises(ValueError, match="load_decoder=True"):
        export_decoder(loaded, tmp_path / "decoder")
