"""What run times want of a file: signs and zero points of codes, bits that their kernels bear, operators that they know.

References:
    ONNX Runtime, "Quantize ONNX models": u8s8 saturates in AVX2 and AVX512 without VNNI, unless weights have 7 bits.
    TensorRT, "Working with quantized types": symmetric quantization alone, zero point 0; Q is followed by DQ; biases are float.
    OpenVINO, "Low precision transformations": Q and DQ are read as one FakeQuantize; weights signed, zero point 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tasks.quant.prepare import QuantLayer

Name = Literal["ort", "ort-avx2", "tensorrt", "openvino"]


@dataclass(frozen=True)
class Target:
    """A run time.

    Args:
        edge: bits that weights may have, 7 or 8. Two products of 8-bit numbers of either kind, added in 16 bits, overflow:
            2 * 255 * 128 > 2^15; with 7 bits they do not.
        signed: inputs' codes are int8 with zero point 0, whatever their values; else uint8.
        codes_clipped: fewer than 8 bits are a Clip of codes, between Q and DQ; else one of values, in front of Q.
        packed: weights of up to 4 bits are stored in 4 or 2, behind what unpacks them.
        whole_biases: a fully connected layer's bias is int32.
    """

    edge: int = 8
    signed: bool = False
    codes_clipped: bool = True
    packed: bool = True
    whole_biases: bool = True

    def prepare(self, model: nn.Module) -> None:
        """Give a prepared model, in place, the quantizers that the run time can do.

        Raises:
            ValueError: an offset where zero points must be 0.
        """
        for layer in model.modules():
            if not isinstance(layer, QuantLayer):
                continue
            layer.weight_quantizer.bits = min(layer.weight_quantizer.bits, self.edge)
            if self.signed:
                if layer.input_quantizer.asymmetric:
                    raise ValueError("asymmetric=True: this target takes zero point 0 alone; leave it out")
                layer.input_quantizer.decides_sign, layer.input_quantizer.signed = False, True


TARGETS: dict[str, Target] = {
    "ort": Target(),
    "ort-avx2": Target(edge=7),
    "tensorrt": Target(signed=True, codes_clipped=False, packed=False, whole_biases=False),
    "openvino": Target(codes_clipped=False, packed=False, whole_biases=False),
}
