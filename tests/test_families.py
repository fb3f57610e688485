from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import FAMILIES, build_family, build_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where is Paris?"}
ASSISTANT = {"role": "assistant", "content": "In France."}


def test_the_loaded_tokenizer_is_the_saved_one(tiny_family: Path):
    text = "It cost 12345 francs\n\n  in 1928 — déjà vu."
    built, loaded = build_tokenizer(tiny_family.name), AutoTokenizer.from_pretrained(tiny_family)

    assert loaded(text)["input_ids"] == built(text)["input_ids"]
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert loaded.chat_template == built.chat_template
    assert loaded.special_tokens_map == built.special_tokens_map


def test_the_loaded_model_generates(tiny_family: Path):
    family = FAMILIES[tiny_family.name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_family)
    model = AutoModelForCausalLM.from_pretrained(tiny_family)
    inputs = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_tensors="pt")

    assert type(model) is family.model
    assert model.config.vocab_size == len(tokenizer) + family.unused_rows
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[0] == 1
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert tokenizer.convert_ids_to_tokens(ends) == list(family.ends)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "Llama",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhere is Paris?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "Qwen3",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is Paris?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "Gemma3",
            "<bos><start_of_turn>user\nBe brief.\n\nWhere is Paris?<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            "Qwen2",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is Paris?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_templates_have_their_familys_shape(name, expected):
    tokenizer = build_tokenizer(name)

    prompt = tokenizer.apply_chat_template(
        [SYSTEM, USER], add_generation_prompt=True, tokenize=False
    )

    assert prompt == expected


def test_mistral_refuses_a_system_turn():
    tokenizer = build_tokenizer("Mistral")

    with pytest.raises(TemplateError, match="must alternate"):
        tokenizer.apply_chat_template([SYSTEM, USER], tokenize=False)
    prompt = tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert prompt == "<s>[INST] Where is Paris? [/INST] In France.</s>"


def test_qwen3_thinks_unless_told_otherwise():
    tokenizer = build_tokenizer("Qwen3")

    def opening(**options):
        prompt = tokenizer.apply_chat_template(
            [USER], add_generation_prompt=True, tokenize=False, **options
        )
        return prompt.split("<|im_start|>assistant\n")[1]

    assert opening() == ""
    assert opening(enable_thinking=False) == "<think>\n\n</think>\n\n"
    taught = tokenizer.apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert taught.endswith("assistant\n<think>\n\n</think>\n\nIn France.<|im_end|>\n")


def test_qwen2_invents_a_system_turn():
    prompt = build_tokenizer("Qwen2").apply_chat_template([USER], tokenize=False)

    assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_equal_calls_share_a_folder_and_a_seed_gives_the_same_weights(tmp_path):
    assert build_family("Llama") == build_family("Llama")
    first = AutoModelForCausalLM.from_pretrained(build_family("Llama")).state_dict()
    again = AutoModelForCausalLM.from_pretrained(build_family("Llama", tmp_path)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
