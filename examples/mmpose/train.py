"""Train any mmpose config, with ARSAM where the config says so.

    make mmpose
    export ARSAM_DATA=data                     # the folder that holds coco/, COCO 2017 in its own layout
    .venv-mmpose/bin/python examples/mmpose/train.py examples/mmpose/hrnet_small.py --work-dir runs/mmpose
    ... --cfg-options optim_wrapper.rho=0.002 train_dataloader.batch_size=16
    ... --resume                               # goes on from the last checkpoint of the work dir, as if never stopped

mmpose's own tools/train.py trains these configs just as well.
"""

from __future__ import annotations

import argparse

from arsam.integrations.mmpose_standins import install

install()  # before mmpose is imported, and up here so that a spawned worker runs it too

from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.runner import Runner  # noqa: E402


def main() -> None:
    """Parse, and hand over to mmengine's runner."""
    parser = argparse.ArgumentParser(description="Train an mmpose config.")
    parser.add_argument("config")
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="name=value")
    args = parser.parse_args()
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    config.work_dir = args.work_dir
    config.resume = args.resume
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
