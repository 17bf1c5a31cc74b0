"""The files of one run, checked and tokenised once with the base's tokenizer and chat template."""

import hashlib
import json
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from ..bases.loading import Base
from ..bases.passes import most_positions
from ..data.example_files import DamagedExamples, ExampleWriter, file_hash, open_examples
from ..data.examples import Examples
from ..data.held_out import group_draws, split
from ..data.templates import writes_the_day
from ..data.token_cache import keep, new_entry, use
from ..data.tokenising import overlap_note, tokenise
from ..formats import NOUNS, Report, check_for_training, checking
from ..progress import Note, Phase
from ..specs import MAX_CONTEXT, TrainSpec

UNKNOWN_CONTEXT = 2048
"""Context length when neither the model nor the tokenizer gives one."""
VERSION = 2
"""Version of how records become examples; raising it invalidates every cached file."""
Role = Literal["training", "validation"]
CERTIFICATE_ROWS, CERTIFICATE_TOKENS = 16, 4096


@dataclass(frozen=True)
class HeldOut:
    """The share of the training file that is a run's validation data."""

    share: float
    """As asked for."""
    seed: int
    group_by: str | None
    examples: int
    of: int
    """The training file's examples, these included."""


@dataclass(frozen=True)
class Data:
    """The files of a run, tokenised."""

    training: Examples
    validation: Examples | None
    hashes: dict[str, str]
    """SHA-256 of each file by its role."""
    notes: list[Note]
    day: date | None = None
    """Today's date as the chat template writes it; None if it writes none."""
    held_out: HeldOut | None = None
    """None unless the validation examples are from the training file."""


@dataclass(frozen=True)
class Reading:
    """How a run reads its files."""

    type: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    end_tokens: frozenset[int]
    embedded_tokens: int
    columns: Mapping[str, str] | None = None
    """The files' column of each key that has another name there."""
    day: date = field(default_factory=date.today)
    """Today's date, for chat templates that write it."""
    reasoning: bool = True
    literal: bool = False
    """Options of `Answers`."""

    @property
    def written_day(self) -> date | None:
        """Today's date as the chat template writes it; None if it writes none."""
        return self.day if writes_the_day(self.tokenizer) else None


@dataclass(frozen=True)
class Tokenised:
    """One tokenised file."""

    examples: Examples
    report: Report
    """The format and container; findings are in `notes`."""
    notes: list[Note]
    sha256: str


def read_data(
    spec: TrainSpec,
    base: Base,
    training: Path,
    validation: Path | None,
    cache: Path | None = None,
    day: date | None = None,
) -> Generator[Phase, None, Data]:
    """Checks and tokenises the files, or takes them from the folder `cache`.

    With the spec's `validation_share` that share of the training examples becomes the validation examples. A
    chat template that writes today's date writes `day`, today if that is not given. The result stays readable
    after the folder is deleted. The folder grows until the caller trims it.
    """
    kept = spec.hyperparameters.context_length
    how = Reading(
        spec.type,
        base.tokenizer,
        context_length(base) if kept == "auto" else kept,
        base.end_tokens,
        base.embedded_tokens,
        spec.columns,
        day or date.today(),
        spec.hyperparameters.train_on_reasoning,
        spec.hyperparameters.takes_control_tokens,
    )
    with _folder(cache) as folder:
        first = yield from read_file(training, "training", how, folder)
        if spec.validation_share is not None:
            return (yield from _with_held_out(first, training, spec, spec.validation_share, how.written_day))
        hashes, notes, held_out = {"training": first.sha256}, first.notes, None
        if validation is not None:
            second = yield from read_file(validation, "validation", how, folder, first.report.format)
            hashes["validation"], held_out = second.sha256, second.examples
            overlap = overlap_note(first.examples, held_out, NOUNS[second.report.container])
            notes = [*notes, *second.notes, *([overlap] if overlap else [])]
    return Data(first.examples, held_out, hashes, notes, how.written_day)


def _with_held_out(
    file: Tokenised, path: Path, spec: TrainSpec, share: float, day: date | None
) -> Generator[Phase, None, Data]:
    """The training file's examples, with a share of them as the validation examples."""
    examples, draws = file.examples, {}
    if spec.group_by is not None:
        draws = yield from group_draws(path, spec.group_by, spec.seed, file.report.rows, spec.columns)
    parts = split(examples, share, spec.seed, draws)
    held_out = HeldOut(share, spec.seed, spec.group_by, len(parts.validation), len(examples))
    by = "" if spec.group_by is None else f", by '{spec.group_by}' and equal tokens"
    note = Note(
        "info",
        f"{held_out.examples} of {held_out.of} examples of the training file are held out for validation: a "
        f"share of {share:g}, drawn by seed {spec.seed} from {parts.groups} groups{by}.",
        {"groups": parts.groups, **asdict(held_out)},
    )
    return Data(
        examples.select(parts.training),
        examples.select(parts.validation),
        {"training": file.sha256},
        [*file.notes, note],
        day,
        held_out,
    )


@contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        yield cache
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def read_file(
    path: Path, role: Role, how: Reading, cache: Path, training_format: str | None = None
) -> Generator[Phase, None, Tokenised]:
    """Raises DataError, naming the line, for a file that cannot be used."""
    sha256 = file_hash(path)
    entry = cache / _key(sha256, role, how)
    try:
        examples, about = open_examples(entry)
    except DamagedExamples:  # or not there
        report = yield from _checked(path, how.columns)
        _refuse_unfit(report, role, how, training_format)
        with new_entry(cache) as folder, ExampleWriter(folder, len(how.tokenizer)) as writer:
            examples, notes = yield from tokenise(
                writer,
                path,
                how.tokenizer,
                context_length=how.context_length,
                end_tokens=how.end_tokens,
                embedded_tokens=how.embedded_tokens,
                role=role,
                total=report.rows,
                day=how.day,
                reasoning=how.reasoning,
                literal=how.literal,
                columns=how.columns,
            )
            about = {"report": _brief(report), "notes": [asdict(note) for note in notes]}
            writer.finish(examples, about)
            keep(folder, entry)
    report = Report.model_validate(about["report"])
    _refuse_unfit(report, role, how, training_format)
    use(entry)
    return Tokenised(examples, report, [Note(**note) for note in about["notes"]], sha256)


def _checked(path: Path, columns: Mapping[str, str] | None) -> Generator[Phase, None, Report]:
    """Checks the file's structure."""
    size = path.stat().st_size
    with path.open("rb") as file:
        steps = checking(file, columns)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                report: Report = end.value
                return report
            yield Phase("checking", min(file.tell(), size), size)


def _refuse_unfit(report: Report, role: Role, how: Reading, training_format: str | None) -> None:
    error = check_for_training(
        report,
        role=role,
        minimum_rows=1,
        training_format=training_format,
        type=how.type,
        literal=how.literal,
    )
    if error is not None:
        raise error


def _brief(report: Report) -> dict[str, Any]:
    return report.model_dump(mode="json", include={"format", "container", "rows"})


def _key(sha256: str, role: Role, how: Reading) -> str:
    """The cache entry's name: a digest of the file and of everything else that the tokens depend on."""
    tokenizer = how.tokenizer
    core = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        VERSION,
        *(transformers.__version__, tokenizers.__version__),
        *(sha256, role),
        None if core is None else hashlib.sha256(core.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        how.context_length,
        sorted(how.end_tokens),
        *(how.reasoning, how.literal),
        how.written_day and how.written_day.isoformat(),
        how.columns,
        how.embedded_tokens,
    ]
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:40]


def context_length(base: Base) -> int:
    """The longest example, in tokens, that the model can read."""
    limit = most_positions(base.model)
    if limit:
        return min(limit, MAX_CONTEXT)
    named = base.tokenizer.model_max_length  # a huge number when the tokenizer has none
    return named if named <= 2**20 else UNKNOWN_CONTEXT


def certificate_rows(data: Data) -> list[list[int]]:
    """Tokens of the first validation rows, or else of training rows."""
    examples, rows, tokens = data.validation or data.training, [], 0
    for i in range(min(CERTIFICATE_ROWS, len(examples))):
        row = examples.row(i)[0].tolist()
        if rows and tokens + len(row) > CERTIFICATE_TOKENS:
            break
        rows.append(row)
        tokens += len(row)
    return rows
