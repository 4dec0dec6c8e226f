"""The peers of the benchmark, against their definitions with dense matrices in float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import peers


@pytest.fixture(autouse=True)
def seeded(request):
    """Fresh but reproducible random numbers: each test has its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def layer(rows=5, columns=16, words=40):
    """W (rows, columns) and correlated inputs X (columns, words)."""
    mixed = torch.randn(columns, columns).double() @ torch.randn(columns, words).double()
    return torch.randn(rows, columns).double(), mixed


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.3, "unstructured"), (0.5, "2:4")])
def test_wanda_removes_the_lowest_products_of_weight_and_input_of_each_output(sparsity, pattern):
    W, X = layer()
    expected = W.clone()
    for i in range(len(W)):
        scores = [abs(float(W[i, j])) * float(X[j].norm()) for j in range(W.shape[1])]
        groups = (
            [range(16)] if pattern == "unstructured" else [range(j, j + 4) for j in (0, 4, 8, 12)]
        )
        for group in groups:
            for j in sorted(group, key=scores.__getitem__)[: round(sparsity * len(group))]:
                expected[i, j] = 0
    assert torch.equal(peers.wanda(W, X @ X.T, sparsity, pattern), expected)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "columns"),
    [(0.4, "unstructured", 16), (0.7, "unstructured", 14), (0.5, "2:4", 12)],
)
def test_sparsegpt_is_optimal_brain_surgery_from_left_to_right(
    sparsity, pattern, columns, monkeypatch
):
    """Column by column, with the inverse of the Hessian of the columns that are left."""
    monkeypatch.setattr(peers, "COLUMNS", 8)
    W, X = layer(columns=columns)
    XXt = X @ X.T
    H = XXt + 0.01 * XXt.diagonal().mean() * torch.eye(columns)
    expected, size = W.clone(), 8 if pattern == "unstructured" else 4
    for start in range(0, columns, size):
        chosen = range(start, min(start + size, columns))
        inverses = [torch.linalg.inv(H[j:, j:]) for j in chosen]
        pivots = torch.stack([inverse[0, 0] for inverse in inverses])
        scores = expected[:, chosen].square() / pivots
        gone = torch.zeros_like(scores, dtype=torch.bool)
        if pattern == "unstructured":
            lowest = scores.flatten().argsort()[: round(sparsity * scores.numel())]
            gone.view(-1)[lowest] = True
        else:
            gone.scatter_(1, scores.argsort(dim=1)[:, :2], True)
        for j, inverse in zip(chosen, inverses, strict=True):
            for i in gone[:, j - start].nonzero()[:, 0].tolist():
                expected[i, j:] -= expected[i, j] / inverse[0, 0] * inverse[:, 0]
                expected[i, j] = 0
    found = peers.sparsegpt(
        W, H - 0.01 * (X @ X.T).diagonal().mean() * torch.eye(columns), sparsity, pattern
    )
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, scale):
        return x + scale * self.down(self.up(x).relu())


def test_each_layer_is_pruned_with_the_inputs_that_pruned_layers_give_without_padding():
    model = nn.ModuleList([Layer(), Layer()]).double()
    calls = [((torch.randn(3, 5, 4).double(),), {"scale": 0.5}) for _ in range(2)]
    words = [torch.rand(3, 5) < 0.7 for _ in calls]
    before = [p.detach().clone() for p in model.parameters()]
    seen = []

    def method(W, XXt, sparsity, pattern):
        seen.append(XXt.clone())
        return torch.zeros_like(W)  # so that only biases are left

    peers.prune_layers(model, calls, words, method, 0.5)
    X = torch.cat([args[0][inside] for (args, _), inside in zip(calls, words, strict=True)])
    W, b, _, down = before[:4]
    hidden = (X @ W.T + b).relu()
    following = X + 0.5 * down
    for found, inputs in zip(seen[:3], (X, hidden, following), strict=True):
        torch.testing.assert_close(found, inputs.T @ inputs)
    assert len(seen) == 4
    assert all(
        not module.weight.any() for module in model.modules() if isinstance(module, nn.Linear)
    )
