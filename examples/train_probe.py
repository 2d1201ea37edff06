"""Train a linear probe on stored activations: which class is a token, or its document, of?

    actpipe run workflows/quickstart.yaml
    python examples/train_probe.py runs/quickstart                     will the model guess the next token right?
    python examples/train_probe.py runs/quickstart --label speaker     which of the most frequent speakers is this?

The label is an array of the store, one class for each token, or a column of documents.parquet, one for each
document. Prints the accuracy on held-out documents beside that of always guessing the most frequent class, and the
same for a control: the same probe, after the labels were dealt out anew at random. Prints the share of time spent
waiting for the feed, too; a probe computes little beside what reading takes, so below it stands how much of the time
it would take to pick such batches out of one tensor in memory, in the thread that trains.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from torch import nn

import actpipe


def classes_of(run: str, label: str, unit: str, n_classes: int) -> tuple[list[str], torch.Tensor]:
    """Return the most frequent labels, and for each document or row its place among them, -1 where there is none."""
    columns = {"hooks": "tokens/position", "labels": [unit, label]} if unit == "document" else {"hooks": label}
    loader = actpipe.ActivationLoader(run, **columns)
    batches = [(batch[unit], batch[label]) for batch in loader]
    units, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    labels = labels.nan_to_num(-1).long()  # metrics are NaN where no token follows
    chosen = torch.bincount(labels[labels >= 0]).argsort(descending=True)[:n_classes]
    place = torch.full((int(labels.max()) + 2,), -1)  # the last one is for -1
    place[chosen] = torch.arange(len(chosen))
    classes = torch.full((int(units.max()) + 1,), -1)
    classes[units] = place[labels]
    texts = loader.classes.get(label)
    return [str(number) if texts is None else texts[number] for number in chosen.tolist()], classes


def shuffled(classes: torch.Tensor, seed: int) -> torch.Tensor:
    """Deal the classes out anew among those that have one."""
    known = (classes >= 0).nonzero().squeeze(1)
    control = classes.clone()
    control[known] = classes[known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]]
    return control


class Task:
    """A hook, and the class of each row by the document or the row that it is of."""

    def __init__(self, hook: str, unit: str, classes: torch.Tensor) -> None:
        self.hook, self.unit, self.classes = hook, unit, classes

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations and classes of the rows that have one."""
        target = self.classes[batch[self.unit]]
        kept = target >= 0
        return batch[self.hook].flatten(1)[kept], target[kept]


def train(tasks: list[Task], loader: actpipe.ActivationLoader, arguments: argparse.Namespace) -> list[nn.Module]:
    """Fit a linear map for each task with a cross-entropy loss; all of them on the same batches."""
    torch.manual_seed(arguments.seed)
    d_in = next(iter(loader))[tasks[0].hook].flatten(1).shape[1]
    probes = [nn.Linear(d_in, arguments.classes).to(arguments.device) for _ in tasks]
    optimizers = [torch.optim.AdamW(probe.parameters(), lr=arguments.rate, weight_decay=0.01) for probe in probes]
    for batch in loader.epochs(arguments.epochs):
        for task, probe, optimizer in zip(tasks, probes, optimizers, strict=True):
            x, target = task(batch)
            loss = nn.functional.cross_entropy(probe(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probes


@torch.no_grad()
def accuracy(probe: nn.Module, task: Task, loader: actpipe.ActivationLoader) -> tuple[float, float]:
    """Return the share of rows that the probe gets right, and that of the most frequent class."""
    right, targets = [], []
    for batch in loader:
        x, target = task(batch)
        right.append(probe(x).argmax(-1) == target)
        targets.append(target)
    counts = torch.bincount(torch.cat(targets))
    return torch.cat(right).double().mean().item(), (counts.max() / counts.sum()).item()


def picking_share(loader: actpipe.ActivationLoader, hook: str, n_batches: int) -> float:
    """Return the share of the time that it would take to pick the batches that were trained on out of memory."""
    busy_seconds = loader.wait_seconds * (1 / loader.wait_fraction - 1) / n_batches
    batches = [batch[hook].cpu() for batch in itertools.islice(loader, 8)]
    rows, seconds = torch.cat(batches), []
    for _ in range(25):
        chosen = torch.randint(len(rows), (len(batches[0]),))
        started = time.perf_counter()
        rows[chosen]
        seconds.append(time.perf_counter() - started)
    return 1 / (1 + busy_seconds / statistics.median(seconds))


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--hook", default="blocks.1.hook_resid_post")
    parser.add_argument("--label", default="metrics/correct", help="an array, or a text column of documents.parquet")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--validation", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    unit = "row" if arguments.label in actpipe.open_store(arguments.run) else "document"
    names, classes = classes_of(arguments.run, arguments.label, unit, arguments.classes)
    options = {
        "labels": ["document"] if unit == "document" else [],
        "drop_special": True,
        "normalize": "standardize",
        "validation_fraction": arguments.validation,
        "device": arguments.device,
    }
    loader = actpipe.ActivationLoader(
        arguments.run, arguments.hook, arguments.batch_size, seed=arguments.seed, split="train", **options
    )
    held_out = actpipe.ActivationLoader(
        arguments.run, arguments.hook, shuffle=None, split="validation", statistics=loader.statistics, **options
    )
    print(f"{arguments.label}: {', '.join(names)}")
    labels = {"labels": classes, "shuffled labels": shuffled(classes, arguments.seed)}
    tasks = [Task(arguments.hook, unit, dealt.to(arguments.device)) for dealt in labels.values()]
    for title, task, probe in zip(labels, tasks, train(tasks, loader, arguments), strict=True):
        right, guess = accuracy(probe, task, held_out)
        print(f"{title}: accuracy {right:.3f} on held-out documents; the most frequent class alone {guess:.3f}")
    print(f"waited for the feed: {loader.wait_fraction:.2%} of the time")
    share = picking_share(loader, arguments.hook, arguments.epochs * len(loader))
    print(f"picking the batches from a tensor in memory would take {share:.2%} of it")


if __name__ == "__main__":
    main()
