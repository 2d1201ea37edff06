"""What model inputs begin and end with, and how long they are: from the recipe, or from the table that is there."""

from __future__ import annotations

from dataclasses import dataclass

from actpipe.errors import ModelLoadError, RecipeError
from actpipe.schemas.manifest import TokenTableManifest
from actpipe.schemas.recipe import GenerateTextConfig, TokenizeTextConfig
from actpipe.stage import RunContext
from actpipe.stores.token_table import TokenTable
from actpipe.text.packing import Packing
from actpipe.text.tokenizing import frame_of


@dataclass(frozen=True)
class ModelInputs:
    """The sequences of a corpus, before or after they are made."""

    layout: str
    """`packed`, `documents`, `tl2` or `tl3`."""
    context_length: int
    """Length of the longest."""
    n_prefix: int = 0
    """Tokens that each begins with and that have no rows in it."""
    generated: bool = False
    """Whether some of their tokens come from the model itself."""

    @property
    def n_rows(self) -> int:
        """Rows of a sequence that is as long as may be."""
        return self.context_length - self.n_prefix

    @classmethod
    def of_table(cls, table: TokenTableManifest) -> ModelInputs:
        """Say what a finished table holds."""
        return cls(table.layout, table.context_length, len(table.prefix_ids), table.generated)


def inputs_of(context: RunContext, corpus: str) -> ModelInputs:
    """Say what a corpus holds, or will hold by this recipe."""
    tokenizing = context.settings_of(TokenizeTextConfig, corpus)
    if tokenizing is not None:
        layout = tokenizing.layout if tokenizing.compat == "none" else tokenizing.compat
        return ModelInputs(layout, tokenizing.context_length, len(prefix_ids(tokenizing, context)))
    generating = context.settings_of(GenerateTextConfig, corpus)
    if generating is not None:
        prompts = inputs_of(context, generating.prompts)
        length = prompts.context_length + generating.max_new_tokens
        return ModelInputs("documents", length, prompts.n_prefix, generated=True)
    return ModelInputs.of_table(TokenTable(context.folder.corpus(corpus)).manifest)


def check_length(context: RunContext, length: int, *, what: str) -> None:
    """Refuse sequences that are longer than what the model has learned positions for.

    Raises:
        RecipeError: Says both lengths.
    """
    shape = context.spec.shape
    if shape.learned_positions and length > shape.n_ctx:
        raise RecipeError(
            f"{what} ({length}) is above the {shape.n_ctx} positions that {context.spec.source.title} has learned"
        )


def packing_of(config: TokenizeTextConfig, context: RunContext) -> Packing:
    """Return how documents become sequences.

    Raises:
        RecipeError: The prefix leaves no room, or the special tokens do not fit the layout.
    """
    bos_id, separator_id = special_ids(config, context)
    prefix = prefix_ids(config, context)
    packed = config.layout == "packed"
    try:
        packing = Packing(
            context_length=config.context_length,
            bos_id=None if prefix else bos_id,
            separator_id=separator_id if packed else None,
            closing_id=None if packed else separator_id,
            max_rows=config.max_tokens,
            prefix=prefix,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return packing if config.overflow == "truncate" else packing.with_windows(config.stride)


def prefix_ids(config: TokenizeTextConfig, context: RunContext) -> tuple[int, ...]:
    """Return the ids that every sequence begins with, empty where there is no prefix.

    Raises:
        RecipeError: The model cannot have one, or has no such tokens.
    """
    prefix = config.prefix
    if prefix is None:
        return ()
    shape = context.spec.shape
    if not shape.causal or shape.encoder_decoder:
        raise RecipeError(
            f"prefix: the tokens of a {context.spec.anatomy.family.name} model see what follows them, so that nothing "
            "can be run once for all sequences; put the text before each document"
        )
    if prefix.text is None:
        ids = list(prefix.ids or ())
    else:
        bos_id, _ = special_ids(config, context)
        ids = [] if bos_id is None else [bos_id]
        ids += context.spec.tokenizer(prefix.text, add_special_tokens=False)["input_ids"]
    if max(ids) >= shape.d_vocab:
        raise RecipeError(f"prefix: token id {max(ids)} is outside the vocabulary of {shape.d_vocab}")
    return tuple(int(token) for token in ids)


def special_ids(config: TokenizeTextConfig, context: RunContext) -> tuple[int | None, int | None]:
    """Return the ids of BOS (for every sequence) and of the separator (after every document), or None.

    Where there is no BOS token, EOS stands in for it, as in TransformerLens. An encoder's sequences stand
    between what its tokenizer puts around a text.
    """
    if not context.spec.shape.causal:
        return _frame(config, context)
    try:
        tokenizer = context.spec.tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    except ModelLoadError:
        if config.dataset is None or config.dataset.column_type != "token_ids":
            raise
        bos, eos = context.spec.config.bos_token_id, context.spec.config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    wanted = config.prepend_bos
    if wanted == "model":
        wanted = context.spec.anatomy.family.default_prepend_bos and (bos is not None or eos is not None)
    if wanted and bos is None and eos is None:
        raise RecipeError("prepend_bos: true, but this tokenizer has neither BOS nor EOS")
    if config.layout == "packed" and eos is None:
        raise RecipeError("the packed layout joins documents by EOS, which this tokenizer lacks; use layout: documents")
    bos_id = (eos if bos is None else bos) if wanted else None
    return bos_id, eos if config.layout == "packed" else None


def _frame(config: TokenizeTextConfig, context: RunContext) -> tuple[int | None, int | None]:
    """Return what stands before and after every sequence of an encoder."""
    family = context.spec.anatomy.family.name
    if config.layout == "packed":
        raise RecipeError(
            f"the packed layout joins documents, and in a {family} model every token sees both its sides; "
            "use layout: documents"
        )
    try:
        before, after = frame_of(context.spec.tokenizer)
    except ModelLoadError:
        if config.dataset is None or config.dataset.column_type != "token_ids":
            raise
        before = after = None
    if config.prepend_bos is True and before is None and after is None:
        raise RecipeError("prepend_bos: true, but this tokenizer puts nothing around a text")
    if config.prepend_bos is False:
        return None, None
    if config.overflow == "windows" and after is not None:
        raise RecipeError(
            f"overflow: windows would put the closing token of a {family} model into the middle of documents; use "
            "overflow: truncate, or prepend_bos: false for windows without special tokens"
        )
    return before, after


def special_token_ids(context: RunContext, table: TokenTableManifest) -> dict[str, frozenset[int]]:
    """Return the ids that `bos`, `eos`, `pad` and `special` mean: the tokenizer's, and what tokenizing added."""
    try:
        tokenizer = context.spec.tokenizer
        named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        every = set(tokenizer.all_special_ids)
    except ModelLoadError:  # a corpus of ids needs no tokenizer
        named, every = {}, set()
    added = {"bos": table.bos_id, "eos": table.separator_id, "pad": table.pad_id}
    ids = {name: frozenset(token for token in (named.get(name), added[name]) if token is not None) for name in added}
    return {**ids, "special": frozenset(every.union(*ids.values()))}
