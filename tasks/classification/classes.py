"""The classes of pictures that a user names: answers on the screen and in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from tasks import log, pictures
from tasks.classification.task import Classification
from tasks.errors import UserError


def write(task: Classification, model: nn.Module, files: list[Path], out: Path) -> None:
    """Print the best class of each picture, and write classes.json with the five best.

    Raises:
        UserError: a picture cannot be read.
    """
    answers: list[dict[str, Any]] = []
    for file, best in zip(files, task.predict(model.eval(), _opened(files)), strict=True):
        answers.append({"file_name": os.fspath(file), "classes": best})
        first = best[0]
        print(f"{file}: {first['class'] if first['class'] is not None else first['label']} ({first['score']:.3f})", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    log.write_json(out / "classes.json", answers)
    print(f"the {len(answers[0]['classes'])} best classes of {len(answers)} pictures in {out / 'classes.json'}")


def _opened(files: list[Path]) -> Iterator[Image.Image]:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such picture")
        with pictures.named(file), Image.open(file) as picture:
            picture.load()
            yield picture
