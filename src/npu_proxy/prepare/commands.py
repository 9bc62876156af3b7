"""The commands that look at the machine and make a model ready for it: doctor, certify, quantize, tune, convert, compile."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_origin

from cyclopts import Parameter

from npu_proxy.devices.kinds import ANY, EXPORTED, TARGETS, chain
from npu_proxy.errors import DeviceError, InputError, ModelError, SettingsError
from npu_proxy.settings import Settings


def _split(kind: object, value: str, *, delimiter: str | None = None) -> list[str]:
    """Several values in one variable stand between commas, since folders may have spaces in their names."""
    if get_origin(kind) is not tuple:
        return [value]
    return [one.strip() for one in value.split(delimiter or ",") if one.strip()]


Shared = Annotated[Settings, Parameter(name="*", group="Settings", negative_iterable=(), env_var_split=_split)]
"""The settings as flags of every command."""
DEFAULTS = Settings()

_MARKS = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}


def doctor(*, json: bool = False, settings: Shared = DEFAULTS) -> None:
    """Say what this machine has for embedding, and the command that mends what it has not. Exit code 0 when something serves.

    Parameters
    ----------
    json
        Print the findings as one JSON object.
    """
    import msgspec

    from npu_proxy.devices.doctor import diagnose

    found = diagnose(settings)
    if json:
        print(msgspec.json.encode(found).decode())
        sys.exit(0 if found.serves else 1)
    for finding in found.findings:
        print(f"{_MARKS[finding.level]} {finding.topic:10} {finding.text}")
        if finding.cure:
            print(f"{'':13} -> {finding.cure}")
    print(f"\n{', '.join(found.devices)} can serve" if found.devices else "\nnothing can serve")
    sys.exit(0 if found.serves else 1)


def certify(model: str = "", /, *, settings: Shared = DEFAULTS) -> None:
    """Compare an accelerator's vectors of golden texts with fp32 on the CPU, in every row shape, and keep the verdict.

    The device is the first of the setting `device`. Exit code 0 when it may serve.

    Parameters
    ----------
    model
        Name, alias or folder; the setting `model` when left out.
    """
    from npu_proxy.devices.chain import certify as judge
    from npu_proxy.devices.chain import served
    from npu_proxy.engine.golden import GoldenRows
    from npu_proxy.engine.tokenize import TextEncoder

    settings, spec = served(_with_model(settings, model))
    name = _accelerator(settings, "the CPU is what others are compared with")
    verdicts, reason = judge(settings, spec, GoldenRows(TextEncoder(spec), spec), name)
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
    settings: Shared = DEFAULTS,
) -> None:
    """Make an int8 copy of a model (weights and activations), measure what it costs in quality, and keep it if that is little.

    Serve it with `--precision int8`. Its vectors have a fingerprint of their own and must not be mixed with others.
    Needs NNCF: pip install 'npu-proxy[quantize]'.

    Parameters
    ----------
    model
        Name, alias or folder; the setting `model` when left out.
    pairs
        Sentence pairs with human scores to measure on: the STS benchmark's sts-test.csv, or .csv, .jsonl or .parquet
        with columns sentence1, sentence2, score.
    sample
        Texts like those you will embed, to calibrate on (.jsonl, .csv, .txt, .parquet), the first 2,000 of them; without
        it, half of the pairs' sentences, and only the other half is measured on.
    text_field
        Field or column of that file that holds the text.
    most_loss
        Points of Spearman correlation (of 100) that int8 may cost.
    """
    from npu_proxy.prepare.quantize import CALIBRATION_TEXTS, read_pairs
    from npu_proxy.prepare.quantize import quantize as make

    settings = _with_model(settings, model)
    report = make(settings, read_pairs(pairs), _texts(sample, text_field, CALIBRATION_TEXTS), most_loss=most_loss, say=_say)
    print(f"{report.model} int8, fingerprint {report.fingerprint}, {sum(report.files.values()) / 1e6:.1f} MB")
    print(f"Spearman x100 over {report.pairs} pairs: fp32 {report.spearman_fp32:.2f}, int8 {report.spearman:.2f}")
    print(f"cosine of int8 to fp32: mean {report.mean_cosine:.4f}, least {report.least_cosine:.4f}")


def tune(
    model: str = "",
    /,
    *,
    sample: Path | None = None,
    text_field: str = "text",
    rounds: int = 3,
    settings: Shared = DEFAULTS,
) -> None:
    """Measure devices, precisions, streams and row lengths side by side, and keep what is fastest as this machine's profile.

    The profile fills in device, streams and row tokens where they are left at their defaults, each precision its own;
    `--profile off` does without. It never changes vectors: for another precision ask by `--precision`. int8 takes part
    once `npu-proxy quantize` has made it.

    Parameters
    ----------
    model
        Name, alias or folder; the setting `model` when left out.
    sample
        Texts like those you will embed (.jsonl, .csv, .txt, .parquet), the first 1,000 of them; without it, made-up ones
        of realistic lengths.
    text_field
        Field or column of that file that holds the text.
    rounds
        How often each candidate is measured.
    """
    from npu_proxy.prepare.tune import tune as measure

    profile = measure(_with_model(settings, model), _texts(sample, text_field, 1000), rounds=rounds, say=_say)
    print(f"{'DEVICE':8} {'PRECISION':9} {'STREAMS':>7} {'ROW':>5} {'TOKENS/S':>9} {'RATIO':>6} {'MEAN COSINE':>11}")
    for trial in profile.trials:
        one = trial.choice
        print(
            f"{one.device:8} {one.precision:9} {one.streams or '-':>7} {one.row_tokens or '-':>5} {trial.tokens_per_second:9.0f}"
            f" {trial.ratio:5.2f}x {trial.mean_cosine:11.6f} {trial.error}".rstrip()
        )
    fastest = profile.usable[0].choice
    own = next((one.choice for one in profile.usable if one.choice.precision == "fp32" and one.choice.device not in EXPORTED), None)
    print("\nratio to the CPU in fp32 as it is without tuning, median of the rounds")
    if own:
        print(f"without further settings: {own}")
    if fastest != own:
        flag = f"--device {fastest.device}" if fastest.device in EXPORTED else f"--precision {fastest.precision}"
        print(f"faster: {flag} ({fastest}); its vectors must not be mixed with those stored before")


def convert(model: str = "", /, *, output: Path, trust_remote_code: bool = False, settings: Shared = DEFAULTS) -> None:
    """Make a graph file of a model whose family is not built here, in a folder of its own, and compare it with torch.

    Serve it with `--model FOLDER`; it is computed padded, on the processor. Needs torch and transformers: pip install
    'npu-proxy[convert]'.

    Parameters
    ----------
    model
        Name, alias or folder; the setting `model` when left out.
    output
        The folder to make.
    trust_remote_code
        Run Python code that lies in the model's folder, for models that transformers has no code of.
    """
    from npu_proxy.prepare.convert import convert as make

    spec, least = make(_with_model(settings, model), output, trust=trust_remote_code, say=_say)
    print(f"{output}: {spec.kind} answers, width {spec.width}, {spec.max_length} tokens; least cosine to torch {least:.7f}")


def compile_model(model: str = "", /, *, platform: str = ANY, settings: Shared = DEFAULTS) -> None:
    """Compile a model's rows ahead of time, into the store; a worker imports them in place of compiling.

    The device is the first of the setting `device`. For an NPU of another machine give its platform, where OpenVINO
    carries the compiler (its Windows packages do), and copy the store.

    Parameters
    ----------
    model
        Name, alias or folder; the setting `model` when left out.
    platform
        NPU platform to compile for: 3720 (Meteor and Arrow Lake), 4000 (Lunar Lake), 5010 (Panther Lake); `any` is this
        machine's own.
    """
    from npu_proxy.devices.chain import compile_blobs, served

    settings, spec = served(_with_model(settings, model))
    name = _accelerator(settings, "the CPU compiles in a second when it starts")
    if platform != ANY and TARGETS[name].openvino != "NPU":
        raise SettingsError(f"device `{name}` has no platforms; leave --platform out", param="platform")
    folder, blobs = compile_blobs(settings, spec, name, platform)
    for blob in blobs:
        print(f"{blob.shape!s:8} {blob.size / 1e6:7.1f} MB {blob.seconds:6.1f} s")
    print(folder)


def _with_model(settings: Settings, model: str) -> Settings:
    return replace(settings, model=(model,) if model else settings.model)


def _accelerator(settings: Settings, why: str) -> str:
    """The first device, which must run in a worker process. Raises SettingsError."""
    name = chain(settings.device)[0]
    if name not in TARGETS or not TARGETS[name].kind.isolated:
        words = why if name == "cpu" else f"`{name}` runs in this process"
        raise SettingsError(f"{words}; name an accelerator with --device", param="device")
    return name


def _texts(path: Path | None, text_field: str, most: int) -> list[str]:
    """Texts of a file that are not empty, the first ``most``; none without a file. Raises InputError when it has none."""
    from itertools import islice

    from npu_proxy.bulk.files import open_source

    if path is None:
        return []
    with open_source(path, text_field) as source:
        texts = list(islice(filter(str.strip, source.texts), most))
    if not texts:
        raise InputError(f"`{path}` has no texts", param="sample")
    return texts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def forget(settings: Settings, folder: Path) -> None:
    """Remove what was prepared for the model in ``folder``; nothing for a folder that cannot be read."""
    from npu_proxy.devices import blobs, profile
    from npu_proxy.models import quantized
    from npu_proxy.models.layout import read_spec

    try:
        fingerprint = read_spec(folder, pooling=settings.pooling, max_length=settings.max_length).fingerprint
    except ModelError:
        return
    for one in (fingerprint, *(report.fingerprint for report in quantized.reports(settings.store) if report.of == fingerprint)):
        blobs.remove(settings.store, one)
    quantized.remove(settings.store, fingerprint)
    profile.remove(settings.store, fingerprint)
