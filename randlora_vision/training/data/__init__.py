"""Training data: images with classes and images with captions, from any source."""
