"""What the model promises: shapes, order, one result whatever the padding, save and load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softrag.batch import collate_documents, collate_prompts
from softrag.config import SoftRAGConfig
from softrag.connector import StandardizedConnector
from softrag.errors import CheckpointError, PlaceholderMismatchError
from softrag.model import SoftRAGModel
from softrag.packing import pack
from softrag.prompt import DocumentPrompt, RagPrompt

LORA = {"r": 4, "alpha": 8}
TEXTS = ["Paris is the capital of France, and the Seine runs through it.", "Water boils."]


def config_for(family: Path, **changes: object) -> SoftRAGConfig:
    values: dict = {
        "decoder": str(family),
        "compressor": str(family),
        "rate": 4,
        "connector_hidden": 16,
        "decoder_lora": LORA,
    }
    return SoftRAGConfig(**values | changes)


def build(family: Path, **changes: object) -> SoftRAGModel:
    return SoftRAGModel.from_base(config_for(family, **changes)).eval()


def shake(model: SoftRAGModel, seed: int = 0) -> None:
    """Give every trained weight a value of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.trained_state().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.forget_fingerprint()


def documents(model: SoftRAGModel, texts: list[str] = TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    question = "Where is it?" if model.config.query_dependent else None
    return collate_documents([prompt.render(text, question) for text in texts], 0)


VARIANTS = {
    "separate": {},
    "papers_readout": {"readout": "memory"},
    "words_readout": {"readout": "words"},
    "pooled_readout": {"readout": "pooled"},
    "standardized": {"connector": "standardized", "readout": "pooled"},
    "first_layer": {"compressor_layers": 1},
    "compressor_lora": {"compressor_lora": LORA},
    "shared": {"compressor": "shared", "compressor_lora": LORA, "connector_hidden": None},
    "query_dependent": {"query_dependent": True},
    "reranking": {"query_dependent": True, "rerank": True},
    "reranking_papers_readout": {"query_dependent": True, "rerank": True, "readout": "memory"},
}


@pytest.mark.parametrize("variant", ["separate", "shared"])
def test_new_adapters_add_nothing_to_the_base_model(tiny_llama: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    model = build(tiny_llama, **changes)
    bare = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[5, 6, 7, 8]])

    with torch.no_grad():
        assert torch.equal(model.decoder(ids).logits, bare(ids).logits)
        if "compressor_lora" in changes:
            states = bare.model(ids).last_hidden_state
            assert torch.equal(model.compressor(ids).last_hidden_state, states)
    adapters = [tensor for name, tensor in model.trained_state().items() if ".lora_A." in name]
    assert adapters
    assert all(tensor.any() for tensor in adapters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_compressor_saves_loads_and_compresses_the_same(
    tiny_llama: Path, tmp_path: Path, variant: str
) -> None:
    model = build(tiny_llama, **VARIANTS[variant])
    shake(model)
    expected = model.compress_and_score(*documents(model))

    model.save_pretrained(tmp_path)
    loaded = SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32)

    assert loaded.fingerprint == model.fingerprint
    found = loaded.compress_and_score(*documents(loaded))
    torch.testing.assert_close(found.soft_tokens, expected.soft_tokens, rtol=0, atol=0)
    assert (found.scores is None) == (not model.config.rerank)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


def test_a_rerank_head_scores_each_document_and_changes_no_memory(tiny_family: Path) -> None:
    plain, reranking = (
        build(tiny_family, query_dependent=True, rerank=rerank) for rerank in (False, True)
    )
    shake(plain)
    shake(reranking)
    reranking.load_state_dict(plain.state_dict(), strict=False)
    question = "What boils?"
    rows = [
        DocumentPrompt.from_config(reranking.config, reranking.compressor_tokenizer).render(
            text, question
        )
        for text in TEXTS
    ]

    together = reranking.compress_and_score(*collate_documents(rows, 0))

    assert together.scores.shape == (2,)
    alone = [reranking.compress_and_score(*collate_documents([row], 0)).scores for row in rows]
    torch.testing.assert_close(together.scores, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together.scores.diff().abs().item() > 1e-3
    without = [row._replace(input_ids=row.input_ids[:-1]) for row in rows]
    expected = plain.compress(*collate_documents(without, 0))
    torch.testing.assert_close(together.soft_tokens, expected, rtol=1e-4, atol=1e-5)


def test_a_head_added_to_a_trained_model_starts_undecided_and_is_saved(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = build(tiny_llama)
    shake(model)
    with pytest.raises(ValueError, match="set query_dependent"):
        model.add_rerank_head()
    model.config.query_dependent = True

    model.add_rerank_head()
    model.add_rerank_head()
    model.save_pretrained(tmp_path)

    loaded = SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.compress_and_score(*documents(loaded)).scores.tolist() == [0.0, 0.0]
    assert set(loaded.trained_state()) >= {"rerank_embedding", "rerank_head.weight"}


def test_a_model_of_several_rates_is_asked_at_any_of_them_and_never_mixes_them(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = build(tiny_llama, rates=[2, 4, 8])
    shake(model)
    model.save_pretrained(tmp_path)

    loaded = {
        rate: SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32, rate=rate)
        for rate in (None, 2, 4, 8)
    }

    tokens = len(model.compressor_tokenizer.encode(TEXTS[1], add_special_tokens=False))
    for rate, each in loaded.items():
        assert len(each.compress(*documents(each, TEXTS[1:]))) == -(-tokens // (rate or 4))
    fingerprints = {rate: each.fingerprint for rate, each in loaded.items()}
    assert fingerprints[None] == fingerprints[4] == model.fingerprint
    assert len(set(fingerprints.values())) == 3
    decoder = SoftRAGModel.from_pretrained(tmp_path, load_compressor=False, rate=8)
    assert decoder.fingerprint == fingerprints[8]
    again = SoftRAGModel.from_pretrained(tmp_path, rate=8)
    assert again.fingerprint == fingerprints[8]
    with pytest.raises(ValueError, match=r"rate 16 .* trained at 2, 4, 8 document tokens"):
        SoftRAGModel.from_pretrained(tmp_path, rate=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [8, 16], "rate": 4}, r"rate is 4, which is not among the rates \[8, 16\]"),
        ({"rates": [0, 4], "rate": 4}, "must be 1 or more each"),
        ({"rates": [4], "rate": 4, "memory_tokens": 8}, "memory_tokens 8"),
        ({"rate": "4"}, "rate is '4'; it must be 1 or more"),
    ],
)
def test_rates_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftRAGConfig(**changes)


def test_another_rate_of_a_fixed_number_of_soft_tokens_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    build(tiny_llama, memory_tokens=3).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="trained for 3 soft tokens, whatever"):
        SoftRAGModel.from_pretrained(tmp_path, rate=4)


def test_a_senseless_copy_bias_is_refused() -> None:
    with pytest.raises(ValueError, match=r"copy_bias must be from 0\.0 to 100\.0, found -4"):
        SoftRAGConfig(copy_bias=-4)


def test_reranking_without_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="needs query_dependent"):
        SoftRAGConfig(rerank=True)


def test_all_families_compress_and_answer(tiny_family: Path) -> None:
    model = build(tiny_family)
    rows = [
        DocumentPrompt.from_config(model.config, model.compressor_tokenizer).render(t)
        for t in TEXTS
    ]
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    asked = [
        rag.render("What boils?", [rows[0].n_memory]),
        rag.render("Where is Paris, and who wrote Hamlet?", [rows[1].n_memory]),
    ]
    compressor = collate_documents(rows, 0)
    decoder = collate_prompts(asked, 0, side="left")

    soft_tokens = model.compress(*compressor)
    answers = model.generate(
        {
            "compressor_input_ids": compressor.input_ids,
            "compressor_attention_mask": compressor.attention_mask,
            "decoder_input_ids": decoder.input_ids,
            "decoder_attention_mask": decoder.attention_mask,
        },
        max_new_tokens=4,
    )

    assert soft_tokens.shape == (
        sum(row.n_memory for row in rows),
        model.decoder.config.hidden_size,
    )
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)


def test_padding_and_neighbours_do_not_change_a_memory(tiny_family: Path) -> None:
    model = build(tiny_family)
    together = model.compress(*documents(model))
    alone = torch.cat([model.compress(*documents(model, [text])) for text in TEXTS])
    input_ids, mask = documents(model)
    wider = torch.nn.functional.pad(input_ids, (7, 3)), torch.nn.functional.pad(mask, (7, 3))

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.compress(*wider), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"readout": "memory"},
        {"readout": "words"},
        {"readout": "pooled"},
        {},
        {"compressor_layers": 1},
    ],
)
def test_packed_rows_equal_padded_rows(
    tiny_family: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = build(tiny_family, **changes)
    monkeypatch.setattr("softrag.backbones.can_pack", lambda _: False)
    padded = build(tiny_family, **changes)

    expected = padded.compress(*documents(padded))

    torch.testing.assert_close(packed.compress(*documents(packed)), expected, rtol=1e-4, atol=1e-5)


def test_a_window_memory_is_made_of_its_own_window_and_ends_there(tiny_llama: Path) -> None:
    from softrag.packing import pack
    from softrag.placeholders import Windows

    # One row of five text tokens and two memory tokens, after padding; then one without memory.
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    packed = pack(mask)
    is_memory = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0]).bool()
    windows = Windows.of(packed, is_memory, (~is_memory).nonzero()[:, 0], is_memory.nonzero()[:, 0])

    assert windows.members.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert windows.count.tolist() == [3, 2]
    assert windows.end.tolist() == [2, 4]
    values = torch.tensor([[3.0], [6.0], [0.0], [1.0], [3.0], [100.0], [100.0]])
    assert windows.mean(values).tolist() == [[3.0], [2.0]]
    # Rounded once, and back in the dtype of the values whatever sums are kept in.
    halves = torch.randn(len(values), 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(windows.mean(halves), windows.mean(halves.float()).bfloat16())


def test_the_window_readout_reaches_text_without_gradient_loss(tiny_llama: Path) -> None:
    model = build(tiny_llama).train()
    model.compress(*documents(model)).sum().backward()

    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith(("compressor", "connector", "memory"))
    )


@pytest.mark.parametrize("readout", ["words", "pooled"])
def test_a_memory_starts_as_its_window_s_words(tiny_llama: Path, readout: str) -> None:
    model = build(tiny_llama, readout=readout)
    with torch.no_grad():
        model.connector.down.weight.zero_()
        model.connector.down.bias.zero_()
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    row = prompt.render(list(range(20, 28)))

    soft_tokens = model.compress(*collate_documents([row], 0))

    words = model.decoder.get_input_embeddings()(torch.arange(20, 28))
    bos = model.decoder.get_input_embeddings()(torch.tensor([row.input_ids[0]]))
    # Two windows over nine tokens, bos being the first.
    windows = [torch.cat([bos, words[:4]]), words[4:]]
    power = {"words": 1.0, "pooled": 0.5}[readout]
    expected = torch.stack([window.sum(0) / len(window) ** power for window in windows])
    torch.testing.assert_close(soft_tokens, expected)


def test_the_connector_starts_at_the_size_of_token_embeddings(tiny_family: Path) -> None:
    model = build(tiny_family)
    soft_tokens = model.compress(*documents(model, TEXTS * 4))
    words = model.decoder.get_input_embeddings().weight

    ratio = soft_tokens.pow(2).mean().sqrt() / words.pow(2).mean().sqrt()
    assert 0.5 < ratio.item() < 2.0


class TestStandardizedConnector:
    def test_states_are_standardised_clamped_and_mapped(self) -> None:
        connector = StandardizedConnector(2, 3, 2)
        with torch.no_grad():
            connector.direct.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
            connector.gain.fill_(0.5)
            # Means 10 and -4, spreads 2 and (held) 0.001.
            connector.calibrate(torch.tensor([[8.0, -4.0], [10.0, -4.0], [12.0, -4.0]]))
            found = connector(torch.tensor([[10.0, -4.0], [14.0, -4.002], [100.0, -5.0]]))

        assert connector.mean.tolist() == [10.0, -4.0]
        torch.testing.assert_close(connector.std.detach(), torch.tensor([2.0, 0.001]))
        expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

    def test_layers_beside_the_direct_one_add_to_it(self) -> None:
        connector = StandardizedConnector(2, 3, 2)
        states = torch.randn(5, 2)
        with torch.no_grad():
            alone = connector(states)
            connector.down.weight.fill_(1.0)
            both = connector(states)
            hidden = torch.nn.functional.gelu(connector.up(states)).sum(-1, keepdim=True)

        assert torch.equal(alone, states @ connector.direct.weight.T)
        torch.testing.assert_close(both, alone + hidden)

    def test_one_state_has_no_spread(self) -> None:
        with pytest.raises(ValueError, match="2 states or more, and there are 1"):
            StandardizedConnector(2, 3, 2).calibrate(torch.zeros(1, 2))

    def test_a_new_model_has_measured_its_states_and_the_size_of_embeddings(
        self, tiny_family: Path
    ) -> None:
        model = build(tiny_family, connector="standardized")
        embeddings = model.decoder.get_input_embeddings().weight
        size = embeddings.pow(2).mean().sqrt()

        soft_tokens = model.compress(*documents(model, TEXTS * 4))

        torch.testing.assert_close(model.connector.gain.detach(), size.detach()[None])
        ratio = soft_tokens.pow(2).mean().sqrt() / size
        assert 0.03 < ratio.item() < 0.3

    def test_what_is_measured_is_saved_and_not_learned(self, tiny_llama: Path) -> None:
        model = build(tiny_llama, connector="standardized")
        fixed = {"connector.mean", "connector.std", "connector.gain"}

        learning = {name for name, each in model.named_parameters() if each.requires_grad}

        assert set(model.trained_state()) - learning == fixed
        assert learning == model.learned_names()

    def test_calibrating_changes_the_fingerprint(self, tiny_llama: Path) -> None:
        model = build(tiny_llama, connector="standardized")
        before = model.fingerprint
        ids, mask = documents(model)
        packed = pack(mask)

        model.calibrate_connector(ids.flatten()[packed.slot], packed)

        states = model.read_documents(ids.flatten()[packed.slot], packed).memory
        torch.testing.assert_close(model.connector.mean, states.mean(0))
        assert model.fingerprint != before

    @pytest.mark.parametrize("changes", [{}, {"connector": "standardized"}])
    def test_there_is_nothing_to_calibrate_in_others(self, tiny_llama: Path, changes: dict) -> None:
        if changes:
            changes = VARIANTS["shared"] | changes
        model = build(tiny_llama, **changes)
        ids, mask = documents(model)
        packed = pack(mask)

        with pytest.raises(ValueError, match=r"connector is (Connector|Identity), which measures"):
            model.calibrate_connector(ids.flatten()[packed.slot], packed)

    def test_an_unknown_kind_is_refused(self) -> None:
        with pytest.raises(ValueError, match="connector is 'gelu'; expected one of"):
            SoftRAGConfig(connector="gelu")


def test_too_few_soft_tokens_name_both_counts(tiny_llama: Path) -> None:
    model = build(tiny_llama)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    input_ids, mask, _ = collate_prompts([rag.render("Who?", [3, 2])], 0, side="left")

    with pytest.raises(PlaceholderMismatchError, match=r"5 <MEM> placeholders.* 4 soft tokens"):
        model.embed_prompt(input_ids, mask, torch.zeros(4, model.decoder.config.hidden_size))


def test_loss_is_that_of_the_answer_tokens_alone(tiny_family: Path) -> None:
    model = build(tiny_family)
    rows = [
        DocumentPrompt.from_config(model.config, model.compressor_tokenizer).render(t)
        for t in TEXTS
    ]
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    taught = [
        rag.render("What boils?", [rows[0].n_memory], answer="Water"),
        rag.render("Where?", [rows[1].n_memory], answer="In Paris, by the Seine"),
    ]
    batch = collate_prompts(taught, 0, side="right", learn=True)
    compressor = collate_documents(rows, 0)
    both = {
        "decoder_input_ids": batch.input_ids,
        "decoder_attention_mask": batch.attention_mask,
        "compressor_input_ids": compressor.input_ids,
        "compressor_attention_mask": compressor.attention_mask,
    }

    everything = model(**both).logits.log_softmax(-1)
    learned = model(**both, labels=batch.labels)

    total, count = 0.0, 0
    for row, answer in enumerate(taught):
        for position in range(answer.answer_start, len(answer.input_ids)):
            total -= everything[row, position - 1, answer.input_ids[position]].item()
            count += 1
    assert learned.loss.item() == pytest.approx(total / count, rel=1e-4)
    assert learned.logits.shape == (count, everything.shape[-1])


@pytest.mark.parametrize("several", [False, True])
def test_soft_tokens_say_their_labels_through_the_decoders_head(
    tiny_llama: Path, several: bool
) -> None:
    model = build(tiny_llama).train()
    compressor = documents(model, TEXTS[:1])
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    soft_tokens = model.compress(*compressor)
    prompt = rag.render("Where is it?", [len(soft_tokens)], answer="Paris")
    batch = collate_prompts([prompt], 0, side="right", learn=True)
    wanted = {0: [7, 9, 30], 2: [8, 9]} if several else {0: [7], 2: [8]}
    labels = torch.full((len(soft_tokens), 3 if several else 1), -100)
    for place, words in wanted.items():
        labels[place, : len(words)] = torch.tensor(words)
    labels = labels if several else labels[:, 0]

    output = model(
        batch.input_ids, batch.attention_mask, *compressor, batch.labels, soft_token_labels=labels
    )

    said = model.decoder.get_output_embeddings()(soft_tokens).log_softmax(-1)
    # Every token of a soft token counts the same, and so does every soft token.
    expected = sum(-said[place, words].mean() for place, words in wanted.items())
    torch.testing.assert_close(output.said_loss, expected)
    output.said_loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(("compressor", "connector", "memory")):
            assert parameter.grad.abs().sum() > 0, name


def test_a_document_used_twice_is_compressed_once_and_filled_in_both_places(
    tiny_llama: Path,
) -> None:
    model = build(tiny_llama)
    rows = [
        DocumentPrompt.from_config(model.config, model.compressor_tokenizer).render(t)
        for t in TEXTS
    ]
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    lengths = [rows[1].n_memory, rows[0].n_memory, rows[1].n_memory]
    prompt = collate_prompts([rag.render("Who?", lengths)], 0, side="right")
    once, thrice = collate_documents(rows, 0), collate_documents([rows[1], rows[0], rows[1]], 0)

    shared = model(
        prompt.input_ids, prompt.attention_mask, *once, document_index=torch.tensor([1, 0, 1])
    )
    repeated = model(prompt.input_ids, prompt.attention_mask, *thrice)

    torch.testing.assert_close(shared.logits, repeated.logits, rtol=1e-4, atol=1e-5)


def test_merging_adapters_keeps_the_answers_and_a_shared_backbone_apart(tiny_llama: Path) -> None:
    for variant in ("separate", "shared"):
        model = build(tiny_llama, **VARIANTS[variant])
        shake(model)
        batch = documents(model)
        before = model.compress(*batch)
        ids = torch.arange(5, 25)[None]
        logits = model.decoder(input_ids=ids).logits

        model.merge_adapters()

        torch.testing.assert_close(model.compress(*batch), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model.decoder(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4
        )
        assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_only_new_tokens_connector_adapters_and_the_compressor_are_trained(
    tiny_llama: Path,
) -> None:
    model = build(tiny_llama)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained == set(model.trained_state())
    assert "memory_embedding" in trained
    assert "auto_encoding_embedding" in trained
    assert "compressor.embed_tokens.weight" not in trained
    assert "compressor.layers.1.mlp.up_proj.weight" in trained
    assert {n for n in trained if n.startswith("decoder.")} == {
        n for n in trained if n.startswith("decoder.") and ".lora_" in n
    }


def test_a_folder_with_adapters_holds_the_adapters_and_not_the_base(
    tiny_llama: Path, tmp_path: Path
) -> None:
    build(tiny_llama, compressor_lora=LORA).save_pretrained(tmp_path)

    names = set(load_file(tmp_path / "model.safetensors"))

    assert not [n for n in names if "base_layer" in n or "embed_tokens" in n or "lm_head" in n]
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("variant", ["separate", "standardized"])
def test_eight_bit_storage_loads_what_its_fingerprint_says(
    tiny_llama: Path, tmp_path: Path, variant: str
) -> None:
    model = build(tiny_llama, **VARIANTS[variant])
    shake(model)
    exact = model.compress(*documents(model))

    model.save_pretrained(tmp_path, storage="int8")
    loaded = SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32)

    stored = load_file(tmp_path / "model.safetensors")
    adapters = [name for name in stored if ".lora_" in name and not name.endswith("_scale")]
    assert stored["compressor.layers.0.mlp.up_proj.weight.difference"].dtype == torch.int8
    assert adapters
    assert all(stored[name].dtype == torch.int8 for name in adapters)
    assert loaded.fingerprint == json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    assert loaded.fingerprint != model.fingerprint
    error = (loaded.compress(*documents(loaded)) - exact).norm() / exact.norm()
    assert error.item() < 0.05
    for name, adapter in model.trained_state().items():
        if ".lora_" in name:
            step = adapter.abs().amax(dim=1, keepdim=True) / 127
            rounded = loaded.trained_state()[name]
            # The step is itself rounded to 8 bits.
            assert ((rounded - adapter).abs() <= step * (1 + 2**-8) / 2 + 1e-6).all()


def test_four_bits_hold_two_values_a_byte_and_a_scale_for_each_64_of_a_row(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = build(tiny_llama, **VARIANTS["separate"])
    shake(model)
    exact = model.compress(*documents(model))

    model.save_pretrained(tmp_path, storage="int4")
    loaded = SoftRAGModel.from_pretrained(tmp_path, dtype=torch.float32)

    stored = load_file(tmp_path / "model.safetensors")
    down, up = (f"compressor.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    rows, columns = loaded.trained_state()[down].shape
    assert columns == 64
    assert stored[f"{down}.difference"].dtype == torch.uint8
    assert stored[f"{down}.difference"].shape == (rows, columns // 2)
    assert stored[f"{down}.difference_scale"].shape == (rows, 1)
    # Rows of 32 values are no group.
    assert stored[f"{up}.difference"].dtype == torch.int8
    base = SoftRAGModel.from_base(model.config, dtype=torch.float32).trained_state()[down]
    wanted = model.trained_state()[down] - base
    step = wanted.abs().amax(dim=1, keepdim=True) / 7
    error = loaded.trained_state()[down] - base - wanted
    assert (error.abs() <= step * (1 + 2**-8) / 2 + 1e-6).all()
    assert error.abs().max() > step.max() / 4
    assert loaded.fingerprint == json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    assert ((loaded.compress(*documents(loaded)) - exact).norm() / exact.norm()).item() < 0.2


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_few_bits_that_are_stored_again_are_the_same(
    tiny_llama: Path, tmp_path: Path, storage: str
) -> None:
    model = build(tiny_llama, **VARIANTS["separate"])
    shake(model)
    model.save_pretrained(tmp_path / "first", storage=storage)
    loaded = SoftRAGModel.from_pretrained(tmp_path / "first", dtype=torch.float32)

    loaded.save_pretrained(tmp_path / "again", storage=storage)

    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert first.keys() == again.keys()
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert SoftRAGModel.from_pretrained(tmp_path / "again").fingerprint == loaded.fingerprint


def test_either_part_can_be_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = build(tiny_llama)
    model.save_pretrained(tmp_path)

    compressor = SoftRAGModel.from_pretrained(tmp_path, load_decoder=False)
    decoder = SoftRAGModel.from_pretrained(tmp_path, load_compressor=False)

    assert compressor.decoder is None
    assert decoder.compressor is None
    assert compressor.fingerprint == decoder.fingerprint == model.fingerprint
    with pytest.raises(ValueError, match="compressor was not loaded"):
        decoder.compress(*documents(model))


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 8},
        {"max_document_tokens": 99},
        {"readout": "memory"},
        {
            "document_prompt": {
                "document": "Text: {document}",
                "document_with_question": "{document}",
            }
        },
    ],
)
def test_the_fingerprint_covers_what_decides_a_memory(tiny_llama: Path, change: dict) -> None:
    assert build(tiny_llama).fingerprint != build(tiny_llama, **change).fingerprint


def test_the_fingerprint_covers_compressor_weights_but_not_the_decoder(tiny_llama: Path) -> None:
    model, other = build(tiny_llama), build(tiny_llama)
    assert model.fingerprint == other.fingerprint

    with torch.no_grad():
        other.decoder.model.layers[0].mlp.up_proj.lora_B.default.weight.add_(1)
    other.forget_fingerprint()
    assert model.fingerprint == other.fingerprint

    with torch.no_grad():
        other.connector.down.weight[0, 0] += 0.5
    other.forget_fingerprint()
    assert model.fingerprint != other.fingerprint


class TestDamagedFolders:
    @pytest.fixture
    def folder(self, tiny_llama: Path, tmp_path: Path) -> Path:
        build(tiny_llama).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def rewrite(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Save other weights, and forget the checksum of the old ones, as an older writer would."""
        save_file(tensors, file, metadata={"format": "pt"})
        path = file.with_name("config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": None}))

    def test_a_truncated_file_is_named(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: math.floor(file.stat().st_size * 0.7)])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            SoftRAGModel.from_pretrained(folder)

    def test_a_missing_and_an_unknown_tensor_are_named(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["foreign"] = tensors.pop("connector.up.bias")
        self.rewrite(file, tensors)
        with pytest.raises(CheckpointError, match=r"Missing: connector.up.bias. Unknown: foreign"):
            SoftRAGModel.from_pretrained(folder)

    def test_a_changed_weight_is_noticed(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["connector.up.bias"] += 1
        self.rewrite(file, tensors)
        with pytest.raises(CheckpointError, match="fingerprint"):
            SoftRAGModel.from_pretrained(folder)

    def test_a_transposed_tensor_is_named_with_both_shapes(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["connector.up.weight"] = tensors["connector.up.weight"].T.contiguous()
        self.rewrite(file, tensors)
        with pytest.raises(CheckpointError, match=r"connector.up.weight .* is \("):
            SoftRAGModel.from_pretrained(folder)

    def test_another_base_model_is_noticed(self, folder: Path, tiny_family: Path) -> None:
        if "llama" in tiny_family.name.lower():
            pytest.skip("this is the base model it was trained on")
        with pytest.raises((CheckpointError, ValueError)):
            SoftRAGModel.from_pretrained(folder, base_model=tiny_family)

    def test_an_unknown_field_in_the_config_is_an_error(self, folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ratee": 8}))
        with pytest.raises(CheckpointError, match="ratee"):
            SoftRAGModel.from_pretrained(folder)

    def test_a_folder_of_another_kind_is_refused(self, tiny_llama: Path) -> None:
        with pytest.raises(CheckpointError, match="model_type 'llama'"):
            SoftRAGModel.from_pretrained(tiny_llama)

    def test_a_path_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nowhere"):
            SoftRAGModel.from_pretrained(tmp_path / "nowhere")


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(tiny_llama).train()
        if checkpointing:
            # The name until transformers 5.22.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        model.compress(*documents(model)).pow(2).sum().backward()
        gradients.append(model.memory_embedding.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
