"""Options of a training run: Hydra structured configs. Unknown keys are errors.

`recipes/` holds the shipped values; the command line overrides them (`data.samples=1000`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class Architecture:
    """What is built from base models; see `softrag.SoftRAGConfig`.

    Attributes:
        decoder: Base language model that answers.
        compressor: Base language model that compresses, or "shared".
        compressor_layers: Keep only its first layers; null keeps all.
        rate: Document tokens per soft token; when asking, where `data.rates` are several.
        memory_tokens: A fixed number of soft tokens; null: by the rate.
        max_document_tokens: Longest document of one memory.
        readout: "memory", "window", "words" or "pooled".
        connector: "standardized", measured on the first documents of the data, or "relu".
        connector_hidden: Width of the connector; null: no connector.
        decoder_lora_r: Rank of the decoder's adapters; 0: the decoder is frozen.
        compressor_lora_r: Rank of the compressor's adapters; 0: all its weights are trained.
        lora_alpha: Scale of the adapters, as a multiple of their rank.
        question_first: The decoder reads the question before the documents too, not only behind
            them.
    """

    decoder: str = "smollm2-135m-instruct"
    compressor: str = "smollm2-135m-instruct"
    compressor_layers: int | None = None
    rate: int = 16
    memory_tokens: int | None = None
    max_document_tokens: int = 256
    readout: str = "window"
    connector: str = "standardized"
    connector_hidden: int | None = 2048
    decoder_lora_r: int = 64
    compressor_lora_r: int = 0
    lora_alpha: float = 2.0
    question_first: bool = False


@dataclass
class WarmStart:
    """Where a model that `arch` builds takes weights from; the rest starts anew.

    A decoder that reads memories teaches another compressor much faster than one that doesn't.

    Attributes:
        checkpoint: Its tensors are taken where name and shape agree, and its adapters where what is
            built has the same or a higher rank; null: none are.
        parts: Beginnings of the names of what is taken, such as "decoder"; empty: everything.
        reader: The adapters of a compressor that shares the decoder's backbone start as the
            decoder's: it can read, and answer, before it learns to compress.
    """

    checkpoint: str | None = None
    parts: list[str] = field(default_factory=list)
    reader: bool = False


@dataclass
class Optimizer:
    """AdamW with a learning rate for each part, 0 leaving it as it is; linear warm-up and decay.

    Attributes:
        compressor_lr: Of the compressor.
        connector_lr: Of the connector and the new tokens' embeddings.
        decoder_lr: Of the decoder's adapters.
        warmup: Share of the run with a rising learning rate.
        curriculum: Share of the run in which the rate rises to the model's, or to its several in
            turn, doubling from 2; 0: none. Ours.
        weight_decay: AdamW's, on matrices only: towards zero, also where a checkpoint goes on.
        dropout: On the inputs of the adapters.
        clip: Largest gradient norm.
        batch_size: Rows a device reads at once.
        accumulation: Batches per optimizer step.
        epochs: Passes over the data.
        steps: Optimizer steps instead of epochs; null: by epochs.
        minutes: Stop, decayed, after so much time, whatever steps or epochs say; null: never. From
            the end of the first step, or of the third where they compile; evaluations included.
        loss_per: What weighs the same in the loss: every "token" that is learned, or every
            "lesson"; or "root", between them: a lesson weighs as the square root of its length.
            Answers are short: by tokens, a third of lessons that reconstruct texts has four fifths
            of the loss of a fine-tuning; by lessons, a paragraph has no more than a name.
        rerank_weight: What a document's relevance weighs in the loss, one of `loss_per` being 1
            (OSCAR, table 7: 0.05).
        saying_weight: What it weighs that soft tokens say something by themselves to the decoder's
            head, one of `loss_per` being 1. Ours. Those of a query-dependent model say the answer,
            one after the other, and those of a document that does not hold it (by its gold flag)
            the answer's end. Those of other models each say the distinct tokens of their window of
            the document, all of them as likely, where windows have 6 tokens or more on average.
        distil_weight: Share of the answers' loss that compares with the teacher, where there is
            one; the labels have the rest.
        match_weight: What it weighs, where there is a teacher, that the decoder's states behind the
            documents are the teacher's, a taught one of `loss_per` being 1 (deep context
            distillation: arXiv 2503.08727).
    """

    compressor_lr: float = 2e-4
    connector_lr: float = 5e-4
    decoder_lr: float = 5e-4
    warmup: float = 0.05
    curriculum: float = 0.0
    weight_decay: float = 0.01
    dropout: float = 0.0
    clip: float = 1.0
    batch_size: int = 128
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    loss_per: str = "token"
    rerank_weight: float = 0.05
    saying_weight: float = 0.0
    distil_weight: float = 0.5
    match_weight: float = 0.0


@dataclass
class Run:
    """How a run is carried out.

    Attributes:
        seed: Of data order, initialisation and every other random choice.
        bf16: Compute in bfloat16 over float32 trained weights; null: on a GPU.
        compile: Compile the transformer layers.
        gradient_checkpointing: Trade time for memory.
        workers: Processes that make batches; null: up to 8 beside a GPU, else none.
        log_every: Steps between log lines.
        eval_every: Steps between evaluations; 0: only at the end.
        eval_rows: Development rows for the loss, and for generated answers.
        score_on_the_way: Answer development questions at every evaluation, not only at the last.
        keep_best: End with the weights of the evaluation with the lowest development loss, the one
            after the last step included. A resumed run knows none from before.
        save_every: Steps between resumable checkpoints; 0: none but the final model.
        resume: Continue from the last checkpoint in out_dir.
        report_to: "none" or "tensorboard".
        storage: How the final model is stored: "full", "int8" or "int4".
    """

    seed: int = 0
    bf16: bool | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    workers: int | None = None
    log_every: int = 20
    eval_every: int = 0
    eval_rows: int = 200
    score_on_the_way: bool = True
    keep_best: bool = False
    save_every: int = 0
    resume: bool = False
    report_to: str = "none"
    storage: str = "full"


@dataclass
class TextLessons:
    """Texts, and what they teach; `recipes/lessons` holds the shipped values.

    Attributes:
        train: Files or folders of texts.
        samples: Use only so many texts; null: all.
        min_chunk_tokens: Shortest chunk; lengths are drawn between it and max_chunk_tokens.
        max_chunk_tokens: Longest chunk.
        chunks: Most consecutive chunks of one lesson (multi-chunk auto-encoding).
        continuation: Share of lessons that continue the text.
        quotation: Share of lessons that quote one chunk among several.
        cloze: Share of lessons that ask for a name or number missing in a sentence.
        noise: Share of the decoder's own input tokens replaced while it reconstructs.
    """

    train: list[str] = field(default_factory=list)
    samples: int | None = None
    min_chunk_tokens: int = 128
    max_chunk_tokens: int = 128
    chunks: int = 1
    continuation: float = 0.5
    quotation: float = 0.0
    cloze: float = 0.0
    noise: float = 0.0


@dataclass
class PretrainingData(TextLessons):
    """Texts, what they teach, and how it is checked.

    Attributes:
        validation: Texts for the development loss; empty: the last rows of `train`.
        rates: Rates to draw from for each lesson, for one model of several; empty: the model's.
    """

    validation: list[str] = field(default_factory=list)
    rates: list[int] = field(default_factory=list)


@dataclass
class ReplayedTexts(TextLessons):
    """Lessons of pre-training between questions; none without `train`.

    Attributes:
        share: Of these lessons among all rows.
    """

    share: float = 0.3


@dataclass
class QuestionData:
    """Questions with their documents.

    Attributes:
        train: Files or folders of questions.
        validation: Questions for the development loss and scores.
        samples: Use only so many questions; null: all.
        min_documents: Fewest documents a question is taught with.
        max_documents: Most; null: all it has.
        text_share: Share of questions that read their documents as text.
        mixed_share: Share of questions that read one document as text, three times of four a gold
            one, and the others from memories (mode "mixed").
        ranked: Documents come best first, as a search has them: a gold one in front for three
            questions of four. Otherwise in any order.
        max_new_tokens: Of generated answers in evaluations.
        rates: Rates to draw from for each question, for one model of several; empty: the model's.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    samples: int | None = None
    min_documents: int = 5
    max_documents: int | None = None
    text_share: float = 0.0
    mixed_share: float = 0.0
    ranked: bool = False
    max_new_tokens: int = 64
    rates: list[int] = field(default_factory=list)


@dataclass
class Pretrain:
    """`python -m softrag_trainers pretrain out_dir=... data.train=[...]`.

    Attributes:
        out_dir: Where the model is written.
        model: A checkpoint to continue from; null: start from the base models of `arch`.
        arch: What to build.
        warm_start: Weights for what is built.
        data: Texts and tasks.
        optimizer: Learning rates, batch, length.
        run: How it is carried out.
    """

    out_dir: str = MISSING
    model: str | None = None
    arch: Architecture = field(default_factory=Architecture)
    warm_start: WarmStart = field(default_factory=WarmStart)
    data: PretrainingData = field(default_factory=PretrainingData)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


@dataclass
class Finetune:
    """`python -m softrag_trainers finetune model=PRETRAINED out_dir=... data.train=[...]`.

    Attributes:
        out_dir: Where the model is written.
        model: A checkpoint to start from; null: start from the base models of `arch`.
        rate: Document tokens per soft token when asking; null: as the model says.
        query_dependent: The compressor reads the question too (OSCAR); null: as the model says.
        rerank: Give a query-dependent model a rerank head, which learns the documents' relevance.
        teacher: A checkpoint fine-tuned with data.text_share=1, to learn its answers' token
            distributions from (logit distillation); null: learn from labels alone.
        arch: What to build when there is no model.
        warm_start: Weights for what is built.
        data: Questions.
        replay: Texts that go on teaching the compressor, and keep the questions from being learned
            by heart.
        optimizer: Learning rates, batch, length.
        run: How it is carried out.
    """

    out_dir: str = MISSING
    model: str | None = None
    rate: int | None = None
    query_dependent: bool | None = None
    rerank: bool = False
    teacher: str | None = None
    arch: Architecture = field(default_factory=Architecture)
    warm_start: WarmStart = field(default_factory=WarmStart)
    data: QuestionData = field(default_factory=QuestionData)
    replay: ReplayedTexts = field(default_factory=ReplayedTexts)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


@dataclass
class Label:
    """`python -m softrag_trainers label task=answers data=[...] out=labels.jsonl teacher=...`.

    Attributes:
        task: "answers": answer questions from the full text of their documents; "questions": make
            up questions about documents, with answers copied from them.
        data: Files or folders: of questions with documents, or of documents as `softrag index`
            takes them.
        out: A .jsonl file that rows are appended to; what it holds is not labelled again.
        teacher: URL of an OpenAI-compatible server (its key in OPENAI_API_KEY), or a base model's
            name or folder.
        teacher_model: The model's name on the server; null: the first it lists.
        prompt: What the teacher is asked, with {documents} and {question}, or {document} and
            {count}; null: as shipped.
        questions: How many questions to ask for about a chunk.
        samples: Label only the first so many questions or chunks; null: all.
        max_tokens: Longest reply.
        batch_size: Replies between two writes to `out`.
        threads: Prompts on their way to a server together.
        model: The checkpoint that is to be fine-tuned; its compressor measures chunks.
        chunk_tokens: Longest chunk that is asked about.
    """

    task: str = MISSING
    data: list[str] = MISSING
    out: str = MISSING
    teacher: str = MISSING
    teacher_model: str | None = None
    prompt: str | None = None
    questions: int = 2
    samples: int | None = None
    max_tokens: int = 128
    batch_size: int = 64
    threads: int = 16
    model: str = "softrag-demo"
    chunk_tokens: int = 128


_STORE = ConfigStore.instance()
_STORE.store(name="pretrain_schema", node=Pretrain)
_STORE.store(name="finetune_schema", node=Finetune)
_STORE.store(name="label_schema", node=Label)


def read_options(stage: str, overrides: list[str]) -> Any:  # noqa: ANN401 (the stage's options)
    """Compose a stage's options from a recipe and the command line.

    Args:
        stage: `"pretrain"` or `"finetune"`, or `"label"`, which has no recipes.
        overrides: Hydra overrides, such as `["recipe=pisco", "data.samples=1000"]`; the recipe is
            `demo` unless named.

    Raises:
        hydra.errors.HydraException: An override is malformed or names an unknown key, or there is
            no such recipe.
    """
    if stage == "label":
        with initialize_config_module("softrag_trainers.recipes", version_base="1.3"):
            return OmegaConf.to_object(compose(config_name="label_schema", overrides=overrides))
    recipe = "demo"
    for override in list(overrides):
        if override.startswith("recipe="):
            recipe = override.removeprefix("recipe=")
            overrides = [other for other in overrides if other != override]
    with initialize_config_module("softrag_trainers.recipes", version_base="1.3"):
        options = compose(config_name=f"{recipe}_{stage}", overrides=overrides)
    return OmegaConf.to_object(options)
