"""The recipe: a model and the stages of a run, with one settings model for each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

from actpipe.schemas.analyses import ANALYSES
from actpipe.schemas.base import Contract, Dtype, Name, NonEmpty, StageConfig
from actpipe.schemas.choosing import DeriveConfig, KeepConfig
from actpipe.schemas.engine import EngineConfig
from actpipe.schemas.eval_analyses import EvaluateModelConfig
from actpipe.schemas.reducing import ReduceActivationsConfig
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

Bytes = Annotated[str, Field(pattern=r"^\d+(\.\d+)?([KMGT]i?)?B$")]
"""An amount of memory with its unit: `40GiB`, `80GB`."""


class ModelConfig(Contract):
    """Which model is run, and where."""

    name: NonEmpty
    """A Hugging Face hub name (`gpt2`) or a folder, relative to the recipe's own folder."""
    revision: NonEmpty | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto"] | Dtype = "auto"
    """Element type of the weights and of the computation; `auto` keeps the checkpoint's own."""
    device: NonEmpty = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes an accelerator where there is one. Not part of what is stored."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = None
    """Spread one model over several devices with accelerate, and over the host's memory (`cpu`) and the `disk`; then
    `device` must stay `auto`. Not part of what is stored."""
    max_memory: dict[NonEmpty, PositiveInt | Bytes] | None = None
    """Most that `device_map` may put on each device: bytes, or `40GiB`, by the device's number, or `cpu`."""
    offload_folder: NonEmpty | None = None
    """Folder for weights that `device_map` puts on the disk, relative to the recipe's own; without it they are read
    from the checkpoint's own files."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""
    convention: Literal["native", "processed"] = "native"
    """`native` stores the model's own activations, `processed` those that `HookedTransformer.from_pretrained` gives
    by default: of a model with folded norms, centred weights and folded value biases."""

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"device_map ({self.device_map}) and device ({self.device}) exclude each other")
        if self.device_map is None and (self.max_memory or self.offload_folder):
            raise ValueError("`max_memory` and `offload_folder` are for a model that is spread: set `device_map: auto`")
        return self

    @field_validator("max_memory", mode="before")
    @classmethod
    def _names_as_text(cls, value: object) -> object:
        return {str(key): most for key, most in value.items()} if isinstance(value, dict) else value


class DatasetConfig(Contract):
    """A Hugging Face dataset, or local files."""

    path: NonEmpty
    """A hub name, a folder, a file or a pattern (`data/*.jsonl`), relative to the recipe's own folder."""
    config: NonEmpty | None = None
    """Name of the configuration (subset) on the hub."""
    split: NonEmpty = "train"
    """Split, in the syntax of `datasets`: `train`, `train[:10%]`."""
    revision: NonEmpty | None = None
    """Branch, tag or commit on the hub."""
    streaming: bool = False
    """Read without downloading or converting the whole dataset first."""
    format: Literal["auto", "parquet", "json", "csv", "text", "arrow"] = "auto"
    """File format; `auto` goes by the file's ending."""
    column: NonEmpty = "text"
    """The column with the text, the chat messages or the token ids."""
    column_type: Literal["auto", "text", "messages", "token_ids"] = "auto"
    """What that column holds; `auto` looks at the dataset's features or its first value."""
    id_column: NonEmpty | None = None
    """Column that names each document; without it `id` is used where it exists, else the row number."""
    text_by: Literal["line", "paragraph", "document"] = "line"
    """What one document is in a plain text file: a line, a paragraph, the whole file."""
    chat_template: NonEmpty | None = None
    """Jinja template for the messages in place of the tokenizer's own."""


class RepeatedTokensConfig(Contract):
    """Built-in source: random tokens repeated, on which induction heads show."""

    kind: Literal["repeated_tokens"] = "repeated_tokens"
    n_documents: PositiveInt = 64
    """Number of sequences."""
    period: PositiveInt = 64
    """Length of the random piece, in tokens."""
    repeats: Annotated[int, Field(ge=2)] = 2
    """How often the piece stands in the sequence."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the generator; the same seed gives the same tokens everywhere."""


class PrefixConfig(Contract):
    """What stands before every model input: a system prompt, a header of examples. It is run once for all of them."""

    text: NonEmpty | None = None
    """The prefix as text; either this or `ids`. BOS comes before it as `prepend_bos` says."""
    ids: tuple[NonNegativeInt, ...] | None = None
    """The prefix as token ids, BOS included if it should have one."""
    store: Literal["none", "once"] = "none"
    """Whether its own rows are stored, once: then they come last, as the document `(prefix)`."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.text is None) == (not self.ids):
            raise ValueError("give exactly one of `text` and `ids`")
        return self


class TokenizeTextConfig(StageConfig):
    """Settings of the stage `tokenize_text`: dataset -> token table."""

    stage: Literal["tokenize_text"] = "tokenize_text"
    dataset: DatasetConfig | None = None
    """The documents; either this or `synthetic`."""
    synthetic: RepeatedTokensConfig | None = None
    """Documents made on the spot; either this or `dataset`."""
    context_length: PositiveInt
    """Longest model input, in tokens, BOS included."""
    layout: Literal["packed", "documents"] = "packed"
    """`packed`: documents joined by EOS and cut at exactly `context_length`; `documents`: each document its own."""
    compat: Literal["none", "tl2", "tl3"] = "none"
    """Reproduce TransformerLens' `tokenize_and_concatenate` of version 2 or 3 to the id, with what it loses."""
    compat_num_proc: PositiveInt = 1
    """`num_proc` of the call to reproduce (its default is 10): it moves the borders of the batches."""
    overflow: Literal["truncate", "windows"] = "truncate"
    """What happens to a document longer than the context in the layout `documents`."""
    stride: PositiveInt | None = None
    """Windows start this many tokens apart; the overlap is context only and each token is stored once."""
    prepend_bos: bool | Literal["model"] = "model"
    """Start every model input with BOS; `model` does what TransformerLens does for this family."""
    prefix: PrefixConfig | None = None
    """Stands before every model input, at the cost of one run; counts in `context_length`."""
    min_document_tokens: Annotated[int, Field(ge=0)] = 0
    """Leave out documents with fewer tokens."""
    max_document_tokens: PositiveInt | None = None
    """Leave out documents with more tokens."""
    max_documents: PositiveInt | None = None
    """Stop after this many documents of the dataset."""
    max_tokens: PositiveInt | None = None
    """Stop after this many rows; the document at the border is cut, and that is recorded."""
    keep_columns: Literal["all", "none"] | tuple[NonEmpty, ...] = "all"
    """Columns of the dataset to copy into documents.parquet; `all` means all with simple values."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.synthetic is None):
            raise ValueError("give exactly one of `dataset` and `synthetic`")
        return self

    @model_validator(mode="after")
    def _layout_fits(self) -> Self:
        windows = self.layout == "documents" and self.overflow == "windows"
        if self.layout == "packed" and self.overflow == "windows":
            raise ValueError("`overflow: windows` needs `layout: documents`")
        if self.stride is not None and not windows:
            raise ValueError("`stride` needs `layout: documents` and `overflow: windows`")
        if self.stride is not None and self.stride > self.context_length:
            raise ValueError(
                f"stride ({self.stride}) is longer than context_length ({self.context_length}): tokens would be lost"
            )
        if self.compat != "none" and (self.layout != "packed" or self.synthetic is not None):
            raise ValueError("`compat` needs `layout: packed` and a `dataset`")
        if self.prefix is not None and self.compat != "none":
            raise ValueError("`prefix` and `compat` exclude each other")
        if self.compat_num_proc != 1 and self.compat == "none":
            raise ValueError("`compat_num_proc` needs `compat: tl2` or `tl3`")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_document_tokens is not None and self.min_document_tokens > self.max_document_tokens:
            raise ValueError(
                f"min_document_tokens ({self.min_document_tokens}) is above "
                f"max_document_tokens ({self.max_document_tokens})"
            )
        if self.compat != "none" and (self.min_document_tokens or self.max_document_tokens or self.max_tokens):
            raise ValueError("`compat` goes with `max_documents` only, not with limits counted in tokens")
        return self


class GenerateTextConfig(StageConfig):
    """Settings of the stage `generate_text`: token table of prompts -> token table of prompts and continuations."""

    stage: Literal["generate_text"] = "generate_text"
    corpus: Name = "generated"
    """The corpus to make: each model input of `prompts` with its continuation, as a document."""
    prompts: Name = "main"
    """The corpus whose model inputs are continued."""
    max_new_tokens: PositiveInt
    """Most tokens to add to each."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """What logits are divided by before a token is drawn; 0 takes the most probable one."""
    top_k: PositiveInt | None = None
    """Draw among so many tokens only."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the fewest tokens whose probabilities sum to more than this."""
    freq_penalty: float = 0.0
    """What a token loses, in scaled logits, for each time that it stands before."""
    stop_at_eos: bool = True
    """End a continuation with EOS."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws; they depend on it, on the number of the prompt and on the step, and on nothing else."""
    batch_tokens: PositiveInt = 8192
    """Most tokens in one batch, prompts, continuations and padding together."""
    prompt_tokens_per_part: PositiveInt = 65_536
    """Tokens of prompts that are continued before what was generated is put on the disk."""

    @property
    def reads(self) -> str:
        """The corpus of the prompts."""
        return self.prompts

    @model_validator(mode="after")
    def _two_corpora(self) -> Self:
        if self.corpus == self.prompts:
            raise ValueError(
                f"`corpus` and `prompts` are both {self.corpus!r}; continuations need a corpus of their own"
            )
        return self


class ExtractActivationsConfig(StageConfig):
    """Settings of the stage `extract_activations`: token table -> activation store."""

    stage: Literal["extract_activations"] = "extract_activations"
    hooks: tuple[NonEmpty, ...] = ()
    """TransformerLens names; `*` and lists such as `[0-5]` or `[0,-1]` stand for layer numbers."""
    keep: KeepConfig | None = None
    """Which tokens to store; by default all."""
    derive: tuple[DeriveConfig, ...] = ()
    """Store less of activations, or something computed from them, in their place or beside them."""
    metrics: tuple[Literal["loss", "entropy", "correct", "correct_logit"], ...] = ()
    """Of the next token: loss and entropy in nats, whether the top prediction was right, its logit."""
    dtype: Literal["model"] | Dtype | Literal["int8", "float8_e4m3"] = "model"
    """Element type on disk; `model` keeps the model's own. `int8` and `float8_e4m3` keep activations in one byte per
    value with scales beside them, and are read as float32."""
    codec: Literal["none", "zstd", "blosc"] = "none"
    """How chunk files are compressed; `none` is the fastest to write and the only one with fast access to rows."""
    on_overflow: Literal["error", "clip"] = "error"
    """What to do with finite values too large for `dtype`: stop and name them, or clip to the largest."""
    rows_per_part: PositiveInt | Literal["auto"] = "auto"
    """Rows per part: one chunk of every array, the least that one commit adds. `auto`: at most 65,536, even."""
    batch_tokens: PositiveInt | Literal["auto"] = 8192
    """Most tokens in one forward pass, padding included; a longer sequence runs alone. `auto` finds the number by trial
    on the device, once per run, and remembers it for runs like it. What does not fit is run in smaller batches."""
    chunk_tokens: PositiveInt | None = None
    """Run longer model inputs in pieces of this many tokens, keys and values carried over, at bounded memory."""
    queue_bytes: PositiveInt = 256 * 2**20
    """Most bytes that wait for the disk before the forward pass waits too."""
    fsync: Literal["none", "commit", "always"] = "commit"
    """When bytes are forced to the disk: `commit` before the record that makes a part count, so that what counts
    survives power loss; `always` after every batch as well, so that little waits; `none` leaves it to the system, and
    `actpipe verify` tells what power loss cost. `true` and `false`, of earlier recipes, mean `commit` and `none`."""

    @field_validator("fsync", mode="before")
    @classmethod
    def _name_policy(cls, value: object) -> object:
        if isinstance(value, bool):
            return "commit" if value else "none"
        return value

    @model_validator(mode="after")
    def _something_to_store(self) -> Self:
        if not self.hooks and not self.metrics and not self.derive:
            raise ValueError("nothing to store: name `hooks`, `metrics` or `derive`")
        names = [derived.name for derived in self.derive]
        if len(set(names)) < len(names):
            raise ValueError(f"`derive` has two entries of one name among {names}")
        return self


class WriteReportConfig(StageConfig):
    """Settings of the stage `write_report`: every result of the run in one page."""

    stage: Literal["write_report"] = "write_report"
    title: NonEmpty | None = None
    """Heading of the page; by default the recipe's name."""


BUILT_IN_STAGES: tuple[type[StageConfig], ...] = (
    TokenizeTextConfig,
    GenerateTextConfig,
    ExtractActivationsConfig,
    ReduceActivationsConfig,
    *ANALYSES,
    EvaluateModelConfig,
    WriteReportConfig,
)

if TYPE_CHECKING:
    AnyStage = StageConfig
else:
    AnyStage = Annotated[Union[BUILT_IN_STAGES], Field(discriminator="stage")]  # noqa: UP007 - of a tuple


class Recipe(Contract):
    """A whole run: one model, and the stages in the order in which they happen."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: Name | None = None
    """Name of the run; by default that of the recipe's file. The run folder is `runs/NAME`."""
    model: ModelConfig
    """The model that every stage uses."""
    engine: EngineConfig = EngineConfig()
    """Who does the parts; `engine: dask` is short for `engine: {kind: dask}`."""
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    """What is done, from top to bottom."""

    @field_validator("engine", mode="before")
    @classmethod
    def _name_engine(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value
