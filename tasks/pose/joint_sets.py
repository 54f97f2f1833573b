"""Ready joint sets, each with its published sigmas and where they are published.

COCO (17): pycocotools, Params.kpt_oks_sigmas. COCO-WholeBody (133), of which hand (21) and face (68) are parts:
jin-s13/COCO-WholeBody, evaluation/myeval_wholebody.py. MPII (16), CrowdPose (14) and AP-10K (17) publish PCK or no sigmas of
their own; theirs here are those of mmpose 1.3, configs/_base_/datasets/{mpii,crowdpose,ap10k}.py, adapted from COCO's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.pose.joints import COCO, Joints, same_names

_FINGERS = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
_HAND = ("hand_root", *(f"{finger}{number}" for finger in _FINGERS for number in (1, 2, 3, 4)))
_HAND_LIMBS = tuple(
    (0 if number == 0 else 4 * finger + number, 4 * finger + number + 1) for finger in range(5) for number in range(4)
)
_HAND_SIGMAS = (
    0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024, 0.022, 0.026, 0.017, 0.021, 0.021, 0.032,
    0.02, 0.019, 0.022, 0.031,
)  # fmt: skip
_FOOT_SIGMAS = (0.068, 0.066, 0.066, 0.092, 0.094, 0.094)
_FACE_SIGMAS = (
    0.042, 0.043, 0.044, 0.043, 0.040, 0.035, 0.031, 0.025, 0.020, 0.023, 0.029, 0.032, 0.037, 0.038, 0.043, 0.041, 0.045,
    0.013, 0.012, 0.011, 0.011, 0.012, 0.012, 0.011, 0.011, 0.013, 0.015, 0.009, 0.007, 0.007, 0.007, 0.012, 0.009, 0.008,
    0.016, 0.010, 0.017, 0.011, 0.009, 0.011, 0.009, 0.007, 0.013, 0.008, 0.011, 0.012, 0.010, 0.034, 0.008, 0.008, 0.009,
    0.008, 0.008, 0.007, 0.010, 0.008, 0.009, 0.009, 0.009, 0.007, 0.007, 0.008, 0.011, 0.008, 0.008, 0.008, 0.01, 0.008,
)  # fmt: skip
# The 68 points of the face in runs, each of which is its own mirror image read backwards, or another run's: outline, brows,
# ridge and foot of the nose, eyes, outer and inner lips.
_FACE_MIRRORED = (
    *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41,
    40, 54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65,
)  # fmt: skip

HAND = Joints(_HAND, sigmas=_HAND_SIGMAS, limbs=_HAND_LIMBS)
FACE = Joints(tuple(f"face-{k}" for k in range(68)), mirrored=_FACE_MIRRORED, sigmas=_FACE_SIGMAS)

_FEET = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("big_toe", "small_toe", "heel"))
_BODY, _LEFT, _RIGHT = len(COCO) + len(_FEET), 91, 112  # where the face and the hands begin
WHOLE_BODY = Joints(
    (*COCO.names, *_FEET, *FACE.names, *(f"left_{name}" for name in _HAND), *(f"right_{name}" for name in _HAND)),
    mirrored=(
        *COCO.mirrored, 20, 21, 22, 17, 18, 19, *(_BODY + k for k in _FACE_MIRRORED), *range(112, 133), *range(91, 112)
    ),
    upper=(*COCO.upper, *(False,) * 6, *(True,) * 110),
    sigmas=(*COCO.sigmas, *_FOOT_SIGMAS, *_FACE_SIGMAS, *_HAND_SIGMAS, *_HAND_SIGMAS),
    limbs=(
        *COCO.limbs, (15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22), (9, _LEFT), (10, _RIGHT),
        *((start + a, start + b) for start in (_LEFT, _RIGHT) for a, b in _HAND_LIMBS),
    ),
)  # fmt: skip
MPII = Joints(
    (
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax", "upper_neck",
        "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist",
    ),
    upper=(False,) * 7 + (True,) * 9,
    sigmas=(
        0.089, 0.083, 0.107, 0.107, 0.083, 0.089, 0.026, 0.026, 0.026, 0.026, 0.062, 0.072, 0.179, 0.179, 0.072, 0.062
    ),
    limbs=(
        (0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (8, 12), (12, 11), (11, 10), (8, 13), (13, 14),
        (14, 15),
    ),
)  # fmt: skip
CROWDPOSE = Joints(
    (
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
        "left_knee", "right_knee", "left_ankle", "right_ankle", "top_head", "neck",
    ),
    upper=(True,) * 6 + (False,) * 6 + (True,) * 2,
    sigmas=(0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089, 0.079, 0.079),
    limbs=(
        (10, 8), (8, 6), (11, 9), (9, 7), (6, 7), (0, 6), (1, 7), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (12, 13), (1, 13),
        (0, 13),
    ),
)  # fmt: skip
AP10K = Joints(
    (
        "L_Eye", "R_Eye", "Nose", "Neck", "Root of tail", "L_Shoulder", "L_Elbow", "L_F_Paw", "R_Shoulder", "R_Elbow",
        "R_F_Paw", "L_Hip", "L_Knee", "L_B_Paw", "R_Hip", "R_Knee", "R_B_Paw",
    ),
    upper=(True,) * 4 + (False,) + (True,) * 5 + (False,) * 7,
    sigmas=(
        0.025, 0.025, 0.026, 0.035, 0.035, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.107, 0.087, 0.089
    ),
    limbs=(
        (0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (5, 6), (6, 7), (3, 8), (8, 9), (9, 10), (4, 11), (11, 12), (12, 13),
        (4, 14), (14, 15), (15, 16),
    ),
)  # fmt: skip

SETS = {
    "coco": COCO, "wholebody": WHOLE_BODY, "mpii": MPII, "crowdpose": CROWDPOSE, "ap10k": AP10K, "hand": HAND, "face": FACE
}  # fmt: skip


def known(names: Sequence[str]) -> Joints | None:
    """The ready set of these names, however they are written; None: there is none."""
    return next((joints for joints in SETS.values() if same_names(joints.names, names)), None)


def agree(expected: Joints, other: Joints) -> bool:
    """Are they the same joints? COCO-WholeBody's files name the 17 of the body alone."""
    return same_names(expected.names, other.names) or (
        same_names(expected.names, WHOLE_BODY.names) and same_names(other.names, COCO.names)
    )
