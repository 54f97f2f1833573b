"""Quantization-aware training: any timm model, 2 to 8 bits, learned step sizes, and a file that runs on integers."""
