"""The models that the scripts use without arguments: small ones of digits, and a pipeline that draws emoji."""
