"""Human pose estimation on COCO keypoints."""
