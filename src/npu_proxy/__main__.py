"""``python -m npu_proxy``."""

from npu_proxy.cli import main

main()
