"""The doctor tells the truth about this machine and about others that are simulated here."""

import json
import os
import sys
from pathlib import Path

import pytest

from npu_proxy import Settings
from npu_proxy.devices import doctor
from npu_proxy.targets import TARGETS

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /sys and /dev")


@linux
def test_what_it_says_about_this_machine_is_true(tmp_path: Path) -> None:
    found = doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path))
    assert found.serves
    assert "cpu" in found.devices
    assert ("npu" in found.devices) <= (not TARGETS["npu"].missing())
    nodes = [finding for finding in found.findings if "/dev/accel/accel0" in finding.text]
    assert bool(nodes) == bool(TARGETS["npu"].missing())
    if nodes:
        steps = " ".join(finding.fix for finding in found.findings if finding.topic == "npu")
        for step in ("modprobe intel_vpu", "intel-level-zero-npu", "libze1", "pass the PCI device through"):
            assert step in steps


def test_a_problem_comes_with_the_command_that_solves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pci", lambda kind: ["0000:00:0b.0 0x643e"])
    monkeypatch.setattr(doctor, "library", lambda name: "")
    found = list(doctor._npu(Settings()))
    problems = {finding.text: finding.fix for finding in found if finding.level == "problem"}
    assert any("intel_vpu is not loaded" in text for text in problems) or Path("/sys/module/intel_vpu").exists()
    assert "github.com/intel/linux-npu-driver" in problems["no NPU user driver (libze_intel_npu.so)"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (node,) = doctor._access([tmp_path], "npu")
    assert node.level == "problem"
    assert f"usermod -aG {tmp_path.group()}" in node.fix
    settings = Settings(store=tmp_path, compile_cache=tmp_path)
    (folder,) = [finding for finding in doctor._folders(settings) if finding.topic == "store"]
    assert (folder.level, folder.fix) == ("problem", "set `store` to a folder that you can write to")


def test_a_plugin_that_crashes_its_process_is_only_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_ASK", "import os; os.abort()")
    found = doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path))
    assert not found.serves
    assert any("the process that loaded the plugins died" in finding.text for finding in found.findings)
    monkeypatch.setattr(doctor, "_ASK", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.5)
    found = doctor.diagnose(Settings(store=tmp_path, compile_cache=tmp_path))
    assert any("no response within 0.5 seconds" in finding.text for finding in found.findings)


def test_the_command_prints_lines_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_proxy.commands import prepare

    monkeypatch.setattr(
        doctor, "_plugins", lambda: {"cpu": {"name": "a processor"}, "npu": {"error": "Exception from x\nit broke"}}
    )
    with pytest.raises(SystemExit) as done:
        prepare.doctor(json=True)
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["devices"] == ["cpu"]
    with pytest.raises(SystemExit) as done:
        prepare.doctor()
    text = capsys.readouterr().out
    assert "npu cannot be used: it broke" in text
    assert text.endswith("cpu can serve\n")
    monkeypatch.setattr(doctor, "_plugins", lambda: {"cpu": {"error": "no"}})
    with pytest.raises(SystemExit) as done:
        prepare.doctor()
    assert done.value.code == 1
