"""What the scripts do without arguments: small models pretrained on scikit-learn's digits."""
