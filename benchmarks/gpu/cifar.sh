#!/usr/bin/env bash
# CIFAR-10 and CIFAR-100, ResNet-18 and WRN-28-10, 200 epochs, cutout, label smoothing: benchmarks/gpu.md
# NETWORKS="resnet18 wrn28" CLASSES="10 100" SEEDS="0 1 2" EXTRA="epochs=30" benchmarks/gpu/cifar.sh
source "$(dirname "$0")/rows.sh"
for classes in ${CLASSES:-10 100}; do
  for network in ${NETWORKS:-resnet18 wrn28}; do
    settings=("task.root=data/cifar$classes" "task.classes=$classes" precision=bf16)
    if [ "$network" = wrn28 ]; then
      settings+=(task.model=resnetv2_18 "task.model_args={'layers':(4,4,4),'channels':(160,320,640),'stem_chs':16}")
    fi
    table "cifar$classes-$network" sgd configs/quant/cifar10_resnet18_ "${settings[@]}"
  done
done
