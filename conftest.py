"""The documentation as tests: Python blocks run, and so do the shell commands that can.

Each page runs top to bottom in a folder of its own where the names it uses exist; see
``tests/helpers/pages.py`` for what they stand for. A block that cannot run carries the reason::

    <!-- skip: next "needs a hub account" -->
"""

import doctest

from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from pages import PAGES, close_page, open_page, run_shell_block

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
