"""Use a file of tools/quantize.py where this project is not installed: python deploy_classifier.py model.onnx PICTURE...

Needs onnxruntime, NumPy and Pillow. What the network wants to be fed with stands in the file's metadata, each value as JSON.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
h, w = about["size"]
how = Image.Resampling[about["interpolation"].upper()]

for path in sys.argv[2:]:
    picture = Image.open(path).convert(about["color"])
    height, width = about["resize"]
    if about["resize_mode"] == "cover":  # keep the picture's shape, cover this size, and cut out the centre
        factor = max(height / picture.height, width / picture.width)
        height, width = max(height, int(picture.height * factor)), max(width, int(picture.width * factor))
    picture = picture.resize((width, height), how)
    top, left = round((height - h) / 2), round((width - w) / 2)
    picture = picture.crop((left, top, left + w, top + h))
    image = (np.asarray(picture, np.float32).reshape(h, w, -1) / 255 - about["mean"]) / about["std"]
    logits = session.run(None, {"image": image.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
    best = int(logits.argmax())
    score = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    print(f"{path}: {about['classes'][best] if about.get('classes') else best} {score[best]:.4f}")
