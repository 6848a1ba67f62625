"""Copy this template under a name of your own.

python examples/plugin_template/new.py adapter-npz ../qlora-kit-adapter-npz
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parent
LEFT_OUT = shutil.ignore_patterns("new.py", "__pycache__", ".pytest_cache", "*.egg-info")


def main(arguments: list[str]) -> str:
    """What was done, or why nothing was."""
    if len(arguments) != 2 or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", arguments[0]):
        return f"usage: new.py NAME FOLDER, where NAME is like adapter-npz\n{__doc__}"
    name, folder = arguments[0], Path(arguments[1])
    if folder.exists():
        return f"{folder} is there already"
    shutil.copytree(TEMPLATE, folder, ignore=LEFT_OUT)
    module = name.replace("-", "_")
    pascal = "".join(part.capitalize() for part in name.split("-"))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = file.read_text(encoding="utf-8")
        text = text.replace("qlora_kit_template", f"qlora_kit_{module}")
        text = text.replace("qlora-kit-template", f"qlora-kit-{name}")
        text = text.replace("my-format", name).replace("MyFormat", pascal)
        file.write_text(text, encoding="utf-8")
    (folder / "src" / "qlora_kit_template").rename(folder / "src" / f"qlora_kit_{module}")
    return f"{folder} holds qlora-kit-{name}. Next:\n  cd {folder}\n  pip install -e .\n  pytest"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
