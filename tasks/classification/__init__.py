"""Image classification, in float or in few bits."""
