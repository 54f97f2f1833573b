#!/usr/bin/env bash
# ResNet-18 at 4 bits on ImageNet, 90 epochs from the float model in WEIGHTS: benchmarks/gpu.md
source "$(dirname "$0")/rows.sh"
table w4a4-resnet18 sgd configs/quant/resnet18_w4a4_ "task.weights=${WEIGHTS:-resnet18.pth}"
