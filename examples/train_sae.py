"""Train a small top-k sparse autoencoder on stored activations.

    actpipe run workflows/quickstart.yaml
    python examples/train_sae.py runs/quickstart --hook blocks.1.hook_resid_post

Prints what share of the variance the reconstruction explains on held-out documents, how many features a row
uses, and what share of the time went by waiting for the feed.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import actpipe


class TopK(nn.Module):
    """A sparse autoencoder that keeps the k largest features of each row (Gao et al., 2024, arXiv:2406.04093)."""

    def __init__(self, d_in: int, n_features: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.bias = nn.Parameter(torch.zeros(d_in))
        self.encode = nn.Linear(d_in, n_features)
        self.decode = nn.Linear(n_features, d_in, bias=False)
        with torch.no_grad():
            self.decode.weight /= self.decode.weight.norm(dim=0)
            self.encode.weight.copy_(self.decode.weight.T)
            self.encode.bias.zero_()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reconstruction and the features."""
        largest = self.encode(x - self.bias).topk(self.k, dim=-1)
        features = torch.zeros(*x.shape[:-1], self.encode.out_features, device=x.device)
        features = features.scatter(-1, largest.indices, largest.values.relu())
        return self.decode(features) + self.bias, features


def train(loader: actpipe.ActivationLoader, hook: str, arguments: argparse.Namespace) -> TopK:
    """Minimize the squared error; decoder columns keep the norm 1."""
    torch.manual_seed(arguments.seed)
    d_in = next(iter(loader))[hook].flatten(1).shape[1]
    sae = TopK(d_in, arguments.features, arguments.k).to(arguments.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=arguments.rate)
    for epoch in range(arguments.epochs):
        for batch in loader:
            x = batch[hook].flatten(1)
            loss = (sae(x)[0] - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                sae.decode.weight /= sae.decode.weight.norm(dim=0)
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}", flush=True)
    return sae


@torch.no_grad()
def evaluate(sae: TopK, loader: actpipe.ActivationLoader, hook: str) -> tuple[float, float]:
    """Return the fraction of variance explained and the mean number of features in use, over all rows."""
    rows, error, used = [], 0.0, 0.0
    for batch in loader:
        x = batch[hook].flatten(1)
        reconstruction, features = sae(x)
        error += (reconstruction - x).double().square().sum().item()
        used += (features > 0).sum().item()
        rows.append(x.double())
    x = torch.cat(rows)
    return 1 - error / (x - x.mean(0)).square().sum().item(), used / len(x)


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--hook", default="blocks.1.hook_resid_post")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    options = {"drop_special": True, "normalize": "mean_norm", "device": arguments.device}
    loader = actpipe.ActivationLoader(
        arguments.run, arguments.hook, arguments.batch_size, seed=arguments.seed, split="train", **options
    )
    held_out = actpipe.ActivationLoader(
        arguments.run, arguments.hook, shuffle=None, split="validation", statistics=loader.statistics, **options
    )
    sae = train(loader, arguments.hook, arguments)
    explained, used = evaluate(sae, held_out, arguments.hook)
    print(f"fraction of variance explained on held-out documents: {explained:.3f}")
    print(f"features in use (L0): {used:.1f} of {arguments.features}")
    print(f"waited for the feed: {loader.wait_fraction:.2%} of the time")


if __name__ == "__main__":
    main()
