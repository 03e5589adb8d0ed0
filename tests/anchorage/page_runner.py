"""Executes the Python blocks of a page (Markdown), or the code cells of a notebook, as a notebook would:
`page_runner.py PAGE.md`, `page_runner.py NOTEBOOK.ipynb`.

Off the main thread, within a running event loop, in the working directory. A block that begins with the comment
`# NAME.py` is written to that file instead. Blocks whose library for data frames is missing are skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import threading
import traceback
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: Path) -> list[str]:
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return BLOCK.findall(page.read_text())


def run(page: Path) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page), start=1):
        file = FILE.match(block)
        if file is not None:
            Path(file[1]).write_text(block)
        elif "to_pandas" not in block or importlib.util.find_spec("pandas") is not None:
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def main() -> int:
    failed = []

    async def notebook() -> None:
        run(Path(sys.argv[1]))

    def thread() -> None:
        try:
            asyncio.run(notebook())
        except BaseException:
            failed.append(traceback.format_exc())

    sys.path.insert(0, "")
    started = threading.Thread(target=thread)
    started.start()
    started.join()
    sys.stderr.writelines(failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
