"""``python -m dcpsvc`` is ``dcpsvc``."""

from dcpsvc.cli import main

main()
