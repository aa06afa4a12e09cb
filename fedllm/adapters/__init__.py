"""What is trained and travels: an adapter's declaration, its PEFT model, its files.

Enters: the adapter's settings and a base model, or its layers' shapes. Leaves: an
`AdapterSpec`, an `AdaptedModel` whose values are set and read, PEFT folders. Only trained
values travel, under names that the kind declares; fixed factors come from the public seed, so
every process makes the same ones. A kind is a class in `kinds`, and nothing outside `kinds`
asks which one it has. Must not import Flower, `data` or `wire`; torch only inside functions.
"""

from fedllm.adapters.peft_model import (
    attach,
    get_trained,
    initial_arrays,
    set_trained,
)
from fedllm.adapters.resolve import adapter_spec

__all__ = ["adapter_spec", "attach", "get_trained", "initial_arrays", "set_trained"]
