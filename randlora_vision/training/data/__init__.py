"""What is trained on: images with classes and images with captions, from any source."""
