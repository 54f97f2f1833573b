"""mmpose's HRNet with small widths (8/16/32/64), from scratch, with ARSAM.

All but what stands here is mmpose's own td-hm_hrnet-w32 config.
"""

_base_ = "mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py"

custom_imports = dict(imports=["arsam.integrations.mmengine"])
optim_wrapper = dict(type="ARSAMOptimWrapper", rho=0.001)  # around the Adam of the config above

model = dict(
    backbone=dict(
        init_cfg=None,
        extra=dict(
            stage1=dict(num_blocks=(2,)),
            stage2=dict(num_blocks=(2, 2), num_channels=(8, 16)),
            stage3=dict(num_modules=1, num_blocks=(2, 2, 2), num_channels=(8, 16, 32)),
            stage4=dict(num_modules=1, num_blocks=(2, 2, 2, 2), num_channels=(8, 16, 32, 64)),
        ),
    ),
    head=dict(in_channels=8),
)

data_root = "{{$ARSAM_DATA:data}}/coco/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root, bbox_file=None))  # None: the annotated boxes, not a detector's
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/person_keypoints_val2017.json")
test_evaluator = val_evaluator
