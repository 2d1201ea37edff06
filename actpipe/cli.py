"""The command line. Thin: each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actpipe.errors import ActpipeError, exit_code_of
from actpipe.records import Finding

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="A model and a corpus in, a store of activations to compute on out.\n\n"
    "Start with `actpipe run RECIPE.yaml`; `actpipe hooks MODEL` lists what can be stored of a model.",
)

Recipe = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Run = Annotated[Path, typer.Argument(help="Run folder, or its URL (s3://bucket/run).", show_default=False)]
Model = Annotated[str, typer.Argument(help="Hub name (gpt2) or folder of a model.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder or URL (s3://bucket/run). By default runs/NAME.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting: model.dtype=float16, tokenize_text.max_tokens=1000."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Give the parts to the workers of this Dask scheduler (tcp://10.0.0.1:8786).", show_default=False
    ),
]
RecipeOfRun = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe of the run, where its paths are relative to it.", show_default=False),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.", show_default=False)
]


LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", envvar="ACTPIPE_LOG_FORMAT", help="json: the log's lines on stderr, for machines."),
]
MetricsPort = Annotated[
    int | None,
    typer.Option("--metrics-port", min=0, max=65535, help="Serve Prometheus metrics there.", show_default=False),
]
MetricsHost = Annotated[str, typer.Option("--metrics-host", help="Address to serve them on.")]


@app.command()
def run(
    recipe: Recipe,
    out: Out = None,
    set_: Set = None,
    scheduler: Scheduler = None,
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
) -> None:
    """Run a recipe. Interrupted, the same command continues; finished, it does nothing.

    Example: `actpipe run workflows/quickstart.yaml --out runs/try --set tokenize_text.max_tokens=20000`

    Exits with 0 when all is done, 75 where the same command may succeed later, 130 and 143 after Ctrl-C and SIGTERM,
    else with 1.
    """
    from actpipe.interrupting import INTERRUPTION
    from actpipe.operating import told_as
    from actpipe.running import run_recipe

    with told_as(log_format, metrics_port=metrics_port, metrics_host=metrics_host) as telemetry, INTERRUPTION.heard():
        summary = run_recipe(recipe, out=out, overrides=set_ or (), telemetry=telemetry, scheduler=scheduler)
    console = new_console()
    for finding in summary.findings:
        print_finding(console, finding)
    console.print(f"\nrun folder: {summary.place}", highlight=False, soft_wrap=True)
    report = summary.folder / "report.html"
    if report.is_file():
        console.print(f"report:     {report}", highlight=False, soft_wrap=True)


@app.command()
def worker(
    scheduler: Annotated[str, typer.Argument(help="Address of a Dask scheduler: tcp://10.0.0.1:8786.")],
    name: Annotated[str | None, typer.Option(help="Name in logs and on Dask's dashboard.", show_default=False)] = None,
    lifetime: Annotated[
        float | None, typer.Option(min=1, help="Leave in order after so many seconds.", show_default=False)
    ] = None,
) -> None:
    """Do parts of runs that are given to a Dask scheduler. Asked to end (SIGTERM), it finishes the parts at hand.

    Start one for each device: `CUDA_VISIBLE_DEVICES=0 actpipe worker tcp://10.0.0.1:8786`
    """
    from actpipe.cluster.working import work_for

    work_for(scheduler, name=name, seconds=lifetime)


@app.command()
def plan(
    recipe: Recipe,
    out: Out = None,
    set_: Set = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many devices, not for this machine's.", show_default=False)
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of each of them, such as 80GB.", show_default=False)
    ] = None,
) -> None:
    """Say what a recipe will cost before anything runs: tokens, bytes, parts, memory, time, and on which devices.

    Tokenizes a sample of the documents and times one batch of the model. For devices that are given by hand, no
    weights are loaded.

    Example: `actpipe plan recipe.yaml --devices 8 --device-memory 80GB`
    """
    from actpipe.planning import devices_by_hand
    from actpipe.running import plan_recipe

    console = new_console()
    by_hand = devices_by_hand(devices, device_memory)
    for finding in plan_recipe(recipe, out=out, overrides=set_ or (), devices=by_hand):
        print_finding(console, finding)


@app.command()
def hooks(
    model: Model,
    pattern: Annotated[list[str] | None, typer.Argument(help="Only names that match, such as blocks.0.*")] = None,
    context: Annotated[int, typer.Option(help="Context length, for the size of scores and patterns.")] = 0,
    dtype: Annotated[str, typer.Option(help="Element type on disk: float32, float16 or bfloat16.")] = "float16",
    revision: Revision = None,
) -> None:
    """List the hook points of a model: name, axes, shape and bytes per token. Loads no weights."""
    from actpipe.model_tables import describe_hooks

    print_finding(
        new_console(), describe_hooks(model, pattern or ["*"], context=context, dtype=dtype, revision=revision)
    )


@app.command()
def check(
    model: Model,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto for the checkpoint's own.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    revision: Revision = None,
) -> None:
    """Prove the hooks on this very model by identities. Exits with 1 where one fails."""
    from actpipe.model_tables import check_model

    finding, holds = check_model(model, dtype=dtype, device=device, revision=revision)
    print_finding(new_console(), finding)
    if not holds:
        raise typer.Exit(1)


@app.command()
def info(run: Run) -> None:
    """Say what a run folder holds: model, corpora, arrays, results, and how much of it is done."""
    from actpipe.describing import describe_run

    console = new_console()
    for finding in describe_run(run):
        print_finding(console, finding)


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every five seconds until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,
) -> None:
    """Say what a run is doing, or how it ended; from any machine that sees its folder or URL. Disturbs nobody.

    Exits with 0 where it is finished or at work, with 3 where it stopped before the end, with 1 where there is no run.
    """
    from actpipe.status import WATCH_SECONDS, describe_status, follow_run

    console, code = new_console(), 0
    for found in follow_run(run, every=WATCH_SECONDS if watch else None):
        code = found.exit_code
        if as_json:
            typer.echo(found.to_json())
            continue
        if watch:
            console.clear()
        for finding in describe_status(found):
            print_finding(console, finding)
    raise typer.Exit(code)


@app.command()
def verify(
    run: Run,
    deep: Annotated[bool, typer.Option("--deep", help="Run some sequences again and compare the values.")] = False,
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences --deep runs.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences --deep draws.")] = 0,
    recipe: RecipeOfRun = None,
) -> None:
    """Compare every file of a run with its commit record and checksum. Exits with 1 where one differs."""
    from actpipe.describing import verify_run

    problems, n_bytes = verify_run(run)
    console = new_console()
    _print_problems(console, "wrong", problems)
    if problems:
        console.print("`actpipe repair` does the broken parts again", highlight=False)
        raise typer.Exit(1)
    if deep:
        from actpipe.repairing import recheck_run

        findings, holds = recheck_run(run, n_sequences=sequences, seed=seed, recipe=recipe)
        for finding in findings:
            print_finding(console, finding)
        if not holds:
            raise typer.Exit(1)
    console.print(f"all is well: {n_bytes} checked", highlight=False)


@app.command()
def repair(run: Run, recipe: RecipeOfRun = None) -> None:
    """Do again what `verify` finds missing or broken, and nothing else. Files of others are named and left alone."""
    from actpipe.repairing import repair_run

    summary = repair_run(run, recipe=recipe)
    console = new_console()
    _print_problems(console, "mended", map(str, summary.mended))
    _print_problems(console, "wrong", map(str, summary.left))
    if summary.left:
        raise typer.Exit(1)
    console.print("all is well", highlight=False)


@app.command()
def clean(
    run: Run, dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and remove none.")] = False
) -> None:
    """Remove what killed runs left half done. What is committed stays, and so do files of others."""
    from actpipe.describing import clean_run

    console = new_console()
    for path, size in clean_run(run, dry_run=dry_run):
        console.print(f"{'would remove' if dry_run else 'removed'} {escape(path)} ({size})", highlight=False)


Format = Annotated[str, typer.Option("--format", help="sae_lens, safetensors, datasets or npy.", show_default=False)]


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    format_: Format,
    hook: Annotated[list[str] | None, typer.Option(help="Only this array; may be repeated.")] = None,
    corpus: Annotated[str, typer.Option(help="Which corpus of the run.")] = "main",
    bfloat16: Annotated[
        str, typer.Option(help="npy has no bfloat16: float32 widens, bits keeps as uint16.")
    ] = "float32",
) -> None:
    """Write a finished store in a format that others read.

    Example: `actpipe export runs/gpt2 exported --format sae_lens --hook blocks.6.hook_resid_post`
    """
    from actpipe.interchange.exporting import export_run

    export_run(run, out, format=format_, hooks=hook or (), corpus=corpus, bfloat16=bfloat16)
    new_console().print(f"exported to {escape(str(out))}", highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder, or one file of safetensors or npy.", show_default=False)],
    format_: Format,
    out: Annotated[Path, typer.Option("--out", help="Run folder to make; new or empty.", show_default=False)],
) -> None:
    """Make a run folder of activations that others have stored, or that were exported.

    Example: `actpipe import exported --format sae_lens --out runs/imported`
    """
    from actpipe.interchange.importing import import_run

    import_run(source, out, format=format_)
    new_console().print(f"run folder: {escape(str(out))}", highlight=False, soft_wrap=True)


def _print_problems(console: Console, label: str, problems: Iterable[str]) -> None:
    for problem in problems:
        console.print(f"[red]{label}[/] {escape(problem)}", highlight=False, soft_wrap=True)


_PLAIN_WIDTH = 160
"""Width of tables where there is no terminal to fit into."""


def new_console() -> Console:
    """Return a console on the standard output stream."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def print_finding(console: Console, finding: Finding) -> None:
    """Print a finding as a table."""
    table = Table(show_edge=False, pad_edge=False, box=SIMPLE_HEAD, show_header=any(finding.columns))
    for position, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if position == 1 else "left", no_wrap=position == 0)
    for row in finding.rows:
        table.add_row(*map(escape, row))
    console.print()
    console.print(escape(finding.title), style="bold", highlight=False)
    console.print(table)
    if finding.note:
        console.print(escape(finding.note), style="dim", highlight=False)


def main() -> None:
    """Run the command line; errors raised on purpose are one line and the exit code of their class."""
    try:
        app(standalone_mode=True)
    except ActpipeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(exit_code_of(error))
