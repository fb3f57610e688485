"""python demos/bring_your_own_collator.py: teach memories a task of your own.

A collator says what is compressed and where its memory goes: here an article's text, in front of
"Title:", so that the decoder learns to name it. The base is a tiny random Llama; name a real one.
"""

import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import softrag
from softrag import SoftRAGConfig, SoftRAGModel
from softrag.prompt import PromptRow
from softrag_trainers.collators import Lesson, MemoryCollator
from softrag_trainers.options import Optimizer, Run
from softrag_trainers.trainer import SoftRAGTrainer

TOKENIZER = Path(softrag.__file__).parent / "demo" / "checkpoint" / "tokenizer"
ARTICLES = [
    ("Tides", "The Moon pulls the sea, which rises and falls twice a day on most coasts."),
    ("Bread", "Flour, water and yeast are kneaded, left to rise for an hour, and baked."),
    ("Chess", "Two players move sixteen pieces each, until one king cannot escape."),
]


class TitleCollator(MemoryCollator):
    """Rows are `(title, text)`."""

    def lesson(self, row: tuple[str, str]) -> Lesson:
        """Compress the text; show its memory and "Title:", teach the title."""
        title, text = row
        document = self.document_prompt.render(text)
        shown = [self.rag_prompt.memory_id] * document.n_memory
        shown += self.decoder_tokenizer.encode("\nTitle:", add_special_tokens=False)
        taught = self.decoder_tokenizer.encode(f" {title}", add_special_tokens=False)
        return Lesson([document], PromptRow([*shown, *taught], answer_start=len(shown)))


set_seed(0)  # the base is random
with tempfile.TemporaryDirectory() as folder:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    base = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=49152, initializer_range=0.3)
    LlamaForCausalLM(base).save_pretrained(folder)
    model = SoftRAGModel.from_base(
        SoftRAGConfig(decoder=folder, compressor=folder, connector_hidden=64, rate=4)
    )
    trainer = SoftRAGTrainer(
        model,
        options=Optimizer(steps=60, batch_size=3, compressor_lr=3e-3, connector_lr=3e-3),
        run=Run(log_every=15),
        out_dir=folder,
        collator=TitleCollator(model.config, model.compressor_tokenizer, model.decoder_tokenizer),
        train_rows=ARTICLES,
    )
    trainer.train()
print("losses:", *(f"{log['loss']:.2f}" for log in trainer.state.log_history if "loss" in log))
