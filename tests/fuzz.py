"""Feed mutilated annotations, overrides, checkpoints and pictures for some seconds: python tests/fuzz.py [SECONDS [SEED]].

Whatever comes, the answer is a result or a UserError. Anything else is printed with the input that brought it about.
"""

from __future__ import annotations

import copy
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from tasks import checkpoint, engine, loading, records, state
from tasks import config as configs
from tasks.errors import UserError
from tasks.pose import sample
from tasks.pose.joints import COCO
from tasks.pose.task import PoseTask
from tests.tasks import toy

ROOT = Path(__file__).parents[1]
ODD = [
    None,
    True,
    -1,
    0,
    1,
    17,
    10**6,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\0",
    [],
    {},
    [1],
    {"id": 1},
]
WORDS = [
    "epochs", "task", "task.limit", "optimizer", "optimizer.lr", "sharpness", "sharpness.sampling", "sharpness.reuse.beta",
    "schedule", "ema", "seed", "precision", "task.codec.sigma", "task.codec", "task.network", "pretraining", "x",
]  # fmt: skip
TOKENS = [
    *"()[]{},.=:+-*'\"\\ \n#@%", "\u00e9", "\ud800", "9" * 5000, "((" * 300,
    "0", "1", "-1", "2.5", "1e999", "None", "True", "nan", "Tail", "fraction", "ARSAM", "rho=", "Epochs", "partial",
    "lambda", "AdamW", "Decayed", "multistep", "__import__", "**",
]  # fmt: skip


def mutated_json(draw: random.Random, value: Any, chance: float) -> Any:
    """A copy with parts replaced, dropped or doubled."""
    if draw.random() < chance:
        return copy.deepcopy(draw.choice(ODD))
    if isinstance(value, dict):
        return {k: mutated_json(draw, v, chance) for k, v in value.items() if draw.random() > chance}
    if isinstance(value, list):
        kept = [mutated_json(draw, v, chance) for v in value if draw.random() > chance]
        return kept + kept[:1] if draw.random() < chance else kept
    return value


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """A copy with bytes changed, cut out or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        place = draw.randrange(len(changed) + 1)
        kind = draw.random()
        if kind < 0.6 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif kind < 0.75:
            del changed[place : place + draw.choice((1, 4, 100, 10**6))]
        else:
            changed[place:place] = draw.randbytes(draw.choice((1, 4, 100)))
    return bytes(changed)


@dataclass
class Fed:
    """What is done with an input, and the input as text."""

    act: Callable[[], object]
    shown: str


class Fuzz:
    """The seeds, and one method for each kind of input.

    Args:
        root: an empty folder.
        seed: of the mutations.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.root = root
        for number, split in enumerate(("train", "val")):
            sample.write_split(root, split, 3, np.random.default_rng([3, number]))
        self.annotations = json.loads((root / "annotations/person_keypoints_val2017.json").read_text())
        self.config = configs.load(str(ROOT / "configs/pose/hrnet_small_arsam.py"))
        self.task = PoseTask(root=str(root))
        self.people = self.task.people("val")[0]
        engine.train(toy.sample, root / "run", device=torch.device("cpu"))
        self.checkpoint = (root / "run/last.pt").read_bytes()
        self.state = checkpoint.load(root / "run/last.pt")
        self.pictures = []
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file, kind)
            self.pictures.append(file.getvalue())

    def coco(self) -> Fed:
        """An annotation file, up to the figures of poses in its pictures."""
        text = json.dumps(mutated_json(self.draw, self.annotations, self.draw.choice((0.0005, 0.003, 0.02))))
        if self.draw.random() < 0.1:
            text = mutated_bytes(self.draw, text.encode()).decode("latin-1")
        (self.root / "annotations/person_keypoints_val2017.json").write_text(text)

        def look() -> None:
            from tasks.pose import errors, evaluate, oks

            people, found = self.task.people("val")
            annotations = found.truth()
            poses = oks.results(
                np.array([person.image_id for person in people]),
                np.stack([person.keypoints[:, :2] for person in people]),
                np.ones((len(people), 17)),
                np.ones(len(people)),
                np.ones(len(people)),
                sigmas=np.array(COCO.sigmas),
            )
            evaluate.coco_figures(annotations, poses)
            errors.error_report(annotations, poses)

        return self.showing(look, text)

    def overrides(self) -> Fed:
        """name=value words."""
        word = self.draw.choice(WORDS) + self.draw.choice((".x", "", "", "", "."))
        word += "=" + "".join(self.draw.choice(TOKENS) for _ in range(self.draw.randrange(8)))
        return self.showing(lambda: configs.describe(configs.override(self.config, [word])), word)

    def checkpoint_bytes(self) -> Fed:
        """A last.pt with other bytes."""
        content = mutated_bytes(self.draw, self.checkpoint)
        (self.root / "run/last.pt").write_bytes(content)
        return self.showing(self.resumed, content)

    def checkpoint_content(self) -> Fed:
        """A last.pt that is whole and holds something else."""
        content = mutated_json(self.draw, self.state, self.draw.choice((0.005, 0.02, 0.1)))
        torch.save(content, self.root / "run/last.pt")
        return self.showing(self.resumed, content)

    def resumed(self) -> None:
        (self.root / "run/previous.pt").unlink(missing_ok=True)
        path = self.root / "run/last.pt"
        checkpoint.load_weights(toy.sample.task.build(), path)
        batches = loading.Batches(21, 4, toy.sample.epochs, 0)
        run = state.State(toy.sample, batches, torch.device("cpu"))
        records.Records(toy.sample, run, batches, self.root / "run", "toy").restore()

    def picture(self) -> Fed:
        """A picture with other bytes."""
        from tasks.pose.data import read_picture

        content = mutated_bytes(self.draw, self.draw.choice(self.pictures))
        (self.root / "a.jpg").write_bytes(content)
        return self.showing(lambda: read_picture(self.root / "a.jpg"), content)

    @staticmethod
    def showing(act: Callable[[], object], shown: Any) -> Fed:
        """The two together."""
        return Fed(act, repr(shown)[:2000])


def main(seconds: float, seed: int) -> int:
    """Fuzz; the number of findings that differ."""
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        fuzz = Fuzz(Path(name), seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for kind in (fuzz.coco, fuzz.overrides, fuzz.checkpoint_bytes, fuzz.checkpoint_content, fuzz.picture):
                fed = kind()
                try:
                    fed.act()
                    counts[f"{kind.__name__} accepted"] += 1
                except UserError:
                    counts[f"{kind.__name__} refused"] += 1
                except (Exception, SystemExit) as error:
                    place = traceback.extract_tb(error.__traceback__)
                    ours = [frame for frame in place if str(ROOT) in frame.filename][-1]
                    key = f"{kind.__name__}: {type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}"
                    if key not in found:
                        found[key] = f"{error}"
                        print(f"FOUND {key}: {str(error)[:200]}\n    {fed.shown}"[:900], flush=True)
    print(f"{sum(counts.values())} inputs in {seconds:.0f} s: {dict(sorted(counts.items()))}; {len(found)} findings")
    return len(found)


if __name__ == "__main__":
    numbers = [float(word) for word in sys.argv[1:]]
    sys.exit(main(numbers[0] if numbers else 60, int(numbers[1]) if len(numbers) > 1 else 0) > 0)
