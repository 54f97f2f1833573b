"""Choose a setting by short runs: python tools/tune.py configs/quant/cifar10_resnet18_arsam.py --sample

By default the setting is sharpness.rho, and its values lie sqrt(2) apart around the config's own. The runs hold out a share of
the training data and are measured on it. Another setting: --name optimizer.lr, and --values for candidates of one's own.
"""

from __future__ import annotations

from pathlib import Path

import cli

from tasks import cache, distributed, folder, tune


def main() -> None:
    """Parse, run the trials, print the table and the line for the config."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--sample", action="store_true", help="the config's sample: small, on data that needs no download")
    parser.add_argument("--name", default="sharpness.rho", help="of the setting; default: %(default)s")
    parser.add_argument("--values", nargs="+", default=[], metavar="V", help="default: five around the config's, sqrt(2) apart")
    parser.add_argument("--share", type=float, default=0.5, help="of the epochs, for the longest runs; default: %(default)s")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the training data; 0: measure on the split val")
    parser.add_argument("--seed", type=int, help="the same as seed=N")
    parser.add_argument("--out", type=cli.path, help="folder; a second call goes on there; default: runs/tune-CONFIG-NAME")
    arguments = parser.parse_intermixed_args()
    values = [word for word in cli.paths(arguments.values) if not word.endswith(".py")]
    others = [word for word in arguments.values if word not in values]  # the config may stand behind --values
    path, config = cli.load_config([*cli.words(arguments), *others], sample=arguments.sample)
    plan = tune.Plan(config, path, arguments.name, tuple(values), arguments.share, arguments.held_out)
    stem = Path(path).stem + ("-sample" if arguments.sample else "")
    out = arguments.out or Path("runs") / f"tune-{stem}-{arguments.name}"
    distributed.first(folder.check(out, "tune", overwrite=arguments.overwrite, inputs=cli.inputs(path, config)))
    with cache.beside(out):
        trials = tune.tune(plan, out, cli.device(arguments.device), anew=arguments.overwrite)
    if distributed.rank():
        return
    chosen = tune.best(trials)
    print(f"\n{tune.table(plan, trials)}\n\n{tune.cost(plan, trials)}\ntable and picture: {out}/tune.json, {out}/tune.png")
    print(f"\n{arguments.name}={chosen.value}")


if __name__ == "__main__":
    cli.run(main)
