"""mmpose's RTMPose-tiny, from scratch, with ARSAM.

All but what stands here is mmpose's own rtmpose-t config. Left out of it: the colour augmentation and the switch of the
pipeline for the last 30 epochs, which are mmdet's, and the weights to start from, which are a download.
"""

_base_ = "mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py"

custom_imports = dict(imports=["arsam.integrations.mmengine"])
optim_wrapper = dict(type="ARSAMOptimWrapper", rho=0.05)

model = dict(backbone=dict(_scope_="mmpose", init_cfg=None))
custom_hooks = []

data_root = "{{$ARSAM_DATA:data}}/coco/"
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="GetBBoxCenterScale"),
    dict(type="RandomFlip", direction="horizontal"),
    dict(type="RandomHalfBody"),
    dict(type="RandomBBoxTransform", scale_factor=[0.6, 1.4], rotate_factor=80),
    dict(type="TopdownAffine", input_size=(192, 256)),
    dict(type="GenerateTarget", encoder={{_base_.codec}}),
    dict(type="PackPoseInputs"),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/person_keypoints_val2017.json")
test_evaluator = val_evaluator
