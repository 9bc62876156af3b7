"""int8 copies, tuning profiles and blobs compiled ahead of time, on golden models."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import golden, smallest_cosine
from npu_proxy import Engine, InputError, ModelError, Settings
from npu_proxy.devices.chain import compile_blobs
from npu_proxy.devices.shapes import ROW_TOKENS, static_shapes
from npu_proxy.devices.worker.blobs import stored_blobs
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import DeviceError
from npu_proxy.models import quantized, tuning
from npu_proxy.models.layout import read_spec
from npu_proxy.models.tuning import TuningChoice, TuningProfile, TuningTrial, apply_profile, save_profile
from npu_proxy.prepare.quantize import SentencePairs, calibration_batches, quantize, read_pairs
from npu_proxy.prepare.tune import candidates, sample_texts, tune
from npu_proxy.targets import ANY_PLATFORM, TARGETS

MODEL = golden("mean")[0]
CLS = golden("cls")[0]


def pairs_of(model: Path, count: int = 300) -> SentencePairs:
    """Pairs whose scores are the model's own cosines, so that fp32 is perfect and every loss shows."""
    texts = sample_texts(2 * count)
    with Engine(model, device="cpu") as engine:
        vectors = engine.embed(texts)
    cosines = (vectors[:count] * vectors[count:]).sum(1)
    return SentencePairs(left=texts[:count], right=texts[count:], scores=[float(cosine) for cosine in cosines])


@pytest.fixture(scope="module")
def pairs() -> SentencePairs:
    return pairs_of(MODEL)


@pytest.mark.slow
def test_an_int8_copy_is_measured_kept_and_served_under_its_own_fingerprint(
    tmp_path: Path, pairs: SentencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    from npu_proxy.prepare import quantize as module

    folder = tmp_path / "my model"  # a folder may have a name that no model of the store can have
    shutil.copytree(MODEL, folder)
    settings = Settings(model=(str(folder),), store=tmp_path, device="cpu")
    with pytest.raises(ModelError, match="npu-proxy quantize"):
        Engine(settings=replace(settings, precision="int8")).start()
    with pytest.raises(ModelError, match="more than 0; it was not kept"):
        quantize(settings, pairs, most_loss=0.0)
    monkeypatch.setattr(module, "_LEAST_COSINE", 0.99999)
    with pytest.raises(ModelError, match="golden text in int8"):
        quantize(settings, pairs, most_loss=20.0)
    monkeypatch.setattr(module, "_LEAST_COSINE", 0.9)
    assert not list((tmp_path / "quantized").iterdir())
    said: list[str] = []
    report = quantize(settings, pairs, most_loss=20.0, say=said.append)
    assert report.pairs == 150  # the other half was calibrated on
    assert report.spearman_fp32 == pytest.approx(100)
    assert 0 < report.loss < 20
    assert 0.9 < report.least_cosine < 1
    assert len(said) == 2
    texts = golden("mean")[1]
    with (
        Engine(settings=replace(settings, precision="int8", device="npu-sim,cpu", fallback=False)) as sim,
        Engine(settings=replace(settings, precision="int8")) as cpu,
        Engine(settings=settings) as exact,
    ):
        reports = [(device.name, device.precision, device.state) for device in sim.device.reports()]
        assert reports == [("npu-sim", "int8", "serving")]
        assert cpu.spec.fingerprint == sim.spec.fingerprint == report.fingerprint != exact.spec.fingerprint
        vectors, wanted = cpu.embed(texts), exact.embed(texts)
        assert smallest_cosine(sim.embed(texts), vectors) > 0.999
        assert 0.9 < smallest_cosine(vectors, wanted) < 0.999999  # it is int8 that runs
    again = quantize(settings, pairs, texts, most_loss=20.0)
    assert {copy.fingerprint for copy in quantized.int8_reports(tmp_path)} == {report.fingerprint, again.fingerprint}
    assert quantized.int8_spec(tmp_path, read_spec(MODEL)).fingerprint == again.fingerprint  # the newest
    (tmp_path / "quantized" / again.fingerprint / "graph.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"graph\.bin is damaged"):
        Engine(settings=replace(settings, precision="int8")).start()


def test_calibration_batches_hold_every_text_once() -> None:
    spec = read_spec(MODEL)
    texts = sample_texts(50)
    batches = list(calibration_batches(spec, RequestTokenizer(spec), texts))
    assert sum(len(batch.slots) for batch in batches) == 50
    assert len({batch.shape for batch in batches}) > 1


def test_pairs_are_read_in_every_format_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"sentence1": f"one {i}", "sentence2": f"two, {i}", "score": i / 10} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("".join(f"g\tf\ty\t{i}\t{i / 10}\tone {i}\ttwo, {i}\n" for i in range(120)))
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.csv"):
        found = read_pairs(tmp_path / name)
        assert (found.left[3], found.right[3], found.scores[3]) == ("one 3", "two, 3", 0.3)
    (tmp_path / "e.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    (tmp_path / "f.csv").write_text("a,b\n1,2\n")
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps(row | {"sentence1": " "}) for row in rows))
    (tmp_path / "g.jsonl").write_text(json.dumps(rows[0]))
    for name, words in {
        "e.jsonl": "score",
        "f.csv": "cannot be read as sentence pairs",
        "g.jsonl": "at least 100",
        "h.txt": "h.txt",
    }.items():
        with pytest.raises(InputError, match=words):
            read_pairs(tmp_path / name)


@pytest.mark.slow
def test_tuning_measures_every_candidate_and_the_settings_follow_the_fastest(tmp_path: Path) -> None:
    settings = Settings(model=(str(MODEL),), store=tmp_path, device="cpu")
    with pytest.raises(InputError, match="rounds"):
        tune(settings, rounds=0)
    found = tune(settings, sample_texts(60), rounds=2, say=lambda line: None)
    spec = read_spec(MODEL)
    assert {trial.choice for trial in found.trials} == set(candidates(settings, spec))
    assert not any(trial.error for trial in found.trials)
    assert all(trial.mean_cosine > 0.999 for trial in found.trials)
    assert [trial.ratio for trial in found.trials] == sorted((trial.ratio for trial in found.trials), reverse=True)
    for precision in ("fp32", "fp16") if len(found.trials) > 6 else ("fp32",):
        best = next(trial.choice for trial in found.trials if trial.choice.precision == precision)
        chosen = apply_profile(replace(settings, precision=precision), spec)
        assert (chosen.precision, chosen.streams, chosen.row_tokens) == (precision, best.streams, best.row_tokens)
    off = apply_profile(replace(settings, profile=False), spec)
    assert (off.streams, off.row_tokens) == (None, None)


def test_a_choice_that_is_wrong_or_does_not_run_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_proxy.prepare import tune as module

    choices = [
        TuningChoice(device="debug"),
        TuningChoice(device="cpu", precision="int8"),
        TuningChoice(device="cpu", streams=1, row_tokens=256),
    ]
    monkeypatch.setattr(module, "candidates", lambda settings, spec: iter(choices))
    found = tune(Settings(model=(str(MODEL),), store=tmp_path), sample_texts(40), rounds=2, say=lambda line: None)
    assert [trial.choice for trial in found.usable] == [choices[2]]
    errors = {trial.choice: trial.error for trial in found.trials}
    assert "vectors differ" in errors[choices[0]]
    assert "npu-proxy quantize" in errors[choices[1]]


def test_a_profile_fills_in_only_unset_settings_and_never_changes_vectors(tmp_path: Path) -> None:
    spec = read_spec(MODEL)
    base = Settings(model=(str(MODEL),), store=tmp_path)

    def store(*choices: TuningChoice) -> None:
        trials = [TuningTrial(choice=choice, ratio=9.0 - number) for number, choice in enumerate(choices)]
        save_profile(tmp_path, TuningProfile(model="m", fingerprint=spec.fingerprint, machine="here", trials=trials, unix=0.0))

    store(
        TuningChoice(device="onnx"),
        TuningChoice(device="cpu", precision="int8", streams=4, row_tokens=1024),
        TuningChoice(device="cpu", streams=1, row_tokens=256),
    )
    plain = apply_profile(replace(base, device="cpu"), spec)
    assert (plain.device, plain.precision, plain.streams, plain.row_tokens) == ("cpu", "fp32", 1, 256)
    int8 = apply_profile(replace(base, device="cpu", precision="int8"), spec)
    assert (int8.streams, int8.row_tokens) == (4, 1024)
    own = apply_profile(replace(base, device="cpu", row_tokens=64, threads=2), spec)
    assert (own.row_tokens, own.streams) == (64, None)  # its streams were measured with all threads
    elsewhere = apply_profile(replace(base, device="npu-sim,cpu"), spec)
    assert (elsewhere.device, elsewhere.row_tokens) == ("npu-sim,cpu", None)
    if base.device == "auto" and TARGETS["npu"].missing() and TARGETS["gpu"].missing():
        assert apply_profile(base, spec).device == "cpu"
    next((tmp_path / "profiles").iterdir()).write_text("{")
    assert apply_profile(base, spec).row_tokens is None


def test_auto_puts_the_fastest_first_once_all_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(MODEL)
    base = Settings(model=(str(MODEL),), store=tmp_path)
    monkeypatch.setattr(tuning, "device_chain", lambda device: ["npu", "gpu", "cpu"] if device == "auto" else device.split(","))
    tried = [TuningChoice(device="gpu", row_tokens=256), TuningChoice(device="cpu", streams=2), TuningChoice(device="npu")]
    for choices, expected in (
        (tried, "gpu,npu,cpu"),
        (tried[1:], "auto"),  # the GPU came later
        ([tried[1], tried[0], tried[2]], "cpu"),
    ):
        trials = [TuningTrial(choice=choice, ratio=9.0 - number) for number, choice in enumerate(choices)]
        save_profile(tmp_path, TuningProfile(model="m", fingerprint=spec.fingerprint, machine="here", trials=trials, unix=0.0))
        assert apply_profile(base, spec).device == expected
    assert apply_profile(replace(base, device="npu,cpu"), spec).row_tokens is None


def test_removing_a_model_removes_what_was_prepared_for_it(tmp_path: Path) -> None:
    from npu_proxy.prepare.artifacts import remove_artifacts

    spec = read_spec(CLS)
    settings = apply_profile(Settings(model=(str(CLS),), store=tmp_path, device="npu-sim", compile_cache_mb=0), spec)
    compile_blobs(settings, spec, "npu-sim", ANY_PLATFORM)
    save_profile(tmp_path, TuningProfile(model="m", fingerprint=spec.fingerprint, machine="here", trials=[], unix=0.0))
    remove_artifacts(settings, CLS)
    assert not list((tmp_path / "compiled").iterdir())
    assert not list((tmp_path / "profiles").iterdir())


def test_blobs_made_ahead_are_imported_and_bad_ones_compiled_again(tmp_path: Path) -> None:
    settings = apply_profile(Settings(model=(str(CLS),), store=tmp_path, device="npu-sim", compile_cache_mb=0), read_spec(CLS))
    spec, target = read_spec(CLS), TARGETS["npu-sim"]
    folder, made = compile_blobs(settings, spec, "npu-sim", ANY_PLATFORM)
    shapes = static_shapes(spec.max_length, ROW_TOKENS, packed=True)
    assert [blob.shape for blob in made] == shapes
    assert all(blob.size > 1000 and blob.seconds > 0 for blob in made)
    files = [stored_blobs(tmp_path, target, spec, shape) for shape in shapes]
    assert all(len(found) == 1 for found in files)
    assert sorted(folder.iterdir()) == sorted(path for found in files for path in found)
    texts, vectors = golden("cls")[1:]
    for content in (None, b"not a blob"):
        if content:
            files[0][0].write_bytes(content)
        with Engine(settings=replace(settings, fallback=False)) as engine:
            np.testing.assert_allclose(engine.embed(texts, normalize=False), vectors, atol=2e-5)


def test_a_compiler_that_is_missing_or_takes_too_long_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    settings = apply_profile(Settings(model=(str(CLS),), store=tmp_path), read_spec(CLS))
    if TARGETS["npu"].missing():
        with pytest.raises(DeviceError, match="this machine has no compiler for it"):
            compile_blobs(settings, read_spec(CLS), "npu", "4000")
    with pytest.raises(DeviceError, match="compile_timeout"):
        compile_blobs(replace(settings, compile_timeout=0.05), read_spec(CLS), "npu-sim", ANY_PLATFORM)
    assert not list((tmp_path / "compiled").iterdir())
