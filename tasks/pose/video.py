"""Videos, frame by frame, in RGB [height, width, 3]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2

from tasks.errors import UserError
from tasks.pose.data import Picture


class Video:
    """A video file, frame by frame.

    Args:
        path: the file.

    Raises:
        UserError: missing, or OpenCV cannot decode it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such video")
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise UserError(f"{path}: not a video that OpenCV can decode")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0

    def __iter__(self) -> Iterator[Picture]:
        """Its frames in RGB.

        Raises:
            UserError: there is none.
        """
        count = 0
        while True:
            there, picture = self._capture.read()
            if not there:
                break
            count += 1
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # type: ignore[misc]
        self._capture.release()
        if not count:
            raise UserError(f"{self._path}: not a video that OpenCV can decode: it has no frame")


class VideoFile:
    """A video that is written frame by frame; its size is the first frame's.

    Args:
        path: MP4.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._path, self._rate = path, rate
        self._writer: cv2.VideoWriter | None = None

    def write(self, picture: Picture) -> None:
        """Append a frame.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is None:
            height, width = picture.shape[:2]
            self._writer = cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*"mp4v"), self._rate, (width, height))
            if not self._writer.isOpened():
                raise OSError(f"{self._path}: cannot be written")
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Write the end."""
        if self._writer is not None:
            self._writer.release()
