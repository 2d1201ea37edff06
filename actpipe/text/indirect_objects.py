"""Prompts in which one of two names comes next: indirect object identification.

Source:
    Wang et al. (2022), https://arxiv.org/abs/2211.00593; TransformerLens 2.16, `evals.IOIDataset`, which seeds its
    generator anew inside every sample, so that all its samples are the same one. Here one generator draws them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TEMPLATES = (
    "When [A] and [B] came to the [PLACE], [B] gave the [OBJECT] to [A]",
    "[B] and [A] spent the day at the [PLACE]. At the end [B] handed the [OBJECT] to [A]",
    "After [A] and [B] had been at the [PLACE] for an hour, [B] passed the [OBJECT] to [A]",
    "While [B] and [A] were walking to the [PLACE], [B] showed the [OBJECT] to [A]",
    "[A] and [B] met at the [PLACE] again. Then [B] sold the [OBJECT] to [A]",
    "Since [B] and [A] had the [PLACE] to themselves, [B] brought the [OBJECT] to [A]",
)
NAMES = ("Mary", "John", "Tom", "Anna", "James", "Alice", "Paul", "Sarah", "Mark", "Laura", "David", "Kate")
NOUNS: dict[str, tuple[str, ...]] = {
    "PLACE": ("store", "market", "park", "school", "station", "library", "office"),
    "OBJECT": ("book", "ball", "key", "letter", "ring", "drink", "bag"),
}


@dataclass(frozen=True)
class NamePrompt:
    """A text that should go on with one name, not the other; both texts end with their name."""

    template: int
    right: str
    """The whole text, with the name that belongs at its end."""
    wrong: str
    """The same with the other name at the end."""


def draw_prompts(
    *,
    n_samples: int,
    symmetric: bool,
    seed: int,
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = NAMES,
    nouns: Mapping[str, Sequence[str]] = NOUNS,
) -> list[NamePrompt]:
    """Draw prompts.

    Args:
        n_samples: How many, with exchanged ones counted.
        symmetric: Whether each is followed by itself with the names exchanged.
        seed: Seed of numpy's PCG64 generator.
        templates: Each ends in `[A]`, the name to find.
        names: Names to draw two of.
        nouns: What may stand for other bracketed words; one word for all places of a prompt.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    prompts = []
    for _ in range(n_samples // 2 if symmetric else n_samples):
        number = int(generator.integers(len(templates)))
        text = templates[number]
        for kind, words in nouns.items():
            text = text.replace(f"[{kind}]", words[int(generator.integers(len(words)))])
        one, other = (names[int(index)] for index in generator.choice(len(names), 2, replace=False))
        prompts.append(_filled(number, text, one, other))
        if symmetric:
            prompts.append(_filled(number, text, other, one))
    return prompts


def _filled(number: int, text: str, right: str, wrong: str) -> NamePrompt:
    before = text.removesuffix("[A]").replace("[A]", right).replace("[B]", wrong)
    return NamePrompt(number, before + right, before + wrong)
