"""The documentation as tests: Python blocks run, and so do the shell commands that can.

Each page runs top to bottom in a folder of its own where the names it uses exist; see
``tests/helpers/pages.py`` for what they stand for. A block that cannot run carries the reason::

    <!-- skip: next "needs a hub account" -->
"""

import doctest
import os

from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from pages import PAGES, close_page, open_page, run_shell_block

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; torch's threads would spin against each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(
            doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        ),
        CodeBlockParser(language="bash", evaluator=run_shell_block),
    ],
    patterns=PAGES,
    setup=open_page,
    teardown=close_page,
).pytest()
