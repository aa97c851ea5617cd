"""Operations on whole adapters: saving, loading, reading PEFT's folders, and sums of adapters."""
