"""Top-down human pose estimation on COCO keypoints."""
