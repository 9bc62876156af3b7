"""schemathesis over the OpenAPI document: no 5xx, nothing undocumented, errors in their dialect's shape.

Left out: the parameter `timeout`, since a deadline of zero seconds is rightly a 504, and the check that whatever fits the
schema is accepted, since a schema cannot know the model's width, its prompts, or that it embeds.
"""

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from conftest import Server

COMMAND = Path(sys.executable).parent / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"


@pytest.mark.timeout(400)
def test_every_answer_is_as_documented(default_model: str, tmp_path: Path) -> None:
    if not COMMAND.exists():
        pytest.skip("schemathesis lives in .venv-clients; `make clients` runs this")
    server = Server().wait_ready()
    document = json.load(urllib.request.urlopen(f"{server.url}/openapi.json"))
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["parameters"] = [parameter for parameter in operation.get("parameters", []) if parameter["name"] != "timeout"]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    command = [COMMAND, "run", "openapi.json", "--url", server.url, "--checks", CHECKS, "--max-examples", "30", "--no-color"]
    command += ["--max-time", "90", "--continue-on-failure", "--request-timeout", "30", "--suppress-health-check", "all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=380, check=False)
    shutil.rmtree(tmp_path / ".hypothesis", ignore_errors=True)
    health = json.load(urllib.request.urlopen(f"{server.url}/health"))
    assert server.stop() == 0
    assert health["status"] == "ok"
    assert done.returncode == 0, done.stdout[-8000:]
    assert "operations" in done.stdout.lower(), done.stdout[-3000:]
