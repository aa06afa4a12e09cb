"""The imports that training needs, done once and without garbage collection."""

import gc


def import_libraries(*, quantized: bool, per_example: bool) -> None:
    """Import what training takes, without looking for garbage in between.

    What imports make stays. Python looks through all of it again and again all the same:
    a fifth of the time that they take, and a SuperNode pays it for every message.

    Raises:
        ModelError: bitsandbytes is wanted and broken.
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
            import fedllm.training.sft  # noqa: F401
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
