"""Image classification: float training, and quantization-aware training of timm models."""
