"""From text to tokens and back, for one prompt or a few; corpora are tokenized elsewhere.

Source: TransformerLens 2.16, `HookedTransformer.to_tokens` and its companions, `utils.test_prompt`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Prompts:
    """A tokenizer as prompts need it.

    Attributes:
        tokenizer: Of transformers.
        n_ctx: Positions that the model has.
        prepend_bos: Whether a text begins with the BOS token where nothing else is said.
        with_special_tokens: Whether the tokenizer's own special tokens stand around a text (encoders).
    """

    tokenizer: Any
    n_ctx: int
    prepend_bos: bool
    with_special_tokens: bool = False

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, both `(batch, position)`; shorter texts are padded."""
        rows = [self._ids(text, prepend_bos, truncate=truncate) for text in _listed(texts)]
        length = max(map(len, rows), default=0)
        ids = torch.full((len(rows), length), self.padding, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
        return ids, mask

    def _ids(self, text: str, prepend_bos: bool | None, *, truncate: bool) -> list[int]:
        if self.with_special_tokens:
            ids = list(self.tokenizer(text, add_special_tokens=prepend_bos is not False)["input_ids"])
        else:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            wanted = self.prepend_bos if prepend_bos is None else prepend_bos
            if wanted:
                ids = [self._bos, *ids]
        if truncate and len(ids) > self.n_ctx:
            warnings.warn(f"{len(ids)} tokens are cut to the {self.n_ctx} positions of the model", stacklevel=4)
            ids = ids[: self.n_ctx]
        return ids

    @property
    def _bos(self) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return int(getattr(self.tokenizer, name))
        raise ValueError("this tokenizer has neither BOS nor EOS to put first; use prepend_bos=False")

    @property
    def padding(self) -> int:
        """The id that stands beside shorter texts."""
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return int(getattr(self.tokenizer, name))
        return 0

    def decode(self, tokens: Any) -> str | list[str]:
        """Return the text of one sequence, or the texts of a batch, special tokens included."""
        ids = torch.as_tensor(tokens)
        if ids.ndim > 2:
            raise ValueError(f"tokens must be one sequence or a batch of them, got shape {tuple(ids.shape)}")
        if ids.ndim == 2:
            return [self._text(row.tolist()) for row in ids]
        return self._text(ids.reshape(-1).tolist())

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._text([int(token)]) for token in ids]


def is_text(value: Any) -> bool:
    """Whether a value is a text or texts, and not token ids."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str))


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


class PromptMethods(ABC):
    """What a model says about texts: tokens, their strings, and how it continues a prompt."""

    @property
    @abstractmethod
    def prompts(self) -> Prompts:
        """The tokenizer as prompts need it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs go."""

    @abstractmethod
    def forward(self, input: Any) -> Any:  # noqa: A002  # TransformerLens' name
        """Run the model."""

    def to_tokens(
        self,
        input: str | Sequence[str],  # noqa: A002  # TransformerLens' name
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> torch.Tensor:
        """Return token ids `(batch, position)` of a text or several; shorter ones are padded.

        Args:
            input: The text or texts.
            prepend_bos: Whether to begin with the BOS token; the family's custom by default.
            padding_side: `left` or `right`; the tokenizer's by default.
            move_to_device: Whether to put them where the model is.
            truncate: Whether to cut what is longer than the context, with a warning.
        """
        ids, _ = self.prompts.encode(input, prepend_bos=prepend_bos, padding_side=padding_side, truncate=truncate)
        return ids.to(self.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of one sequence of ids, or the texts of a batch."""
        return self.prompts.decode(tokens)

    def to_str_tokens(
        self,
        input: Any,  # noqa: A002  # TransformerLens' name
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> list[Any]:
        """Return the string of each token of a text, or of ids `(position,)` or `(1, position)`; of a list, of each."""
        if isinstance(input, str):
            ids, _ = self.prompts.encode(input, prepend_bos=prepend_bos, padding_side=padding_side)
            return self.prompts.pieces(ids[0].tolist())
        if isinstance(input, list):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        ids = torch.as_tensor(np.asarray(input.cpu() if isinstance(input, torch.Tensor) else input)).squeeze()
        if ids.ndim > 1:
            raise ValueError(
                f"to_str_tokens takes one sequence of ids, got shape {tuple(ids.shape)}; give a list of them"
            )
        return self.prompts.pieces(ids.reshape(-1).tolist())

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ValueError: It is more than one, or none; names them.
        """
        ids, _ = self.prompts.encode(string, prepend_bos=False)
        if ids.shape[1] != 1:
            raise ValueError(f"{string!r} is not a single token but {self.prompts.pieces(ids[0].tolist())}")
        return int(ids[0, 0])

    def to_single_str_token(self, int_token: int) -> str:
        """Return the string of one token id."""
        return self.prompts.pieces([int_token])[0]

    def get_token_position(
        self,
        single_token: str | int | torch.Tensor,
        input: Any,  # noqa: A002  # TransformerLens' name
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Return where a token stands in a text or in ids `(position,)` or `(1, position)`.

        Raises:
            ValueError: It does not occur, or `mode` is none of the two.
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode!r}")
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.as_tensor(input)
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise ValueError(f"get_token_position takes one sequence, got shape {tuple(ids.shape)}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        places = (ids.reshape(-1) == token).nonzero().reshape(-1).tolist()
        if not places:
            raise ValueError(f"token {self.to_single_str_token(token)!r} does not occur in the prompt")
        return int(places[0 if mode == "first" else -1])

    def test_prompt(
        self,
        prompt: str,
        answer: str | Sequence[str],
        prepend_space_to_answer: bool = True,
        print_details: bool = True,
        prepend_bos: bool | None = None,
        top_k: int = 10,
    ) -> list[tuple[str, int]]:
        """Show how the model ranks an answer after a prompt, token by token; of several answers, their first tokens.

        Args:
            prompt: The beginning.
            answer: What should follow, or several candidates for the next token.
            prepend_space_to_answer: Whether to put a space before an answer that has none.
            print_details: Whether to print the tables.
            prepend_bos: Whether the prompt begins with BOS.
            top_k: How many of the likeliest tokens to print.

        Returns:
            Each answer token with its rank, 0 for the likeliest.
        """
        spaced = [a if a.startswith(" ") or not prepend_space_to_answer else f" {a}" for a in _listed(answer)]
        start = self.to_tokens(prompt, prepend_bos)
        answers = [self.to_tokens(text, prepend_bos=False)[0] for text in spaced]
        if not isinstance(answer, str):
            answers = [ids[:1] for ids in answers]
        ids = torch.cat([start[0], answers[0]])
        logits = self.forward(ids[None])[0].float()
        ranks: list[tuple[str, int]] = []
        for offset in range(len(answers[0])):
            here = logits[start.shape[1] + offset - 1]
            tokens = [int(candidate[offset]) for candidate in answers]
            order = here.argsort(descending=True).tolist()
            found = [(self.to_single_str_token(token), order.index(token)) for token in tokens]
            ranks.extend(found)
            if print_details:
                self._print_ranks(here, dict(zip(tokens, found, strict=True)), order[:top_k])
        return ranks

    def _print_ranks(self, logits: torch.Tensor, answers: dict[int, tuple[str, int]], top: list[int]) -> None:
        table = Table("rank", "logit", "probability", "token")
        probabilities = logits.softmax(-1)
        rows = {token: rank for rank, token in enumerate(top)} | {token: rank for token, (_, rank) in answers.items()}
        for token, rank in sorted(rows.items(), key=lambda item: item[1]):
            style = "bold" if token in answers else ""
            cells = (str(rank), f"{logits[token]:.2f}", f"{probabilities[token]:.2%}")
            table.add_row(*cells, repr(self.to_single_str_token(token)), style=style)
        Console().print(table)
