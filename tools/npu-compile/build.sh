#!/usr/bin/env bash
# The vendor's NPU compiler on Linux, without an NPU: the Windows wheel of OpenVINO under Wine.
# Debian, as root (it installs Wine and a cross compiler). Result: $WORK/run/npuc.exe. Everything else stays in $WORK.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
WORK=${WORK:-$here/.work}
PYTHON=${PYTHON:-python3}
VERSION=${VERSION:-$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("openvino"))')}
[[ -f $WORK/run/npuc.exe && $(cat "$WORK/version" 2>/dev/null) == "$VERSION" ]] && exit 0
mkdir -p "$WORK/run" && cd "$WORK"
if ! command -v x86_64-w64-mingw32-gcc >/dev/null || [[ ! -x /usr/lib/wine/wine64 ]]; then
  [[ $(id -u) == 0 ]] || { echo "needs wine64, gcc-mingw-w64-x86-64 and unzip: install them, or run as root" >&2; exit 1; }
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends wine64 wine gcc-mingw-w64-x86-64 unzip >/dev/null
fi
rm -f openvino-*.whl
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --platform win_amd64 --python-version 3.11 "openvino==$VERSION" -d .
unzip -q -o openvino-*.whl -d wheel
cp wheel/openvino/libs/{openvino,openvino_c,openvino_ir_frontend,openvino_intel_npu_plugin,openvino_intel_npu_compiler,openvino_intel_npu_compiler_loader,tbb12}.dll run/
x86_64-w64-mingw32-gcc -O1 -w -Iwheel/openvino/include "$here/npuc.c" -o run/npuc.exe wheel/openvino/libs/openvino_c.lib
rm -rf wheel openvino-*.whl
echo "$VERSION" > version
