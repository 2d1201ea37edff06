"""What a run is doing, or how it ended, from its files alone: commit records, lock and log. Loads no torch."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml.error import YAMLError

from actpipe.errors import EXIT_STOPPED, EXIT_TRY_AGAIN, IncompleteStoreError, did_you_mean
from actpipe.event_log import read_events
from actpipe.planning import format_bytes, plan_parts
from actpipe.records import Finding
from actpipe.schemas.manifest import TokenTableManifest
from actpipe.stores.layout import MAIN_CORPUS, RunFolder
from actpipe.stores.locking import LockState
from actpipe.stores.peeking import Place, place_of
from actpipe.stores.run_record import parse_record
from actpipe.stores.writing import parse_manifest, parts_named

State = Literal["at work", "finished", "failed", "stopped", "killed"]
StageState = Literal["done", "at work", "begun", "to do"]
WATCH_SECONDS = 5.0
"""How often `follow_run` looks."""
_RECENT_SECONDS = 600.0
"""The rate is that of so much of the latest work."""
_SILENT_SECONDS = 60.0
_RETRIES_SHOWN = 3
_ENDS: dict[str, State] = {"run finished": "finished", "run failed": "failed", "run stopped": "stopped"}


@dataclass(frozen=True)
class StageStatus:
    """One stage of the recipe."""

    stage: str
    corpus: str
    state: StageState
    seconds: float | None
    """How long it took, where it is done."""


@dataclass(frozen=True)
class CorpusStatus:
    """What one corpus has, by its commit records."""

    corpus: str
    n_tokens: int | None
    """Tokens of the token table; None until it is committed."""
    parts_done: int
    parts_total: int | None
    """None where there is no store yet."""
    tokens_done: int
    """Rows of the parts that are done."""


@dataclass(frozen=True)
class WorkStatus:
    """The piece of work at hand, as the log last told of it."""

    what: str
    unit: str
    done: int
    total: int | None
    n_bytes: int
    rate: float
    """Units per second, of the last ten minutes."""
    seconds_left: float | None


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run."""

    run: str
    state: State
    reason: str
    """Why it ended, where it did not finish."""
    exit_code_of_run: int | None
    """What the process exited with, where the log says."""
    host: str | None
    pid: int | None
    began: float | None
    """When the latest attempt began: seconds since 1970, by the clock of its host."""
    silent_seconds: float | None
    """Time since the last sign of life of a run at work."""
    attempts: int
    workers: int | None
    parts_in_flight: int | None
    retries: int
    """Of the latest attempt."""
    last_retries: tuple[str, ...]
    work: WorkStatus | None
    stages: tuple[StageStatus, ...]
    corpora: tuple[CorpusStatus, ...]

    @property
    def exit_code(self) -> int:
        """What `actpipe status` exits with: 0 where the run is finished or at work."""
        return 0 if self.state in ("at work", "finished") else EXIT_STOPPED

    def to_json(self) -> str:
        """Return it as one line for machines."""
        return json.dumps({**asdict(self), "exit_code": self.exit_code})


def read_status(run: str | Path) -> RunStatus:
    """Say what a run is doing, or how it ended; nothing of it is changed.

    Args:
        run: The run folder, or its URL.

    Raises:
        IncompleteStoreError: There is no run.
        StorageError: The place cannot be reached.
    """
    place = place_of(run)
    lock = place.look_at_lock()
    events = list(read_events(place.read("log.jsonl") or b""))
    corpora = tuple(_read_corpora(place))
    if lock is None and not events and place.read("run.yaml") is None and not any(map(_has_something, corpora)):
        raise IncompleteStoreError(f"there is no run at {place.title}{_near(run)}")
    attempts = list(dict.fromkeys(event.get("attempt") for event in events))
    latest = [event for event in events if event.get("attempt") == attempts[-1]] if attempts else []
    if lock is not None and lock.is_alive and not _is_of(latest, lock):
        latest = []
    state, reason, exit_code = _state_of(lock, latest, corpora)
    work = [event for event in latest if event["event"] in ("progress", "stage started", "work finished")]
    at_hand = work if state == "at work" and work and work[-1]["event"] == "progress" else []
    retries = [str(event.get("message", "")) for event in latest if event["event"] == "retry"]
    told = at_hand[-1] if at_hand else {}
    return RunStatus(
        run=place.title,
        state=state,
        reason=reason,
        exit_code_of_run=exit_code,
        host=lock.owner.host if lock else latest[0].get("host") if latest else None,
        pid=lock.owner.pid if lock else latest[0].get("pid") if latest else None,
        began=latest[0]["time"] if latest else None,
        silent_seconds=round(lock.age_seconds, 1) if lock is not None and state == "at work" else None,
        attempts=len(attempts),
        workers=_whole(told.get("workers")),
        parts_in_flight=_whole(told.get("parts_in_flight")),
        retries=len(retries),
        last_retries=tuple(retries[-_RETRIES_SHOWN:]),
        work=_work_of(at_hand),
        stages=tuple(_stages_of(place, events, is_at_work=state == "at work")),
        corpora=corpora,
    )


def follow_run(run: str | Path, *, every: float | None = None) -> Iterator[RunStatus]:
    """Yield the status of a run; with `every`, again after so many seconds for as long as it is at work."""
    while True:
        found = read_status(run)
        yield found
        if every is None or found.state != "at work":
            return
        time.sleep(every)


def _state_of(
    lock: LockState | None, latest: Sequence[dict[str, Any]], corpora: Sequence[CorpusStatus]
) -> tuple[State, str, int | None]:
    """Return the state, why the run ended, and what it exited with."""
    if lock is not None and lock.is_alive:
        return "at work", "", None
    end = next((event for event in reversed(latest) if event["event"] in _ENDS), None)
    if end is not None:
        reason = f"{end['error']}: {end.get('message', '')}" if "error" in end else ""
        code: int | None = end.get("exit_code", 0)
        if end["event"] == "run stopped":
            reason = "interrupted" if code == 130 else "asked to end"
        return _ENDS[end["event"]], reason, code
    if not latest and lock is None:
        if all(corpus.parts_done == corpus.parts_total for corpus in corpora):
            return "finished", "", None
        return "stopped", "parts are missing, and no log says why", None
    return "killed", "its process ended without a word: killed, out of memory, or its machine went down", None


def _is_of(events: Sequence[dict[str, Any]], lock: LockState) -> bool:
    """Whether events are those of a lock's owner."""
    return bool(events) and (events[0].get("host"), events[0].get("pid")) == (lock.owner.host, lock.owner.pid)


def _work_of(events: Sequence[dict[str, Any]]) -> WorkStatus | None:
    """Return the work at hand; its rate is that of the latest stretch that the log tells of."""
    if not events:
        return None
    last = events[-1]
    same = [event for event in events if event.get("what") == last["what"] and event["event"] == "progress"]
    first = next(event for event in same if last["elapsed"] - event["elapsed"] <= _RECENT_SECONDS)
    seconds = last["elapsed"] - first["elapsed"]
    rate = (last["done"] - first["done"]) / seconds if seconds > 0 else last["rate"]
    total = last.get("total")
    left = (total - last["done"]) / rate if total and rate > 0 else None
    return WorkStatus(
        last["what"], last["unit"], last["done"], total, last["n_bytes"], round(rate, 3), left and round(left, 1)
    )


def _stages_of(place: Place, events: Sequence[dict[str, Any]], *, is_at_work: bool) -> Iterator[StageStatus]:
    """Yield the stages of the recipe, each with what the log last said of it."""
    Key = tuple[str, str, int]  # the third: which one, where a recipe has several alike
    said: dict[Key, StageStatus] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for event in events:
        name = (event.get("stage", ""), event.get("corpus", ""))
        if event["event"] == "run started":
            seen.clear()
        elif event["event"] == "stage started":
            seen[name] += 1
            said[*name, seen[name]] = StageStatus(*name, "begun", None)
        elif event["event"] == "stage finished":
            said[*name, seen[name]] = StageStatus(*name, "done", event.get("seconds"))
    current = next(reversed(said), None) if is_at_work and events and events[-1]["event"] not in _ENDS else None
    if current is not None and said[current].state == "begun":
        said[current] = StageStatus(current[0], current[1], "at work", None)
    listed: Counter[tuple[str, str]] = Counter()
    for name in _recipe_of(place):
        listed[name] += 1
        yield said.pop((*name, listed[name]), StageStatus(*name, "to do", None))
    yield from said.values()


def _recipe_of(place: Place) -> list[tuple[str, str]]:
    """Return stage and corpus of every stage; none where `run.yaml` is not there or cannot be read."""
    text = place.read("run.yaml")
    if text is None:
        return []
    with suppress(ValueError, YAMLError):
        stages: Any = parse_record(text.decode()).recipe["stages"]
        return [(stage["stage"], stage["corpus"]) for stage in stages]
    return []


def _read_corpora(place: Place) -> Iterator[CorpusStatus]:
    for name in [MAIN_CORPUS, *place.children("corpora")]:
        folder = RunFolder(Path()).corpus(name)
        n_tokens, parts, n_parts, tokens_done = None, set[int](), None, 0
        with suppress(ValueError):
            if (record := place.read(folder.token_commit.as_posix())) is not None:
                n_tokens = TokenTableManifest.from_json(record).n_rows
        with suppress(ValueError, LookupError):
            if (metadata := place.read((folder.store / "zarr.json").as_posix())) is not None:
                manifest = parse_manifest(metadata)
                parts = parts_named(place.children(folder.commits.as_posix()))
                planned = plan_parts(manifest.n_rows, manifest.rows_per_part)
                n_parts, tokens_done = len(planned), sum(part.n_rows for part in planned if part.index in parts)
        yield CorpusStatus(name, n_tokens, len(parts), n_parts, tokens_done)


def _has_something(corpus: CorpusStatus) -> bool:
    return corpus.n_tokens is not None or corpus.parts_total is not None


def _near(run: str | Path) -> str:
    parent = Path(run).parent
    return did_you_mean(str(run), [str(parent / path.name) for path in parent.iterdir()] if parent.is_dir() else [])


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def describe_status(status: RunStatus) -> list[Finding]:
    """Return a status as tables for people."""
    rows = [("state", _headline(status))]
    if status.work is not None:
        rows.append(("work", _describe_work(status.work)))
    if status.host is not None:
        rows.append(("process", f"{status.pid} on {status.host}{_since(status.began)}, attempt {status.attempts}"))
    if status.silent_seconds is not None:
        silent = ", longer than usual" if status.silent_seconds > _SILENT_SECONDS else ""
        rows.append(("sign of life", f"{status.silent_seconds:.0f} s ago{silent}"))
    if status.workers is not None:
        rows.append(("workers", f"{status.workers:,}"))
    if status.retries:
        rows.append(("retries", f"{status.retries:,}, the last: {'; '.join(filter(None, status.last_retries))}"))
    rows += [(f"corpus {one.corpus}", _describe_corpus(one)) for one in status.corpora if _has_something(one)]
    found = [
        Finding(status.run, ("", "", ""), tuple((name, "", text) for name, text in rows), note=_way_on(status)),
    ]
    if status.stages:
        stages = tuple((s.stage, _describe_time(s.seconds), s.corpus, s.state) for s in status.stages)
        found.append(Finding("Stages", ("stage", "took", "corpus", "state"), stages))
    return found


def _headline(status: RunStatus) -> str:
    stage = next((stage for stage in status.stages if stage.state == "at work"), None)
    if status.state == "at work":
        return f"at work: {stage.stage} of {stage.corpus}" if stage else "at work: checking, or loading the model"
    return f"{status.state}: {status.reason}" if status.reason else status.state


def _describe_work(work: WorkStatus) -> str:
    share = f" of {work.total:,} {work.unit} ({work.done / work.total:.0%})" if work.total else f" {work.unit}"
    size = f", {format_bytes(work.n_bytes)}" if work.n_bytes else ""
    left = "" if work.seconds_left is None else f", {_describe_time(work.seconds_left)} left"
    return f"{work.what}: {work.done:,}{share}, {work.rate:,.0f} {work.unit}/s{size}{left}"


def _describe_corpus(corpus: CorpusStatus) -> str:
    tokens = "not tokenized yet" if corpus.n_tokens is None else f"{corpus.n_tokens:,} tokens"
    if corpus.parts_total is None:
        return tokens
    return f"{tokens}; {corpus.parts_done:,} of {corpus.parts_total:,} parts ({corpus.tokens_done:,} rows) committed"


def _describe_time(seconds: float | None) -> str:
    """Write a duration for people: `3 d 4 h`, `2 h 5 min`, `40 s`, `1.2 s`; nothing where it is not known."""
    if seconds is None:
        return ""
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {smaller}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _since(began: float | None) -> str:
    return "" if began is None else f", since {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _way_on(status: RunStatus) -> str:
    if status.exit_code == 0:
        return ""
    command = f"`actpipe run RECIPE --out {status.run}`"
    if status.state == "failed" and status.exit_code_of_run != EXIT_TRY_AGAIN:
        return f"mend what it says; then {command} continues from what is committed"
    return f"{command} continues from what is committed"
