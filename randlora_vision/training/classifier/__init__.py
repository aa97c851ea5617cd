"""Fine-tuning timm models as image classifiers."""
