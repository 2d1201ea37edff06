"""The settings of analyses that take the residual stream, and logits, apart into what writes to them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from actpipe.schemas.base import AnalysisConfig, Contract, NonEmpty
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator


class TopTokens(Contract):
    """The tokens that the model holds most probable."""

    top: PositiveInt
    """How many; the rank of each, from 0, is an axis of the result."""


class FromColumn(Contract):
    """What a column of documents.parquet says of each document."""

    column: NonEmpty
    """The column."""


TokenId = Annotated[int, Field(ge=0)]


class DecomposeResidualConfig(AnalysisConfig):
    """Settings of the stage `decompose_residual`: how much each component writes to the residual stream."""

    stage: Literal["decompose_residual"] = "decompose_residual"
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decompose the residual stream entering this layer; by default that leaving the last one."""
    mode: Literal["all", "attn", "mlp"] = "all"
    """Measure all components, or only what attention or MLPs write, beside the embeddings."""
    incl_embeds: bool = True
    """Measure the embeddings too."""
    mlp_input: bool = False
    """Decompose the stream that the MLP of `layer` reads, with what attention of that layer writes; with
    `accumulated`, measure that stream too."""
    accumulated: bool = False
    """Measure the stream entering each layer up to `layer`, in place of what is written to it."""
    incl_mid: bool = False
    """With `accumulated`: the stream between attention and MLP of each layer below, too."""
    heads: bool = False
    """Head by head, and the biases, in place of what attention writes; needs `attn.hook_z`."""
    neurons: NonNegativeInt = 0
    """Measure so many neurons, those with the largest mean modulus of their share, all others of a layer together, and
    the biases, in place of what MLPs write; needs `mlp.hook_post`. 0 measures MLPs whole."""

    @model_validator(mode="after")
    def _keys_belong_together(self) -> Self:
        if self.accumulated and (self.mode != "all" or self.heads or self.neurons or not self.incl_embeds):
            raise ValueError("`accumulated` measures streams; leave out `mode`, `incl_embeds`, `heads` and `neurons`")
        if self.incl_mid and not self.accumulated:
            raise ValueError("`incl_mid` belongs to `accumulated: true`")
        if self.heads and self.mode == "mlp":
            raise ValueError("`heads` are what attention writes; leave out `mode: mlp`, or `heads`")
        if self.neurons and self.mode == "attn":
            raise ValueError("`neurons` are what MLPs write; leave out `mode: attn`, or `neurons`")
        if self.mlp_input and self.layer is None:
            raise ValueError("`mlp_input` is what the MLP of `layer` reads; name a `layer`")
        return self


class AttributeLogitsConfig(AnalysisConfig):
    """Settings of the stage `attribute_logits`: direct attribution of the correct next token's logit."""

    stage: Literal["attribute_logits"] = "attribute_logits"
    target: TokenId | NonEmpty | TopTokens | FromColumn = "next"
    """Whose logit: `next`, the token that comes next; `top`, the one that the model holds most probable; `{top: 5}`,
    the five most probable, rank by rank; one token for all rows, by id or by its text (`" the"`), which must be one
    token; or `{column: answer}`, the token, by id or text, in a column of documents.parquet."""
    minus: TokenId | NonEmpty | FromColumn | None = None
    """Attribute the difference to this token's logit, by id, text or `{column: NAME}`, in place of the logit."""
    rows: Literal["all", "last"] = "all"
    """Which rows: all, or the last of each document, such as where a prompt ends."""
    by: NonEmpty | FromColumn | None = None
    """Means by group too: `token`, the row's own token; `target`, the token whose logit it is; `document`; or a column
    of documents.parquet (`{column: NAME}` where that has the name of one of these)."""
    tokens: PositiveInt = 50
    """With `by: token` and `by: target`: so many token ids, those with the most rows; all others are one more group."""
    heads: bool = True
    """Attribute to every head too; needs `attn.hook_z` of every layer."""
    neurons: NonNegativeInt = 0
    """Attribute to every neuron too, and list so many, those with the largest mean modulus; all others of a layer are
    one column. Needs `mlp.hook_post` of every layer; 0 leaves neurons out."""
    keep_rows: bool = False
    """Keep the attribution of every row, not only the means by component and position."""

    @model_validator(mode="after")
    def _target_says_which_token(self) -> Self:
        if self.rows == "last" and self.target == "next":
            raise ValueError(
                "`rows: last` are rows that nothing of their document follows; name another `target`, such as a column"
            )
        return self
