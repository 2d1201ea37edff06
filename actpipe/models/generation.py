"""Continue prompts, with the keys and values of what stands already.

Source: TransformerLens 2.16, `HookedTransformer.generate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils.logging import tqdm

from actpipe.compute.sampling import Sampling, choose_tokens, draws
from actpipe.errors import UnsupportedModelError
from actpipe.models.caching import KeyValueCache
from actpipe.models.passes import Input, InputIds, PassMethods
from actpipe.models.prompts import PaddingSide, is_text
from actpipe.models.taps import UNEMBED_INPUT

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Continuation:
    """How prompts are continued."""

    max_new_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    """Tokens after which a sequence is finished; they belong to it."""
    seed: int = 0
    use_past_kv_cache: bool = True


class GenerationMethods(PassMethods, ABC):
    """How a model continues prompts."""

    @property
    @abstractmethod
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a text."""

    @abstractmethod
    def new_kv_cache(self) -> KeyValueCache:
        """Return an empty cache of keys and values."""

    @abstractmethod
    def unembed(self, normalized: torch.Tensor) -> torch.Tensor:
        """Return the logits of what the unembedding multiplies."""

    @torch.no_grad()
    def generate(
        self,
        input: Input = "",  # noqa: A002  # TransformerLens' name
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,  # noqa: ARG002  # TransformerLens' argument
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
        *,
        attention_mask: InputIds | None = None,
        seed: int | None = None,
    ) -> Any:
        """Continue a prompt, or several.

        Args:
            input: A text, texts, or token ids `(batch, position)`, padded on either side.
            max_new_tokens: Most tokens to add.
            stop_at_eos: Whether a sequence ends with EOS; shorter ones are filled up with it.
            eos_token_id: What ends a sequence, one id or several; the model's own EOS by default.
            do_sample: Whether to draw; otherwise the most probable token is taken.
            top_k: Draw among so many tokens only.
            top_p: Draw among the fewest tokens whose probabilities sum to more than this.
            temperature: What logits are divided by; 0 takes the most probable token.
            freq_penalty: What a token loses for each time that it stands before.
            use_past_kv_cache: Whether to keep keys and values instead of running everything again for each token.
            prepend_bos: Whether texts begin with BOS; the family's custom by default.
            padding_side: Without effect: prompts of different lengths stand at the right, padded on the left.
            return_type: `str`, `tokens`, or as the input is.
            verbose: Whether to show a progress bar.
            attention_mask: `(batch, position)`, 1 at real tokens of ids; worked out for texts.
            seed: What the draws follow from; by default one from torch's generator.

        Returns:
            Prompt and continuation: a text, texts, or `(batch, position + new)` ids padded on the left.

        Raises:
            UnsupportedModelError: The model does not predict what follows.
            ValueError: The arguments do not fit the model, or each other.
        """
        prompts = self._prompts(input, attention_mask, prepend_bos)
        stop_ids = self._stop_ids(eos_token_id) if stop_at_eos else ()
        how = Continuation(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature if do_sample else 0.0, top_k, top_p, freq_penalty),
            stop_ids=stop_ids,
            seed=int(torch.randint(2**63 - 1, ())) if seed is None else seed,
            use_past_kv_cache=use_past_kv_cache,
        )
        with tqdm(total=max_new_tokens, disable=not verbose) as bar:
            new = self.continue_prompts(prompts, how, on_step=bar.update)
        if return_type == "str" or (return_type == "input" and is_text(input)):
            whole = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
            texts = [self.prompts.tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]
            return texts[0] if isinstance(input, str) or len(texts) == 1 else texts
        filler = np.full(max(map(len, new)), stop_ids[0] if stop_ids else 0)
        whole = [np.concatenate([*pair, filler[len(pair[1]) :]]) for pair in zip(prompts, new, strict=True)]
        padding = self.prompts.padding if len({*map(len, prompts)}) > 1 else 0
        return left_padded(whole, padding)[0].to(self.device)

    @torch.no_grad()
    def continue_prompts(
        self,
        prompts: Sequence[Ids],
        how: Continuation,
        *,
        numbers: Iterable[int] | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[Ids]:
        """Return the new ids of each prompt, with the one that ended it.

        Args:
            prompts: Ids of each, none empty.
            how: How to continue them.
            numbers: What stands for each prompt in the random draws; by default 0, 1 and so on. The same prompt
                with the same number is continued in the same way in any batch, beyond float error.
            on_step: Called after each token.

        Raises:
            UnsupportedModelError: The model does not predict what follows.
            ValueError: A prompt is empty, or too long.
        """
        self._check_prompts(prompts, how.max_new_tokens)
        text = _Growing(prompts, how, range(len(prompts)) if numbers is None else tuple(numbers))
        if how.sampling.freq_penalty:
            text.count(self.shape.d_vocab)
        cache = self.new_kv_cache() if how.use_past_kv_cache else None
        last: list[torch.Tensor] = []
        with self.capture([UNEMBED_INPUT], lambda _, rows: last.append(rows[:, -1].clone()), stop=True) as capture:
            while len(last) < how.max_new_tokens and not text.is_finished:
                inputs: dict[str, Any] = self.inputs_for(*text.after(0 if cache is None else cache.n_tokens))
                capture.run(**(inputs if cache is None else cache.extend(inputs)))
                text.grow(self.unembed(last[-1]), step=len(last) - 1)
                on_step()
        return text.continuations()

    def _prompts(self, given: Input, attention_mask: InputIds | None, prepend_bos: bool | None) -> list[Ids]:
        """Return the real tokens of each prompt."""
        inputs = self.inputs_for(given, attention_mask, prepend_bos)
        ids = inputs["input_ids"].cpu().numpy()
        if "attention_mask" not in inputs:
            return list(ids)
        mask = inputs["attention_mask"].cpu().numpy().astype(bool)
        return [row[real] for row, real in zip(ids, mask, strict=True)]

    def _stop_ids(self, given: int | Sequence[int] | None) -> tuple[int, ...]:
        if given is not None:
            return (given,) if isinstance(given, int) else tuple(given)
        if not self.eos_ids:
            raise ValueError("this model and its tokenizer have no EOS: give `eos_token_id`, or stop_at_eos=False")
        return self.eos_ids

    def _check_prompts(self, prompts: Sequence[Ids], max_new_tokens: int) -> None:
        if not self.shape.causal or self.shape.encoder_decoder:
            raise UnsupportedModelError(
                f"a {self.anatomy.family.name} model does not continue a prompt: its tokens see what follows them"
            )
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("a prompt is empty; with prepend_bos=True it begins with BOS")
        longest = max(map(len, prompts))
        if self.shape.learned_positions and longest + max_new_tokens > self.shape.n_ctx:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the {self.shape.n_ctx} "
                "positions that this model has learned"
            )


class _Growing:
    """Prompts with what was added to them, padded on the left so that all grow at the right."""

    def __init__(self, prompts: Sequence[Ids], how: Continuation, numbers: Sequence[int]) -> None:
        self._how = how
        self._numbers = numbers
        self._ids, self._mask = left_padded(prompts, 0)
        self._padded = not bool(self._mask.all())
        self._n_prompt = self._ids.shape[1]
        self._lengths = torch.zeros(len(prompts), dtype=torch.long)
        self._running = torch.ones(len(prompts), dtype=torch.bool)
        self._stops = torch.tensor(how.stop_ids, dtype=torch.long)
        self._counts: torch.Tensor | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sequence came to its end."""
        return not bool(self._running.any())

    def count(self, d_vocab: int) -> None:
        """Count how often each token stands in each sequence."""
        self._counts = torch.zeros(len(self._ids), d_vocab)
        self._counts.scatter_add_(1, self._ids, self._mask.to(self._counts))

    def after(self, n_held: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ids and mask from a column on; no mask where there is no padding."""
        return self._ids[:, n_held:], self._mask[:, n_held:] if self._padded else None

    def grow(self, logits: torch.Tensor, step: int) -> None:
        """Choose a token for each sequence, and add it."""
        uniform = draws(self._how.seed, self._numbers, step)
        counts = None if self._counts is None else self._counts.to(logits.device)
        chosen = choose_tokens(logits, uniform, self._how.sampling, counts).cpu().unsqueeze(-1)
        self._ids = torch.cat([self._ids, chosen], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(chosen)], dim=1)
        if self._counts is not None:
            self._counts.scatter_add_(1, chosen, torch.ones_like(chosen).to(self._counts))
        self._lengths += self._running
        self._running &= ~torch.isin(chosen.squeeze(-1), self._stops)

    def continuations(self) -> list[Ids]:
        """Return what was added to each, up to its end."""
        new = self._ids[:, self._n_prompt :].numpy()
        return [row[:length] for row, length in zip(new, self._lengths.tolist(), strict=True)]


def left_padded(rows: Sequence[Ids], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `(batch, position)` with the rows at the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[index, width - len(row) :] = 1
    return ids, mask
