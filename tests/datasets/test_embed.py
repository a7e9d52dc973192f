"""`sparsesam embed` end to end, on drawn photos and a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
import zarr
from eight_devices import loaded
from killed import command, contents, draw, environment, run_and_kill
from models import SMALL, random_weights
from PIL import Image

from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.cli.app import main
from sparsesam_jax.datasets import EmbeddingStore
from sparsesam_jax.datasets.embed import EmbedJob
from sparsesam_jax.datasets.encoder import BatchEncoder
from sparsesam_jax.datasets.engine import run_shards
from sparsesam_jax.datasets.jobs import ModelOptions
from sparsesam_jax.datasets.sources import find_source, part_of
from sparsesam_jax.datasets.store import Store

ENCODER = dataclasses.replace(SMALL.image_encoder, depth=2, global_attn_indexes=(0,))
MODEL = dataclasses.replace(SMALL, image_encoder=ENCODER)
COUNT = 13
OPTIONS = ["--batch", "2", "--shard-size", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "small.safetensors", MODEL))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "photos", COUNT, broken=[2, 3])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: str) -> Path:
    """The store of an undisturbed run."""
    store = tmp_path_factory.mktemp("whole") / "store"
    assert embed(photos, weights, store) == 1
    return store


def embed(photos: Path, weights: str, store: Path, *args: str) -> int:
    return main(["embed", str(photos), "--out", str(store), "--weights", weights, *OPTIONS, *args])


def test_embeddings_are_the_predictors(photos, weights, whole, capsys) -> None:
    store = EmbeddingStore(whole)
    assert len(store) == COUNT
    predictor, other = (SamPredictor(Sam.from_pretrained(weights)) for _ in range(2))
    for row in (0, 7, 12):
        predictor.set_image(np.asarray(Image.open(photos / f"{row:05}.jpg")))
        found, expected = store[row], predictor.embedding
        assert found.features.dtype == np.float16
        assert (found.sizes, found.frame) == (expected.sizes, expected.frame)
        # Half an epsilon of float16 at values below 4.
        np.testing.assert_allclose(found.features, expected.features, atol=2**-10)
        other.set_embedding(store[f"{row:05}.jpg"])
        box = np.array([5, 5, 40, 40])
        masks = [p.predict(box=box)[0] for p in (predictor, other)]
        assert (masks[0] == masks[1]).mean() > 0.99
    with pytest.raises(ValueError, match=r"row 2 of .* has no embedding: image must be a picture"):
        store[2]
    with pytest.raises(IndexError, match="row must be below 13, got 13"):
        store[13]
    index = store.store.index().to_pylist()
    assert [record["row"] for record in index] == list(range(COUNT))
    assert [record["row"] for record in index if record["error"]] == [2, 3]
    assert index[0]["photo_sha256"] and index[0]["width"] == 128
    assert main(["store", "info", str(whole)]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 shards" in text and "00002.jpg: image must be a picture" in text


@pytest.mark.parametrize(("dtype", "size"), [("float16", "128"), ("bfloat16", "304")])
def test_zarrs_libraries_read_the_store(tmp_path, photos, weights, dtype, size) -> None:
    options = ["--store-dtype", dtype, "--image-size", size, "--padding", "crop", "--limit", "5"]
    assert embed(photos, weights, tmp_path / "store", *options) == 1
    store, side = EmbeddingStore(tmp_path / "store"), int(size) // 16
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/store/features/"},
    }
    arrays = [tensorstore.open(spec, read=True).result().read().result()]
    if dtype == "float16":  # zarr-python has no bfloat16
        group = zarr.open_group(tmp_path / "store", mode="r")
        arrays.append(np.asarray(group["features"]))
    for array in arrays:
        assert array.shape == (5, side, side, 32)
        assert not array[2].any()
        for row in (0, 1, 4):
            features = store[row].features[0]
            height, width, _ = features.shape
            np.testing.assert_array_equal(array[row, :height, :width], features)
            assert not array[row, height:].any() and not array[row, :, width:].any()
    frames = {store[row].frame for row in (0, 1, 4)}
    assert frames == ({None} if size == "128" else {None, (19, 19)})


def test_a_killed_run_ends_with_the_same_bytes(tmp_path, photos, weights, whole) -> None:
    args = command("embed", str(photos), "--out", str(tmp_path / "store"), "--weights", weights)
    args += [*OPTIONS[:-1], "1"]  # with a worker process, which ends too
    assert run_and_kill(args, 0)  # after its first shard
    assert subprocess.run(args, env=environment(), capture_output=True).returncode == 1
    assert contents(tmp_path / "store") == contents(whole)


def test_what_is_done_is_not_done_again(tmp_path, photos, weights, whole, capsys) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    (store / "index" / "00000001.parquet").unlink()
    (store / "features" / "c" / "1" / "0" / "0" / ".0.shard.partial").write_text("half a shard")
    capsys.readouterr()
    assert embed(photos, weights, store) == 1
    out, err = capsys.readouterr()
    (line,) = (json.loads(line) for line in out.splitlines())
    assert (line["shard"], line["photos"], line["failed"], line["seconds_left"]) == (1, 4, 0, 0)
    assert 0 <= line["device_busy"] <= 1 and line["photos_per_second"] > 0
    assert "2 of 13 photos left out" in err
    assert contents(store) == contents(whole)


def test_two_parts_fill_one_store(tmp_path, photos, weights, whole) -> None:
    codes = [embed(photos, weights, tmp_path / "s", "--shard", f"{i}/2") for i in (1, 0)]
    assert codes == [0, 1]  # the broken photos are in the first half
    assert contents(tmp_path / "s") == contents(whole)


LOCKED = """
import sys
from sparsesam_jax.datasets.store import Store
with Store(sys.argv[1]).locked(range(2, 4)):
    print("locked", flush=True)
    input()
"""


def test_two_runs_at_once_are_an_error(photos, weights, whole, capsys) -> None:
    before = contents(whole)
    args = [sys.executable, "-c", LOCKED, str(whole)]
    other = subprocess.Popen(
        args, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    assert embed(photos, weights, whole) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert embed(photos, weights, whole, "--shard", "0/2") == 1  # whose shards nobody has
    other.communicate("\n")
    assert embed(photos, weights, whole) == 1
    assert contents(whole) == before


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, photos, weights, whole, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # photos take 4,096 bytes each
    try:
        assert embed(photos, weights, tmp_path / "store") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and "features/c/1" in last
    assert not [*(tmp_path / "store").rglob("*.partial")]
    assert embed(photos, weights, tmp_path / "store") == 1
    assert contents(tmp_path / "store") == contents(whole)


def test_damage_is_found(tmp_path, whole, capsys) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    assert main(["store", "verify", str(store)]) == 0
    assert "4 of 4 shards, 11 photos, 0 damaged" in capsys.readouterr().out
    path = store / "features" / "c" / "1" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    index = store / "index" / "00000003.parquet"
    index.write_bytes(index.read_bytes()[:-9])
    (store / "features" / "c" / "2" / "0" / "0" / "0").unlink()
    assert main(["store", "verify", str(store)]) == 1
    out, err = capsys.readouterr()
    assert "row 5 (00005.jpg): other bytes than were written" in err
    assert "00000003.parquet is damaged" in err
    assert "6 damaged" in out
    with pytest.raises(ValueError, match=r"row 5 of .* is damaged"):
        EmbeddingStore(store)[5]


def test_strict_stops_at_the_first_bad_photo(tmp_path, photos, weights, capsys) -> None:
    assert embed(photos, weights, tmp_path / "store", "--strict") == 2
    assert "error: 00002.jpg: image must be a picture" in capsys.readouterr().err
    assert not [*(tmp_path / "store").rglob("*.parquet")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--batch", "4"], "one with the same batch, got 4 instead of 2"),
        (["--density", "0.5"], "one with the same density, got 0.5 instead of None"),
        (["--limit", "5"], "one with the same rows, got 5 instead of 13"),
        (["--image-size", "100"], "image_size must be a multiple of 16, got 100"),
        (["--shard", "2/2"], "--shard must be I/N"),
        (["--workers", "-1"], "workers must be 0 (threads) or more"),
        (["--weights", "absent"], "weights must be the name of embedded ones"),
    ],
)
def test_wrong_arguments(photos, weights, whole, args, message, capsys) -> None:
    before = contents(whole)
    assert embed(photos, weights, whole, *args) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
    assert contents(whole) == before


def test_a_folder_with_other_files_is_no_store(photos, weights, capsys) -> None:
    before = contents(photos)
    assert embed(photos, weights, photos) == 2
    assert "out must be a store or an empty folder" in capsys.readouterr().err
    assert contents(photos) == before
    with pytest.raises(ValueError, match=r"store must be a folder with a store\.json"):
        Store(photos)


def test_batches_are_cut_in_half_where_memory_ends(tmp_path: Path, weights: str) -> None:
    predictor = SamPredictor(Sam.from_pretrained(weights))
    sizes = []

    def encode(padded, *rest):
        sizes.append(len(padded))
        if len(padded) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return predictor.compiled.encode_padded(list(padded), *rest)

    memory = tmp_path / "batch_sizes.json"
    encoder = BatchEncoder(predictor, 8, memory, devices=jax.devices()[:1], encode=encode)
    features = encoder.wait(encoder.launch(loaded(5))).arrays().features
    assert sizes == [8, 4, 2, 2, 2] and features.shape == (5, 8, 8, 32)
    encoder.wait(encoder.launch(loaded(2)))
    assert sizes[5:] == [2]  # remembered
    again = BatchEncoder(predictor, 8, memory, devices=jax.devices()[:1], encode=encode)
    again.wait(again.launch(loaded(2)))
    assert sizes[6:] == [2]  # by the next run too
    whole = BatchEncoder(predictor, 8, devices=jax.devices()[:1])
    expected = whole.wait(whole.launch(loaded(5))).arrays().features
    np.testing.assert_allclose(features, expected, atol=1e-5)  # float32, another batch size

    def never(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with pytest.raises(ValueError, match="one photo of 128 x 128 does not"):
        BatchEncoder(predictor, 8, devices=jax.devices()[:1], encode=never).launch(loaded(1))


def test_eight_devices_have_the_features_of_one(weights: str) -> None:
    env = environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    args = [sys.executable, str(Path(__file__).with_name("eight_devices.py")), weights]
    result = subprocess.run(args, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_same_in_python(tmp_path, photos, weights, whole) -> None:
    model = ModelOptions(weights=weights, batch=2)
    source = find_source(str(photos), shard_size=4)
    with_limits = json.loads((whole / "store.json").read_text())["reader"]
    job = EmbedJob(source=source, model=model)
    store, reports = job.store(tmp_path / "store"), []
    run_shards(job, store, part_of(store.num_shards, (0, 4)), reports.append)
    assert [(r.shard, r.photos, [*r.problems]) for r in reports] == [
        (0, 2, ["00002.jpg", "00003.jpg"])
    ]
    assert with_limits["max_side"] == 20000 and store.settings["reader"]["max_side"] is None
    assert store.settings["patch_size"] == ENCODER.patch_size
    path = "features/c/0/0/0/0"
    assert (store.path / path).read_bytes() == (whole / path).read_bytes()
