"""What a run folder says of itself: the run record, the token table and the store's manifest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from actpipe.schemas.base import Contract, Name, Without
from pydantic import Field, NonNegativeInt, PositiveInt

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelIdentity(Contract):
    """Which model it was."""

    name: str
    """Hub name, or the last piece of the folder's path."""
    revision: str | None
    """Commit on the hub, where it came from there."""
    family: str
    """The entry under which its parts were found."""
    fingerprint: Sha256
    """SHA-256 over the configuration and over size and sampled bytes of every weight file."""
    dtype: str
    """Element type of the computation."""


class BlockRecord(Contract):
    """Sizes and structure of one block."""

    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    d_head: PositiveInt
    """Length of a value vector."""
    d_qk: PositiveInt
    """Length of a query or key vector."""
    d_mlp: NonNegativeInt
    """Neurons; 0 where the block has experts in their place."""
    mlp: Literal["plain", "gated", "experts", "opaque"]
    n_experts: NonNegativeInt
    n_experts_per_token: NonNegativeInt
    projections: bool
    """Whether queries and keys exist before rotary."""
    rotary: bool
    parallel: bool
    ln1: bool
    ln2: bool
    ln1_post: bool
    ln2_post: bool
    qk_norm: Literal["none", "head", "all"]
    attention: bool
    """Whether queries, keys and a pattern are seen."""
    z: bool
    """Whether one projection mixes the heads into what attention puts out."""
    gated_z: bool
    """Whether something stands between the mixed values and that projection."""
    branches: tuple[str, ...]
    """Hook points whose values the block adds to the residual stream."""
    others: tuple[tuple[str, NonNegativeInt], ...]
    """More named outputs, with their lengths."""
    stack: Literal["blocks", "encoder", "decoder"] = "blocks"
    """How its names begin."""
    post_norm: bool = False
    """Whether norms stand after each sum."""
    causal: bool = True
    """Whether a token attends to none after it."""
    cross: bool = False
    """Whether it has attention to the encoder's output."""
    relative_bias: bool = False
    """Whether it holds a learned bias of scores by distance."""


class ShapeRecord(Contract):
    """Sizes and structure of the model: enough to know its hook points without it."""

    d_model: PositiveInt
    d_vocab: PositiveInt
    n_ctx: PositiveInt
    norm: Literal["LN", "RMS"]
    learned_positions: bool
    blocks: Annotated[tuple[BlockRecord, ...], Field(min_length=1)]
    embed_norm: bool
    logit_softcap: float | None
    withheld: tuple[str, ...]
    """Kinds of hook points that no identity proves for this architecture, and that are not offered."""
    final_norm: bool = True
    token_types: NonNegativeInt = 0
    """Kinds of segment that the embedding tells apart."""
    masked_head: bool = False
    """Whether a layer and a norm stand before the unembedding."""
    next_sentence: bool = False


class TokenTableManifest(Contract):
    """What the token table holds: written once it is whole, so its presence means that it is."""

    schema_version: Literal[1] = 1
    layout: Literal["packed", "documents", "tl2", "tl3"]
    context_length: PositiveInt
    n_documents: NonNegativeInt
    n_sequences: NonNegativeInt
    n_rows: NonNegativeInt
    n_truncated: NonNegativeInt
    """Tokens that the source had and that were cut off."""
    status_counts: dict[str, int]
    """Documents by what became of them."""
    first_problems: dict[str, tuple[str, ...]]
    """The first few ids of documents left out, by the reason."""
    bos_id: int | None
    """Id that stands at position 0 of every sequence, or none."""
    separator_id: int | None
    """Id that stands after every document in the packed layout, or at the end of every sequence of an encoder."""
    pad_id: int | None
    """Id with which TransformerLens pads a short row; known for compat layouts only, never stored."""
    prefix_ids: tuple[NonNegativeInt, ...] = ()
    """What every sequence begins with as context, run once for all of them."""
    generated: bool = False
    """Whether sequences hold tokens that the model itself added: those from `n_prompt` on in sequences.parquet."""
    dataset: str
    """The dataset, for people."""
    dataset_fingerprint: str | None
    """Fingerprint that `datasets` gives, where it gives one."""
    tokenizer_sha256: Sha256 | None
    """SHA-256 of `tokenizer/tokenizer.json`."""
    checksums: dict[str, str]
    """CRC-32C of each file of the table, eight hexadecimal digits."""


class Quantisation(Contract):
    """How an array is kept in one byte per value: value = code * row scale of its block * channel scale of its part."""

    code: Literal["int8", "float8_e4m3"]
    """What a byte is; `float8_e4m3` is stored as its bits, in `uint8`."""
    block: PositiveInt
    """Consecutive values of a row (flattened) that share a row scale."""
    row_scales: str
    """Path of the array (row, block), float32."""
    channel_scales: str
    """Path of the array (part, ...), float32: one row of scales for each part."""


class Derivation(Contract):
    """What an array was made of, and how."""

    hook: str
    settings: dict[str, object]
    """The recipe's entry of `derive`."""
    sha256: Sha256 | None = None
    """SHA-256 of the file of weights, if there was one."""


class ArrayManifest(Without):
    """One array of a store."""

    without: ClassVar = {"quantisation": None, "derived": None}

    path: str
    """Path in the Zarr group: `activations/blocks.3.hook_resid_post`."""
    dtype: str
    """Element type that is read; on disk too, unless the array is quantised."""
    row_shape: tuple[PositiveInt, ...]
    """Shape of one row; empty for one number per token."""
    axes: tuple[str, ...]
    """Names of the axes, `row` first; Zarr's `dimension_names`."""
    quantisation: Quantisation | None = None
    """How it is kept in one byte per value, if it is."""
    derived: Derivation | None = None
    """What it was made of, where it is not an activation itself."""


class KeptRowsManifest(Contract):
    """Which tokens a store has rows of, where these are not all: the record of rows.parquet, written after it."""

    schema_version: Literal[1] = 1
    keep: dict[str, object]
    """The recipe's `keep`, with every default filled in."""
    tokens: dict[str, str]
    """Checksums of the token table that they are of."""
    n_rows: NonNegativeInt
    rows_crc32c: str
    """CRC-32C of the row numbers in the token table, as little-endian 64-bit integers."""
    file_crc32c: str
    """CRC-32C of rows.parquet."""


class StoreManifest(Without):
    """The store as a whole; kept in the attributes of its Zarr group."""

    without: ClassVar = {"kept_rows": None}

    format: Literal["actpipe-store"] = "actpipe-store"
    schema_version: Literal[1, 2, 3] = 1
    """2 where a codec or quantisation is used, 3 where not every token has a row or arrays are derived from
    activations, which earlier readers do not know."""
    corpus: Name
    n_rows: NonNegativeInt
    rows_per_part: PositiveInt
    """Rows of a part, which are those of every array's chunk."""
    context_length: PositiveInt
    convention: Literal["native", "processed"] = "native"
    """Values are the native model's own, or those after TransformerLens 2.16's default weight processing."""
    codec: Literal["none", "zstd", "blosc"] = "none"
    """What a chunk file holds: the row-major array, little-endian, as it is or compressed as its `zarr.json` says."""
    kept_rows: str | None = None
    """CRC-32C of the numbers of the tokens that have rows (`rows.parquet` lists them); none where all have."""
    model: ModelIdentity
    shape: ShapeRecord
    arrays: tuple[ArrayManifest, ...]


class RunRecord(Contract):
    """`run.yaml`: the resolved recipe and what it was run with."""

    schema_version: Literal[1] = 1
    actpipe_version: str
    libraries: dict[str, str]
    """Version of each library that can change a value."""
    recipe: dict[str, object]
    """The recipe with every default filled in."""
    model: ModelIdentity
    datasets: dict[str, str | None]
    """By corpus, the fingerprint that `datasets` gives; none where it gives none, absent until tokenized."""
