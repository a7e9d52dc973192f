"""A run of tuning: its stages, its log, its checkpoints, and the model that comes out."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.tuning.augment import Augmentation, Batch
from sparsesam_jax.tuning.data import Photos
from sparsesam_jax.tuning.lora import has_lora, merge_lora, save_lora
from sparsesam_jax.tuning.objective import Objective
from sparsesam_jax.tuning.parameters import take_apart
from sparsesam_jax.tuning.step import Fixed, Optimiser, State, Step, initial_state
from sparsesam_jax.tuning.validation import validate

LOG = "log.jsonl"
MODEL = "model.safetensors"
LORA = "lora.safetensors"
_CHECKPOINTS = "checkpoints"
_AHEAD = 2  # batches that are made while a step runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with one size of input.

    Attributes:
        image_size: Side of the model's input; a multiple of the patch size. Position tables are
            interpolated where it is not the model's own.
        batch: Photos of a step.
        share: Of the run.
    """

    image_size: int
    batch: int
    share: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on beside model and data.

    Attributes:
        stages: One after the other.
        steps: Length of the run in steps, or
        seconds: in seconds, the compiler's among them. The learning rate then goes by the clock, so
            that no run is like another.
        targets: Targets of a photo in a step.
        accumulate: Micro-batches of a step.
        train: Patterns of what is tuned, see `parameters.take_apart`.
        seed: Of all that is drawn.
        objective: What is minimised.
        optimiser: How.
        augmentation: What is done to the photos.
        log_every: Steps between lines of the log.
        save_every: Steps between checkpoints.
        validate_every: Steps between validations; 0 validates at the end alone.
    """

    stages: tuple[Stage, ...]
    steps: int | None = None
    seconds: float | None = None
    targets: int = 6
    accumulate: int = 1
    train: tuple[str, ...] = ("all",)
    seed: int = 0
    objective: Objective = dataclasses.field(default_factory=Objective)
    optimiser: Optimiser = dataclasses.field(default_factory=Optimiser)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    log_every: int = 10
    save_every: int = 500
    validate_every: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("either steps or seconds must be given")
        if not self.stages:
            raise ValueError("stages must be at least one, got none")
        counts: dict[str, float] = {"length": self.steps or self.seconds or 0}
        counts |= {
            name: getattr(self, name)
            for name in ("targets", "accumulate", "log_every", "save_every")
        }
        for stage in self.stages:
            counts |= {"batch": stage.batch, "share": stage.share, "image_size": stage.image_size}
            if stage.batch % self.accumulate:
                expected = f"a multiple of accumulate ({self.accumulate})"
                raise ValueError(f"batch must be {expected}, got {stage.batch}")
        for name, value in counts.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def stage(self, progress: float) -> int:
        """The number of the stage that a share of the run lies in."""
        ends = np.cumsum([stage.share for stage in self.stages])
        return min(int(np.searchsorted(ends / ends[-1], progress, "right")), len(ends) - 1)


def tune(
    sam: Sam,
    photos: Photos,
    settings: Settings,
    out: Path,
    *,
    teacher: SamModel | None = None,
    validation: Sequence[Photo] = (),
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Sam:
    """Tune a model on all devices that JAX sees.

    `out` gets `settings.json`, `log.jsonl` (a line every `log_every` steps and one a validation),
    `model.safetensors` (the averaged parameters; a low-rank update is merged, and by itself in
    `lora.safetensors`) and checkpoints, of which a run that was ended at
    any moment continues with the same losses.

    Args:
        sam: The model; it stays as it is. Parameters should be float32.
        photos: What it is tuned on.
        settings: Everything else.
        out: Folder of the run.
        teacher: A model that the objective follows.
        validation: Photos that it is measured on.
        resume: Whether to continue the run that `out` holds.
        report: Called with every line of the log.

    Returns:
        The model with the averaged parameters.

    Raises:
        ValueError: `out` holds a run and `resume` is false, or that run has other settings; a batch
            cannot be divided among the devices; or the objective needs a teacher that is not there,
            or features of photos that the augmentation moves.
    """
    run = _Run(sam, photos, settings, out, teacher, resume)
    return run(validation, report)


class _Run:
    def __init__(
        self,
        sam: Sam,
        photos: Photos,
        settings: Settings,
        out: Path,
        teacher: SamModel | None,
        resume: bool,
    ):
        _check_teacher(teacher, photos, settings)
        mesh = Mesh(np.array(jax.devices()), ("data",))
        for stage in settings.stages:
            if stage.batch // settings.accumulate % mesh.size:
                raise ValueError(
                    f"batch must be a multiple of accumulate and of the {mesh.size} devices, "
                    f"got {stage.batch}"
                )
            if stage.image_size % sam.config.image_encoder.patch_size:
                patch = sam.config.image_encoder.patch_size
                raise ValueError(
                    f"image_size must be a multiple of {patch}, got {stage.image_size}"
                )
        self.photos, self.settings, self.out = photos, settings, out
        self.parts = take_apart(sam, settings.train)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.by_photo = NamedSharding(mesh, PartitionSpec("data"))
        self.teacher = teacher and take_apart(teacher, [])
        fixed = Fixed(self.parts.fixed, self.teacher.fixed if self.teacher else {})
        self.fixed = jax.device_put(fixed, self.everywhere)
        # A copy, because a step takes the memory of what it is given.
        copy = self.parts._replace(tuned=jax.tree.map(jnp.copy, self.parts.tuned))
        state = initial_state(copy, settings.optimiser)
        self.state: State = jax.device_put(state, self.everywhere)
        self.elapsed = self.begun = 0.0  # seconds now and at the first step
        self.manager = self._open(resume)
        self.pool = ThreadPoolExecutor(_AHEAD + 1 + len(settings.stages))
        self.batches: collections.deque[tuple[tuple[int, int], Future[Batch]]] = collections.deque()

    def __call__(
        self, validation: Sequence[Photo], report: Callable[[dict[str, Any]], None]
    ) -> Sam:
        settings, step = self.settings, int(self.state.step)
        with self.pool, self.manager, open(self.out / LOG, "a", encoding="utf-8") as log:

            def write(line: dict[str, Any]) -> None:
                log.write(json.dumps(line) + "\n")
                log.flush()
                report(line)

            start = time.perf_counter() - self.elapsed
            compiled = [self.pool.submit(self._compile, stage) for stage in settings.stages]
            compiled[settings.stage(self._progress(step))].result()
            took = time.perf_counter() - start - self.elapsed
            write({"step": step, "compile_seconds": round(took, 1)})
            self.elapsed += took
            self.begun = self.begun or self.elapsed
            # What a validation needs is compiled beside the steps.
            warm = self.pool.submit(validate, self.model(), validation[:1]) if validation else None
            images, last = 0, time.perf_counter()
            record = None
            while (progress := self._progress(step)) < 1:
                index = settings.stage(progress)
                if settings.seconds and index and not compiled[index].done():
                    index -= 1  # rather than to wait for the compiler
                stage, run = settings.stages[index], compiled[index].result()
                batch = self._batch(step, stage)
                waited = record
                self.state, record = run(self.state, self.fixed, batch, np.float32(progress))
                step, images = step + 1, images + stage.batch
                # The host stays one step ahead, so that its clock is the device's.
                jax.block_until_ready(waited)
                self.elapsed = time.perf_counter() - start
                if step % settings.log_every == 0:
                    values = {name: float(value) for name, value in jax.device_get(record).items()}
                    now = time.perf_counter()
                    rate, images, last = images / (now - last), 0, now
                    line = {"step": step, "seconds": round(now - start, 3), "progress": progress}
                    line |= {"image_size": stage.image_size, "images_per_second": round(rate, 1)}
                    write(line | values)
                if step % settings.save_every == 0:
                    self._save(step)
                if settings.validate_every and step % settings.validate_every == 0 and validation:
                    paused = time.perf_counter()
                    write({"step": step, "validation": validate(self.model(), validation)})
                    start, last = (x + time.perf_counter() - paused for x in (start, last))
            self._save(step)
            model = self.model()
            if warm is not None:
                warm.result()
                write({"step": step, "validation": validate(model, validation)})
        return model

    def model(self) -> Sam:
        """The model with the averaged parameters."""
        # Copies on one device, as the model was.
        average = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), self.state.average)
        return self.parts.model(average)

    def _progress(self, step: int) -> float:
        if self.settings.steps is not None:
            return step / self.settings.steps
        assert self.settings.seconds is not None
        return (self.elapsed - self.begun) / max(self.settings.seconds - self.begun, 1e-9)

    def _compile(self, stage: Stage) -> Any:
        settings = self.settings
        step = Step(
            parts=self.parts,
            teacher=self.teacher,
            objective=settings.objective,
            optimiser=settings.optimiser,
            augmentation=settings.augmentation,
            image_size=stage.image_size,
            accumulate=settings.accumulate,
            seed=settings.seed,
        )
        drawn = self.photos.draw(settings.seed, 0, stage.batch, settings.targets)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.by_photo), Batch(*drawn)
        )
        jitted = jax.jit(step.__call__, donate_argnums=0, out_shardings=self.everywhere)
        return jitted.lower(self.state, self.fixed, batch, np.float32(0)).compile()

    def _batch(self, step: int, stage: Stage) -> Batch:
        """The batch of a step; those of the next steps are begun."""
        settings = self.settings

        def make(step: int) -> Batch:
            drawn = self.photos.draw(settings.seed, step, stage.batch, settings.targets)
            return jax.device_put(Batch(*drawn), self.by_photo)

        wanted = [(number, stage.batch) for number in range(step, step + 1 + _AHEAD)]
        while self.batches and self.batches[0][0] != wanted[0]:
            self.batches.popleft()
        for key in wanted[len(self.batches) :]:
            self.batches.append((key, self.pool.submit(make, key[0])))
        return self.batches.popleft()[1].result()

    def _open(self, resume: bool) -> ocp.CheckpointManager:
        """The run's checkpoints, after the last one was read; and its settings and log."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dataclasses.asdict(self.settings), indent=1) + "\n"
        file, log = self.out / "settings.json", self.out / LOG
        if file.exists():
            if not resume:
                raise ValueError(f"out must hold no run, or resume be given, got {str(self.out)!r}")
            if file.read_text(encoding="utf-8") != settings:
                raise ValueError(f"{file} must have this run's settings to resume, got others")
        with atomic_path(file) as temporary:
            temporary.write_text(settings, encoding="utf-8")
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager((self.out / _CHECKPOINTS).absolute(), options=options)
        latest = manager.latest_step()
        if latest is not None:
            target = {"state": self.state, "elapsed": 0.0, "begun": 0.0}
            restored = manager.restore(latest, args=ocp.args.StandardRestore(target))
            self.state = restored["state"]
            self.elapsed, self.begun = float(restored["elapsed"]), float(restored["begun"])
        if log.exists():
            kept = [row for row in _lines(log) if json.loads(row)["step"] <= (latest or 0)]
            with atomic_path(log) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
        return manager

    def _save(self, step: int) -> None:
        jax.block_until_ready(self.state)  # an error of the step is its own, not the checkpoint's
        if step == self.manager.latest_step():
            return
        tree = {"state": self.state, "elapsed": self.elapsed, "begun": self.begun}
        self.manager.save(step, args=ocp.args.StandardSave(tree))
        model = self.model()
        merge_lora(model).save_pretrained(self.out / MODEL)
        if has_lora(model):
            save_lora(model, self.out / LORA)


def _check_teacher(teacher: SamModel | None, photos: Photos, settings: Settings) -> None:
    objective = settings.objective
    given = teacher is not None or photos.features is not None
    if objective.needs_teacher and (not given or (objective.teacher_masks and teacher is None)):
        raise ValueError("objective needs a teacher, got none")
    if given and not objective.needs_teacher:
        raise ValueError("objective must say what is followed of the teacher, got nothing")
    if teacher is None and photos.features is not None:
        moved = {name: getattr(settings.augmentation, name) for name in ("flip", "crop", "paste")}
        if any(moved.values()):
            raise ValueError(f"augmentation must leave photos with features in place, got {moved}")
        for stage in settings.stages:
            rows = photos.features.shape[1]
            if stage.image_size % rows:
                expected = f"that of the {rows} rows of features"
                raise ValueError(f"image_size must be {expected}, got {stage.image_size}")


def _lines(log: Path) -> Iterator[str]:
    """The whole lines of a log; a kill may have cut the last one."""
    return (row for row in log.read_text("utf-8").splitlines(keepends=True) if row.endswith("\n"))
