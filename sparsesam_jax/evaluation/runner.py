"""Every method at every density on every image, batch by batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sparsesam_jax.choices import Dtype, PromptKind, ProtocolName, check_choice
from sparsesam_jax.config import Grid
from sparsesam_jax.datasets.loading import load_ahead
from sparsesam_jax.evaluation import summary as summaries
from sparsesam_jax.evaluation.candidates import DENSE, Candidate
from sparsesam_jax.evaluation.datasets import Pair, Photo, read_photo
from sparsesam_jax.evaluation.metrics import boundary_iou, iou, relative_error
from sparsesam_jax.evaluation.predict import Predictions, predict
from sparsesam_jax.evaluation.protocols import Protocol, make_protocol
from sparsesam_jax.evaluation.rows import Row, RowFile
from sparsesam_jax.evaluation.runs import RunOptions
from sparsesam_jax.evaluation.summary import Summary
from sparsesam_jax.predict.image_files import PhotoReader
from sparsesam_jax.predict.predictor import SamPredictor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What `sparsesam evaluate` measures and how.

    Attributes:
        prompts: Kind of prompt, taken from the ground truth.
        protocol: Name of the protocol.
        batch: Images a call.
    """

    prompts: PromptKind = "box"
    protocol: ProtocolName = "sam"
    batch: int = 8

    def __post_init__(self) -> None:
        check_choice("prompts", self.prompts, PromptKind)
        check_choice("protocol", self.protocol, ProtocolName)
        if self.batch < 1:
            raise ValueError(f"batch must be positive, got {self.batch}")
        super().__post_init__()

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype, the protocol's where none was asked for."""
        return self.dtype or ("float16" if self.protocol == "release" else "float32")


class Report(NamedTuple):
    """What a run found.

    Attributes:
        summaries: One a candidate.
        problems: What was wrong with an image that was left out, by its name.
    """

    summaries: list[Summary]
    problems: dict[str, str]


class Evaluation:
    """Photos, models and the rows that are measured so far.

    Args:
        options: What to measure.
        pairs: The photos. Those of one grid, in this order, are batches.

    Raises:
        ValueError: The weights, a method or a sparsity is not as it must be.
    """

    def __init__(self, options: Options, pairs: Sequence[Pair]):
        self.options = options
        self.pairs = list(pairs)
        self.sam = options.sam()
        self.config = self.sam.config.image_encoder
        self.protocol: Protocol = make_protocol(options.protocol, self.config.image_size)
        self.predictors = {
            candidate: SamPredictor(candidate.model(self.sam), padding=options.padding)
            for candidate in (DENSE, *options.candidates)
            if candidate == DENSE or not candidate.is_dense
        }
        self.problems: dict[str, str] = {}
        self._compiled: set[Candidate] = set()

    def measure(self, file: RowFile, advance: Callable[[Candidate, int], None]) -> None:
        """Measure what `file` lacks; `advance` hears of every candidate and its images."""
        size = self.options.batch
        # Photos of one grid wait for each other, so that there is one batch size to compile for.
        waiting: dict[Grid, list[Photo]] = {}
        for photo in self._read_ahead(self.pairs):
            if photo is None:
                for candidate in self.predictors:
                    advance(candidate, 1)
                continue
            grid = self.predictors[DENSE].grid(self.protocol.query_size(photo))
            waiting.setdefault(grid, []).append(photo)
            if len(waiting[grid]) == size:
                self._measure(waiting.pop(grid), file, advance)
        for photos in waiting.values():
            self._measure(photos, file, advance)

    def read(self, pairs: Sequence[Pair]) -> list[Photo]:
        """The photos of pairs without a problem; problems are noted."""
        return [photo for photo in self._read_ahead(pairs) if photo is not None]

    def predict(self, candidate: Candidate, photos: Sequence[Photo]) -> Predictions:
        """Masks and features of at most a batch of photos."""
        queries = [self.protocol.query(photo, self.options.prompts) for photo in photos]
        return predict(
            self.predictors[candidate],
            photos,
            queries,
            protocol=self.protocol,
            batch=min(self.options.batch, len(self.pairs)),
        )

    def report(self, file: RowFile) -> Report:
        """Summaries of what was measured.

        Raises:
            ValueError: Not one image was.
        """
        names = [pair.name for pair in self.pairs if pair.name not in self.problems]
        if not names:
            first = next(iter(self.problems.values()))
            raise ValueError(f"at least one image must be usable, got {len(self.pairs)}: {first}")

        def rows(candidate: Candidate) -> list[Row]:
            key = DENSE if candidate.is_dense else candidate
            return [file.found[(*key[:2], name)] for name in names]

        found = [
            summaries.summarise(
                rows(candidate),
                rows(DENSE),
                method=candidate.method,
                density=candidate.density,
                gmacs=candidate.gmacs(self.config),
                mean_batch=self.protocol.mean_batch,
            )
            for candidate in self.options.candidates
        ]
        return Report(found, dict(self.problems))

    def _read_ahead(self, pairs: Sequence[Pair]) -> Iterator[Photo | None]:
        """Photos, the next ones read meanwhile; None where there is a problem, which is noted."""
        read = functools.partial(_photo_or_problem, reader=self.options.reader)
        for pair, result in zip(pairs, load_ahead(pairs, read), strict=True):
            if isinstance(result, str):
                self.problems[pair.name] = result
            yield result if isinstance(result, Photo) else None

    def _measure(
        self, photos: Sequence[Photo], file: RowFile, advance: Callable[[Candidate, int], None]
    ) -> None:
        todo = [
            candidate
            for candidate in self.predictors
            if any((*candidate[:2], photo.name) not in file.found for photo in photos)
        ]
        found: list[Row] = []
        dense = self.predict(DENSE, photos) if todo else None
        for candidate in self.predictors:
            if dense is not None and candidate in todo:
                new = dense if candidate == DENSE else self.predict(candidate, photos)
                found += self._rows(candidate, photos, new, dense)
            advance(candidate, len(photos))
        file.append(found)

    def _rows(
        self, candidate: Candidate, photos: Sequence[Photo], new: Predictions, dense: Predictions
    ) -> Iterator[Row]:
        errors = [float(e[0]) for e in map(relative_error, new.features, dense.features)]
        compiled = candidate not in self._compiled
        self._compiled.add(candidate)
        for index, photo in enumerate(photos):
            mask = new.masks[index]
            yield Row(
                method=candidate.method,
                density=candidate.density,
                prompts=self.options.prompts,
                protocol=self.options.protocol,
                image=photo.name,
                iou=iou(mask, photo.mask),
                boundary_iou=boundary_iou(mask, photo.mask),
                agreement=iou(mask, dense.masks[index]),
                feature_error=errors[index],
                seconds=new.seconds / min(self.options.batch, len(self.pairs)),
                compiled=compiled,
            )


def _photo_or_problem(pair: Pair, reader: PhotoReader) -> Photo | str:
    try:
        return read_photo(pair, reader)
    except ValueError as error:
        return str(error)
