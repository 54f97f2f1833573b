"""mmpose's SimCC on ResNet-18, from scratch, with ARSAM.

All but what stands here is mmpose's own simcc_res50 config.
"""

_base_ = "mmpose::body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py"

custom_imports = dict(imports=["arsam.integrations.mmengine"])
optim_wrapper = dict(type="ARSAMOptimWrapper", rho=0.05)

model = dict(backbone=dict(depth=18, init_cfg=None), head=dict(in_channels=512))

data_root = "{{$ARSAM_DATA:data}}/coco/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root, bbox_file=None))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/person_keypoints_val2017.json")
test_evaluator = val_evaluator
