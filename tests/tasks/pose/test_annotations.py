"""COCO files as people write them: what is read, completed, passed over and counted, refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.errors import UserError
from tasks.pose import coco, joint_sets, people
from tasks.pose.annotations import Annotations, named, read
from tasks.pose.joints import COCO, Joints


def one_annotation(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 7, "image_id": 1, "bbox": [10, 10, 50, 60], "keypoints": [20, 30, 2] * 17, "iscrowd": 0}
    return {"images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 40}], "annotations": [annotation | changes]}


def loaded(content: Any, folder: Path, joints: Joints | None = None, category: Any = None) -> Annotations:
    file = folder / "x.json"
    file.write_text(json.dumps(content))
    return read(file, folder, "look elsewhere", joints, category, False)


def test_boxes_are_clipped_as_in_mmpose(tmp_path: Path) -> None:
    """To width - 1 and height - 1."""
    (person,) = people.annotated(loaded(one_annotation(bbox=[-5, 10, 200, 60]), tmp_path))
    np.testing.assert_array_equal(person.box, [0, 10, 99, 29])
    assert (person.picture, person.image_id, person.size) == (tmp_path / "a.jpg", 1, (100, 40))


@pytest.mark.parametrize(
    "changes",
    [{"iscrowd": 1}, {"iscrowd": 1.0}, {"keypoints": [0] * 51}, {"bbox": [10, 10, 0, 5]}, {"bbox": [200, 0, 9, 9]}],
)
def test_nobody_to_learn_from(changes: dict[str, Any], tmp_path: Path) -> None:
    """Crowds, unlabelled people and empty boxes stay in the file's annotations and are not trained on."""
    found = loaded(one_annotation(**changes), tmp_path)
    assert len(people.annotated(found)) == 0
    assert len(found.truth()["annotations"]) == 1


@pytest.mark.parametrize(
    "changes",
    [{"area": None}, {"iscrowd": None}, {"iscrowd": 0.0}, {"num_keypoints": 17.0}, {"num_keypoints": None}, {"id": None},
     {"category_id": None}, {"image_id": 1.0}, {"image_id": "1"}],
)  # fmt: skip
def test_null_and_float_fields(changes: dict[str, Any], tmp_path: Path) -> None:
    """As exporters through pandas or a database write them. Kills: an area of null that is 0, a text that is no id."""
    (annotation,) = loaded(one_annotation(**changes), tmp_path).truth()["annotations"]
    assert annotation == {
        "id": 1, "category_id": 1, "image_id": 1, "bbox": [10, 10, 50, 60], "area": 0.53 * 50 * 60, "iscrowd": 0,
        "keypoints": [20, 30, 2] * 17, "num_keypoints": 17,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"keypoints": None}, "1 without keypoints"),
        ({"keypoints": []}, "1 without keypoints"),
        ({"bbox": None}, "1 without a box"),
        ({"category_id": 2}, "1 of the category car"),
    ],
)
def test_passed_over(
    changes: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """As mmpose does; counted, and listed once. Kills: a silent loss, a line on each evaluation."""
    content = one_annotation(category_id=1)
    content["annotations"].append({**content["annotations"][0], "id": 8, **changes})
    content["categories"] = [{"id": 1, "name": "person", "keypoints": list(COCO.names)}, {"id": 2, "name": "car"}]
    assert len(loaded(content, tmp_path).boxes) == 1
    assert f"x.json: 1 annotations are passed over: {kind}" in capsys.readouterr().err
    read(tmp_path / "x.json", tmp_path, "look elsewhere", None, None, False)
    assert capsys.readouterr().err == ""


def test_a_joint_of_null_is_not_labelled(tmp_path: Path) -> None:
    """Kills: null taken for 0 beside a v of 2."""
    found = loaded(one_annotation(keypoints=[None, None, 2, 20, 30, None] + [20, 30, 2] * 15), tmp_path)
    assert found.keypoints[0, :2].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert found.truth()["annotations"][0]["num_keypoints"] == 15


@pytest.mark.parametrize("exif", [None, 6])
@pytest.mark.parametrize("fields", [{}, {"width": None, "height": 0}, {"width": "?", "height": -1}])
def test_sizes_that_the_file_lacks(fields: dict[str, Any], exif: int | None, tmp_path: Path) -> None:
    """Are the pictures' own, as they are shown. Kills: the size of before EXIF turns it."""
    content = one_annotation()
    content["images"] = [{"id": 1, "file_name": "a.jpg", **fields}]
    turned = Image.Exif()
    turned[0x0112] = exif or 1
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=turned)
    assert loaded(content, tmp_path).sizes.tolist() == [[48, 64] if exif else [64, 48]]


@pytest.mark.parametrize("ids", [["img-1", "img-2"], ["b9e1", 7], [2, 1], [1.5, "x"]])
def test_ids_of_any_kind(ids: list[Any], tmp_path: Path) -> None:
    """Pictures are numbered in the file's order; results get the ids back. Kills: sorted ids, ids taken for places."""
    content = one_annotation(image_id=ids[1])
    content["images"] = [{"id": number, "file_name": f"{k}.jpg", "width": 9, "height": 9} for k, number in enumerate(ids)]
    found = loaded(content, tmp_path)
    assert found.truth()["annotations"][0]["image_id"] == 2
    assert found.ids == ids
    assert found.file(1).name == "1.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(keypoints=[0] * 9), "annotation 7 has 9 keypoint values, expected 51"),
        (lambda d: d["annotations"][0].update(image_id=5), "annotation 7 names the picture 5"),
        (lambda d: d["annotations"][0].update(image_id=[1]), "annotation 7 is not one of COCO's"),
        (lambda d: d["images"].append({**d["images"][0], "file_name": "b.jpg"}), "two images have the id 1, a.jpg and b.jpg"),
        (lambda d: d["images"].__setitem__(0, 5), "each of its images needs an id and a file_name"),
        (lambda d: d.update(categories=[{"id": 1, "name": "dog", "keypoints": ["a", "a"]}]), "'a' stands there twice"),
        (lambda d: d.update(categories=[{"id": 1, "name": "dog", "keypoints": 5}]), "its categories name no joint set"),
    ],
)
def test_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    """The error names the file, the annotation and the rule."""
    content = one_annotation()
    change(content)
    with pytest.raises(UserError, match=f"x.json: .*{message}"):
        loaded(content, tmp_path)


def fish(keypoints: list[str], **category: Any) -> dict[str, Any]:
    content = one_annotation(keypoints=[20, 30, 2] * len(keypoints), category_id=1)
    content["categories"] = [{"id": 1, "name": "fish", "keypoints": keypoints, **category}]
    return content


def test_joints_of_the_file(tmp_path: Path) -> None:
    """Names, pairs from left and right, limbs from the skeleton, which counts from 1. Kills: limbs off by one."""
    found = loaded(fish(["tip", "left", "right", "tail"], skeleton=[[1, 2], [1, 3], [9, 1]]), tmp_path)
    assert found.keypoints.shape == (1, 4, 3)
    joints = named(tmp_path / "x.json", "look elsewhere", None)
    assert joints is not None
    assert (joints.names, joints.mirrored, joints.limbs) == (("tip", "left", "right", "tail"), (0, 2, 1, 3), ((0, 1), (0, 2)))
    loaded(fish(["tip", "left", "right", "tail"], skeleton=[[0, 3]]), tmp_path)
    assert named(tmp_path / "x.json", "look elsewhere", None).limbs == ((0, 3),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("skeleton", "limbs"),
    [
        ([["tip", "tail"]], ((0, 3),)),
        ([[1, 4], ["x", 2], [[1], 2], [1], 3, None], ((0, 3),)),
        ("abc", ()),
        (None, ()),
        ({}, ()),
    ],
)
def test_skeletons_as_people_write_them(skeleton: Any, limbs: Any, tmp_path: Path) -> None:
    """Names will do, and what is no pair is left out. Kills: a file that is refused for what is only drawn."""
    loaded(fish(["tip", "left", "right", "tail"], skeleton=skeleton), tmp_path)
    assert named(tmp_path / "x.json", "look elsewhere", None).limbs == limbs  # type: ignore[union-attr]


def test_a_ready_set_is_known_by_its_names(tmp_path: Path) -> None:
    """However they are written: with its sigmas. Kills: AP-10K's 17 joints taken for COCO's."""
    names = [name.lower().replace(" ", "_").replace("l_", "left_").replace("r_", "right_") for name in joint_sets.AP10K.names]
    names[4] = "root_of_tail"
    loaded(fish(names), tmp_path)
    assert named(tmp_path / "x.json", "look elsewhere", None) is joint_sets.AP10K


def test_contradictions(tmp_path: Path) -> None:
    """A set that is asked for and other names in the file. Kills: 17 joints of another order, silently."""
    names = [*COCO.names[1:], COCO.names[0]]
    with pytest.raises(UserError, match=r"x\.json: its keypoints are 17 joints .* the 1\. of them 'left_eye' and not 'nose'"):
        loaded(fish(names), tmp_path, COCO)
    assert loaded(fish(names), tmp_path).keypoints.shape == (1, 17, 3)


def test_several_categories(tmp_path: Path) -> None:
    """The one with keypoints by default; one of several by name or id. Kills: the first of the file."""
    content = fish(["a", "b"])
    content["categories"].insert(0, {"id": 0, "name": "boat"})
    content["annotations"].append({**content["annotations"][0], "category_id": 0})
    assert len(loaded(content, tmp_path).boxes) == 1
    content["categories"].append({"id": "h", "name": "hand", "keypoints": ["x", "y", "z"]})
    content["annotations"].append({**content["annotations"][0], "category_id": "h", "keypoints": [1, 1, 2] * 3})
    with pytest.raises(UserError, match=r"different keypoints: fish \(2\), hand \(3\); choose one with task\.category="):
        loaded(content, tmp_path)
    for category in ("hand", "h"):
        assert loaded(content, tmp_path, category=category).keypoints.shape == (1, 3, 3)
    with pytest.raises(UserError, match="no category frog; task.category may be one of boat, fish, hand"):
        loaded(content, tmp_path, category="frog")


def test_whole_body(tmp_path: Path) -> None:
    """The other 116 joints lie in fields of their own. Kills: a wrong order of the parts."""
    content = fish(list(COCO.names))
    parts = {"foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
    for value, (name, count) in enumerate(parts.items(), start=1):
        content["annotations"][0][name] = [value, value, 2] * count
    found = loaded(content, tmp_path, joint_sets.WHOLE_BODY)
    assert found.keypoints[0, [16, 17, 22, 23, 90, 91, 111, 112, 132], 0].tolist() == [20, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("joints", joint_sets.SETS.values(), ids=list(joint_sets.SETS))
def test_ready_sets(joints: Joints) -> None:
    """Mirroring pairs left with right, and joins limbs to limbs. Kills: a pair that is off by one."""
    for k, m in enumerate(joints.mirrored):
        assert joints.side(k) == -joints.side(m)
        # Both sides are as hard to annotate; the face's and the hands' were measured, and mirrored ones differ a little.
        assert len(joints) > 60 or joints.sigmas[k] == joints.sigmas[m]
    limbs = {frozenset(limb) for limb in joints.limbs}
    assert {frozenset(joints.mirrored[k] for k in limb) for limb in limbs} == limbs
    assert joints.without_other_side() == []


def test_growth_is_linear(tmp_path: Path) -> None:
    """Eight times the annotations take about eight times as long. Kills: a search through the list for each annotation."""
    seconds = []
    for count in (1000, 8000):
        content = one_annotation()
        content["images"] = [{**content["images"][0], "id": k, "file_name": f"{k}.jpg"} for k in range(count)]
        content["annotations"] = [{**content["annotations"][0], "image_id": k} for k in range(count)]
        begin = time.process_time()
        people.annotated(loaded(content, tmp_path))
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 30 * seconds[0]


def test_a_split_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose joints were asked for first. Kills: the validation split's file parsed again once training's has been."""
    parsed: list[str] = []
    real = coco.read_json

    def read_json(path: Path, *others: Any) -> Any:
        parsed.append(path.stem)
        return real(path, *others)

    monkeypatch.setattr(coco, "read_json", read_json)
    files = [tmp_path / "val.json", tmp_path / "train.json"]
    for file in files:
        file.write_text(json.dumps(one_annotation()))
    named(files[0], "", None)
    for file in (*reversed(files), *files):
        read(file, tmp_path, "", COCO, None, False)
        named(file, "", None)
    assert parsed == ["val", "train"]
    assert not coco._contents.keys() & set(files)
    files[0].write_text(json.dumps(one_annotation(id=8)) + " ")
    read(files[0], tmp_path, "", COCO, None, False)
    assert parsed[-1] == "val" and len(parsed) == 3
