"""The doctor tells the truth about this machine and about others that are played here."""

import json
import sys
from pathlib import Path

import pytest

from npu_proxy import Settings
from npu_proxy.devices import doctor
from npu_proxy.devices.kinds import TARGETS

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /sys and /dev")


@linux
def test_what_it_says_of_this_machine_is_so(tmp_path: Path) -> None:
    found = doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path))
    assert found.serves
    assert "cpu" in found.devices
    assert ("npu" in found.devices) <= (not TARGETS["npu"].missing())
    nodes = [one for one in found.findings if "/dev/accel/accel0" in one.text]
    assert bool(nodes) == bool(TARGETS["npu"].missing())
    if nodes:
        cures = " ".join(one.cure for one in found.findings if one.topic == "npu")
        for step in ("modprobe intel_vpu", "intel-level-zero-npu", "libze1", "pass the PCI device through"):
            assert step in cures


def test_trouble_comes_with_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pci", lambda kind: ["0000:00:0b.0 0x643e"])
    monkeypatch.setattr(doctor, "library", lambda name: "")
    found = list(doctor._npu(Settings()))
    problems = {one.text: one.cure for one in found if one.level == "problem"}
    assert any("intel_vpu is not loaded" in text for text in problems) or Path("/sys/module/intel_vpu").exists()
    assert "github.com/intel/linux-npu-driver" in problems["no NPU user driver (libze_intel_npu.so)"]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (node,) = doctor._access([tmp_path], "npu")
    assert node.level == "problem"
    assert f"usermod -aG {tmp_path.group()}" in node.cure
    (folder,) = [one for one in doctor._folders(Settings(store=tmp_path, compile_cache=tmp_path)) if one.topic == "store"]
    assert (folder.level, folder.cure) == ("problem", "set `store` to a folder of yours")


def test_a_plugin_that_takes_the_process_along_is_only_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_ASK", "import os; os.abort()")
    found = doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path))
    assert not found.serves
    assert any("the process that asked died" in one.text for one in found.findings)
    monkeypatch.setattr(doctor, "_ASK", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.5)
    assert any(
        "no answer within 0.5 seconds" in one.text
        for one in doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path)).findings
    )


def test_the_command_prints_lines_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_proxy.prepare import commands

    monkeypatch.setattr(
        doctor, "_plugins", lambda: {"cpu": {"name": "a processor"}, "npu": {"error": "Exception from x\nit broke"}}
    )
    with pytest.raises(SystemExit) as done:
        commands.doctor(json=True)
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["devices"] == ["cpu"]
    with pytest.raises(SystemExit) as done:
        commands.doctor()
    text = capsys.readouterr().out
    assert "npu cannot be used: it broke" in text
    assert text.endswith("cpu can serve\n")
    monkeypatch.setattr(doctor, "_plugins", lambda: {"cpu": {"error": "no"}})
    with pytest.raises(SystemExit) as done:
        commands.doctor()
    assert done.value.code == 1
