"""``python -m qlora_kit`` is the command line."""

import sys

from qlora_kit.cli import main

sys.exit(main())
