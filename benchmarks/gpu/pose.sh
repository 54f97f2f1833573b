#!/usr/bin/env bash
# HRNet-W32 at 256x192 on COCO's keypoints, 210 epochs: benchmarks/gpu.md
source "$(dirname "$0")/rows.sh"
table pose-hrnet adamw configs/pose/hrnet_ precision=bf16
