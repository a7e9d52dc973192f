"""`sparsesam segment-dataset`: masks of every photo of a data set, as COCO's results.

The results of shard 17 are `STORE/results/00000017.json`, a JSON list with a result a line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.datasets.jobs import EncodingWorker, ModelOptions, source_settings
from sparsesam_jax.datasets.loading import LoadedPhoto, LoadPhoto
from sparsesam_jax.datasets.prompt_files import ObjectPrompt, Prompts
from sparsesam_jax.datasets.sources import Source
from sparsesam_jax.datasets.store import PhotoRecord, Store
from sparsesam_jax.predict.image_files import DEFAULT_READER, PhotoReader

if TYPE_CHECKING:
    from sparsesam_jax.datasets.encoder import Launched

KIND = "masks"
Result = dict[str, Any]  # one of COCO's


@dataclasses.dataclass(frozen=True, kw_only=True)
class EverythingOptions:
    """How masks are found without prompts, as `AutomaticMaskGenerator` has it."""

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    min_mask_region_area: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskJob:
    """Masks of a data set.

    Attributes:
        source: The photos.
        model: The model.
        prompts: What is asked for; None asks for everything.
        everything: How everything is found.
        reader: How photos are read.
    """

    source: Source
    model: ModelOptions
    prompts: Prompts | None = None
    everything: EverythingOptions = EverythingOptions()
    reader: PhotoReader = DEFAULT_READER

    def loader(self) -> LoadPhoto:
        """How a photo is read: at the size that the model takes, or as it is for everything."""
        side = None if self.prompts is None else self.model.side
        return LoadPhoto(source=self.source, reader=self.reader, long_side=side)

    def store(self, path: str | Path) -> Store:
        """The job's store, which is made if there is none."""
        asked = {"prompts": None if self.prompts is None else self.prompts.digest}
        if self.prompts is None:
            asked = {"everything": dataclasses.asdict(self.everything)}
        settings = {
            "kind": KIND,
            **asked,
            **self.model.settings(),
            **source_settings(self.source, self.reader),
        }
        return Store.create(path, settings, {})

    def worker(self, store: Store) -> PromptedWorker | EverythingWorker:
        """The model at work."""
        return EverythingWorker(self) if self.prompts is None else PromptedWorker(self, store)


class PromptedWorker(EncodingWorker):
    """Runs a `MaskJob` with prompts, see `jobs.Worker`: batches are encoded, photos decoded."""

    busy_s = None  # the decoder's share is not known

    def __init__(self, job: MaskJob, store: Store):
        from sparsesam_jax.datasets.encoder import BatchEncoder

        assert job.prompts is not None
        predictor, memory = job.model.predictor(), store.path / "batch_sizes.json"
        super().__init__(BatchEncoder(predictor, job.model.batch, memory))
        self._prompts, self._predictor = job.prompts, predictor
        self.metadata: Mapping[str, str] = {}

    def finish(
        self, photos: Sequence[LoadedPhoto], launched: Launched
    ) -> Iterator[tuple[PhotoRecord, list[Result]]]:
        """Each photo's record and its results."""
        import jax

        # From all devices to the first, which decodes.
        device = self.encoder.devices[0]
        arrays = launched.arrays()
        for place, photo in enumerate(photos):
            one = jax.tree.map(lambda x, at=place: jax.device_put(x[at : at + 1], device), arrays)
            image_id, objects = self._prompts.of(photo.name, photo.row)
            results = self._masks(photo, image_id, objects, one, launched.crop) if objects else []
            yield _record(photo, image_id, results), results

    def open(self, store: Store, shard: int) -> ResultShard:
        """Begin to write a shard."""
        return ResultShard(store, shard)

    def _masks(
        self,
        photo: LoadedPhoto,
        image_id: int,
        objects: Sequence[ObjectPrompt],
        arrays: Any,
        crop: tuple[int, int],
    ) -> list[Result]:
        from sparsesam_jax.predict.embedding import Embedding
        from sparsesam_jax.predict.finite import check_finite
        from sparsesam_jax.predict.prompt_arrays import (
            ImagePrompt,
            ImageSizes,
            PromptArrays,
            pad_together,
        )

        predictor = self._predictor
        height, width = photo.pixels.shape[:2]
        sizes = ImageSizes(photo.size, (height, width))
        embedding = Embedding(
            arrays.features,
            arrays.early_features,
            (sizes,),
            predictor.fingerprint,
            self.encoder.frame(crop),
        )
        low_res = (4 * arrays.features.shape[1], 4 * arrays.features.shape[2])
        each = [ImagePrompt(**o.prompt.arguments, mask_input=None) for o in objects]
        given = [prompt.arrays(sizes, low_res) for prompt in each]
        length = max(a.labels.shape[1] for a in given)
        points, labels, _ = pad_together(given, 1, length)
        ((masks, iou, logits),) = predictor.predict_arrays(
            embedding,
            [PromptArrays(points[:, 0], labels[:, 0], None)],
            multimask_output=False,
            mask_format="rle",
        )
        check_finite(predictor.sam, iou, logits)
        return [
            {
                "image_id": image_id,
                "category_id": one.category,
                "score": float(score) if one.score is None else one.score,
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},
            }
            for one, (mask,), (score,) in zip(objects, masks, iou, strict=True)
        ]


class EverythingWorker:
    """Runs a `MaskJob` without prompts, photo by photo, see `jobs.Worker`."""

    busy_s = None
    batch = 1

    def __init__(self, job: MaskJob):
        from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator

        self.metadata: Mapping[str, str] = {}
        self._generator = AutomaticMaskGenerator(
            job.model.predictor(), output_mode="coco_rle", **dataclasses.asdict(job.everything)
        )

    def group(self, photo: LoadedPhoto, /) -> Hashable:
        """Nothing is shared."""
        return photo.row

    def launch(self, photos: Sequence[LoadedPhoto], /) -> None:
        """The generator does all in `finish`."""

    def wait(self, launched: None, /) -> None:
        """Nothing was launched."""

    def finish(
        self, photos: Sequence[LoadedPhoto], launched: None
    ) -> Iterator[tuple[PhotoRecord, list[Result]]]:
        """Each photo's record and its results."""
        for photo in photos:
            results = [
                {
                    "image_id": photo.row,
                    "category_id": 1,
                    "score": float(mask["predicted_iou"]),
                    "stability_score": float(mask["stability_score"]),
                    "bbox": mask["bbox"],
                    "segmentation": mask["segmentation"],
                }
                for mask in self._generator.generate(photo.pixels)
            ]
            yield _record(photo, photo.row, results), results

    def open(self, store: Store, shard: int) -> ResultShard:
        """Begin to write a shard."""
        return ResultShard(store, shard)


class ResultShard:
    """The results of a shard, which are kept until all of its photos have theirs."""

    def __init__(self, store: Store, shard: int):
        self._path = results_path(store, shard)
        self._lines: dict[int, list[str]] = {}

    def add(self, row: int, results: list[Result], /) -> None:
        """Keep a photo's results."""
        self._lines[row] = _lines(results)

    def commit(self) -> None:
        """Write the file."""
        lines = [line for _, photo in sorted(self._lines.items()) for line in photo]
        self._path.parent.mkdir(exist_ok=True)
        with atomic_path(self._path, mark="shard") as temporary:
            temporary.write_text(_as_list(lines), "utf-8")

    def abort(self, error: BaseException) -> None:
        """Nothing is written yet."""


def results_path(store: Store, shard: int) -> Path:
    """Where a shard's results lie."""
    return store.path / "results" / f"{shard:08d}.json"


def damaged(store: Store, shard: int) -> Iterator[str]:
    """What of a shard is not as its index says."""
    path = results_path(store, shard)
    try:
        lines = [json.dumps(result) for result in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError) as error:
        yield f"{path}: {error}"
        return
    for record in store.index(shard).to_pylist():  # in the order of the results
        if record["error"] is None:
            found, lines = lines[: record["masks"]], lines[record["masks"] :]
            if _sha256(found) != record["sha256"]:
                yield f"row {record['row']} ({record['name']}): other masks than were written"


def export(store: Store, path: Path) -> int:
    """Write the results of all shards as one file of COCO's, and return how many there are.

    Raises:
        ValueError: The store has no masks, or is not complete.
        OSError: The file cannot be written.
    """
    if store.kind != KIND:
        raise ValueError(f"store must be one of {KIND}, got one of {store.kind}")
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for shard in range(store.num_shards):
            if not store.is_done(shard):
                raise ValueError(f"store must be complete, got shard {shard} missing")
            for line in results_path(store, shard).read_text("utf-8").splitlines()[1:-1]:
                file.write(("[\n" if count == 0 else ",\n") + line.rstrip(","))
                count += 1
        file.write("\n]\n" if count else "[\n]\n")
    return count


def _record(photo: LoadedPhoto, image_id: int, results: list[Result]) -> PhotoRecord:
    return PhotoRecord(
        row=photo.row,
        name=photo.name,
        image_id=image_id,
        height=photo.size[0],
        width=photo.size[1],
        masks=len(results),
        photo_sha256=photo.sha256,
        sha256=_sha256(_lines(results)),
    )


def _lines(results: list[Result]) -> list[str]:
    return [json.dumps(result, allow_nan=False) for result in results]


def _as_list(lines: list[str]) -> str:
    return "[\n" + ",\n".join(lines) + ("\n]\n" if lines else "]\n")


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
