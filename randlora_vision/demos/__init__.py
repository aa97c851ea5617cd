"""The models that the scripts use without arguments: small ones, pretrained on the digits of scikit-learn."""
