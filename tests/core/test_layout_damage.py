"""A damaged or foreign checkpoint is an error that names the file, never a silent wrong load."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softrag import checkpoint, layouts
from softrag.errors import CheckpointError
from softrag.model import SoftRAGModel
from tests.checkpoints import build_checkpoint
from tests.families import build_family
from tests.foreign import build_hub, build_research

ADAPTERS = "adapters.pth"
ENDS = "decoder_first_last_layers.pth"


@pytest.fixture(scope="module")
def pisco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hub(tmp_path_factory.mktemp("pisco")).folder


@pytest.fixture(scope="module")
def research(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_research(tmp_path_factory.mktemp("research")).folder


@pytest.fixture
def copy(pisco: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pisco, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> SoftRAGModel:
    return SoftRAGModel.from_pretrained(folder, dtype=torch.float32, device="cpu", **options)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a pickled file; the file keeps valid checksums."""
    values = torch.load(path, weights_only=True)
    change(values)
    torch.save(values, path)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(values: dict, old: str, new: str) -> None:
    values[new] = values.pop(old)


LORA = "model.layers.0.mlp.up_proj.lora_A.weight"


# ---------------------------------------------------------------------- tensors


def test_a_missing_and_an_extra_tensor_are_both_listed(copy: Path) -> None:
    edit(copy / ADAPTERS, lambda v: rename(v["decoder_adapter"], LORA, "model.layers.9.surprise"))

    with pytest.raises(CheckpointError) as error:
        load(copy)

    message = str(error.value)
    assert "Missing: decoder.model.layers.0.mlp.up_proj.lora_A.default.weight" in message
    assert "Unknown: decoder.model.layers.9.surprise (adapters.pth)" in message


def test_an_unknown_adapter_is_not_passed_over(copy: Path) -> None:
    edit(copy / ADAPTERS, lambda v: v.update(other_adapter=v["decoder_adapter"]))

    with pytest.raises(CheckpointError, match=r"Unknown: other_adapter\.model\.layers\.0"):
        load(copy)


@pytest.mark.parametrize("name", ["decoder_adapter", "encoder_adapter"])
def test_a_missing_adapter_is_named(copy: Path, name: str) -> None:
    edit(copy / ADAPTERS, lambda v: v.pop(name))

    with pytest.raises(CheckpointError, match=r"Missing: (compressor|decoder)\.\S+lora_A"):
        load(copy)


@pytest.mark.parametrize("loaded", [{"load_decoder": False}, {"load_compressor": False}])
def test_half_a_model_needs_its_own_tensors_only(copy: Path, loaded: dict) -> None:
    part = "decoder_adapter" if "load_decoder" in loaded else "encoder_adapter"
    edit(copy / ADAPTERS, lambda v: v.pop(part))

    load(copy, **loaded)


@pytest.mark.parametrize("change", [torch.t, lambda tensor: tensor[:-1], lambda tensor: tensor[0]])
def test_tensors_of_another_shape_name_both_shapes_and_the_file(
    copy: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    edit(
        copy / ADAPTERS,
        lambda v: v["encoder_adapter"].update({LORA: change(v["encoder_adapter"][LORA]).clone()}),
    )

    with pytest.raises(CheckpointError, match=r"adapters\.pth is \(.*; the model needs \(4, 32\)"):
        load(copy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(copy: Path, bad: float) -> None:
    edit(copy / ADAPTERS, lambda v: v["decoder_adapter"][LORA].view(-1)[3:4].fill_(bad))

    with pytest.raises(CheckpointError, match=r"adapters\.pth holds NaN or infinity"):
        load(copy)


def test_whole_numbers_are_no_weights(copy: Path) -> None:
    edit(
        copy / ADAPTERS,
        lambda v: v["decoder_adapter"].update({LORA: v["decoder_adapter"][LORA].long()}),
    )

    with pytest.raises(CheckpointError, match=r"adapters\.pth is torch\.int64"):
        load(copy)


def test_another_base_model_is_told_by_its_vocabulary(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give the right one as base_model="):
        load(copy, base_model=build_family("Mistral"))


def test_embeddings_that_peft_saved_with_every_adapter_are_read_once(copy: Path) -> None:
    ends = torch.load(copy / ENDS, weights_only=True)
    edit(copy / ADAPTERS, lambda v: [adapter.update(ends) for adapter in v.values()])
    load(copy)

    edit(copy / ADAPTERS, lambda v: v["decoder_adapter"]["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight twice"):
        load(copy)


# ---------------------------------------------------------------------- files


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    torch.save({"decoder_adapter": Attack(tmp_path / "ran")}, copy / ADAPTERS)

    with pytest.raises(CheckpointError, match=r"adapters\.pth holds something other than tensors"):
        load(copy)

    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / ADAPTERS).write_bytes(pickle.dumps(Attack(tmp_path / "ran")))

    with pytest.raises(CheckpointError, match=r"adapters\.pth"):
        load(copy)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", ADAPTERS, ENDS])
def test_a_missing_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink()

    with pytest.raises(CheckpointError, match=file):
        load(copy)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"COCOM"', b"\xff\xfe", b"[" * 100_000], ids=repr
)
def test_a_config_that_is_no_json_object_is_named(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(copy)


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; softrag reads softrag, COCOM, CLaRa, PISCO"),
        ({"sep": False}, 'sep: false.*set "sep": true'),
        ({"lora": False}, "lora: false"),
        ({"compr_model_name": "google-bert/bert-base-uncased"}, "bert-base-uncased"),
        ({"compr_every_n_layer": 2}, "compr_every_n_layer"),
        ({"compr_model_name": "mistral_trimmed"}, "lacks compr_base_model_name"),
        ({"decoder_model_name": None}, "lacks decoder_model_name"),
        ({"doc_max_length": 0}, "no soft token"),
        ({"compr_rate": "16"}, "compr_rate: '16'; expected int"),
        ({"lora_r": True}, "lora_r: True; expected int"),
        ({"lora_r": 0}, "can't be built"),
    ],
)
def test_a_config_softrag_cannot_follow_says_why(copy: Path, changes: dict, message: str) -> None:
    configure(copy, **changes)

    with pytest.raises(CheckpointError, match=f"(?s)config\\.json.*{message}"):
        load(copy)


def test_a_compressor_that_reads_both_ways_is_refused(copy: Path, tmp_path: Path) -> None:
    place = build_family("Llama", tmp_path / "bert")
    (place / "config.json").write_text(json.dumps({"model_type": "bert"}))
    configure(copy, compr_model_name=str(place))

    with pytest.raises(CheckpointError, match="both directions"):
        load(copy)


def test_a_base_model_that_scales_its_embeddings_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="Gemma scales embeddings"):
        load(copy, base_model=build_family("Gemma3"))


def test_whole_weights_of_the_first_cocom_are_recognised_and_refused(copy: Path) -> None:
    (copy / ADAPTERS).unlink()
    (copy / "model-00001-of-00003.safetensors").touch()

    with pytest.raises(CheckpointError, match="COCOM v0 or v1"):
        load(copy)


def test_the_path_of_a_training_machine_is_replaced_by_a_base_model(copy: Path) -> None:
    base = json.loads((copy / "config.json").read_text())["decoder_model_name"]
    expected = load(copy).fingerprint
    configure(copy, decoder_model_name="/mnt/training/Mistral-7B-Instruct-v0.2")

    with pytest.raises(CheckpointError, match=r"(?s)config\.json.*/mnt/training.*base_model="):
        load(copy)

    assert load(copy, base_model=base).fingerprint == expected


def test_one_adapter_for_both_is_used_for_both(copy: Path) -> None:
    edit(copy / ADAPTERS, lambda v: v.pop("encoder_adapter"))
    configure(copy, training_form="both")

    state = load(copy).trained_state()

    name = "layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(state[f"compressor.{name}"], state[f"decoder.model.{name}"])


def test_fields_left_out_have_the_originals_defaults(copy: Path) -> None:
    path = copy / "config.json"
    values = json.loads(path.read_text())
    for name in ("quantization", "attn_implementation", "architectures", "auto_map"):
        del values[name]
    path.write_text(json.dumps(values))

    load(copy)


def test_code_that_comes_with_a_checkpoint_is_not_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "modelling_pisco.py").write_text(f"open({str(marker)!r}, 'w')\n")

    load(copy)

    assert not marker.exists()


def test_an_index_does_not_lead_out_of_its_folder(research: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(research, tmp_path / "copy"))
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "compressor" / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"index\.json names no files"):
        load(folder)


# ---------------------------------------------------------------------- 200 random damages


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 8, 200])):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def blank(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    length = rng.choice([16, 4096])
    data[start : start + length] = bytes(min(length, len(data) - start))
    path.write_bytes(data)


def insert(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + rng.randbytes(rng.choice([1, 100])) + data[at:])


def _adapter(values: dict, rng: random.Random) -> dict:
    return (
        values
        if isinstance(next(iter(values.values())), torch.Tensor)
        else rng.choice(list(values.values()))
    )


def drop_key(path: Path, rng: random.Random) -> None:
    edit(path, lambda v: (t := _adapter(v, rng)).pop(rng.choice(list(t))))


def rename_key(path: Path, rng: random.Random) -> None:
    edit(path, lambda v: rename(t := _adapter(v, rng), rng.choice(list(t)), "renamed.weight"))


def cut_tensor(path: Path, rng: random.Random) -> None:
    def change(values: dict) -> None:
        tensors = _adapter(values, rng)
        name = rng.choice(list(tensors))
        tensors[name] = tensors[name][:-1].clone()

    edit(path, change)


def replace_by_other(path: Path, rng: random.Random) -> None:
    other = {ADAPTERS: ENDS, ENDS: ADAPTERS}[path.name]
    shutil.copyfile(path.with_name(other), path)


DAMAGES = [flip, truncate, blank, insert, drop_key, rename_key, cut_tensor, replace_by_other]


def test_two_hundred_random_damages_are_named_or_harmless(copy: Path) -> None:
    model = load(copy)
    expected = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    # Weights are read when a model is filled, by the very code that from_pretrained runs.
    source = layouts.open_source(copy)
    whole = {file: (copy / file).read_bytes() for file in (ADAPTERS, ENDS)}
    refused = unnamed = 0
    for number in range(200):
        rng = random.Random(number)
        path = copy / rng.choice([ADAPTERS, ENDS])
        rng.choice(DAMAGES)(path, rng)
        try:
            checkpoint.load_weights(model, source)
        except CheckpointError as error:
            refused += 1
            unnamed += path.name not in str(error) and str(copy) not in str(error)
        else:
            # What the damage hit was no weight, such as the padding between two.
            state = model.trained_state()
            assert all(torch.equal(state[name], expected[name]) for name in expected), number
        path.write_bytes(whole[path.name])

    assert refused > 150
    assert unnamed == 0
    checkpoint.load_weights(model, source)


def test_damages_of_softrags_own_files_are_named_too(tmp_path: Path) -> None:
    whole = build_checkpoint()
    model = load(whole)
    for number in range(60):
        rng = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        rng.choice([flip, truncate, blank, insert])(folder / "model.safetensors", rng)
        if (folder / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes():
            continue  # Zeros where zeros were.

        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            checkpoint.load_weights(model, layouts.open_source(folder))


def test_a_config_cut_anywhere_is_named(pisco: Path, tmp_path: Path) -> None:
    text = (pisco / "config.json").read_text()
    for end in range(len(text)):
        (tmp_path / "config.json").write_text(text[:end])
        with pytest.raises(CheckpointError, match=r"config\.json"):
            layouts.open_source(tmp_path)


def test_checksums_are_checked_for_every_weight(copy: Path) -> None:
    with zipfile.ZipFile(copy / ADAPTERS) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray((copy / ADAPTERS).read_bytes())
    # In the middle of the largest record: a weight, far from any header.
    data[info.header_offset + 100 + info.file_size // 2] ^= 1
    (copy / ADAPTERS).write_bytes(data)

    with pytest.raises(CheckpointError, match=r"adapters\.pth is damaged: .* its checksum"):
        load(copy)
