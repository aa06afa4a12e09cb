"""The imports that training needs, done once and without garbage collection."""

import gc


def import_libraries(*, quantized: bool, per_example: bool) -> None:
    """Import the libraries of a training with the garbage collector switched off.

    What imports make stays, yet Python searches all of it for garbage again and again: a
    fifth of the time that they take, and a SuperNode pays it for every message.

    Args:
        quantized: Whether the base model needs bitsandbytes.
        per_example: Whether the training is DP-SGD, which does not need TRL.

    Raises:
        ModelError: bitsandbytes is needed and cannot be imported.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        if quantized:
            from fedllm.models.quantization import import_bitsandbytes

            import_bitsandbytes()
        if per_example:
            import fedllm.training.dp_sgd
        else:
            import fedllm.training.sft  # noqa: F401 - its imports are what is wanted
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
