"""Commands that examine the machine and prepare a model for it: doctor, certify, quantize, tune, convert, compare, compile."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from npu_proxy.commands.shared import DEFAULTS, SharedSettings, say, with_model
from npu_proxy.errors import DeviceError, InputError, SettingsError
from npu_proxy.settings import Settings
from npu_proxy.targets import ANY_PLATFORM, GRAPH_FILES, TARGETS, device_chain

_MARKS = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}


def doctor(*, json: bool = False, settings: SharedSettings = DEFAULTS) -> None:
    """Check which devices of this machine can compute embeddings, and how to fix problems. Exit code 0 if any device can serve.

    Parameters
    ----------
    json
        Print the findings as one JSON object.
    """
    import msgspec

    from npu_proxy.devices.doctor import diagnose

    diagnosis = diagnose(settings)
    if json:
        print(msgspec.json.encode(diagnosis).decode())
        sys.exit(0 if diagnosis.serves else 1)
    for finding in diagnosis.findings:
        print(f"{_MARKS[finding.level]} {finding.topic:10} {finding.text}")
        if finding.fix:
            print(f"{'':13} -> {finding.fix}")
    print(f"\n{', '.join(diagnosis.devices)} can serve" if diagnosis.devices else "\nno device can serve")
    sys.exit(0 if diagnosis.serves else 1)


def certify(model: str = "", /, *, settings: SharedSettings = DEFAULTS) -> None:
    """Compare an accelerator's vectors for golden texts with fp32 on the CPU, in every batch shape, and store the result.

    The accelerator is the first device in the setting `device`. Exit code 0 if it may serve.

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    """
    from npu_proxy.devices.chain import certify as examine
    from npu_proxy.engine.golden import GoldenBatches
    from npu_proxy.engine.tokenize import RequestTokenizer
    from npu_proxy.models.resolve import resolve

    settings, spec = resolve(with_model(settings, model))
    name = _accelerator(settings, "the CPU is the reference that other devices are compared with")
    verdicts, reason = examine(settings, spec, GoldenBatches(RequestTokenizer(spec), spec), name)
    for verdict in verdicts:
        print(f"{verdict.subject.shape:12} cosine {verdict.cosine:.6f}  {verdict.reason or 'certified'}")
    if reason:
        raise DeviceError(f"{name} may not serve {spec.name}: {reason}")
    print(f"{name} may serve {spec.name}")


def quantize(
    model: str = "",
    /,
    *,
    pairs: Path,
    sample: Path | None = None,
    text_field: str = "text",
    most_loss: float = 1.0,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Make an int8 copy of a model (weights and activations), and keep it if the loss of quality is small.

    Serve it with `--precision int8`. Its vectors have their own fingerprint and must not be mixed with others.
    Needs NNCF: pip install 'npu-proxy[quantize]'.

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    pairs
        File of sentence pairs with human scores, on which quality is measured: the STS benchmark's sts-test.csv, or a .csv,
        .jsonl or .parquet file with the columns sentence1, sentence2 and score.
    sample
        File of texts to calibrate on, similar to those you will embed (.jsonl, .csv, .txt, .parquet); the first 2,000 are
        used. Default: the sentences of every other pair; quality is then measured on the remaining pairs.
    text_field
        Field or column of that file that contains the text.
    most_loss
        Largest acceptable loss of Spearman correlation, in points out of 100.
    """
    from npu_proxy.prepare.quantize import CALIBRATION_TEXTS, read_pairs
    from npu_proxy.prepare.quantize import quantize as make

    settings = with_model(settings, model)
    report = make(settings, read_pairs(pairs), _texts(sample, text_field, CALIBRATION_TEXTS), most_loss=most_loss, say=say)
    print(f"{report.model} int8, fingerprint {report.fingerprint}, {sum(report.files.values()) / 1e6:.1f} MB")
    print(f"Spearman x100 over {report.pairs} pairs: fp32 {report.spearman_fp32:.2f}, int8 {report.spearman:.2f}")
    print(f"cosine of int8 to fp32: mean {report.mean_cosine:.4f}, minimum {report.least_cosine:.4f}")


def tune(
    model: str = "",
    /,
    *,
    sample: Path | None = None,
    text_field: str = "text",
    rounds: int = 3,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Compare devices, precisions, streams and batch sizes, and store the fastest as this machine's profile.

    The profile provides defaults for `device`, `streams` and `row_tokens`, separately for each precision; `--no-profile`
    ignores it. It never changes vectors: choose another precision with `--precision`. int8 is included if `npu-proxy
    quantize` has made an int8 copy.

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    sample
        File of texts similar to those you will embed (.jsonl, .csv, .txt, .parquet); the first 1,000 are used. Default:
        generated texts of realistic lengths.
    text_field
        Field or column of that file that contains the text.
    rounds
        How many times each candidate is measured.
    """
    from npu_proxy.prepare.tune import tune as measure

    profile = measure(with_model(settings, model), _texts(sample, text_field, 1000), rounds=rounds, say=say)
    print(f"{'DEVICE':8} {'PRECISION':9} {'STREAMS':>7} {'ROW':>5} {'TOKENS/S':>9} {'RATIO':>6} {'MEAN COSINE':>11}")
    for trial in profile.trials:
        choice = trial.choice
        print(
            f"{choice.device:8} {choice.precision:9} {choice.streams or '-':>7} {choice.row_tokens or '-':>5}"
            f" {trial.tokens_per_second:9.0f}"
            f" {trial.ratio:5.2f}x {trial.mean_cosine:11.6f} {trial.error}".rstrip()
        )
    fastest = profile.usable[0].choice
    default = next(
        (trial.choice for trial in profile.usable if trial.choice.precision == "fp32" and trial.choice.device not in GRAPH_FILES),
        None,
    )
    print("\nratio: speed relative to the CPU in fp32 without tuning, median of the rounds")
    if default:
        print(f"used by default: {default}")
    if fastest != default:
        flag = f"--device {fastest.device}" if fastest.device in GRAPH_FILES else f"--precision {fastest.precision}"
        print(f"faster: {flag} ({fastest}); do not mix its vectors with vectors stored earlier")


def convert(model: str = "", /, *, output: Path, trust_remote_code: bool = False, settings: SharedSettings = DEFAULTS) -> None:
    """Convert a model of an unsupported architecture to a graph file in a new folder, and compare it with torch.

    Serve it with `--model FOLDER`; it runs on the CPU, with padding. Needs torch and transformers: pip install
    'npu-proxy[convert]'.

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    output
        Folder to create.
    trust_remote_code
        Run Python code from the model's folder, for models that transformers does not implement.
    """
    from npu_proxy.prepare.convert import convert as make

    spec, least = make(with_model(settings, model), output, trust=trust_remote_code, say=say)
    print(f"{output}: {spec.output_type} output, width {spec.width}, {spec.max_length} tokens; minimum cosine to torch {least:.7f}")


def compare(
    model: str = "", /, *, trust_remote_code: bool = False, json: bool = False, settings: SharedSettings = DEFAULTS
) -> None:
    """Compare a model with what its own library computes, over about 60 texts that are easily computed wrongly.

    The library must be installed beside npu-proxy: pip install sentence-transformers (or model2vec). Exit code 1 if any text
    differs.

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    trust_remote_code
        Let the library run Python code from the model's folder.
    json
        Print one JSON object per text.
    """
    from npu_proxy.prepare.compare import agrees, compare_folder, summary

    spec, found = compare_folder(with_model(settings, model), trust=trust_remote_code)
    if json:
        for one in found:
            print(msgspec.json.encode(one).decode())
    else:
        print(summary(spec, found))
    if not all(agrees(one, spec) for one in found):
        raise SystemExit(1)


def compile_model(model: str = "", /, *, platform: str = ANY_PLATFORM, settings: SharedSettings = DEFAULTS) -> None:
    """Compile a model into the store ahead of time, so that worker processes import it instead of compiling it.

    The device is the first one in the setting `device`. To compile for the NPU of another machine, set its platform, and copy
    the store afterwards; this needs an OpenVINO package that contains the compiler (the Windows packages do).

    Parameters
    ----------
    model
        Name, alias or folder. Default: the setting `model`.
    platform
        NPU platform to compile for: 3720 (Meteor Lake, Arrow Lake), 4000 (Lunar Lake), 5010 (Panther Lake); `any` is this
        machine's platform.
    """
    from npu_proxy.devices.chain import compile_blobs
    from npu_proxy.models.resolve import resolve

    settings, spec = resolve(with_model(settings, model))
    name = _accelerator(settings, "the CPU needs no compiled model: it compiles within a second at start-up")
    if platform != ANY_PLATFORM and TARGETS[name].openvino != "NPU":
        raise SettingsError(f"device `{name}` has no platforms; remove --platform", param="platform")
    folder, blobs = compile_blobs(settings, spec, name, platform)
    for blob in blobs:
        print(f"{blob.shape!s:8} {blob.size / 1e6:7.1f} MB {blob.seconds:6.1f} s")
    print(folder)


def _accelerator(settings: Settings, why: str) -> str:
    """The first device in `device`. Raises SettingsError, with ``why`` for the CPU, if it does not run in a worker process."""
    name = device_chain(settings.device)[0]
    if name not in TARGETS or not TARGETS[name].kind.isolated:
        reason = why if name == "cpu" else f"device `{name}` runs in this process"
        raise SettingsError(f"{reason}; choose an accelerator with --device", param="device")
    return name


def _texts(path: Path | None, text_field: str, limit: int) -> list[str]:
    """The first ``limit`` texts of a file that are not blank; [] if there is no file. Raises InputError if the file has none."""
    from itertools import islice

    from npu_proxy.bulk.files import find_inputs
    from npu_proxy.bulk.texts import TextSource, read_texts

    if path is None:
        return []
    source = read_texts(find_inputs([str(path)]), TextSource(field=text_field))
    texts = list(islice(filter(str.strip, source), limit))
    if not texts:
        raise InputError(f"`{path}` contains no texts", param="sample")
    return texts
