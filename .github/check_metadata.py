"""What PyPI will be told: complete, and without links that lead nowhere from there.

python .github/check_metadata.py build/dist
"""

from __future__ import annotations

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

REQUIRED = ("Name", "Version", "Summary", "License-Expression", "Requires-Python", "Author")
LABELS = {"Documentation", "Repository", "Issues", "Changelog"}


def read_metadata(file: Path) -> str:
    """The metadata in a wheel or an sdist."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return wheel.read(name).decode()
    with tarfile.open(file) as sdist:
        name = next(name for name in sdist.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name))
        content = sdist.extractfile(name)
        assert content is not None
        return content.read().decode()


def find_faults(text: str) -> list[str]:
    """What is missing or wrong, one phrase each."""
    message = email.message_from_string(text)
    readme = str(message.get_payload())
    labels = {line.partition(",")[0] for line in message.get_all("Project-URL", [])}
    faults = [f"no {name}" for name in REQUIRED if not message[name]]
    faults += [f"no URL for {label}" for label in sorted(LABELS - labels)]
    faults += [
        f"a relative link: {link}"
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", readme, flags=re.S))
        if not re.match(r"[a-z]+:|#", link)
    ]
    if not readme.strip():
        faults.append("no description")
    return faults


def main() -> int:
    """The exit status: 1 if anything is wrong, or nothing was built."""
    files = sorted(Path(sys.argv[1]).glob("qlora_kit-*"))
    versions = set()
    status = 0 if len(files) == 2 else 1
    for file in files:
        text = read_metadata(file)
        versions.add(str(email.message_from_string(text)["Version"]))
        faults = find_faults(text)
        status |= bool(faults)
        print(f"{file.name}: {', '.join(faults) or 'complete'}")
    if len(versions) != 1:
        print(f"versions differ: {sorted(versions)}")
        status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
