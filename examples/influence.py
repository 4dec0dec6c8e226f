"""Which training images speak for a prediction? Influence functions on the handwritten digits.

    python -m examples.influence

Influence functions (Koh and Liang 2017, arXiv 1703.04730) predict by how much the loss of a test
image changes if a training image is left out. They need F⁻¹, but no further training. Here their
predictions are checked: on three splits of the data, the model is trained again without each of 100
random training images. The output is the rank correlation of predicted and actual changes over
these images, as the mean over 100 test images. The picture shows the test image with the highest
loss, and the training images that help and harm it most. All of this takes less than a minute on
one core, and no network.
"""

import argparse
import copy
from pathlib import Path

import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from prun import BlockedInverseFisher, PagedInverseFisher

# Training minimises (1/n) Σᵢ ℓᵢ(w) + ½ λ‖w‖² over n images. Let gᵢ be the gradient of ℓᵢ, and let
# gᵢgᵢᵀ stand in for its second derivatives. Then the Hessian of this sum is F = λI + (1/m) Σᵢ gᵢgᵢᵀ
# with m = n, and the damping is the weight decay. At the minimum the gradient of the sum is zero.
# Without image i it is −gᵢ/n there, so a Newton step changes the weights by F⁻¹gᵢ/n. The loss of a
# test image with gradient g then changes by gᵀF⁻¹gᵢ/n. One F⁻¹g serves all training images.
DECAY = 0.01  # λ
SHOWN = 4  # images that help, and as many that harm

Images = tuple[Tensor, Tensor]  # (n, 64) in [0, 1], and their labels (n,)


def train(model: nn.Module, images: Tensor, labels: Tensor, n: int) -> None:
    """Goes to the minimum. There is only one, as this logistic regression is strictly convex."""
    options = {"max_iter": 1000, "tolerance_grad": 1e-8, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels, reduction="sum") / n
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's loss without weight decay, (n, d)."""

    def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, image), label)

    params = {name: p.detach() for name, p in model.named_parameters()}
    parts = vmap(grad(loss), (None, 0, 0))(params, images, labels)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


def fisher_rows(model: nn.Module, images: Tensor) -> Tensor:
    """G (classes · n, d) for which (1/m) GᵀG is the Fisher matrix itself, not the empirical one:
    each class serves as a label and counts with the probability that the model gives it."""
    p = model(images).detach().softmax(1)
    classes = p.shape[1]
    labels = torch.arange(classes).repeat_interleave(len(images))
    rows = gradients(model, images.repeat(classes, 1), labels)
    return (classes * p.T.flatten()).sqrt()[:, None] * rows


def predict(model: nn.Module, training: Images, test: Images) -> dict[str, Tensor]:
    """The change of each test loss without each training image, (tests, n), for three F."""
    G, tests = gradients(model, *training), gradients(model, *test)
    n, d = G.shape
    empirical = PagedInverseFisher(G, DECAY)
    rows = fisher_rows(model, training[0])  # more than weights: one block (d, d) is smaller
    fisher = BlockedInverseFisher(rows, blocksize=d, damp=DECAY)
    return {
        "F = λI": tests @ G.T / (DECAY * n),
        "empirical Fisher": torch.stack([empirical.matvec(g) for g in tests]) @ G.T / n,
        "Fisher": torch.stack([fisher.matvec(g) for g in tests]) @ G.T / n,
    }


@torch.no_grad()
def losses(model: nn.Module, test: Images) -> Tensor:
    return cross_entropy(model(test[0]), test[1], reduction="none")


def retrain(model: nn.Module, training: Images, test: Images, removed: Tensor) -> Tensor:
    """The actual change of each test loss without each image at the indices removed, (tests, …)."""
    images, labels = training
    n, changes = len(images), []
    for i in removed:
        kept = torch.arange(n) != i
        retrained = copy.deepcopy(model)  # a start from which the minimum is near
        train(retrained, images[kept], labels[kept], n)  # still 1/n: the decay weighs the same
        changes.append(losses(retrained, test) - losses(model, test))
    return torch.stack(changes, dim=1)


def rank_correlation(predicted: Tensor, actual: Tensor) -> float:
    """Spearman's, over the images removed; the mean over the test images."""
    found = [float(spearmanr(*pair).statistic) for pair in zip(predicted, actual, strict=True)]
    return sum(found) / len(found)


def draw(path: Path, pictures: list[tuple[str, Tensor]], points: dict[str, Tensor]) -> None:
    """The test image, those that help it, those that harm it, and predicted against actual."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    grid = left.subplots(2, SHOWN + 1)
    grid[1, 0].set_axis_off()
    for axes, (title, image) in zip((*grid[0], *grid[1, 1:]), pictures, strict=True):
        axes.imshow(image.view(8, 8), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    grid[0, 1].set_ylabel("help most")
    grid[1, 1].set_ylabel("harm most")
    axes = right.subplots()
    for name, color, marker in (("empirical Fisher", "#D55E00", "^"), ("Fisher", "#0072B2", "o")):
        axes.scatter(points[name], points["actual"], s=18, c=color, marker=marker, label=name)
    axes.axline((0, 0), slope=1, color="0.5", linewidth=1, label="prediction = change")
    axes.set(xlabel="Predicted change of the test loss", ylabel="Actual change, after retraining")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> dict[str, list[float]]:
    """The rank correlation of each split of the data, for each F."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=3, help="of the data")
    parser.add_argument("--images", type=int, default=500, help="to train on")
    parser.add_argument("--removed", type=int, default=100, help="left out, one at a time")
    parser.add_argument("--output", type=Path, metavar="PNG", default=Path("runs/influence.png"))
    args = parser.parse_args()
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    correlations: dict[str, list[float]] = {}
    for split in range(args.splits):
        torch.manual_seed(split)
        order = torch.randperm(len(images))
        parts = order[: args.images], order[-100:]
        training, test = ((images[part] / 16, labels[part]) for part in parts)
        model = nn.Linear(64, 10).double()
        train(model, *training, n=args.images)
        predicted = predict(model, training, test)

        shown = int(losses(model, test).argmax())
        ranked = predicted["Fisher"][shown].argsort(descending=True)
        extremes = torch.cat([ranked[:SHOWN], ranked[-SHOWN:].flip(0)])
        removed = torch.cat([extremes, torch.randperm(args.images)[: args.removed]])
        actual = retrain(model, training, test, removed)
        predicted = {name: changes[:, removed] for name, changes in predicted.items()}
        for name, changes in predicted.items():
            # Random images only: the extremes are easier to rank.
            found = rank_correlation(changes[:, len(extremes) :], actual[:, len(extremes) :])
            correlations.setdefault(name, []).append(round(found, 3))
        print(f"split {split + 1}:", {name: found[-1] for name, found in correlations.items()})
        if split == 0:
            taken = int(model(test[0][shown]).argmax())
            pictures = [(f"test: a {test[1][shown]},\ntaken for {taken}", test[0][shown])]
            for i, change in zip(extremes, actual[shown], strict=False):
                pictures.append((f"a {training[1][i]}\n{change:+.3f}", training[0][i]))
            points = {"actual": actual[shown]}
            points |= {name: changes[shown] for name, changes in predicted.items()}
            draw(args.output, pictures, points)
    return correlations


if __name__ == "__main__":
    print(main())
