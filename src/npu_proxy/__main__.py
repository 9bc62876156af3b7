"""``python -m npu_proxy``."""

from npu_proxy.commands.app import main

main()
