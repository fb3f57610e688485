"""`python -m softrag_trainers`, from files to saved models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from safetensors.torch import load_file

from softrag.adapters import is_lora_weight
from softrag.batch import collate_documents
from softrag.model import SoftRAGModel
from softrag.packing import pack
from softrag.prompt import DocumentPrompt, RagPrompt
from softrag_trainers.__main__ import main
from softrag_trainers.options import Finetune, Pretrain, PretrainingData, read_options
from softrag_trainers.pretraining import TextPieces
from softrag_trainers.runs import finetune, score_questions
from tests.checkpoints import build_checkpoint, build_model
from tests.trainers.tiny import (
    question_records,
    question_rows,
    text_records,
    text_rows,
    tiny_arch,
    write_lines,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "trainers/softrag_trainers/recipes").glob("*.yaml"))
SHORT = ["optimizer.batch_size=4", "optimizer.steps=2", "run.log_every=1"]
SHORT_ANSWERS = [*SHORT, "data.max_new_tokens=4"]
SHORT_TEXTS = [*SHORT, "data.min_chunk_tokens=8", "data.max_chunk_tokens=24", "data.chunks=2"]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "questions.jsonl", question_records()))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "texts.jsonl", text_records()))


def logged(folder: Path, name: str) -> list[float]:
    """Return what a run logged under a name, in order."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_a_run_in_bf16_scores_generated_answers_while_and_after_it_trains(
    tmp_path: Path, questions: str
) -> None:
    options = read_options(
        "finetune",
        [
            *tiny_arch(),
            *SHORT_ANSWERS,
            f"out_dir={tmp_path / 'model'}",
            f"data.train=[{questions}]",
            f"data.validation=[{questions}]",
            "run.bf16=true",
            "run.eval_every=1",
        ],
    )

    model = finetune(options)

    for name in ("loss", "loss_shuffled", "loss_without", "em", "f1", "match", "rouge_l"):
        values = logged(tmp_path / "model", f"eval_{name}")
        assert len(values) == 3, name
        assert all(map(math.isfinite, values)), name
    # The model that is returned answers outside autocast too.
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    assert model.decoder.dtype == torch.bfloat16
    with torch.no_grad():
        model.decoder(input_ids=torch.arange(5)[None])
        model.compress(*collate_documents([prompt.render("Paris.")], 0))


def test_pretraining_then_finetuning_ends_in_a_model_that_answers(
    tmp_path: Path, texts: str, questions: str
) -> None:
    parquet, pretrained, final = (tmp_path / name for name in ("q.parquet", "pre", "final"))
    pq.write_table(pa.Table.from_pylist(question_records()), parquet)
    held_out = tmp_path / "held_out"
    Dataset.from_list(question_records()[:3]).save_to_disk(held_out)

    first = main(
        ["pretrain", *tiny_arch(), *SHORT_TEXTS, f"out_dir={pretrained}", f"data.train=[{texts}]"]
    )
    second = main(
        [
            "finetune",
            *SHORT_ANSWERS,
            f"model={pretrained}",
            f"out_dir={final}",
            f"data.train=[{questions},{parquet}]",
            f"data.validation=[{held_out}]",
            "query_dependent=true",
            "run.report_to=tensorboard",
        ]
    )

    assert (first, second) == (0, 0)
    # A tenth of the texts was held out; questions had a file of their own.
    assert len(logged(pretrained, "eval_loss")) == len(logged(final, "eval_loss_shuffled")) == 1
    assert len(logged(final, "eval_f1")) == 1
    assert json.loads((final / "config.json").read_text())["query_dependent"] is True
    saved = OmegaConf.load(final / "options.yaml")
    assert (saved.model, saved.optimizer.steps, saved.run.storage) == (str(pretrained), 2, "int8")
    assert list(tmp_path.rglob("events.out.tfevents*"))
    # The demo recipe stores the tuned compressor as 8-bit differences to its base.
    tensors = load_file(final / "model.safetensors")
    difference = tensors["compressor.layers.0.mlp.up_proj.weight.difference"]
    assert difference.dtype == torch.int8
    assert difference.any()
    model = SoftRAGModel.from_pretrained(final, dtype=torch.float32)
    scores = score_questions(model, question_rows(), batch_size=3, max_new_tokens=4)
    assert set(scores) == {"em", "f1", "match", "rouge_l"}


def test_saved_options_repeat_the_run(tmp_path: Path, questions: str) -> None:
    arguments = [*tiny_arch(), *SHORT_ANSWERS, "run.seed=3", f"data.train=[{questions}]"]
    assert main(["finetune", *arguments, f"out_dir={tmp_path / 'one'}"]) == 0
    saved = OmegaConf.load(tmp_path / "one" / "options.yaml")
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Finetune), saved))
    options.out_dir = str(tmp_path / "two")

    finetune(options)

    assert logged(tmp_path / "one", "loss") == logged(tmp_path / "two", "loss")
    one, two = (
        SoftRAGModel.from_pretrained(tmp_path / name, load_decoder=False) for name in ("one", "two")
    )
    assert one.fingerprint == two.fingerprint


def test_the_text_baseline_trains_the_decoder_alone(tmp_path: Path, questions: str) -> None:
    files = [f"data.train=[{questions}]", f"data.validation=[{questions}]"]
    code = main(
        [
            "finetune",
            *tiny_arch(),
            *SHORT_ANSWERS,
            *files,
            f"out_dir={tmp_path / 'model'}",
            "data.text_share=1",
        ]
    )

    assert code == 0
    assert logged(tmp_path / "model", "eval_loss") == logged(
        tmp_path / "model", "eval_loss_without"
    )
    untouched = SoftRAGModel.from_base(SoftRAGModel.from_pretrained(tmp_path / "model").config)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert not any(t.any() for name, t in tensors.items() if name.endswith(".difference"))
    torch.testing.assert_close(
        tensors["connector.up.weight"].float(), untouched.connector.up.weight, rtol=0, atol=0.01
    )


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_a_decoder_that_learns_alone_reads_memories_that_were_stored_before(
    tmp_path: Path, questions: str, storage: str
) -> None:
    start = build_model(compressor_layers=1, readout="words")
    start.save_pretrained(tmp_path / "start", storage=storage)

    code = main(
        [
            *("finetune", *SHORT_ANSWERS, f"model={tmp_path / 'start'}", "data.mixed_share=0.5"),
            *(f"data.train=[{questions}]", f"out_dir={tmp_path / 'end'}"),
            *("optimizer.compressor_lr=0", "optimizer.connector_lr=0", f"run.storage={storage}"),
        ]
    )

    assert code == 0
    before, after = (
        SoftRAGModel.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("start", "end")
    )
    assert before.fingerprint == after.fingerprint
    learned = after.trained_state()
    assert {
        name.split(".")[0]
        for name, tensor in before.trained_state().items()
        if not torch.equal(tensor, learned[name])
    } == {"decoder"}


def test_an_int8_checkpoint_is_taken_up_where_it_was_left(
    tmp_path: Path, texts: str, questions: str
) -> None:
    start = build_model(compressor_layers=1, readout="words")
    start.save_pretrained(tmp_path / "int8", storage="int8")
    stored = SoftRAGModel.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    model = f"model={tmp_path / 'int8'}"

    for stage, files, short in (
        ("pretrain", f"data.train=[{texts}]", SHORT_TEXTS),
        ("finetune", f"data.train=[{questions}]", SHORT_ANSWERS),
    ):
        same, moved = tmp_path / f"{stage}-same", tmp_path / f"{stage}-moved"
        common = [stage, model, files, *short, "run.storage=full"]
        assert main([*common, *still, f"out_dir={same}"]) == 0
        assert main([*common, f"out_dir={moved}"]) == 0

        expected, kept, learned = (
            stored.trained_state(), load_file(same / "model.safetensors"),
            load_file(moved / "model.safetensors"),
        )  # fmt: skip
        assert set(kept) == set(expected)
        for name, value in expected.items():
            # Not a bit is lost; what training moves, it moves in float32.
            assert torch.equal(kept[name], value), name
            assert learned[name].dtype == torch.float32
        assert not torch.equal(
            learned["compressor.layers.0.mlp.up_proj.weight"],
            expected["compressor.layers.0.mlp.up_proj.weight"],
        )


def test_a_new_architecture_takes_the_weights_that_fit_it(tmp_path: Path, questions: str) -> None:
    trained = build_model(compressor_layers=1, seed=3)
    trained.save_pretrained(tmp_path / "trained")
    theirs = trained.trained_state()
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    common = [
        "finetune", f"data.train=[{questions}]", *SHORT_ANSWERS, *still, *tiny_arch(),
        "run.storage=full", "arch.readout=words", "arch.connector=relu",
        f"warm_start.checkpoint={tmp_path / 'trained'}",
    ]  # fmt: skip

    assert main([*common, f"out_dir={tmp_path / 'all'}"]) == 0
    assert main([*common, "warm_start.parts=[decoder]", f"out_dir={tmp_path / 'decoder'}"]) == 0

    state = SoftRAGModel.from_pretrained(tmp_path / "all", dtype=torch.float32).trained_state()
    assert set(state) - set(theirs) == {"word_projection.weight"}
    for name, tensor in theirs.items():
        assert torch.equal(state[name], tensor), name
    partly = SoftRAGModel.from_pretrained(tmp_path / "decoder", dtype=torch.float32)
    for name, tensor in partly.trained_state().items():
        if name in theirs and theirs[name].std() > 0:
            assert torch.equal(tensor, theirs[name]) == name.startswith("decoder."), name


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_soft_tokens_are_taught_to_say_their_words_in_both_stages(
    tmp_path: Path, texts: str, questions: str, stage: str
) -> None:
    files, short = (texts, SHORT_TEXTS) if stage == "pretrain" else (questions, SHORT_ANSWERS)
    losses = {}
    for weight in (0, 1):
        folder = tmp_path / str(weight)
        # Without a curriculum: at rate 2 windows are too short to be said.
        options = ["arch.rate=8", "arch.readout=pooled", f"optimizer.saying_weight={weight}"]
        options += ["optimizer.curriculum=0"]
        arguments = [*tiny_arch(), *short, *options, f"data.train=[{files}]", f"out_dir={folder}"]
        assert main([stage, *arguments]) == 0
        losses[weight] = logged(folder, "loss")

    assert losses[1][0] > losses[0][0]


@pytest.mark.parametrize("first", [False, True])
def test_a_decoder_can_be_taught_to_read_the_question_before_the_documents_too(
    tmp_path: Path, questions: str, first: bool
) -> None:
    options = [*tiny_arch(), *SHORT_ANSWERS, f"arch.question_first={str(first).lower()}"]
    assert main(["finetune", *options, f"data.train=[{questions}]", f"out_dir={tmp_path}"]) == 0

    model = SoftRAGModel.from_pretrained(tmp_path)
    assert model.decoder_tokenizer is not None
    prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    text = model.decoder_tokenizer.decode(prompt.render("Who wrote it?", ["By Ada."]).input_ids)
    asked = "Question: Who wrote it?"
    before = f"{asked}\n\n" if first else ""
    assert f"{before}Background:\nBy Ada.\n\n{asked}" in text
    assert text.count(asked) == 1 + first


@pytest.mark.parametrize("source", ["pretrain", "finetune", "replay", "question"])
def test_a_new_standardized_connector_is_measured_on_the_data(
    tmp_path: Path, texts: str, questions: str, source: str
) -> None:
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    common = [*tiny_arch(), *still, "run.storage=full", f"out_dir={tmp_path / 'model'}"]
    if source == "pretrain":
        arguments = [
            "pretrain",
            *SHORT_TEXTS,
            f"data.train=[{texts}]",
            f"data.validation=[{texts}]",
        ]
    else:
        arguments = ["finetune", *SHORT_ANSWERS, f"data.train=[{questions}]", "rate=8"]
    if source == "replay":
        arguments += [f"replay.train=[{texts}]", "replay.min_chunk_tokens=8"]
    if source == "question":
        arguments += ["query_dependent=true"]

    assert main([*arguments, *common]) == 0

    read: dict[str, str | None] = {}
    if source in ("pretrain", "replay"):
        read = {row.text: None for row in text_rows()}
    else:
        for row in question_rows():
            for text in row.documents:
                # Each with the first question that it is a document of.
                read.setdefault(text, row.question if source == "question" else None)
    model = SoftRAGModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    batch = collate_documents([prompt.render(*each) for each in read.items()], 0)
    packed = pack(batch.attention_mask)
    with torch.no_grad():
        states = model.read_documents(batch.input_ids.flatten()[packed.slot], packed).memory
    expected = {"connector.mean": states.mean(0), "connector.std": states.std(0)}
    for name, value in expected.items():
        torch.testing.assert_close(model.trained_state()[name], value, rtol=1e-4, atol=1e-5)


def test_a_measured_connector_is_taken_over_as_it_is_and_one_of_another_kind_is_not(
    tmp_path: Path, questions: str
) -> None:
    for kind in ("standardized", "relu"):
        build_model(compressor_layers=1, seed=3, connector=kind).save_pretrained(tmp_path / kind)
    common = ["finetune", f"data.train=[{questions}]", *SHORT_ANSWERS, "run.storage=full"]
    standardized, relu = (
        SoftRAGModel.from_pretrained(tmp_path / kind, dtype=torch.float32).trained_state()
        for kind in ("standardized", "relu")
    )
    states = {}
    for name, start in {
        "continued": [f"model={tmp_path / 'standardized'}"],
        "taken": [*tiny_arch(), f"warm_start.checkpoint={tmp_path / 'standardized'}"],
        "other": [*tiny_arch(), f"warm_start.checkpoint={tmp_path / 'relu'}"],
    }.items():
        assert main([*common, *start, "run.bf16=true", f"out_dir={tmp_path / name}"]) == 0
        states[name] = load_file(tmp_path / name / "model.safetensors")

    for name in ("connector.mean", "connector.std", "connector.gain"):
        for run in ("continued", "taken"):
            # Not a bit is lost, though all else that is not trained is rounded.
            assert torch.equal(states[run][name], standardized[name]), (run, name)
        assert not torch.equal(states["other"][name], standardized[name]), name
    close = torch.isclose(states["other"]["connector.up.weight"], relu["connector.up.weight"],
                          atol=0.01)  # fmt: skip
    assert not close.all()


def test_a_shared_compressor_can_start_as_the_reader_that_the_decoder_has_become(
    tmp_path: Path, questions: str
) -> None:
    trained = build_model(seed=3, decoder_lora={"r": 4, "alpha": 8})
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if is_lora_weight(name):
                parameter.normal_()
    trained.save_pretrained(tmp_path / "trained")
    theirs = trained.trained_state()
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    common = [
        "finetune", f"data.train=[{questions}]", *SHORT_ANSWERS, *still, *tiny_arch(),
        "run.storage=full", "arch.compressor=shared", "arch.compressor_layers=null",
        "arch.connector_hidden=null", "query_dependent=true", "warm_start.reader=true",
        f"warm_start.checkpoint={tmp_path / 'trained'}", "warm_start.parts=[decoder]",
    ]  # fmt: skip

    assert main([*common, "arch.compressor_lora_r=4", f"out_dir={tmp_path / 'm'}"]) == 0

    state = SoftRAGModel.from_pretrained(tmp_path / "m", dtype=torch.float32).trained_state()
    adapters = [name for name in state if name.startswith("compressor.")]
    assert len(adapters) > 20
    for name in adapters:
        source = name.replace("compressor.", "decoder.model.")
        assert torch.equal(state[name], theirs[source]), name
        assert torch.equal(state[source], theirs[source]), source


def test_adapters_of_a_lower_rank_are_taken_and_the_further_ranks_add_nothing_yet(
    tmp_path: Path, questions: str
) -> None:
    trained = build_model(seed=3, compressor_layers=1, decoder_lora={"r": 4, "alpha": 8})
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if is_lora_weight(name):
                parameter.normal_()
    trained.save_pretrained(tmp_path / "trained")
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    common = ["finetune", f"data.train=[{questions}]", *SHORT_ANSWERS, *still, *tiny_arch()]
    start = ["run.storage=full", "arch.connector=relu", "arch.decoder_lora_r=6"]

    assert main([*common, *start, f"warm_start.checkpoint={tmp_path / 'trained'}",
                 f"out_dir={tmp_path / 'wide'}"]) == 0  # fmt: skip

    wide = SoftRAGModel.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert wide.config.decoder_lora["r"] == 6
    ids = torch.tensor([[5, 6, 7]])
    nothing = torch.zeros(0, wide.decoder.config.hidden_size)
    with torch.no_grad():
        logits = [
            model.eval()(ids, torch.ones_like(ids), soft_tokens=nothing).logits
            for model in (wide, trained)
        ]
    assert torch.allclose(*logits, atol=1e-5)
    assert wide.fingerprint == SoftRAGModel.from_pretrained(tmp_path / "trained").fingerprint


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_dropout_is_set_for_a_checkpoint_and_rests_while_evaluating(
    tmp_path: Path, texts: str, questions: str, stage: str
) -> None:
    build_model(decoder_lora={"r": 4, "alpha": 8, "dropout": 0.3}).save_pretrained(tmp_path / "m")
    files, short = (texts, SHORT_TEXTS) if stage == "pretrain" else (questions, SHORT_ANSWERS)
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    losses, evaluated = {}, {}
    for dropout in (0.0, 0.5):
        folder = tmp_path / f"{stage}-{dropout}"
        options = [f"model={tmp_path / 'm'}", f"out_dir={folder}", f"optimizer.dropout={dropout}"]
        files_of = [f"data.train=[{files}]", f"data.validation=[{files}]"]
        assert main([stage, *options, *files_of, *short, *still]) == 0
        losses[dropout] = logged(folder, "loss")
        evaluated[dropout] = logged(folder, "eval_loss")
        config = json.loads((folder / "config.json").read_text())
        assert config["decoder_lora"]["dropout"] == dropout

    assert evaluated[0.0] == evaluated[0.5]
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses[0.0], losses[0.5], strict=True))


def test_the_best_weights_are_kept_and_said_to_be(tmp_path: Path, questions: str) -> None:
    # Other answers than those that are learned: what it learns makes it worse.
    records = [record | {"answers": ["7 8 9 6 5 4 3 2 1"]} for record in question_records()]
    others = write_lines(tmp_path / "others.jsonl", records)
    arguments = [
        *("finetune", *tiny_arch(), "arch.connector=relu", *SHORT_ANSWERS, "optimizer.steps=12"),
        *(f"data.train=[{questions}]", f"data.validation=[{others}]", "run.storage=full"),
        *(f"optimizer.{part}_lr=0.1" for part in ("compressor", "connector", "decoder")),
        *("run.eval_every=2", "run.score_on_the_way=false", f"out_dir={tmp_path / 'model'}"),
    ]

    assert main([*arguments, "run.keep_best=true"]) == 0

    evaluated = logged(tmp_path / "model", "eval_loss")
    best = evaluated.index(min(evaluated))
    assert len(evaluated) == 7
    assert 0 < best < 5
    assert logged(tmp_path / "model", "kept_step") == [2 * (best + 1)]
    assert logged(tmp_path / "model", "kept_loss") == [min(evaluated)]
    # Answers are written once, at the end.
    assert len(logged(tmp_path / "model", "eval_f1")) == 1
    again = [*arguments, f"model={tmp_path / 'model'}", "optimizer.steps=1", "run.eval_every=0"]
    still = [f"optimizer.{part}_lr=0" for part in ("compressor", "connector", "decoder")]
    assert main([*again, *still, f"out_dir={tmp_path / 'again'}"]) == 0
    assert logged(tmp_path / "again", "eval_loss") == pytest.approx([min(evaluated)])


def test_keeping_the_best_needs_evaluations(
    tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", *tiny_arch(), *SHORT, f"data.train=[{questions}]"]

    assert main([*arguments, f"out_dir={tmp_path / 'model'}", "run.keep_best=true"]) == 1
    assert "set run.eval_every" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_resumed_and_one_that_never_began_is_begun(
    tmp_path: Path, questions: str
) -> None:
    arguments = [
        "finetune",
        *tiny_arch(),
        *SHORT_ANSWERS,
        f"data.train=[{questions}]",
        f"out_dir={tmp_path / 'model'}",
        "run.save_every=2",
        "run.resume=true",
    ]

    assert main(arguments) == 0
    assert main([*arguments, "optimizer.steps=4"]) == 0

    assert len(logged(tmp_path / "model", "loss")) == 4
    assert (tmp_path / "model" / "checkpoint-4").is_dir()


def test_two_processes_learn_what_one_with_twice_the_batch_learns(
    tmp_path: Path, questions: str, texts: str
) -> None:
    build_model(seed=7).save_pretrained(tmp_path / "teacher")
    arguments = [
        "finetune",
        *tiny_arch(),
        *SHORT_ANSWERS,
        f"teacher={tmp_path / 'teacher'}",
        f"data.train=[{questions}]",
        f"data.validation=[{questions}]",
        "data.min_documents=1",
        "data.text_share=0.5",
        f"replay.train=[{texts}]",
        "replay.min_chunk_tokens=8",
        "replay.max_chunk_tokens=24",
        "replay.quotation=0",
        "replay.cloze=0",
        # Two processes keep one clock; there is time enough for every step.
        "optimizer.minutes=1000",
        "query_dependent=true",
        "rerank=true",
        "optimizer.saying_weight=0.5",
        "rate=8",
        "data.rates=[8,4]",
    ]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "softrag_trainers", *arguments),
            *("optimizer.batch_size=2", f"out_dir={tmp_path / 'two'}"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'trainers'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    assert main([*arguments, f"out_dir={tmp_path / 'one'}"]) == 0

    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["rate"], config["rates"]) == (8, [4, 8])
    for name in ("loss", "grad_norm", "eval_loss", "eval_rerank_mrr"):
        assert logged(tmp_path / "two", name) == pytest.approx(
            logged(tmp_path / "one", name), rel=1e-4
        ), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m softrag_trainers"),
        (["distil"], "usage: python -m softrag_trainers"),
        (["pretrain", "out_dir=x", "optimizer.learning_rate=1"], "learning_rate"),
        (["finetune", "out_dir=x", "arch.rate=much"], "much"),
        (["finetune", "out_dir=x", "recipe=llava"], "llava_finetune"),
        (["pretrain", "out_dir"], "out_dir"),
        (["finetune"], "out_dir"),
    ],
)
def test_misuse_is_answered_with_the_reason_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "give files, data.train="),
        (["pretrain"], "give files, data.train="),
        (["finetune", "data.train=[nowhere.jsonl]"], "nowhere.jsonl"),
        (["finetune", "model=nowhere", "data.train=[{questions}]"], "nowhere"),
        (["finetune", "data.train=[{questions}]", "run.storage=int3"], "'int3'"),
        (["finetune", "data.train=[{questions}]", "data.rates=[8,16]"], "rate is 4, which is not"),
        (
            [
                "finetune",
                "data.train=[{questions}]",
                "warm_start.checkpoint={checkpoint}",
                "warm_start.parts=[encoder]",
            ],
            "no tensor has the same name and shape",
        ),
        (
            [
                "finetune",
                "data.train=[{questions}]",
                "warm_start.checkpoint={checkpoint}",
                "warm_start.reader=true",
                "arch.compressor=shared",
                "arch.compressor_layers=null",
                "arch.compressor_lora_r=3",
                "arch.connector_hidden=null",
            ],
            "arch.compressor_lora_r to the rank of its decoder_lora (",
        ),
        (
            [
                "finetune",
                "data.train=[{questions}]",
                "warm_start.checkpoint={checkpoint}",
                "warm_start.reader=true",
            ],
            "do not fit the compressor. Set arch.compressor=shared",
        ),
        (
            [
                "finetune",
                "data.train=[{questions}]",
                "model={checkpoint}",
                "warm_start.checkpoint={checkpoint}",
            ],
            "`warm_start` gives weights to what `arch` builds",
        ),
        (
            ["finetune", "data.train=[{questions}]", "warm_start.reader=true"],
            "name it (warm_start.checkpoint=FOLDER)",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_exit_code_1(
    arguments: list[str],
    message: str,
    questions: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {"questions": questions, "checkpoint": build_checkpoint()}
    arguments = [argument.format(**found) for argument in arguments]
    options = [*tiny_arch(), *SHORT, f"out_dir={tmp_path / 'model'}"]

    assert main([*arguments, *options]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert "'loss'" not in output.out, "found out after training"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_composes(recipe: str) -> None:
    name, stage = recipe.rsplit("_", 1)

    options = read_options(stage, [f"recipe={name}", "out_dir=x"])

    assert isinstance(options, {"pretrain": Pretrain, "finetune": Finetune}[stage])


def test_the_papers_recipes_keep_the_papers_figures() -> None:
    pisco = read_options("finetune", ["recipe=pisco", "out_dir=x"])
    oscar = read_options("pretrain", ["recipe=oscar", "out_dir=x"])

    for options in (pisco, oscar):
        assert options.arch.decoder == "mistralai/Mistral-7B-Instruct-v0.2"
        assert (options.arch.rate, options.arch.memory_tokens) == (16, 8)
        assert options.optimizer.batch_size * options.optimizer.accumulation == 128
        assert options.optimizer.decoder_lr == 1e-4
    assert pisco.arch.compressor == "shared"
    assert read_options("finetune", ["recipe=oscar", "out_dir=x"]).query_dependent is True


class TestTextPieces:
    @pytest.mark.parametrize(("chunks", "shortest"), [(1, 8), (3, 8), (2, 24)])
    def test_chunks_follow_each_other_and_lose_nothing_but_short_ends(
        self, chunks: int, shortest: int
    ) -> None:
        model = build_model()
        prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
        data = PretrainingData(min_chunk_tokens=shortest, max_chunk_tokens=24, chunks=chunks)

        pieces = TextPieces(text_rows()[:1], prompt, data, seed=0)

        tokens = prompt.tokenize(text_rows()[0].text)
        position = 0
        for piece in (pieces[index] for index in range(len(pieces))):
            assert 1 <= len(piece.chunks) <= chunks
            for chunk in piece.chunks:
                assert len(chunk) <= 24
                assert chunk == tokens[position : position + len(chunk)]
                position += len(chunk)
            assert piece.following == tokens[position : position + 24]
        assert len(tokens) - position < max(1, shortest // 2)

    def test_texts_that_are_all_too_short_are_an_error_with_the_fix(self) -> None:
        model = build_model()
        prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
        data = PretrainingData(min_chunk_tokens=4000, max_chunk_tokens=4000)

        with pytest.raises(ValueError, match=r"lower data\.min_chunk_tokens"):
            TextPieces(text_rows(), prompt, data, seed=0)
