"""Train and evaluate a config: python tools/train.py configs/pose/hrnet_small_arsam.py --sample"""

from __future__ import annotations

from pathlib import Path

import cli

from tasks import engine
from tasks.base import UserError


def main() -> None:
    """Parse, train, print."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--sample", action="store_true", help="the config's sample: small, on data that needs no download")
    parser.add_argument("--out", type=Path, help="the run's folder; default: runs/NAME, the first that is free")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the run's folder")
    parser.add_argument("--seed", type=int, help="the same as seed=N")
    arguments = parser.parse_intermixed_args()
    words = arguments.words + ([f"seed={arguments.seed}"] if arguments.seed is not None else [])
    path, config = cli.load_config(words, sample=arguments.sample)
    name = Path(path).stem + ("-sample" if arguments.sample else "")
    out = arguments.out or _folder(name, arguments.resume)
    if arguments.out and not arguments.resume and (out / "run.json").exists():
        raise UserError(f"{out}: already holds a run; go on with --resume, or name another --out")
    print(f"{name}: {config.task.name}, {config.epochs} epochs, into {out}", flush=True)
    result = engine.train(config, out, device=cli.device(arguments.device), resume=arguments.resume, name=path)
    cli.print_table(result["metrics"])
    print(
        f"passes per step {result['passes_per_step']:.3f} ({result['ascents']} ascents in {result['steps']} steps), "
        f"{result['train_seconds']:.0f} s of training, {result['images_per_second']:.0f} images/s"
    )
    print(f"results in {out / 'result.json'}")


def _folder(name: str, resume: bool) -> Path:
    """runs/NAME, runs/NAME-2, ...: the first free one, or the last one to resume."""
    folders = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]
    taken = [folder for folder in folders if (folder / "run.json").exists()]
    if resume and not taken:
        raise UserError(f"{folders[0]}: holds no run to resume; name its folder with --out")
    return taken[-1] if resume else next(folder for folder in folders if folder not in taken)


if __name__ == "__main__":
    cli.run(main)
