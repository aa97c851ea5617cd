"""The training scripts, installed as `randlora_vision.train_scripts`."""
