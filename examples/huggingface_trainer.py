"""The Hugging Face Trainer: a small BERT learns which package a docstring comes from.

    python -m examples.huggingface_trainer --output runs/bert

`--resume runs/bert/checkpoint-80` resumes from a checkpoint, to the same bits on a CPU. The texts
are the docstrings of four packages of Python's standard library; tokenizer and model are made here.
"""

import argparse
import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from optim import MFAC

PACKAGES = ["asyncio", "email", "importlib", "logging"]
STEPS = 160


def docstrings() -> Iterator[tuple[str, int]]:
    """Texts with the number of their package."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for label, package in enumerate(PACKAGES):
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, documented) else None
                if text:
                    yield text, label


def datasets() -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Training set, test set, and the size of the vocabulary: the words of the training set."""
    examples = sorted(docstrings())
    random.Random(0).shuffle(examples)
    test, training = examples[:200], examples[200:]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    words = tokenizers.trainers.WordLevelTrainer(
        vocab_size=1000, special_tokens=["[PAD]", "[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator([text for text, _ in training], words)
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)

    def encoded(examples: list[tuple[str, int]]) -> list[dict[str, Any]]:
        encodings = tokenizer.encode_batch([text for text, _ in examples])
        return [
            {"input_ids": e.ids, "attention_mask": e.attention_mask, "labels": label}
            for e, (_, label) in zip(encodings, examples, strict=True)
        ]

    return encoded(training), encoded(test), tokenizer.get_vocab_size()


def make_trainer(output: Path) -> Trainer:
    set_seed(0)
    training, test, words = datasets()
    config = BertConfig(
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=len(PACKAGES),
        initializer_range=0.1,  # because this network is narrow
    )
    model = BertForSequenceClassification(config)
    # Trainer's own rule: no weight decay for biases and norms.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if (name in decayed) == decay],
            "weight_decay": 1e-3 if decay else 0.0,
        }
        for decay in (True, False)
    ]
    optimizer = MFAC(groups, lr=0.003, momentum=0.5, ngrads=64, damp=1e-4)
    scheduler = get_linear_schedule_with_warmup(optimizer, STEPS // 5, STEPS)
    return Trainer(
        model,
        TrainingArguments(
            str(output),
            max_steps=STEPS,
            save_steps=STEPS // 2,
            per_device_train_batch_size=32,
            use_cpu=True,
            report_to="none",
            logging_steps=STEPS // 4,
            disable_tqdm=True,
        ),
        train_dataset=training,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        optimizers=(optimizer, scheduler),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    arguments = parser.parse_args()
    trainer = make_trainer(arguments.output)
    trainer.train(resume_from_checkpoint=arguments.resume and str(arguments.resume))
    print({"accuracy": float(trainer.evaluate()["eval_accuracy"])})
